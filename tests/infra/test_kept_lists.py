"""Kept lists: after any arrivals and departures their first k are those of a search."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import kept_lists, neighbours
from infra.kept_lists import ALL

K, WIDTH = 3, 5


def fresh(vectors):
    return neighbours.search(vectors, vectors, K, same=True)


def assert_view(kept, vectors):
    found, expected = kept_lists.view(kept, K), fresh(vectors)
    assert found.neighbour.tolist() == expected.neighbour.tolist()
    assert found.score.tolist() == expected.score.tolist()


def unit(angles) -> np.ndarray:
    return np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float16)


def test_a_removal_deletes_and_an_addition_inserts():
    vectors = unit(np.arange(9) / 10)
    kept, computed = kept_lists.search(vectors, WIDTH)
    assert computed >= 81
    # 4 leaves, 4.5 arrives as the last row.
    place = np.array([0, 1, 2, 3, -1, 4, 5, 6, 7])
    now = np.concatenate([vectors[place >= 0], unit(np.array([0.45]))])
    kept, computed = kept_lists.update(kept, place, now, K)
    assert_view(kept, now)
    assert kept_lists.view(kept, K).neighbour[3].tolist() == [2, 8, 1]
    # 9 products, and exact scores of the few that matter.
    assert computed < 30


def test_nothing_new_costs_nothing():
    vectors = unit(np.arange(20) / 30)
    kept, _ = kept_lists.search(vectors, WIDTH)
    again, computed = kept_lists.update(kept, np.arange(20), vectors, K)
    assert computed == 0 and (again.keys == kept.keys).all() and (again.floor == kept.floor).all()


def test_a_list_that_runs_short_is_searched_again():
    vectors = unit(np.arange(12) / 20)
    kept, _ = kept_lists.search(vectors, WIDTH)
    place = np.array([0, -1, -1, -1, 1, 2, 3, 4, 5, 6, 7, 8])
    kept, computed = kept_lists.update(kept, place, vectors[place >= 0], K)
    assert_view(kept, vectors[place >= 0])
    assert 0 < computed < 81


def test_a_list_of_all_others_stays_one_until_it_is_full():
    vectors = unit(np.arange(4) / 5)
    kept, _ = kept_lists.search(vectors, WIDTH)
    assert kept.floor.tolist() == [ALL] * 4
    now = np.concatenate([vectors, unit(np.array([0.9]))])
    kept, _ = kept_lists.update(kept, np.arange(4), now, K)
    assert kept.floor.tolist() == [ALL] * 5
    assert_view(kept, now)


# A grid of few values: many equal scores, opposite and zero vectors among them.
COARSE = st.tuples(*[st.integers(-2, 2)] * 3)


@st.composite
def histories(draw):
    """Distinct vectors, and for each step which of them are there, in an order of its own."""
    vectors = draw(st.lists(COARSE, min_size=2, max_size=40, unique=True))
    steps = draw(
        st.lists(
            st.lists(st.sampled_from(range(len(vectors))), unique=True), min_size=2, max_size=6
        )
    )
    return np.array(vectors, np.float16), [np.array(step, int) for step in steps]


@given(histories())
@pytest.mark.parametrize("width", [K, WIDTH, 12])
def test_any_history_ends_at_the_lists_of_a_search(width, history):
    vectors, steps = history
    kept, _ = kept_lists.search(vectors[steps[0]], width)
    for before, now in pairwise(steps):
        row = {item: at for at, item in enumerate(now.tolist())}
        place = np.array([row.get(item, -1) for item in before.tolist()], np.int64)
        kept, _ = kept_lists.update(kept, place, vectors[now], K)
        assert_view(kept, vectors[now])


@given(seed=st.integers(0, 2**32 - 1))
def test_nights_of_a_few_in_a_hundred(seed):
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal((400, 16))
    pool[200:300] = pool[:100] + 0.01 * rng.standard_normal((100, 16))
    pool = (pool / np.linalg.norm(pool, axis=1, keepdims=True)).astype(np.float16)
    now = rng.permutation(400)[:300]
    kept, _ = kept_lists.search(pool[now], WIDTH)
    for _ in range(4):
        stay = rng.permutation(now)[: len(now) - int(rng.integers(0, 12))]
        come = np.setdiff1d(rng.permutation(400)[:8], now)
        then = np.sort(np.concatenate([stay, come]))
        row = {item: at for at, item in enumerate(then.tolist())}
        place = np.array([row.get(item, -1) for item in now.tolist()], np.int64)
        kept, _ = kept_lists.update(kept, place, pool[then], K)
        assert_view(kept, pool[then])
        now = then
