"""Short answers: how they are read, and whether two say the same. Numbers are exact."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

ARTICLES = frozenset(("a", "an", "the"))
SPELLED = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
LEAD = re.compile(
    r"^(?:so,? |therefore,? |thus,? )?(?:the )?(?:correct |final |right )?(?:answer|option|choice)"
    r"\b(?: is\b:?| ?[:=]| (?=\S)) *",
    re.IGNORECASE,
)
DIGITS = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,30})(?:\.[0-9]{1,30})?"
NUMBER = re.compile(
    rf"([$€£¥]?) ?({DIGITS})(?:/([0-9]{{1,30}}))? ?(%|[A-Za-z°µ]{{1,12}}[0-9]?|)\.?"
)
WORD = re.compile(rf"[$€£¥]?{DIGITS}%?|[^\W_]+(?:['\u2019][^\W_]+)?")
OPTION = re.compile(r"\(?([A-Za-z])[):]?|\(([A-Za-z])\) .*|([A-Z])[.):] .*|([a-z])\) .*", re.DOTALL)
YES_NO = re.compile(r"(yes|no|true|false)[.!]?", re.IGNORECASE)
YES_NO_FIRST = re.compile(r"(yes|no|true|false)(?:[,.;:!].*)?", re.IGNORECASE | re.DOTALL)


class Number(NamedTuple):
    """A number and its unit, perhaps none; per cent are hundredths."""

    value: Fraction
    unit: str


def stated(text: str) -> str:
    """NFKC, one line, without what announces an answer and the marks around it."""
    folded = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u2212", "-")
    line = " ".join(folded.split()).strip("*_`\"' ")
    return LEAD.sub("", line).strip("*_`\"' ")


def number(text: str) -> Number | None:
    """The number that a stated answer is, in digits or spelled."""
    bare = text.rstrip(".").lower()
    if bare in SPELLED:
        return Number(Fraction(SPELLED[bare]), "")
    found = NUMBER.fullmatch(text)
    if not found or (found[3] and not int(found[3])):
        return None
    value = Fraction(found[2].replace(",", "")) / int(found[3] or 1)
    percent = found[4] == "%"
    return Number(value / 100 if percent else value, "%" if percent else found[1] + found[4])


def option(text: str) -> str | None:
    """The letter of a stated answer that is one option of several, with or without its text."""
    found = OPTION.fullmatch(text.rstrip("."))
    letter = next((group for group in found.groups() if group), None) if found else None
    return letter.upper() if letter else None


def yes_no(text: str, form: re.Pattern[str] = YES_NO) -> bool | None:
    """Whether a stated answer is yes; by YES_NO_FIRST also where more follows."""
    found = form.fullmatch(text)
    return found[1].lower() in ("yes", "true") if found else None


def plain(text: str) -> list[str]:
    """The words of a stated answer, case folded, without articles and marks, numbers as values."""
    words = WORD.findall(text.casefold())
    return [_value(word) for word in words if word not in ARTICLES]


def matches(said: str | None, expected: str | None, containment: bool = True) -> bool:
    """Whether an answer says what is expected. No answer, or an empty one, matches nothing.

    Option letters decide where both have one. Else the words are equal, or with `containment` those
    of one stand in a row in the other: never parts of words or of numbers.
    """
    one, other = stated(said or ""), stated(expected or "")
    letters = option(one), option(other)
    if all(letters):
        return letters[0] == letters[1]
    first, second = plain(one), plain(other)
    if not first or not second:
        return False
    if first == second:
        return True
    short, long = sorted((first, second), key=len)
    places = range(len(long) - len(short) + 1)
    return containment and any(long[at : at + len(short)] == short for at in places)


def _value(word: str) -> str:
    """A number as its value, per cent told apart and money not; another word as it is."""
    found = number(word)
    if found is None:
        return word
    return f"{found.value}{'%' if found.unit == '%' else ''}"
