"""Snapshot: list the corpus, tell images from captions from the rest, read the caption files."""

import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field

from infra import captions, tables
from infra.build import Build
from infra.canonical import digest
from infra.captions import Columns
from infra.corpus import SIDECAR_TYPES, extension, is_image_name
from infra.errors import ConfigError
from infra.store import Location, Stat
from infra.tables import Table

VERSION = 2
MAX_KEY = 4_096


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

    Raises ConfigError for a configured caption file that is not there or lacks its columns.
    """
    stats = {stat.key: stat for stat in build.corpus.list()}
    build.progress("snapshot", len(stats), len(stats))
    wanted = set(params.captions) or {key for key in stats if captions.is_caption_file(key)}
    missing = sorted(wanted - stats.keys())
    if missing:
        raise ConfigError(f"corpus.captions names {missing[0]!r}, which the corpus does not hold")
    rows: list[dict[str, Any]] = []
    listing, drops, rest, unused = [], [], [], Counter[str]()
    for key in sorted(wanted):
        found, refused = _caption_file(build, stats[key], params)
        resolved = list(_resolve(found, key, stats))
        rows += resolved
        unused.update(refused, caption_of_no_file=len(found) - len(resolved))
        drops.append(_drop(key, "metadata" if found else "ignored"))
    for stat in stats.values():
        if stat.key in wanted:
            continue
        kind, rule = _classify(stat.key, stats)
        if kind:
            listing.append(_listed(stat, kind, stats))
        else:
            rest.append((stat.key, rule))
    beside = {sidecar for row in listing for sidecar in row["sidecars"]}
    drops += [_drop(key, "metadata" if key in beside else rule) for key, rule in rest]
    return Snapshot(
        tables.write(build.store, "listing", listing),
        tables.write(build.store, "file_captions", rows),
        tables.write(build.store, "drops", drops),
        tables.write(build.store, "facts", [{"name": n, "value": c} for n, c in unused.items()]),
    )


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


def _listed(stat: Stat, kind: str, stats: dict[str, Stat]) -> dict[str, Any]:
    stem = posixpath.splitext(stat.key)[0]
    beside = [stem + t for t in SIDECAR_TYPES if kind == "loose" and stem + t in stats]
    stamp = "+".join([stat.etag, *(stats[key].etag for key in beside)])
    return {
        "key": stat.key,
        "kind": kind,
        "stamp": stamp,
        "size": stat.size,
        "sidecars": beside,
    }


def _caption_file(
    build: Build, stat: Stat, params: CorpusParams
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows (key, caption, licence) of one caption file, and how many captions were refused."""
    wanted = Columns(params.key_column, params.caption_column, params.licence_column or None)
    key = digest([VERSION, stat.key, stat.etag, stat.size, list(wanted), params.max_caption_chars])
    record = build.ledger.find("snapshot", "caption_files", key)
    if record is None:
        data = build.corpus.get(stat.key)
        refused = Counter[str]()
        rows = list(_rows(stat.key, data, wanted, params.max_caption_chars, refused))
        if not rows and (params.captions or params.caption_column):
            raise ConfigError(
                f"caption file {stat.key} has no rows with columns "
                f"{wanted.key or 'file_name'!r} and {wanted.caption or 'caption'!r}; "
                "set corpus.key_column and corpus.caption_column"
            )
        table = tables.write(build.store, "file_captions", rows)
        record = {"tables": {"rows": table.to_json()}, "refused": dict(refused)}
        build.ledger.write("snapshot", "caption_files", key, record)
    found = tables.read(build.store, Table.from_json(record["tables"]["rows"])).to_pylist()
    return found, record["refused"]


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


def _drop(key: str, rule: str) -> dict[str, Any]:
    return {"level": "object", "id": key, "stage": "snapshot", "rule": rule}
