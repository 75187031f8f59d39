"""Snapshot: list the corpus, tell images from captions from the rest, read the caption files."""

import posixpath
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from infra import captions, corpus, tables, tombstones
from infra.build import Build
from infra.canonical import digest
from infra.captions import Columns
from infra.cluster import Crash
from infra.corpus import SIDECAR_TYPES, extension, is_image_name
from infra.errors import ConfigError, PairmillError
from infra.store import Location, NotFound, Stat, Store
from infra.tables import Table
from infra.tombstones import Tombstones

VERSION = 3
MAX_KEY = 4_096
STEADY_ATTEMPTS = 3  # readings of a caption file that somebody writes
RACY_SECONDS = 2.0


class CorpusParams(Location):
    """The bucket of images and how its captions are found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    captions: list[str] = Field(
        [],
        description="Keys of caption files (CSV, JSONL, Parquet). Empty: files named captions.* "
        "or metadata.*, and .txt or .json sidecars beside the images.",
    )
    key_column: str = Field("", description="Column that names the image; empty: file_name.")
    caption_column: str = Field("", description="Column with the caption; empty: caption, text.")
    licence_column: str = Field("", description="Column with the licence; empty: licence.")
    licence: str = Field("unknown", description="Licence of images that state none themselves.")
    max_caption_chars: int = Field(
        4_096, ge=1, le=100_000, description="Longer captions are not used, and that is counted."
    )
    check: Literal["stat", "digest"] = Field(
        "stat",
        description="How changed bytes under an old name are noticed. stat: by ETag, size and time "
        "on S3, by inode, size and time in a folder; digest: every file is read and hashed.",
    )


class Snapshot(NamedTuple):
    """What was listed: images and containers, captions of caption files, and the rest.

    `facts` counts rows of caption files that are not used: of no file in the corpus, or refused.
    """

    listing: Table
    file_captions: Table
    drops: Table
    facts: Table


def snapshot(build: Build, params: CorpusParams) -> Snapshot:
    """List the corpus. Reads no image; caption files are read again only when they changed.

    Forgotten objects whose bytes are known are left out of the listing, under a keyed hash among
    the drops. Raises ConfigError for a configured caption file that is not there or lacks its
    columns.
    """
    gone = tombstones.load(build.store)
    stats = {stat.key: stat for stat in build.corpus.list()}
    build.progress("snapshot", len(stats), len(stats))
    wanted = set(params.captions) or {key for key in stats if captions.is_caption_file(key)}
    missing = sorted(wanted - stats.keys())
    if missing:
        raise ConfigError(f"corpus.captions names {missing[0]!r}, which the corpus does not hold")
    stamps = _stamps(build, stats, params.check)
    listing, rest = [], []
    for key in stats.keys() - wanted:
        kind, rule = _classify(key, stats)
        if kind:
            listing.append(_listed(stats[key], kind, stamps))
        else:
            rest.append((key, rule))
    listing, hidden = _hide(sorted(listing, key=lambda row: row["key"]), gone)
    rows, drops, unused = _captions(build, params, stats, wanted, _Names(gone, listing))
    beside = {sidecar for row in listing for sidecar in row["sidecars"]}
    for key, rule in sorted(rest):
        is_gone = key not in beside and bool(gone) and gone.keyed(key) in gone.names
        hidden += [_gone(gone.keyed(key))] if is_gone else []
        drops += [] if is_gone else [_drop(key, "metadata" if key in beside else rule)]
    return Snapshot(
        tables.write(build.store, "listing", listing),
        tables.write(build.store, "file_captions", rows),
        tables.write(build.store, "drops", drops + hidden),
        tables.write(build.store, "facts", [{"name": n, "value": c} for n, c in unused.items()]),
    )


def _stamps(build: Build, stats: Mapping[str, Stat], check: str) -> dict[str, str]:
    """What tells the bytes of each file from others that were or will be under its name."""
    if check == "digest":
        return _digests(build, sorted(stats))
    if build.corpus.uri.startswith("s3://"):
        return {k: f"{s.etag};{s.size};{int(s.mtime)}" for k, s in stats.items()}
    # Where times have whole seconds, a second write within the second would not show: such a
    # file gets a stamp of its own, and is read once more by the next build.
    now, once = time.time(), f"?{time.time_ns()}"
    return {
        key: stat.etag
        + (once if stat.mtime.is_integer() and now - stat.mtime < RACY_SECONDS else "")
        for key, stat in stats.items()
    }


def _digests(build: Build, keys: list[str]) -> dict[str, str]:
    """SHA-256 of every file, read by the pool."""
    shards = [tuple(keys[at : at + 200]) for at in range(0, len(keys), 200)]
    found: dict[str, str] = {}
    for _, result in build.pool.map(partial(corpus.digests, build.corpus), shards):
        if isinstance(result, Crash):
            raise PairmillError(f"hashing files ended its worker: {result.reason}; run again")
        found |= result
        build.progress("hash files", len(found), len(keys))
    return found


def _hide(
    listing: list[dict[str, Any]], gone: Tombstones
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that stay, and drops for those that are known to be forgotten."""
    if not gone:
        return listing, []
    kept, hidden = [], []
    for row in listing:
        place = gone.place(row["key"], None, row["stamp"])
        if place not in gone.objects:
            kept.append(row)
            continue
        hidden.append(_gone(gone.keyed(row["key"])))
        if image := gone.objects[place]:
            hidden.append(_gone(image, "image"))
    return kept, hidden


