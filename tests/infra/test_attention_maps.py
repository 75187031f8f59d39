"""SD-RPN's rules on maps that show one thing at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.attention_maps import (
    Cells,
    Square,
    Thresholds,
    blurred,
    find_boxes,
    label_cells,
    mean_map,
    pad_square,
    padding_cells,
    to_cells,
    to_pixels,
    without_sinks,
)

PEAK = 0.02


def blob(top: int, left: int, bottom: int, right: int, grid=(12, 12), low=0.0) -> np.ndarray:
    looked = np.full(grid, low, np.float32)
    looked[top:bottom, left:right] = PEAK
    return looked


def test_a_map_is_the_mean_over_steps():
    rows = np.array([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], np.float32)
    assert mean_map(rows, (2, 3)).tolist() == [[2, 3, 4], [5, 6, 7]]
    assert mean_map(rows[:0], (2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


# Labels --------------------------------------------------------------------------------------


def test_one_blob_is_foreground_and_the_rest_background():
    labels = label_cells(blob(3, 4, 6, 8))
    expected = np.zeros((12, 12), np.int8)
    expected[3:6, 4:8] = 1
    assert labels.status == "ok" and labels.box == Cells(3, 4, 6, 8)
    assert labels.cells.dtype == np.int8
    assert np.array_equal(labels.cells, expected)


@pytest.mark.parametrize(
    ("share", "label"), [(0.0, 0), (0.0999, 0), (0.1001, -1), (0.1999, -1), (0.2001, 1)]
)
def test_just_below_and_just_above_the_thresholds(share, label):
    looked = blob(3, 4, 6, 8)
    looked[5, 9] = share * PEAK
    assert label_cells(looked).cells[5, 9] == label


def test_a_low_cell_within_the_box_is_ignored_and_never_background():
    looked = blob(3, 4, 6, 8)
    looked[4, 5] = 0.0
    assert label_cells(looked).cells[4, 5] == -1
    assert label_cells(looked).cells[2, 5] == 0


def test_a_sink_far_away_would_widen_the_box_until_it_is_removed():
    looked, sink = blob(3, 4, 6, 8), np.zeros((12, 12), np.float32)
    looked[11, 0], sink[11, 0] = 5 * PEAK, 0.02
    raw = label_cells(looked)
    assert raw.cells[11, 0] == 1 and raw.cells[4, 5] == -1  # the blob is not even foreground
    cleaned = without_sinks(looked, sink, 1e-2)
    assert looked[11, 0] > 0  # the map itself stays
    assert label_cells(cleaned).box == Cells(3, 4, 6, 8)
    assert np.array_equal(without_sinks(looked, sink, 0.03), looked)


def test_a_sink_at_the_threshold_is_one():
    sink = np.array([[0.0099, 0.01, 0.0101]], np.float32)
    assert without_sinks(np.ones((1, 3), np.float32), sink, 0.01).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("looked", "status"),
    [
        (np.full((12, 12), PEAK, np.float32), "too_large"),
        (blob(0, 0, 6, 12), "too_large"),  # half of the grid
        (blob(0, 0, 6, 11), "ok"),
        (np.zeros((12, 12), np.float32), "too_weak"),
        (blob(3, 4, 6, 8) * np.float32(0.249), "too_weak"),
        (blob(3, 4, 6, 8) * np.float32(0.251), "ok"),
    ],
)
def test_maps_that_say_nothing_are_ignored_whole(looked, status):
    labels = label_cells(looked)
    assert labels.status == status
    assert (status == "ok") == bool((labels.cells != -1).any())


def test_other_thresholds_are_parameters():
    looked = blob(3, 4, 6, 8)
    looked[5, 9] = 0.22 * PEAK
    assert label_cells(looked, Thresholds(0.25, 0.05)).cells[5, 9] == -1
    assert label_cells(looked).cells[5, 9] == 1


def test_padding_is_background_and_a_margin_widens_the_box():
    square = Square(12 * 28, 6 * 28)
    padding = padding_cells((12, 12), square)
    looked = blob(3, 4, 6, 8, low=0.15 * PEAK)
    labels = label_cells(looked, padding=padding)
    assert (labels.cells[:3] == 0).all() and (labels.cells[9:] == 0).all()
    assert (labels.cells[6:9] == -1).all()
    assert label_cells(blob(3, 0, 6, 8), margin=1).box == Cells(2, 0, 7, 9)


@given(st.integers(0, 2**32 - 1))
def test_labels_keep_their_rules_on_any_map(seed):
    looked = np.random.default_rng(seed).exponential(0.01, (9, 13)).astype(np.float32)
    labels = label_cells(looked)
    peak = looked.max()
    assert set(np.unique(labels.cells)) <= {-1, 0, 1}
    assert (looked[labels.cells == 1] > 0.2 * peak).all()
    assert (looked[labels.cells == 0] < 0.1 * peak).all()
    if labels.status == "ok":
        inside = labels.cells[
            labels.box.top : labels.box.bottom, labels.box.left : labels.box.right
        ]
        assert (inside != 0).all()


# Boxes ---------------------------------------------------------------------------------------


def test_a_blur_is_a_3_by_3_gaussian():
    looked = np.zeros((5, 5), np.float32)
    looked[2, 2] = 1
    one = np.exp(-np.array([1, 0, 1]) / 2)
    one /= one.sum()
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = np.outer(one, one)
    assert np.allclose(blurred(looked), expected, atol=1e-6)


def test_boxes_of_two_blobs_come_with_the_stronger_first():
    grid = (16, 16)
    looked = blob(2, 2, 5, 5, grid) + 2 * blob(9, 8, 12, 13, grid)
    # Beside a blob the blur leaves 0.27 of its height: more than 0.2 of the stronger one's.
    assert find_boxes(looked) == [Cells(8, 7, 13, 14), Cells(2, 2, 5, 5)]
    assert find_boxes(looked, 1.5 * PEAK) == [Cells(9, 9, 12, 12)]  # less its corners


def test_blobs_that_touch_at_a_corner_are_one():
    looked = blob(2, 2, 5, 5) + blob(5, 5, 8, 8)
    assert find_boxes(looked, -0.5) == [Cells(2, 2, 8, 8)]


def test_single_cells_are_dropped_small_ones_grow_and_huge_ones_are_dropped():
    lonely = blob(5, 5, 6, 6)
    assert find_boxes(lonely, -0.9) == []
    two = blob(5, 5, 6, 7)
    assert find_boxes(two, -0.9) == [Cells(4, 4, 7, 7)]
    corner = blob(0, 10, 1, 12)
    assert find_boxes(corner, -0.7) == [Cells(0, 9, 3, 12)]
    four = blob(5, 5, 7, 7)
    assert find_boxes(four, -0.9) == [Cells(5, 5, 7, 7)]
    wide = blob(1, 1, 16, 16, (24, 24))
    assert find_boxes(wide, -0.6) == [Cells(1, 1, 16, 16)]  # less its corners, 221 cells
    assert find_boxes(blob(1, 1, 16, 17, (24, 24)), -0.5) == []


def flooded(high: np.ndarray) -> list[set[tuple[int, int]]]:
    """Components whose cells touch, at corners too, by walking from cell to cell."""
    left = {(int(y), int(x)) for y, x in np.argwhere(high)}
    found = []
    while left:
        waiting, part = [left.pop()], set()
        while waiting:
            y, x = waiting.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            waiting += near
        found.append(part)
    return found


@given(st.integers(0, 2**32 - 1), st.sampled_from([-0.2, -0.5, -0.7]))
def test_boxes_are_those_of_components_found_by_walking(seed, threshold):
    looked = np.random.default_rng(seed).exponential(0.01, (16, 16)).astype(np.float32) ** 2
    smooth = blurred(looked)
    boxes = []
    for part in flooded(smooth > -threshold * float(smooth.max())):
        (top, left), (bottom, right) = (
            tuple(f(c) for c in zip(*part, strict=True)) for f in (min, max)
        )
        if 4 <= len(part) <= 225:
            boxes.append((-max(smooth[cell] for cell in part), (top, left, bottom + 1, right + 1)))
        elif len(part) > 1:
            # Three by three about the middle, moved to where the grid has them.
            low = [min(max((a + b) // 2 - 1, 0), 13) for a, b in ((top, bottom), (left, right))]
            around = (*low, low[0] + 3, low[1] + 3)
            boxes.append((-max(smooth[cell] for cell in part), around))
    assert [tuple(box) for box in find_boxes(looked, threshold)] == [b for _, b in sorted(boxes)]


def test_an_empty_map_has_no_boxes():
    assert find_boxes(np.zeros((12, 12), np.float32)) == []


# Cells and pixels ----------------------------------------------------------------------------


def test_a_picture_is_padded_to_a_square_with_grey():
    padded = np.asarray(pad_square(Image.new("RGB", (40, 20), (255, 0, 0))))
    assert padded.shape == (40, 40, 3)
    assert (padded[:10] == 127).all() and (padded[30:] == 127).all()
    assert (padded[10:30] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("size", "cells", "pixels"),
    [
        ((240, 240), Cells(3, 4, 6, 8), (80, 60, 160, 120)),
        ((240, 120), Cells(3, 4, 6, 8), (80, 0, 160, 60)),  # 60 pixels of padding above
        ((120, 240), Cells(3, 0, 6, 5), (0, 60, 40, 120)),  # 60 pixels of padding on the left
        ((240, 120), Cells(0, 4, 3, 8), None),  # in the padding
    ],
)
def test_a_box_of_cells_in_pixels_of_the_picture(size, cells, pixels):
    assert to_pixels(cells, (12, 12), Square(*size)) == pixels


@given(
    st.integers(20, 2000),
    st.integers(20, 2000),
    st.integers(1, 24),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_cells_cover_the_pixels_that_they_were_made_from(width, height, side, shares):
    (a, c), (b, d) = sorted(shares[:2]), sorted(shares[2:])
    box = (a * width, b * height, c * width, d * height)
    square, grid = Square(width, height), (side, side)
    back = to_pixels(to_cells(box, grid, square), grid, square)
    if c - a < 1e-3 or d - b < 1e-3:
        return
    assert back is not None
    cell = square.side / side
    assert back[0] <= box[0] + 1e-3 and back[2] >= box[2] - 1e-3
    assert back[1] <= box[1] + 1e-3 and back[3] >= box[3] - 1e-3
    assert back[0] >= box[0] - cell - 1e-3 and back[2] <= box[2] + cell + 1e-3


def test_padding_cells_are_those_without_a_pixel_of_the_picture():
    assert not padding_cells((4, 4), Square(100, 100)).any()
    wide = padding_cells((4, 4), Square(100, 50))
    assert wide.all(1).tolist() == [True, False, False, True]
    partly = padding_cells((4, 4), Square(100, 60))  # 20 of 25 pixels of the first row are padding
    assert not partly.any()
