"""Compose texts: new columns out of others by templates, such as a response with its thoughts."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Composition(NamedTuple):
    """Column -> template with the names of columns in braces; columns that are left out after."""

    texts: Mapping[str, str]
    leaves_out: tuple[str, ...] = ()


class Composed(NamedTuple):
    """Samples with the composed columns."""

    samples: Table


def meaning(params: Composition) -> list[object]:
    return [dict(params.texts), list(params.leaves_out)]


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def compose_texts(build: Build, given: Table, params: Composition) -> Composed:
    """Fill every template from the row as it came, so that columns can be renamed and replaced.

    A text is null where a column that its template names is.
    """
    rows = tables.frame(build.store, given)
    new = [
        pl.Series(name, [_filled(template, row) for row in rows.iter_rows(named=True)], pl.String)
        for name, template in params.texts.items()
    ]
    composed = rows.drop(*params.leaves_out, strict=False).with_columns(new)
    return Composed(samples.write(build.store, composed))


class _Row(dict[str, object]):
    """A row that remembers whether a null was asked for."""

    null = False

    def __getitem__(self, name: str) -> object:
        value = super().__getitem__(name)
        self.null |= value is None
        return value


def _filled(template: str, row: Mapping[str, object]) -> str | None:
    noted = _Row(row)
    text = template.format_map(noted)
    return None if noted.null else text
