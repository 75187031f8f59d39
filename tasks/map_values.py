"""Map values: a new column from another by a table, such as the domain of a source."""

import fnmatch
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class ValueMap(NamedTuple):
    """`to` is the value beside the first pattern (`*` and `?` allowed) that `column` fits.

    What fits none gets `other`; without one it is dropped as `unmapped`.
    """

    column: str
    to: str
    values: tuple[tuple[str, str], ...]
    other: str | None = None


class Mapped(NamedTuple):
    """Samples with the new column, and those whose value stands in no row of the table."""

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=list)
def map_values(build: Build, given: Table, params: ValueMap) -> Mapped:
    """Look each value up; a null fits no pattern."""
    rows = tables.frame(build.store, given)
    found = {value: _looked_up(value, params) for value in rows[params.column].unique()}
    new = pl.Series(params.to, [found[value] for value in rows[params.column]], pl.String)
    mapped = rows.drop(params.to, strict=False).with_columns(new)
    lost = mapped.filter(pl.col(params.to).is_null()).select("sample_id", params.column)
    gone = [{"id": name, "rule": "unmapped", "detail": value} for name, value in lost.iter_rows()]
    return Mapped(
        samples.write(build.store, mapped.drop_nulls(params.to)),
        samples.write_drops(build.store, samples.drops(gone, "map_values")),
    )


def _looked_up(value: str | None, params: ValueMap) -> str | None:
    fitting = (to for like, to in params.values if fnmatch.fnmatchcase(value or "", like))
    return params.other if value is None else next(fitting, params.other)