class _Names:
    """Tells rows of caption files that belong to something forgotten."""

    def __init__(self, gone: Tombstones, listing: list[dict[str, Any]]):
        self.gone = gone
        self.hashes = {row["key"]: gone.keyed(row["key"]) for row in listing} if gone else {}
        # Names that were forgotten, and stand for other bytes now.
        self.innocent = sorted(gone.names.intersection(self.hashes.values()))

    @property
    def digest(self) -> list[str]:
        return [digest(sorted(self.gone.names)), *self.innocent] if self.gone.names else []

    def hides(self, key: str, caption_file: str) -> bool:
        if not self.gone.names:
            return False
        near = posixpath.normpath(posixpath.join(posixpath.dirname(caption_file), key))
        if near in self.hashes:
            return False
        names = {near} if key in self.hashes else {near, key}
        return any(self.gone.keyed(name) in self.gone.names for name in names)


def _captions(
    build: Build,
    params: CorpusParams,
    stats: dict[str, Stat],
    files: set[str],
    names: _Names,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Rows of all caption files, a drop for each file, and how many captions are not used."""
    rows: list[dict[str, Any]] = []
    drops, unused = [], Counter[str]()
    for key in sorted(files):
        found, refused = _caption_file(build, stats[key], params, names)
        resolved = list(_resolve(found, key, stats))
        rows += resolved
        unused.update(refused, caption_of_no_file=len(found) - len(resolved))
        drops.append(_drop(key, "metadata" if found else "ignored"))
    return rows, drops, unused


def _classify(key: str, stats: dict[str, Stat]) -> tuple[str | None, str]:
    """Kind of source (loose, tar, parquet), or None and the fate of a file that is none."""
    kind = extension(key)
    stem = key.removesuffix(kind)
    if kind == ".tar":
        return "tar", ""
    if is_image_name(key) or (not kind and not key.endswith("/")):
        return "loose", ""
    if f"{stem.removesuffix('_stats')}.tar" in stats and kind in (".parquet", ".json"):
        return None, "metadata"
    if kind == ".parquet":
        return "parquet", ""
    return None, "ignored"


def _listed(stat: Stat, kind: str, stamps: Mapping[str, str]) -> dict[str, Any]:
    stem = posixpath.splitext(stat.key)[0]
    beside = [stem + t for t in SIDECAR_TYPES if kind == "loose" and stem + t in stamps]
    stamp = "+".join(stamps[key] for key in (stat.key, *beside))
    return {
        "key": stat.key,
        "kind": kind,
        "stamp": stamp,
        "size": stat.size,
        "sidecars": beside,
    }


def _caption_file(
    build: Build, stat: Stat, params: CorpusParams, names: _Names
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows (key, caption, licence) of one caption file, and how many captions were refused."""
    wanted = Columns(params.key_column, params.caption_column, params.licence_column or None)

    def key_of(stat: Stat) -> str:
        shown = [VERSION, stat.key, stat.etag, stat.size, list(wanted), params.max_caption_chars]
        return digest([*shown, *names.digest])

    key = key_of(stat)
    record = build.ledger.find("snapshot", "caption_files", key)
    if record is None:
        data, stat = _steady(build.corpus, stat)
        key = key_of(stat)
        refused = Counter[str]()
        rows = list(_rows(stat.key, data, wanted, params.max_caption_chars, refused))
        if not rows and (params.captions or params.caption_column):
            raise ConfigError(
                f"caption file {stat.key} has no rows with columns "
                f"{wanted.key or 'file_name'!r} and {wanted.caption or 'caption'!r}; "
                "set corpus.key_column and corpus.caption_column"
            )
        shown_rows = [row for row in rows if not names.hides(row["key"], stat.key)]
        refused.update(caption_forgotten=len(rows) - len(shown_rows))
        table = tables.write(build.store, "file_captions", shown_rows)
        record = {"tables": {"rows": table.to_json()}, "refused": dict(refused)}
        build.ledger.write("snapshot", "caption_files", key, record)
    found = tables.read(build.store, Table.from_json(record["tables"]["rows"])).to_pylist()
    return found, record["refused"]


def _steady(store: Store, stat: Stat) -> tuple[bytes, Stat]:
    """A file read while nobody wrote it, and its facts then, which may not be those listed.

    Raises PairmillError where it has gone or keeps changing.
    """
    for _ in range(STEADY_ATTEMPTS):
        try:
            data, now = store.get(stat.key), store.head(stat.key)
        except NotFound as error:
            raise PairmillError(
                f"caption file {stat.key} was removed while the corpus was listed; run again"
            ) from error
        if now.etag == stat.etag:
            return data, now
        stat = now
    raise PairmillError(
        f"caption file {stat.key} keeps changing while it is read; run again when it is written"
    )


def _rows(
    key: str, data: bytes, wanted: Columns, max_chars: int, refused: Counter[str]
) -> Iterator[dict[str, Any]]:
    """One row a caption; a picture with a licence and no usable caption has a row as well."""
    for row in captions.read_rows(key, data):
        columns = captions.choose_columns(tuple(row), wanted)
        image = row[columns.key] if columns else None
        if columns is None or not isinstance(image, str) or len(image) > MAX_KEY:
            continue
        text = captions.from_row(row, columns, max_chars)
        refused.update([text.refused] if text.refused else [])
        for caption in text.captions or ("",):
            yield {"key": captions.encodable(image), "caption": caption, "licence": text.licence}


def _resolve(
    rows: list[dict[str, Any]], caption_file: str, stats: dict[str, Stat]
) -> Iterator[dict[str, Any]]:
    """Rows under the key they mean: beside the caption file, else from the root of the corpus."""
    folder = posixpath.dirname(caption_file)
    for row in rows:
        near = posixpath.normpath(posixpath.join(folder, row["key"]))
        key = near if near in stats else row["key"]
        if key in stats:
            yield row | {"key": key}


def _gone(name: str, level: str = "object") -> dict[str, Any]:
    return {"level": level, "id": name, "stage": "forget", "rule": "forgotten"}


def _drop(key: str, rule: str) -> dict[str, Any]:
    return {"level": "object", "id": key, "stage": "snapshot", "rule": rule}
