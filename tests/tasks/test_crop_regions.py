"""Boxes that are regions, just above and just below every bound; crops that stay in the picture."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.pictures import View
from infra.samples import write
from tasks.crop_regions import CropParams, clipped, crop_regions, padded
from tests.tasks.examples import put, rows

WIDTH, HEIGHT = 1000, 800


@pytest.fixture
def cropped(build):
    """Crops boxes of one picture of 1000 x 800; (ids of samples, rule and value by id)."""

    def run(boxes, **params):
        images = put(build, "images", "image_id width height", [("i", WIDTH, HEIGHT)])
        frame = pl.DataFrame(
            {"sample_id": list(boxes), "image_id": ["i"] * len(boxes), "box": list(boxes.values())},
            {"sample_id": pl.String, "image_id": pl.String, "box": pl.List(pl.Int64)},
        )
        found = crop_regions(build, write(build.store, frame), images, CropParams(**params))
        lost = {row["id"]: (row["rule"], row["value"]) for row in rows(build, found.drops)}
        return {row["sample_id"]: row for row in rows(build, found.samples)}, lost

    return run


@pytest.mark.parametrize(
    ("box", "rule"),
    [
        ([0, 0, 32, 400], None),
        ([0, 0, 31, 400], ("small_region", 31)),
        ([0, 0, 400, 31], ("small_region", 31)),
        ([100, 100, 180, 150], None),  # 4,000 px: 0.5 %
        ([100, 100, 179, 150], ("small_share", 4937)),
        ([0, 0, 1000, 760], None),  # 95 %
        ([0, 0, 1000, 761], ("large_share", 951250)),
        ([-50, -50, 100, 100], None),  # what is in the picture counts
        ([-50, -50, 31, 100], ("small_region", 31)),
        ([1000, 0, 1100, 100], ("outside_picture", None)),
        ([-90, 10, 0, 100], ("outside_picture", None)),
        ([2000, 2000, 2100, 2100], ("outside_picture", None)),
    ],
)
def test_the_bounds_of_a_region(cropped, box, rule):
    found, lost = cropped({"s": box})
    assert lost.get("s") == rule
    assert bool(found) == (rule is None)


def test_a_region_is_shown_with_a_tenth_of_each_side_around_it(cropped):
    found, _ = cropped({"s": [100, 200, 300, 240], "edge": [900, 700, 1100, 900]})
    assert View.of(found["s"]["region"]) == View("i", (80, 196, 320, 244))
    assert View.of(found["s"]["around"]) == View("i", (0, 176, 420, 264))
    assert (found["s"]["width"], found["s"]["height"]) == (WIDTH, HEIGHT)
    # The box is that of the picture, clipped; so is the view.
    assert found["edge"]["box"] == [900, 700, 1000, 800]
    assert View.of(found["edge"]["region"]).crop == (890, 690, 1000, 800)


def test_eight_regions_an_image_are_drawn_whatever_else_there_is(cropped):
    boxes = {f"s{n:02}": [n, n, n + 100, n + 100] for n in range(20)}
    found, lost = cropped(boxes)
    assert len(found) == 8
    assert lost == dict.fromkeys(boxes.keys() - found.keys(), ("too_many_regions", 8))
    left = {name: box for name, box in boxes.items() if name in found or name < "s10"}
    assert cropped(left)[0].keys() == found.keys()
    assert cropped(boxes, seed=1)[0].keys() != found.keys()


def test_no_samples_make_no_regions_with_the_same_columns(cropped):
    assert cropped({}) == ({}, {})


@given(
    st.tuples(*[st.integers(-50, 150)] * 4), st.floats(0, 2), st.integers(1, 120),
    st.integers(1, 120),
)  # fmt: skip
def test_a_padded_box_holds_its_box_and_stays_inside(box, share, width, height):
    inside = clipped(box, width, height)
    if inside is None:
        assert min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0)
        return
    wide = padded(inside, share, width, height)
    assert 0 <= wide[0] <= inside[0] < inside[2] <= wide[2] <= width
    assert 0 <= wide[1] <= inside[1] < inside[3] <= wide[3] <= height
