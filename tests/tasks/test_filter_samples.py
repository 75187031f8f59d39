"""Rules in a table: what each keeps, and what is said of those that fail."""

import polars as pl
import pytest

from infra import samples
from tasks.filter_samples import Rule, Rules, filter_samples
from tests.tasks.examples import rows, tuples


def filtered(build, frame: dict, *rules: Rule):
    """Ids that are kept, and (id, rule, value, detail) of the others."""
    count = len(next(iter(frame.values())))
    named = {"sample_id": [f"s{at}" for at in range(count)], "image_id": ["i"] * count, **frame}
    found = filter_samples(build, samples.write(build.store, pl.DataFrame(named)), Rules(rules))
    lost = [(r["id"], r["rule"], r["value"], r["detail"]) for r in rows(build, found.drops)]
    return [row[0] for row in tuples(build, found.samples)], lost


def test_both_ends_of_a_bound_are_kept_and_a_null_is_not(build):
    kept, lost = filtered(
        build,
        {"n": [2, 3, 5, 6, None]},
        Rule("low", "n", "least", 3),
        Rule("high", "n", "most", 5),
    )
    assert kept == ["s1", "s2"]
    assert lost == [("s0", "low", 2, None), ("s3", "high", 6, None), ("s4", "low", None, None)]


def test_the_first_rule_that_fails_is_the_fate(build):
    rules = Rule("word", "w", "is", "yes"), Rule("length", "w", "longer", 3)
    assert filtered(build, {"w": ["no", "yes"]}, *rules) == (["s1"], [("s0", "word", None, "no")])
    assert filtered(build, {"w": ["no", "yes"]}, *rules[::-1])[1][0][1] == "length"


@pytest.mark.parametrize(("a", "b", "holds"), [(3, 4, True), (3, 3, False), (None, 9, False)])
def test_of_several_columns_the_sum_counts(build, a, b, holds):
    frame = {"a": pl.Series([a], dtype=pl.Int64), "b": pl.Series([b], dtype=pl.Int64)}
    kept, lost = filtered(build, frame, Rule("sum", ("a", "b"), "least", 7))
    assert (kept, lost) == (
        (["s0"], []) if holds else ([], [("s0", "sum", None if a is None else a + b, None)])
    )


def test_a_null_may_pass(build):
    frame = {"n": pl.Series([None, 1], dtype=pl.Int64)}
    assert filtered(build, frame, Rule("low", "n", "least", 3, True))[0] == ["s0"]


@pytest.mark.parametrize(
    ("least", "text", "kept"),
    [
        (16, "fifteen letters", False), (16, "sixteen letters!", True),  # text-rich, for LLaVAR-2
        (20, "nineteen characters", False), (20, "twenty characters!!!", True),  # Recap
        (16, "  fifteen letters\n", False), (1, " \n", False), (2, "東京", True),
    ],
)  # fmt: skip
def test_length_is_counted_in_characters_without_blanks_around(build, least, text, kept):
    found, _ = filtered(build, {"said": [text]}, Rule("short", "said", "longer", least))
    assert bool(found) is kept
