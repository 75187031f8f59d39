"""Shares are rounded up, ties go to the lesser id, and groups have shares of their own."""

import polars as pl
import pytest
from hypothesis import given as tries
from hypothesis import settings
from hypothesis import strategies as st

from infra import samples
from tasks.keep_quantile import Quantile, keep_quantile
from tests.tasks.examples import new_build, rows

SCORES = {"a": 5, "b": 9, "c": 9, "d": None, "e": 1}


def kept(build, params, scores=SCORES, **columns):
    frame = pl.DataFrame(
        {"sample_id": list(scores), "image_id": "i", "score": list(scores.values()), **columns},
        {"sample_id": pl.String, "image_id": pl.String, "score": pl.Int64,
         **dict.fromkeys(columns, pl.String)},
    )  # fmt: skip
    found = keep_quantile(build, samples.write(build.store, frame), params)
    dropped = {row["id"]: (row["rule"], row["value"]) for row in rows(build, found.drops)}
    names = {row["sample_id"] for row in rows(build, found.samples)}
    assert names | dropped.keys() == scores.keys() and not names & dropped.keys()
    assert all(gone == ("beyond_quantile", scores[name]) for name, gone in dropped.items())
    return names


@pytest.mark.parametrize(
    ("keep", "names"),
    [(0.2, "b"), (0.200001, "bc"), (0.4, "bc"), (0.6, "abc"), (0.8, "abce"), (1.0, "abcde")],
)
def test_the_highest_stay_and_a_null_goes_first(build, keep, names):
    assert kept(build, Quantile("score", keep)) == set(names)


def test_the_lowest_may_stay_instead(build):
    assert kept(build, Quantile("score", 0.4, highest=False)) == {"e", "a"}


def test_each_group_has_its_share(build):
    groups = ["x", "x", "y", "y", "y"]
    assert kept(build, Quantile("score", 0.5, per="group"), group=groups) == {"b", "c", "e"}


@settings(max_examples=25)
@tries(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(-3, 3), max_size=9),
       st.integers(1, 1_000_000))  # fmt: skip
def test_it_is_a_function_of_the_set(tmp_path_factory, scores, share):
    build = new_build(tmp_path_factory.mktemp("quantile"))
    first = kept(build, Quantile("score", share / 1e6), scores)
    turned = dict(reversed(scores.items()))
    assert kept(build, Quantile("score", share / 1e6), turned) == first
    assert len(first) == -(-len(scores) * share // 1_000_000)
