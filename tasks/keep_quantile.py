"""Keep quantile: the share of samples with the highest, or the lowest, value of a column."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

PARTS = 1_000_000


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
    """Keep the first of each group by value, then id, so that it is a function of the set.

    Of n samples the share is rounded up. A null is behind all values.
    """
    rows = tables.frame(build.store, given)
    order = rows.sort(params.column, "sample_id", descending=[params.highest, False],
                      nulls_last=True)  # fmt: skip
    share = round(params.keep * PARTS)
    place, count = pl.int_range(pl.len()), pl.len()
    if params.per:
        place, count = place.over(params.per), count.over(params.per)
    # place < ceil(n * share), without a float.
    ranked = order.with_columns((place * PARTS < count.cast(pl.Int64) * share).alias("_kept"))
    lost = ranked.filter(~pl.col("_kept"))
    gone = [
        {"id": name, "rule": "beyond_quantile", "value": value}
        for name, value in lost.select("sample_id", params.column).iter_rows()
    ]
    return Kept(
        samples.write(build.store, ranked.filter(pl.col("_kept")).drop("_kept")),
        samples.write_drops(build.store, samples.drops(gone, "keep_quantile")),
    )
