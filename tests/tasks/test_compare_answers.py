"""Answers are compared by rule where both are of one closed form, and left open elsewhere."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import samples
from tasks.compare_answers import AnswerComparison, compare_answers, compared
from tests.tasks.examples import rows


def kind_and_verdict(expected, said):
    return compared(expected, said, 8)


@pytest.mark.parametrize(
    ("expected", "said", "agrees"),
    [
        ("3", "3", True),
        ("3", "4", False),
        ("3", "three", True),
        ("Three.", "3", True),
        ("3", "The answer is 3.", True),
        ("3", "**3**", True),
        ("3.0", "3", True),
        ("1,200", "1200", True),
        ("12,00", "1200", None),  # no number here
        ("1/2", "0.5", True),
        ("\u00bd", "0.5", True),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("10%", "0.1", True),
        ("10%", "10%", True),
        ("10%", "10", None),
        ("5 cm", "5 cm", True),
        ("5 cm", "6 cm", False),
        ("5 cm", "50 mm", None),
        ("5 cm", "5", None),
        ("$5", "$5.00", True),
        ("2", "There are 2 of them and 3 others", None),
        ("1/0", "1/0", True),  # the same words, if no number
    ],
)
def test_numbers(expected, said, agrees):
    kind, found = kind_and_verdict(expected, said)
    assert found is agrees
    assert kind == ("fact" if expected in ("12,00", "1/0") else "number")


@pytest.mark.parametrize(
    ("expected", "said", "agrees"),
    [
        ("B", "B", True),
        ("B", "(B)", True),
        ("B", "b.", True),
        ("B", "B. a dog", True),
        ("B", "B) a dog", True),
        ("B", "The correct option is B", True),
        ("B", "Answer: C", False),
        ("(B) a dog", "B", True),
        ("B", "a dog", None),
        ("A", "A dog", None),
    ],
)
def test_options(expected, said, agrees):
    assert kind_and_verdict(expected, said) == ("option", agrees)


@pytest.mark.parametrize(
    ("expected", "said", "agrees"),
    [
        ("Yes", "yes.", True),
        ("Yes", "Yes, there is a cat.", True),
        ("Yes", "No, there is none.", False),
        ("no", "False", True),
        ("True", "Yes", True),
        ("Yes", "No one can tell", None),
        ("Yes", "There is a cat", None),
    ],
)
def test_yes_and_no(expected, said, agrees):
    assert kind_and_verdict(expected, said) == ("yes_no", agrees)


@pytest.mark.parametrize(
    ("expected", "said", "kind", "agrees"),
    [
        ("A red car", "the red car.", "fact", True),
        ("red car", "crimson car", "fact", None),
        ("C++", "C", "fact", None),
        ("Yes, it is a cat", "Yes", "fact", None),
        ("one two three four five six seven eight", "x", "fact", None),
        ("one two three four five six seven eight nine", "x", "description", None),
        ("+", "-", "fact", None),
    ],
)
def test_words(expected, said, kind, agrees):
    assert kind_and_verdict(expected, said) == (kind, agrees)


@pytest.mark.parametrize("said", [None, "", " ", "**"])
@pytest.mark.parametrize("expected", ["3", "B", "yes", "a red car"])
def test_no_answer_agrees_with_nothing(expected, said):
    assert kind_and_verdict(expected, said)[1] is False


@given(st.text(min_size=1).filter(str.strip), st.text())
def test_any_text_is_compared(expected, said):
    kind, agrees = kind_and_verdict(expected, said)
    assert kind in ("number", "option", "yes_no", "fact", "description")
    assert agrees in (True, False, None)


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_agree_where_they_are_equal(one, other):
    assert kind_and_verdict(f"{one:,}", str(other)) == ("number", one == other)


def test_columns_are_added(build):
    frame = pl.DataFrame(
        {"sample_id": ["a", "b", "c"], "image_id": ["i"] * 3, "response": ["3", "a cat", "B"],
         "conclusion": ["3", "a kitten", None]}
    )  # fmt: skip
    found = compare_answers(build, samples.write(build.store, frame), AnswerComparison())
    assert [(r["answer_type"], r["agrees"]) for r in rows(build, found.samples)] == [
        ("number", True),
        ("fact", None),
        ("option", False),
    ]
