"""Compare answers: by rule where both say a number, an option, or yes or no; else left to a judge.

Source: Bee's HoneyPipe (arXiv 2510.13795): factual answers match exactly, descriptions in meaning.
"""

from collections.abc import Callable, Mapping
from functools import partial
from operator import eq
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.short_answers import ARTICLES, YES_NO_FIRST, Number, number, option, stated, yes_no
from infra.tables import Table


class AnswerComparison(BaseModel):
    """What counts as a short fact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fact_words: int = Field(
        8,
        ge=0,
        description="An answer of at most so many words is a fact, a longer one a description. Not"
        " given in the source; our own default, the longest answers of VQA being phrases.",
    )
    expected: str = Field("response", description="The column of the answers that are right.")
    given: str = Field("conclusion", description="The column of the answers to be compared.")


class Compared(NamedTuple):
    """Samples with `answer_type` (number, option, yes_no, fact or description) of the right answer,
    and `agrees`: null where no rule decides.
    """

    samples: Table


@stage(version=2, reads={"given": tables.ALL})
def compare_answers(build: Build, given: Table, params: AnswerComparison) -> Compared:
    """Compare each row. No answer agrees with nothing."""
    rows = tables.frame(build.store, given)
    pairs = rows.select(params.expected, params.given).iter_rows()
    found = [compared(expected, said, params.fact_words) for expected, said in pairs]
    return Compared(
        samples.write(
            build.store,
            rows.with_columns(
                pl.Series("answer_type", [kind for kind, _ in found], pl.String),
                pl.Series("agrees", [agrees for _, agrees in found], pl.Boolean),
            ),
        )
    )


def compared(expected: str, said: str | None, fact_words: int) -> tuple[str, bool | None]:
    """The type of the right answer, and whether the other one agrees; None: no rule decides."""
    right, answer = stated(expected), stated(said or "")
    kind, agrees = _by_form(right, answer)
    if kind is None:
        kind = "fact" if len(right.split()) <= fact_words else "description"
        agrees = True if _words(right) == _words(answer) else None
    return kind, agrees if answer else False


def _by_form(right: str, answer: str) -> tuple[str | None, bool | None]:
    """The closed form of the right answer, if it has one, and whether the other agrees in it."""
    for kind, (expects, reads, agree) in _KINDS.items():
        if (value := expects(right)) is not None:
            other = reads(answer)
            return kind, None if other is None else agree(value, other)
    return None, None


def _numbers_agree(right: Number, other: Number) -> bool | None:
    """Equal with equal units; a share may be said in per cent. Other units are for a judge."""
    if right.unit == other.unit:
        return right.value == other.value
    is_share = {right.unit, other.unit} == {"%", ""} and right.value == other.value
    return True if is_share else None


def _words(text: str) -> list[str]:
    """Words as they are written, signs inside them included; without articles."""
    words = (word.strip(".,;:!?\"'()") for word in text.casefold().split())
    return [word for word in words if word and word not in ARTICLES]


# How the right answer is read, how the other one is, and when two agree.
_KINDS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., bool | None]]] = {
    "number": (number, number, _numbers_agree),
    "option": (option, option, eq),
    "yes_no": (yes_no, partial(yes_no, form=YES_NO_FIRST), eq),
}
