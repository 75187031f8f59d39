"""What a version is made of: its tables, and how records of its kind become files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl

from infra.tables import Table


class Contents(NamedTuple):
    """The tables that a version is made of."""

    records: Table
    fates: Table
    images: Table
    eligible: Table
    captions: Table
    objects: Table


class Product(NamedTuple):
    """What kind of records a version holds: which images they name, the files that trainers read
    beside the Parquet ones, the card, and what the tars say of an image beside its own facts; by
    a `split` among these, tars are of one split each.
    """

    images: Callable[[pl.DataFrame], Iterable[str | None]]
    files: Callable[[pl.DataFrame], Iterator[tuple[str, bytes]]]
    card: str
    told: Callable[[pl.DataFrame], Mapping[str, Mapping[str, Any]]] = lambda rows: {}
