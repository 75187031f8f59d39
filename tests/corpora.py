"""Corpora made on the spot, and what a build says of them, in words a test can compare."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import tables
from infra.build import Build
from infra.models import ModelParams
from infra.tables import Table
from tasks.describe import Described, DescribeParams, describe
from tasks.snapshot import CorpusParams, Snapshot, snapshot

Member = tuple[str, bytes] | tuple[tarfile.TarInfo, bytes]


def fill(build: Build, files: Mapping[str, bytes | str]) -> None:
    """Write files into the corpus of a build."""
    for key, data in files.items():
        build.corpus.put(key, data.encode() if isinstance(data, str) else data)


def touch(build: Build, key: str) -> None:
    """Give a file another time, so that it looks changed."""
    os.utime(Path(build.corpus.uri, key), ns=(1, 1))


def tar(members: Iterable[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar; a member is a name or a TarInfo, and its data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data.ljust(info.size, b"\0")))
    return file.getvalue()


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def parquet(columns: Mapping[str, Any], row_group_size: int | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file, row_group_size=row_group_size, **options)
    return file.getvalue()


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def listed(build: Build, **corpus: Any) -> Snapshot:
    return snapshot(build, CorpusParams(uri=build.corpus.uri, **corpus))


def described(
    build: Build,
    models: Mapping[str, ModelParams] | None = None,
    corpus: Mapping[str, Any] | None = None,
    **params: Any,
) -> Described:
    """Snapshot and describe, without models unless told otherwise."""
    settings = CorpusParams(uri=build.corpus.uri, **(corpus or {}))
    found = snapshot(build, settings)
    limits = DescribeParams(**{"device": "cpu", "min_side": 1, **params})
    return describe(build, found.listing, found.file_captions, settings, models or {}, limits)


def rows(build: Build, table: Table) -> list[dict[str, Any]]:
    return tables.read(build.store, table).to_pylist()


def name(row: Mapping[str, Any]) -> str:
    return row["key"] if row["member"] is None else f"{row['key']}::{row['member']}"


def fates(build: Build, seen: Described) -> dict[str, str]:
    """What describe says of each object: the rule that dropped it, or `image`."""
    dropped = {row["id"]: row["rule"] for row in rows(build, seen.drops)}
    return {
        name(row): row["rule"] or dropped.get(row["image_id"], "image")
        for row in rows(build, seen.objects)
    }


def details(build: Build, seen: Described) -> dict[str, str]:
    """The detail of each drop by object id or image id."""
    return {row["id"]: row["detail"] for row in rows(build, seen.drops)}


def captions(build: Build, seen: Described) -> dict[str, list[str]]:
    """The captions of each object that is an image."""
    return {name(row): row["captions"] for row in rows(build, seen.objects) if row["image_id"]}


def licences(build: Build, seen: Described) -> dict[str, str]:
    return {name(row): row["licence"] for row in rows(build, seen.objects)}
