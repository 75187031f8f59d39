"""When two short answers say the same."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.short_answers import Number, matches, number, option, plain, stated, yes_no

SAME = [
    ("Bakery", "bakery"),
    ("the bakery.", "Bakery"),
    ("It says “BAKERY”", "bakery"),
    ("The answer is: a red car", "red car"),
    ("1,200", "1200"),
    ("1200.0", "1200"),
    ("three", "3"),
    ("$5", "5"),
    ("10%", "10.0 %".replace(" ", "")),
    ("B", "(b) a horse"),
    ("b", "(B) a horse"),
    ("a", "A."),  # a letter of its own is no article
    ("So the answer is B", "b) a horse"),
    ("Answer:B", "B"),
    ("Option", "option"),  # announces nothing
    ("(B)", "B."),
    ("Option B", "B"),
    ("\u22124", "-4"),
    ("cafe\u0301", "café"),
]
OTHER = [
    ("bakery", "brewery"),
    ("12", "1200"),
    ("12,00", "1200"),  # a comma stands before three digits
    ("1", "10"),
    ("art", "party"),
    ("10%", "10"),
    ("4", "-4"),
    ("1.5", "15"),
    ("A", "B"),
    ("A) a horse", "B) a horse"),
    ("", "bakery"),
    (None, "bakery"),
    ("the", "a"),
    ("...", "..."),
]
CONTAINED = [("It says bakery on it", "bakery"), ("red", "a red car"), ("exit 12 B", "12 b")]


@pytest.mark.parametrize(("said", "expected"), SAME)
def test_the_same(said, expected):
    assert matches(said, expected)
    assert matches(expected, said)


@pytest.mark.parametrize(("said", "expected"), OTHER)
def test_not_the_same(said, expected):
    assert not matches(said, expected)
    assert not matches(expected, said)


@pytest.mark.parametrize(("said", "expected"), CONTAINED)
def test_containment_can_be_turned_off(said, expected):
    assert matches(said, expected)
    assert not matches(said, expected, containment=False)


def test_what_is_compared():
    assert plain(stated("The answer is: 1,200 Apples, an Ox's")) == ["1200", "apples", "ox's"]
    assert [option(text) for text in ("(c)", "C: a cat", "a cat", "I", "cat")] == [
        "C", "C", None, "I", None,
    ]  # fmt: skip
    assert number("$1,200") == Number(Fraction(1200), "$")
    assert number(stated("**½**")) == number("0.5") == Number(Fraction(1, 2), "")
    assert [yes_no(text) for text in ("Yes.", "false", "No one")] == [True, False, None]


@given(st.text(), st.text())
def test_nothing_breaks_it_and_both_ways_are_one(one, other):
    assert matches(one, other) == matches(other, one)
    assert matches(one, one) == bool(plain(stated(one)) or option(stated(one)))
