"""The rewards of LFPC against values worked out by hand."""

import pytest

from infra.crop_rewards import (
    geo_reward,
    iou,
    iou_reward,
    l1,
    l1_reward,
    overlap,
    total_reward,
)

B1, B2 = (100, 100, 200, 200), (50, 50, 250, 250)
SIZE = (1000, 500)


@pytest.mark.parametrize(
    ("right", "covered", "rewarded"),
    # 189 of 100..200 is 0.89 of B1: nothing. 191 is 0.91: the IoU, which is the share itself.
    [(189, 0.89, 0.0), (190, 0.90, 0.0), (191, 0.91, 0.91), (200, 1.0, 1.0)],
)
def test_iou_counts_where_more_than_nine_tenths_are_covered(right, covered, rewarded):
    predicted = (100, 100, right, 200)
    assert overlap(predicted, B1) == pytest.approx(covered)
    assert iou_reward(predicted, [B1]) == pytest.approx(rewarded)


def test_the_best_of_the_nested_boxes_counts():
    assert iou_reward(B2, [B1]) == pytest.approx(10_000 / 40_000)
    assert iou_reward(B2, [B1, B2]) == 1.0
    between = (75, 75, 225, 225)
    assert iou_reward(between, [B1, B2]) == pytest.approx(max(10_000 / 22_500, 22_500 / 40_000))


def test_what_does_not_meet_has_no_iou():
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert overlap((300, 300, 400, 400), B1) == 0.0
    assert overlap((200, 200, 100, 100), B1) == 0.0  # a box turned over


def test_distance_is_a_share_of_the_picture():
    # 50 of 1000 px, and 50 of 500 px, on both corners.
    assert l1(B1, B2, SIZE) == pytest.approx((0.05 + 0.1 + 0.05 + 0.1) / 4)
    assert l1_reward(B1, [B2], SIZE) == pytest.approx(0.925)
    assert l1_reward(B1, [B1, B2], SIZE) == 1.0


def test_both_parts_and_the_whole():
    assert geo_reward(B2, [B1], SIZE, 0.25) == pytest.approx(0.25 * 0.25 + 0.75 * 0.925)
    assert geo_reward(B2, [B1], SIZE) == pytest.approx(0.5 * 0.25 + 0.5 * 0.925)  # our omega
    assert geo_reward(B1, [B1, B2], SIZE) == 1.0
    assert total_reward(1.0, 0.5, 0.25) == 1.75
    assert total_reward(0.0, 0.5, 0.25) == 0.5
