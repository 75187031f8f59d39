"""Draw variants: each sample gets numbers drawn by hash, such as which wording it is asked by."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Draws(NamedTuple):
    """Columns to add, each with the column whose value is drawn for, and how many variants are."""

    columns: Mapping[str, str]
    of: int
    seed: int = 0


class Drawn(NamedTuple):
    """The samples, with a number from 0 in each new column."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=lambda p: [dict(p.columns), p.of, p.seed])
def draw_variants(build: Build, given: Table, params: Draws) -> Drawn:
    """Draw by a seeded hash, so that a sample's numbers don't depend on which others there are."""
    rows = tables.frame(build.store, given)
    added = [
        pl.Series(
            name, [drawn(f"{params.seed} {name} {key}", params.of) for key in rows[by]], pl.Int64
        )
        for name, by in params.columns.items()
    ]
    return Drawn(samples.write(build.store, rows.with_columns(added)))


def drawn(key: str, of: int) -> int:
    """A number below `of`, the same for the same key."""
    return int(hashlib.sha256(f"draw {key}".encode()).hexdigest()[:15], 16) % of
