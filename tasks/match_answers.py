"""Match answers: whether what was said of each sample is what was expected, as a column."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.short_answers import matches
from infra.tables import Table


class Matching(NamedTuple):
    """The columns that are compared, and the one that says whether they match."""

    said: str
    expected: str
    to: str
    containment: bool = True


class Matched(NamedTuple):
    """Samples with the new column, true or false."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=list)
def match_answers(build: Build, given: Table, params: Matching) -> Matched:
    """Compare row by row; see infra.short_answers for what counts as the same."""
    rows = tables.frame(build.store, given)
    pairs = rows.select(params.said, params.expected).iter_rows()
    found = [matches(said, expected, params.containment) for said, expected in pairs]
    column = pl.Series(params.to, found, pl.Boolean)
    return Matched(samples.write(build.store, rows.with_columns(column)))
