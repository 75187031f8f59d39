"""Compare answers: by rule where both say a number, an option, or yes or no; else left to a judge.

Source: Bee's HoneyPipe (arXiv 2510.13795): factual answers match exactly, descriptions in meaning.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from operator import eq
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
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


@stage(version=1, reads={"given": tables.ALL})
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
    right, answer = _plain(expected), _plain(said or "")
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


class Number(NamedTuple):
    """A number and its unit, perhaps none."""

    value: Fraction
    unit: str


_LEAD = re.compile(
    r"^(?:so,? |therefore,? |thus,? )?(?:the )?(?:correct |final |right )?(?:answer|option|choice)"
    r"\b(?: is\b| ?[:=])? *",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"([$€£¥]?) ?([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?)"
    r"(?:/([0-9]{1,30}))? ?(%|[A-Za-z°µ]{1,12}[0-9]?|)\.?"
)
_OPTION = re.compile(r"\(?([A-Za-z])\)?|\(([A-Za-z])\) .*|([A-Z])[.):] .*", re.DOTALL)
_YES_NO = re.compile(r"(yes|no|true|false)[.!]?", re.IGNORECASE)
_YES_NO_FIRST = re.compile(r"(yes|no|true|false)(?:[,.;:!].*)?", re.IGNORECASE | re.DOTALL)
_SPELLED = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}


def _plain(text: str) -> str:
    """NFKC, one line, without what announces an answer and the marks around it."""
    folded = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u2212", "-")
    line = " ".join(folded.split()).strip("*_`\"' ")
    return _LEAD.sub("", line).strip("*_`\"' ")


def _number(text: str) -> Number | None:
    bare = text.rstrip(".").lower()
    if bare in _SPELLED:
        return Number(Fraction(_SPELLED[bare]), "")
    found = _NUMBER.fullmatch(text)
    if not found or (found[3] and not int(found[3])):
        return None
    value = Fraction(found[2].replace(",", "")) / int(found[3] or 1)
    percent = found[4] == "%"
    return Number(value / 100 if percent else value, "%" if percent else found[1] + found[4])


def _numbers_agree(right: Number, other: Number) -> bool | None:
    """Equal with equal units; a share may be said in per cent. Other units are for a judge."""
    if right.unit == other.unit:
        return right.value == other.value
    is_share = {right.unit, other.unit} == {"%", ""} and right.value == other.value
    return True if is_share else None


def _option(text: str) -> str | None:
    found = _OPTION.fullmatch(text.rstrip("."))
    letter = next((group for group in found.groups() if group), None) if found else None
    return letter.upper() if letter else None


def _yes_no(text: str, form: re.Pattern[str] = _YES_NO) -> bool | None:
    found = form.fullmatch(text)
    return found[1].lower() in ("yes", "true") if found else None


def _words(text: str) -> list[str]:
    """Words as they are written, signs inside them included; without articles."""
    words = (word.strip(".,;:!?\"'()") for word in text.casefold().split())
    return [word for word in words if word and word not in _ARTICLES]


# How the right answer is read, how the other one is, and when two agree.
_KINDS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., bool | None]]] = {
    "number": (_number, _number, _numbers_agree),
    "option": (_option, _option, eq),
    "yes_no": (_yes_no, partial(_yes_no, form=_YES_NO_FIRST), eq),
}
