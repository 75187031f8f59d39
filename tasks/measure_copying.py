"""Measure copying: which share of a text's word n-grams stands in another text already."""

import re
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

PARTS = 1_000_000


class Copying(NamedTuple):
    """The column of the text, that of what it may copy from, and the length of n-grams in words."""

    text: str
    source: str
    n: int = 5


class Measured(NamedTuple):
    """The samples with `<text>_copied`, in millionths, and `<text>_words`."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=lambda params: list(params))
def measure_copying(build: Build, given: Table, params: Copying) -> Measured:
    """Measure every sample. A text without n-grams, or without a source, copies nothing."""
    rows = tables.frame(build.store, given)
    pairs = list(rows.select(params.text, params.source).iter_rows())
    copied = [copy_rate(text or "", source or "", params.n) for text, source in pairs]
    counts = [len(words(text or "")) for text, _ in pairs]
    return Measured(
        samples.write(
            build.store,
            rows.with_columns(
                pl.Series(f"{params.text}_copied", copied, pl.Int64),
                pl.Series(f"{params.text}_words", counts, pl.Int64),
            ),
        )
    )


def copy_rate(text: str, source: str, n: int) -> int:
    """Share of the distinct n-grams of words of `text` that `source` has too, in millionths."""
    mine, theirs = _grams(text, n), _grams(source, n)
    return PARTS * len(mine & theirs) // len(mine) if mine else 0


def words(text: str) -> list[str]:
    """Words without case or punctuation."""
    return re.findall(r"\w+", text.casefold())


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + n]) for at in range(len(found) - n + 1)}
