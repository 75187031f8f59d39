"""Files of a model: where they lie, what tells one state of them from another, and a local copy."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from infra.canonical import digest
from infra.errors import ConfigError
from infra.store import Location, Stat, Store, open_store

SUFFIXES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model", ".jinja")


def stamps(place: str) -> list[tuple[str, int, str]]:
    """Name, size and time of a model's files in a folder or bucket, to notice a replaced one."""
    path = Path(place)
    if place.startswith("s3://"):
        return [(stat.key, stat.size, stat.etag) for stat in stored(place)]
    if not path.exists():
        return []
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in inside if file.is_file()]
    return [(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]


def stored(uri: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Stat]:
    """Model files in a folder of a bucket, or the one file that `uri` names."""
    folder, _, name = uri.rpartition("/") if uri.endswith(suffixes) else (uri, "", "")
    return [
        stat
        for stat in open_store(Location(uri=folder)).list(name)
        if "/" not in stat.key and stat.key.endswith(suffixes)
    ]


def download(uri: str, only: str | None = None, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """A folder of model files from a bucket, in the user's cache, whole or not at all."""
    store = open_store(Location(uri=uri))
    stats = [stat for stat in stored(uri, suffixes) if only in (None, stat.key)]
    if not stats:
        raise ConfigError(f"models: {uri} holds no model files; name the folder with the weights")
    name = digest([uri, [[s.key, s.etag, s.size] for s in stats]])[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pairmill" / "models"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            _fetch(store, [s.key for s in stats], Path(part) / name)
            try:
                (Path(part) / name).rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def _fetch(store: Store, keys: Sequence[str], folder: Path) -> None:
    folder.mkdir()
    for key in keys:
        size = store.head(key).size
        with (folder / Path(key).name).open("wb") as file:
            for start in range(0, size, 16 << 20):
                file.write(store.get(key, start, min(16 << 20, size - start)))
