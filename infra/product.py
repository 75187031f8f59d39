"""What a version is made of: its tables, and how records of its kind become files."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

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
    beside the Parquet ones, and the card.
    """

    images: Callable[[pl.DataFrame], Iterable[str | None]]
    files: Callable[[pl.DataFrame], Iterator[tuple[str, bytes]]]
    card: str
