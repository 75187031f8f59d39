"""Name origins: whether a text came with a sample, or has yet to be made by a model."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Origins(NamedTuple):
    """By column of texts, what `<column>_origin` says where there is one, and where there is none.

    A column that is not there is one without texts.
    """

    columns: Mapping[str, tuple[str, str]]


class Named(NamedTuple):
    """The samples with the origins; texts of nothing but blanks are null."""

    samples: Table


def meaning(params: Origins) -> dict[str, list[str]]:
    return {column: list(names) for column, names in sorted(params.columns.items())}


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def name_origins(build: Build, given: Table, params: Origins) -> Named:
    """Say of each text where it is from, so that no text of a model is taken for a person's."""
    rows = tables.frame(build.store, given)
    for column, (given_by, otherwise) in params.columns.items():
        text = pl.col(column) if column in rows.columns else pl.lit(None, pl.String)
        said = text.str.strip_chars().replace("", None)
        origin = pl.when(said.is_null()).then(pl.lit(otherwise)).otherwise(pl.lit(given_by))
        rows = rows.with_columns(said.alias(column), origin.alias(f"{column}_origin"))
    return Named(samples.write(build.store, rows))
