"""Keep quantile: the share of samples with the highest, or the lowest, value of a column."""

from typing import NamedTuple

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import by_share
from infra.tables import Table


class Quantile(NamedTuple):
    """Which share of the samples is kept by which column; with `per`, of each value of that one."""

    column: str
    keep: float
    highest: bool = True
    per: str | None = None


class Kept(NamedTuple):
    """The samples of the share, and the others with their value, as `beyond_quantile`."""

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=lambda params: list(params))
def keep_quantile(build: Build, given: Table, params: Quantile) -> Kept:
    """Keep the first of each group by value, then id. Of n samples the share is rounded up."""
    kept, gone = by_share(tables.frame(build.store, given), *params)
    return Kept(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(gone, "keep_quantile")),
    )
