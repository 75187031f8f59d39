"""Query and text put together, in the plane where angles can be seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import neighbours
from infra.fusing import fuse, preferences


def at(*degrees):
    turns = np.radians(degrees)
    return np.column_stack([np.cos(turns), np.sin(turns)]).astype(np.float16)


def degrees(vectors):
    return np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])).round(1).tolist()


@pytest.mark.parametrize(("weight", "middle"), [(0.0, 60), (0.5, 30), (1.0, 0)])
def test_half_and_half_lies_in_the_middle(weight, middle):
    assert degrees(fuse(at(0), at(60), weight)) == pytest.approx([middle], abs=0.1)


def test_lengths_have_no_say():
    assert degrees(fuse(at(0) * np.float16(4), at(60), 0.5)) == pytest.approx([30], abs=0.1)


def test_target_and_best_negative_of_each_query():
    fused, targets, negatives = at(0, 90), at(10, 40), at(20, 5, 80)
    target, best = preferences(fused, targets, negatives, np.array([2, 1]))
    expected = neighbours.scores(at(0, 90, 0, 90), at(10, 40, 5, 80))
    assert [*target, *best] == expected.tolist()
    assert target[0] < best[0] and target[1] < best[1]


def test_nothing_gives_nothing():
    none = np.zeros((0, 2), np.float16)
    target, best = preferences(none, none, none, np.zeros(0, np.int64))
    assert (len(target), len(best)) == (0, 0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_query_is_scored_the_same_whoever_else_is_there(sizes, seed):
    rng = np.random.default_rng(seed)

    def vectors(count):
        return rng.standard_normal((count, 8)).astype(np.float16)

    images, texts, targets, negatives = (
        vectors(n) for n in (len(sizes), len(sizes), len(sizes), sum(sizes))
    )
    whole = preferences(fuse(images, texts, 0.3), targets, negatives, np.array(sizes))
    ends = np.cumsum(sizes)
    for n, size in enumerate(sizes):
        one, part = slice(n, n + 1), slice(ends[n] - size, ends[n])
        alone = preferences(
            fuse(images[one], texts[one], 0.3), targets[one], negatives[part], np.array([size])
        )
        assert (alone[0][0], alone[1][0]) == (whole[0][n], whole[1][n])
