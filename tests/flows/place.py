"""A small corpus of real pictures with a store beside it, and what one does with them."""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from PIL import Image

from flows.absent import Remains, verify_absent
from flows.build import stages
from flows.config import load_config, open_build
from flows.forget import Options, forget
from infra import traces
from infra.store import Location, Store, open_store
from tests.corpora import tar
from tests.mllm_server import MllmServer

SAMPLE = Path(__file__).parents[2] / "sample"
CAPTIONS = "captions.csv"


def pictures() -> list[dict[str, str]]:
    with (SAMPLE / "bucket" / CAPTIONS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))[:36]


def fill(corpus: Path) -> None:
    """30 loose pictures with captions in a file, six in a tar, and copies of the first two."""
    rows = pictures()
    loose, packed = rows[:30], rows[30:]
    for row in loose:
        target = corpus / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / "bucket" / row["file_name"], target)
    first = corpus / loose[0]["file_name"]
    Image.open(first).convert("RGB").save(corpus / "copy.jpg", quality=90)
    shutil.copy(corpus / loose[1]["file_name"], corpus / "twin.png")
    (corpus / loose[2]["file_name"]).with_suffix(".txt").write_text("words beside it, and no more")
    members: list[tuple[str, bytes]] = []
    for number, row in enumerate(packed):
        kind = Path(row["file_name"]).suffix
        members.append((f"{number}{kind}", (SAMPLE / "bucket" / row["file_name"]).read_bytes()))
        members.append((f"{number}.txt", f"words of member {number}".encode()))
    (corpus / "packed.tar").write_bytes(tar(members))
    with (corpus / CAPTIONS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(loose)


class Place:
    """A corpus and a store in a folder of their own, and what one does with them."""

    server: MllmServer

    def __init__(self, folder: Path, **sections: Any):
        self.folder, self.corpus = folder, folder / "corpus"
        self.config_file = folder / "config.yaml"
        data = {
            "dataset": "few",
            "corpus": {"uri": str(self.corpus)},
            "store": {"uri": str(folder / "store")},
            "models": {
                "clip": {"library": "open_clip", "name": str(SAMPLE / "models/clip")},
                "dino": {"library": "timm", "name": str(SAMPLE / "models/dino")},
            },
            "spaces": {"dino": {"model": "dino"}, "clip_text": {"model": "clip", "of": "caption"}},
            "cluster": {"kind": "threads"},
            "publish": {"images": True},
            **sections,
        }
        self.where: dict[str, Any] = data["store"]  # type: ignore[assignment]
        self.config_file.write_text(yaml.safe_dump(data), "utf-8")

    @property
    def store(self) -> Store:
        return open_store(Location(**self.where))

    def build(self, **changes: Any) -> dict[str, Any]:
        config = load_config(self.config_file, [f"{k}={v}" for k, v in changes.items()])
        with open_build(config) as build:
            return stages(build, config)

    def forget(self, *names: str, prefix: str | None = None, **options: bool) -> list[str]:
        return list(forget(self.store, names, prefix, Options(**options)))

    def verify(self) -> list[str]:
        """Keys that still hold something."""
        found: list[str] = []
        try:
            for line in verify_absent(self.store):
                found += [line.split(": ")[0]] if "; " in line and ": " in line else []
        except Remains:
            return [key for key in found if "/" in key]
        return []

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text in the store with the key of what holds it."""
        for stat in self.store.list():
            data = self.store.get(stat.key)
            for text in traces.texts(stat.key, data) | {stat.key}:
                yield stat.key, text
            if not stat.key.endswith(".parquet"):
                yield stat.key, data.decode("utf-8", "replace")

    def holding(self, *needles: str) -> set[str]:
        """Keys of stored objects in which one of these strings occurs anywhere."""
        return {key for key, text in self.texts() if any(needle in text for needle in needles)}

    def fates(self, number: int) -> pl.DataFrame:
        return pl.read_parquet(self.folder / f"store/datasets/few/v{number:06d}/fates.parquet")

    def fates_of_latest(self) -> list[dict[str, Any]]:
        latest = json.loads(self.store.get("datasets/few/latest.json"))
        return self.fates(latest["version"]).to_dicts()

    def image(self, key: str, number: int = 1) -> str:
        rows = self.fates(number).filter((pl.col("level") == "object") & (pl.col("id") == key))
        return str(rows["image_id"][0] or rows["detail"][0])


def labels(url: str) -> dict[str, Any]:
    endpoint = {"url": url, "model": "test", "concurrency": 4, "backoff_s": 0.01}
    return {"labeller": "mllm", "endpoint": endpoint, "max_pixels": 4096}


@contextmanager
def opened(folder: Path, *, fresh: bool = False) -> Iterator[Place]:
    """A place whose labels come from a server that is there for as long."""
    if fresh:
        fill(folder / "corpus")
    with MllmServer() as server:
        place = Place(folder, labels=labels(server.url))
        place.server = server
        yield place
