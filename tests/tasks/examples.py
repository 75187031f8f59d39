"""Literal tables for tests of stages: rows in, rows out, in a folder store."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from infra import tables
from infra.build import Build
from infra.cluster import ClusterParams, ThreadPool
from infra.folder import FolderStore
from infra.store import Store
from infra.tables import Table


def new_build(folder: Path, store: Store | None = None) -> Build:
    """A build over `folder/corpus` and `folder/store`; its thread is never started."""
    for name in ("corpus", "store"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pool = ThreadPool(ClusterParams(kind="threads", workers=1), ExitStack())
    corpus = FolderStore(str(folder / "corpus"))
    return Build(corpus, store or FolderStore(str(folder / "store")), pool)


def put(build: Build, name: str, columns: str, rows: Sequence[Sequence[Any]]) -> Table:
    """Write a table from tuples: put(build, "aligned", "image_id clip_score", [("a", 5)])."""
    return tables.write(
        build.store, name, [dict(zip(columns.split(), row, strict=True)) for row in rows]
    )


def put_vectors(build: Build, key: str, vectors: Mapping[str, Sequence[float]]) -> Table:
    """Write id -> vector; `key` is image_id or caption_id."""
    name = {"image_id": "vectors", "caption_id": "texts"}[key]
    if not vectors:
        return Table(name)
    matrix = np.array(list(vectors.values()), np.float16)
    return tables.write(build.store, name, tables.vector_rows(key, vectors, matrix))


def rows(build: Build, table: Table) -> list[dict[str, Any]]:
    return tables.read(build.store, table).to_pylist()


def tuples(build: Build, table: Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows(build, table)]


def angle(degrees: float) -> tuple[float, float]:
    """A vector of length 1 in the plane; the score of two of them follows from their angle."""
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the vectors as stored, in float64."""
    one, two = np.array(a, np.float16).astype(float), np.array(b, np.float16).astype(float)
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
