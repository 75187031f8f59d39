"""Match answers: whether a short answer says what is expected, by rule alone."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.short_answers import matches
from infra.tables import Table


class Matching(NamedTuple):
    """Whether one answer may contain the other's words, and the columns of both."""

    containment: bool
    expected: str = "answer"
    given: str = "said"


class Matched(NamedTuple):
    """Samples with `right`; no answer is never right."""

    samples: Table


@stage(version=2, reads={"given": tables.ALL})
def match_answers(build: Build, given: Table, params: Matching) -> Matched:
    """Match each row."""
    rows = tables.frame(build.store, given)
    pairs = rows.select(params.given, params.expected).iter_rows()
    right = [matches(said, expected, params.containment) for said, expected in pairs]
    return Matched(
        samples.write(build.store, rows.with_columns(pl.Series("right", right, pl.Boolean)))
    )
