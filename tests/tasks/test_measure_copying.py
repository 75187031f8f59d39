"""Copied n-grams, counted by hand."""

import pytest

from tasks.measure_copying import Copying, copy_rate, measure_copying
from tests.tasks.examples import rows
from tests.tasks.tables_of_samples import samples_of

WHOLE = "A red fox jumps over the lazy dog, near a river."


@pytest.mark.parametrize(
    ("text", "n", "rate"),
    [
        (WHOLE, 5, 1_000_000),
        ("a RED fox -- jumps; over", 5, 1_000_000),  # case and punctuation don't count
        ("A red fox jumps over it", 5, 500_000),  # the first of two
        ("a red fox sits on the lazy dog", 5, 0),
        ("fox jumps over the lazy dog near me", 3, 833_333),  # 5 of 6
        ("red fox", 5, 0),  # no n-gram at all
        ("", 5, 0),
        ("the dog the dog the dog", 1, 1_000_000),  # distinct ones
        ("der Fuchs 狐狸 springt über den Zaun", 2, 0),
    ],
)
def test_the_share_of_distinct_n_grams_that_the_source_has(text, n, rate):
    assert copy_rate(text, WHOLE, n) == rate


def test_columns_of_a_table(build):
    columns = "sample_id image_id caption whole"
    given = [("1", "i", "a red fox jumps over", WHOLE), ("2", "i", None, WHOLE)]
    given.append(("3", "i", "x", None))
    measured = measure_copying(
        build, samples_of(build, given, columns), Copying("caption", "whole")
    )
    found = [(r["caption_copied"], r["caption_words"]) for r in rows(build, measured.samples)]
    assert found == [(1_000_000, 5), (0, 0), (0, 1)]
