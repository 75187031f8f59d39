"""Route samples: those with some values of a column go one way, the others another."""

from typing import Any, NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Route(NamedTuple):
    """The values of `column` that are taken; None among them takes nulls."""

    column: str
    values: tuple[Any, ...]


class Routed(NamedTuple):
    """Samples that were taken, and the others. Nothing is lost: the drops are empty."""

    samples: Table
    others: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=list)
def route_samples(build: Build, given: Table, params: Route) -> Routed:
    """Part the samples in two."""
    rows = tables.frame(build.store, given)
    column = pl.col(params.column)
    is_taken = column.is_null() & (None in params.values)
    for value in (value for value in params.values if value is not None):
        is_taken = is_taken | (column == value).fill_null(False)
    return Routed(
        samples.write(build.store, rows.filter(is_taken)),
        samples.write(build.store, rows.filter(~is_taken)),
        samples.write_drops(build.store, []),
    )
