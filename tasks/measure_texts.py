"""Measure texts: how long each is, and how much of it repeats itself."""

import re
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class TextMeasures(NamedTuple):
    """Columns to measure, and of how many words a gram is."""

    columns: tuple[str, ...]
    gram: int = 3


class TextsMeasured(NamedTuple):
    """Samples with `<column>_words` and `<column>_repetition`, the latter in millionths."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=list)
def measure_texts(build: Build, given: Table, params: TextMeasures) -> TextsMeasured:
    """Add the measures of each column; those of a null are null."""
    rows = tables.frame(build.store, given)
    for column in params.columns:
        told = [(None, None) if text is None else _measured(text, params) for text in rows[column]]
        rows = rows.with_columns(
            pl.Series(f"{column}_words", [words for words, _ in told], pl.Int64),
            pl.Series(f"{column}_repetition", [share for _, share in told], pl.Int64),
        )
    return TextsMeasured(samples.write(build.store, rows))


def _measured(text: str, params: TextMeasures) -> tuple[int, int]:
    words = re.findall(r"\w+", text.casefold())
    return len(words), repetition(words, params.gram)


def repetition(words: list[str], gram: int) -> int:
    """Share of the n-grams of words that stood in the text before, in millionths, rounded down.

    0 for a text without two n-grams. Of the family of Rae et al. 2021 (arXiv 2112.11446, A1.1).
    """
    grams = [tuple(words[at : at + gram]) for at in range(len(words) - gram + 1)]
    return 1_000_000 * (len(grams) - len(set(grams))) // max(1, len(grams))
