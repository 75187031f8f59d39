"""Which answers are right, as a column."""

import polars as pl
import pytest

from infra import samples
from tasks.match_answers import Matching, match_answers
from tests.tasks.examples import rows


@pytest.mark.parametrize(
    ("containment", "right"),
    [(True, [True, True, False, False]), (False, [True, False] + [False] * 2)],
)
def test_no_answer_is_never_right(build, containment, right):
    frame = pl.DataFrame(
        {"sample_id": list("abcd"), "image_id": ["i"] * 4, "answer": ["red"] * 4,
         "said": ["Red.", "a red car", "blue", None]}
    )  # fmt: skip
    found = match_answers(build, samples.write(build.store, frame), Matching(containment))
    assert [row["right"] for row in rows(build, found.samples)] == right
