"""What is a quotation and what is not, and where it was found."""

import polars as pl
import pytest

from infra import samples
from tasks.check_spans import Spans, check_spans, holds, plain
from tests.tasks.examples import rows

SIGN = "OPEN  daily\n9:30-18:00, closed on 1 January.\nCafé Zoë, 112 High St"


@pytest.mark.parametrize(
    "span",
    ["open daily", "Daily 9:30", "18:00", "1 January", "CAFÉ ZOË", "112", "High St", "Cafe\u0301"],
)
def test_a_quotation_may_differ_in_case_blanks_and_form(span):
    assert holds(plain(SIGN), plain(span))


@pytest.mark.parametrize("span", ["12", "11", "Caf", "pen", "9:3", "January 1", "open on", "", "-"])
def test_parts_of_words_and_other_orders_are_none(span):
    assert not holds(plain(SIGN), plain(span))


def test_scripts_without_blanks_have_no_edges():
    assert holds(plain("東京都美術館"), plain("東京"))


def test_a_span_within_a_word_is_sought_further_on():
    assert holds(plain("party art"), plain("art"))


def test_the_first_text_that_holds_it_is_named_and_others_are_drops(build):
    given = samples.write(
        build.store,
        pl.DataFrame(
            {
                "sample_id": ["a", "b", "c", "d"],
                "image_id": ["i"] * 4,
                "ocr": ["Stop here", None, "Stop here", "Stop here"],
                "caption": ["a stop sign", "a stop sign", "a sign", "a sign"],
                "answer": ["\u201cStop.\u201d", "stop", "halt", "..."],
            }
        ),
    )
    found = check_spans(build, given, Spans("answer", ("ocr", "caption")))
    assert [(r["sample_id"], r["span_of"]) for r in rows(build, found.samples)] == [
        ("a", "ocr"),
        ("b", "caption"),
    ]
    assert [(r["id"], r["rule"], r["detail"]) for r in rows(build, found.drops)] == [
        ("c", "not_a_span", "halt"),
        ("d", "not_a_span", "..."),
    ]
