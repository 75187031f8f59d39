"""Samples: what a recipe makes records of. A row has an id, an image, and the recipe's own columns.

Their columns differ from recipe to recipe, so a table of samples carries its own schema.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

import polars as pl
import pyarrow as pa
from pydantic import BaseModel

from infra import tables
from infra.canonical import digest, settings
from infra.schema import SCHEMAS
from infra.store import Store
from infra.tables import Table

SHARD_ROWS = 100_000
BASE = {"sample_id": pl.String, "image_id": pl.String}
TYPES: dict[Any, Any] = {
    str: pl.String,
    bool: pl.Boolean,
    int: pl.Int64,
    float: pl.Int64,  # in millionths: what is kept is hashed, and floats have no canonical form
    list[str]: pl.List(pl.String),
    list[int]: pl.List(pl.Int64),
}


def sample_id(image_id: str, content: Mapping[str, Any]) -> str:
    """The name of a sample: the digest of its image and of what was said of it."""
    return digest([image_id, settings(dict(content))])


def write(store: Store, frame: pl.DataFrame, name: str = "samples") -> Table:
    """Write samples sorted by id, their columns kept also where there are no rows."""
    arrow = frame.sort("sample_id").to_arrow(compat_level=pl.CompatLevel.oldest())
    return tables.write_published(store, name, arrow, SHARD_ROWS)


def columns_of(answer: type[BaseModel]) -> dict[str, Any]:
    """Column types of the fields of an answer; closed sets are text, what is nested is JSON."""
    return {name: _column(field.annotation) for name, field in answer.model_fields.items()}


def _column(kind: Any) -> Any:
    if kind in TYPES:
        return TYPES[kind]
    words = get_args(kind)
    if words and all(isinstance(word, str) for word in words):
        return pl.String
    if get_origin(kind) is list and words and words[0] in TYPES:
        return pl.List(TYPES[words[0]])
    return pl.String


def drops(rows: Iterable[Mapping[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Drop rows of samples from (id, rule, value or detail)."""
    return [
        {"level": "sample", "stage": stage, "value": None, "detail": None, **row} for row in rows
    ]


def write_drops(store: Store, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Write drops, sorted by id."""
    ordered = sorted(rows, key=lambda row: (row["level"], row["id"]))
    return tables.write(store, "drops", pa.Table.from_pylist(ordered, schema=SCHEMAS["drops"]))
