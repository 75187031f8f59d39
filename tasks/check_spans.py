"""Check spans: what should be a quotation stands in one of the texts that it is from."""

import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

AROUND = " \t.,;:!?\"'`()[]{}\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"


class Spans(NamedTuple):
    """The column that is quoted, and those that it may be quoted from, in their order."""

    span: str
    texts: tuple[str, ...]


class Checked(NamedTuple):
    """Samples with `span_of`, the first column in which the span stands; drops `not_a_span`."""

    samples: Table
    drops: Table


@stage(
    version=1, reads={"given": tables.ALL}, meaning=lambda params: [params.span, list(params.texts)]
)
def check_spans(build: Build, given: Table, params: Spans) -> Checked:
    """Drop samples whose span is in none of the texts.

    Compared in NFKC without case, with blanks and line breaks as one, and without the marks around
    the span. It must not begin or end within a word, save in scripts that write none apart.
    """
    rows = tables.frame(build.store, given)
    sources = [source(row, params) for row in rows.iter_rows(named=True)]
    judged = rows.with_columns(pl.Series("span_of", sources, pl.String))
    lost = judged.filter(pl.col("span_of").is_null())
    gone = [
        {"id": name, "rule": "not_a_span", "detail": (span or "")[:200]}
        for name, span in lost.select("sample_id", params.span).iter_rows()
    ]
    return Checked(
        samples.write(build.store, judged.filter(pl.col("span_of").is_not_null())),
        samples.write_drops(build.store, samples.drops(gone, "check_spans")),
    )


def source(row: Mapping[str, Any], params: Spans) -> str | None:
    """The first column that holds the span of a row."""
    span = plain(row[params.span] or "").strip(AROUND)
    held = (name for name in params.texts if row[name] and holds(plain(row[name]), span))
    return next(held, None)


def plain(text: str) -> str:
    """A text as spans are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def holds(text: str, span: str) -> bool:
    """Whether a span, in which there is a letter or digit, stands in a text at edges of words."""
    at = text.find(span) if any(map(str.isalnum, span)) else -1
    while at >= 0:
        end = at + len(span)
        if not _within(text[at - 1 : at + 1]) and not _within(text[end - 1 : end + 1]):
            return True
        at = text.find(span, at + 1)
    return False


def _within(two: str) -> bool:
    """Whether there is no edge between two characters: letters with case, marks, and digits."""
    return len(two) == 2 and all(unicodedata.category(c) in _WORD for c in two)


_WORD = {"Lu", "Ll", "Lt", "Lm", "Mn", "Mc", "Nd"}
