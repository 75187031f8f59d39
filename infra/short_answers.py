"""Short answers: whether two say the same, by rule. Numbers are as exact as they are written."""

import re
import unicodedata
from fractions import Fraction

ARTICLES = frozenset(("a", "an", "the"))
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
NUMBERS = {word: str(number) for number, word in enumerate(WORDS)}
LEAD = re.compile(r"^(the )?(correct |final |right )?(answer|option|choice)( is|:| *=)?:? +", re.I)
OPTION = re.compile(r"^\(?([A-Za-z])[).:](?:\s|$)|^\(?([A-Z])\)?\.?$")
WORD = re.compile(r"[$€£]?[+-]?\d[\d,]*(?:\.\d+)?%?|[^\W_]+(?:['\u2019][^\W_]+)?")


def plain(text: str) -> list[str]:
    """The words of an answer: NFKC, case folded, without articles and marks, numbers as values."""
    folded = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()
    found = WORD.findall(LEAD.sub("", folded).casefold())
    return [_value(word) for word in found if word not in ARTICLES]


def option(text: str) -> str | None:
    """The letter of an answer that is one option of several, with or without its text."""
    found = OPTION.match(LEAD.sub("", unicodedata.normalize("NFKC", text).strip()))
    return (found[1] or found[2]).upper() if found else None


def matches(said: str | None, expected: str | None, containment: bool = True) -> bool:
    """Whether an answer says what is expected. No answer, or an empty one, matches nothing.

    Option letters decide where both have one. Else the words are equal, or with `containment` those
    of one stand in a row in the other: never parts of words or of numbers.
    """
    first, second = plain(said or ""), plain(expected or "")
    letters = option(said or ""), option(expected or "")
    if all(letters):
        return letters[0] == letters[1]
    if not first or not second:
        return False
    if first == second:
        return True
    short, long = sorted((first, second), key=len)
    places = range(len(long) - len(short) + 1)
    return containment and any(long[at : at + len(short)] == short for at in places)


def _value(word: str) -> str:
    """A number as its value, with its sign of money or of per cent; another word as it is."""
    bare = NUMBERS.get(word, word).strip("$€£%").replace(",", "")
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", bare):
        return word
    number = str(Fraction(bare))
    return f"{number}%" if word.endswith("%") else number
