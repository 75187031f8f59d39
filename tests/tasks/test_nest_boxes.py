"""Boxes inside boxes, and where they come from."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra import samples, tables
from infra.build import Build
from tasks.nest_boxes import Nesting, contains, enlarged, nest_boxes, nested

SIZE = (1000, 800)
WORDS, SIGN, HOUSE = (400, 300, 500, 340), (380, 280, 520, 360), (200, 100, 700, 700)


def test_boxes_go_from_the_smallest_outwards():
    assert nested([HOUSE, WORDS, SIGN], SIZE, 1.75) == ([WORDS, SIGN, HOUSE], None)
    assert nested([WORDS, WORDS, SIGN], SIZE, 1.75) == ([WORDS, SIGN], None)


@pytest.mark.parametrize(
    ("boxes", "rule"),
    [
        ([WORDS, (600, 300, 900, 400)], "boxes_not_nested"),
        ([WORDS, (450, 280, 620, 360)], "boxes_not_nested"),
        ([(1000, 0, 1100, 50)], "box_outside"),
        ([WORDS, (-50, -50, 0, 10)], "box_outside"),
    ],
)
def test_boxes_that_can_not_be_used(boxes, rule):
    assert nested(boxes, SIZE, 1.75) == ([], rule)


def test_one_box_gets_its_surroundings():
    assert nested([WORDS], SIZE, 1.5) == ([WORDS, (375, 290, 525, 350)], None)
    assert nested([WORDS], SIZE, 2.0) == ([WORDS, (350, 280, 550, 360)], None)
    assert nested([(0, 0, 100, 40)], SIZE, 2.0)[0][1] == (0, 0, 150, 60)  # clipped
    assert nested([(0, 0, *SIZE)], SIZE, 2.0)[0] == [(0, 0, *SIZE)]
    assert nested([(-5, -5, 100, 40)], SIZE, 1.5)[0][0] == (0, 0, 100, 40)


@given(
    st.integers(0, 900), st.integers(0, 700), st.integers(1, 400), st.integers(1, 400),
    st.sampled_from((1.5, 1.75, 2.0)),
)  # fmt: skip
def test_what_is_enlarged_holds_what_it_was_and_stays_inside(left, top, wide, high, factor):
    box = (left, top, min(SIZE[0], left + wide), min(SIZE[1], top + high))
    around = enlarged(box, SIZE, factor)
    assert contains(around, box)
    assert contains((0, 0, *SIZE), around)


def stored(build: Build, **columns):
    frame = pl.DataFrame(
        {"sample_id": ["s"], "image_id": ["i"], "width": [SIZE[0]], "height": [SIZE[1]]}
    ).with_columns(**{name: pl.Series([value], dtype=pl.List(pl.Int64))
                      for name, value in columns.items()})  # fmt: skip
    return samples.write(build.store, frame)


@pytest.mark.parametrize(
    ("columns", "source", "given_count", "first"),
    [
        ({"boxes": [*SIGN, *WORDS], "roi_boxes": [*HOUSE]}, "annotation", 2, WORDS),
        ({"boxes": [], "roi_boxes": [*HOUSE, *SIGN]}, "roi_labels", 1, SIGN),
        ({"roi_boxes": [*HOUSE]}, "roi_labels", 1, HOUSE),
    ],
)
def test_the_source_is_named(build, columns, source, given_count, first):
    found = nest_boxes(build, stored(build, **columns), Nesting())
    [row] = tables.frame(build.store, found.samples).to_dicts()
    assert (row["box_source"], row["boxes_given"]) == (source, given_count)
    assert (tuple(row["boxes"][:4]), len(row["boxes"])) == (first, 8)


def test_without_boxes(build):
    rows = stored(build, boxes=[])
    [row] = tables.frame(build.store, nest_boxes(build, rows, Nesting()).samples).to_dicts()
    assert (row["boxes"], row["box_source"]) == ([], None)
    found = nest_boxes(build, rows, Nesting(required=True))
    assert found.samples.rows == 0
    assert tables.read(build.store, found.drops)["rule"].to_pylist() == ["no_boxes"]


@pytest.mark.parametrize("name", ["human", "Human boxes", "annotation"])
def test_boxes_of_a_model_are_never_called_human(name):
    with pytest.raises(ValidationError, match="neither human nor annotated"):
        Nesting(derived_source=name)
