"""Measures of pictures and texts, and their bounds, just above and just below."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import samples
from tasks.filter_by_form import Filtering, FormFilter, filter_by_form
from tasks.measure_images import measure_images
from tasks.measure_texts import TextMeasures, measure_texts, repetition
from tests.tasks.examples import put, rows


def sampled(build, **columns):
    count = len(next(iter(columns.values())))
    names = [f"{at}" for at in range(count)]
    return samples.write(
        build.store, pl.DataFrame({"sample_id": names, "image_id": names, **columns})
    )


def test_images(build):
    images = put(
        build, "headers", "image_id width height", [("0", 64, 48), ("1", 7, 50), ("2", 31, 31)]
    )
    found = rows(build, measure_images(build, sampled(build, x=["a", "b", "c"]), images).samples)
    assert [(r["width"], r["height"], r["short_side"], r["aspect"]) for r in found] == [
        (64, 48, 48, 1_334),
        (7, 50, 7, 7_143),
        (31, 31, 31, 1_000),
    ]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two", 0),
        ("one two three", 0),
        ("a b c a b c", 250_000),  # abc bca cab abc: one of four
        ("so so so so so so so", 800_000),  # five times the same
        ("So, so; SO so so so so", 800_000),
    ],
)
def test_repetition(build, text, share):
    found = measure_texts(build, sampled(build, said=[text]), TextMeasures(("said",)))
    [row] = rows(build, found.samples)
    assert (row["said_repetition"], row["said_words"]) == (share, len(text.split()))


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_repetition_counts_what_stood_before(words, gram):
    seen, again = set(), 0
    grams = [" ".join(words[at : at + gram]) for at in range(max(0, len(words) - gram + 1))]
    for one in grams:
        again += one in seen
        seen.add(one)
    assert repetition(words, gram) == (1_000_000 * again // len(grams) if grams else 0)


def test_a_null_has_no_measure(build):
    text = pl.Series("said", [None], pl.String)
    found = measure_texts(build, sampled(build, said=text), TextMeasures(("said",)))
    assert rows(build, found.samples)[0]["said_words"] is None


@pytest.mark.parametrize(
    ("size", "text", "fate"),
    [
        ((32, 32), "fine", None),
        ((31, 32), "fine", "small_image"),
        ((32, 160), "fine", None),
        ((32, 161), "fine", "extreme_aspect"),
        ((3_200, 641), "fine", None),
        ((3_206, 641), "fine", "extreme_aspect"),  # 5.0016
        ((64, 64), "a b c d a b c d a b c d", None),  # 6 of 10
        ((64, 64), "a b c d a b c d a b c d a", "repeated_text"),  # 7 of 11
    ],
)
def test_the_form_at_its_bounds(build, size, text, fate):
    images = put(build, "headers", "image_id width height", [("0", *size)])
    given_table = measure_images(build, sampled(build, instruction=[text]), images).samples
    measured = measure_texts(build, given_table, TextMeasures(("instruction",))).samples
    found = filter_by_form(build, measured, Filtering(FormFilter(), "instruction"))
    assert [row["rule"] for row in rows(build, found.drops)] == ([fate] if fate else [])
