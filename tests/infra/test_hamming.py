"""Hamming search against comparing all pairs, and survivors against their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import hamming

WORD = st.integers(0, 2**64 - 1)


@st.composite
def clumped(draw: st.DrawFn, most: int = 60) -> np.ndarray:
    """Hashes near a few centres, some equal, so that neighbours, ties and chains occur."""
    centres = draw(st.lists(WORD, min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=5)
    words = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=most))
    return np.array([c ^ sum(1 << b for b in set(f)) for c, f in words], dtype=np.uint64)


def collected(chunks) -> list[tuple[int, int, int]]:
    return sorted(
        (int(i), int(j), int(d)) for chunk in chunks for i, j, d in zip(*chunk, strict=True)
    )


def naive_pairs(hashes: np.ndarray, radius: int) -> list[tuple[int, int, int]]:
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    near = np.argwhere(np.triu(distance <= radius, 1))
    return [(int(i), int(j), int(distance[i, j])) for i, j in near]


def naive_survivors(columns: np.ndarray, related: np.ndarray, radius: int) -> list[int]:
    def near(i: int, j: int) -> bool:
        one, other = columns[i], columns[j]
        apart = [*np.bitwise_count(one[0] ^ other), *np.bitwise_count(one ^ other[0])]
        return min(apart) <= radius and bool(related[i, j])

    owner = list(range(len(columns)))
    for b in range(len(columns)):
        owner[b] = next((a for a in range(b) if owner[a] == a and near(a, b)), b)
    return owner


PLANS = [hamming.SCAN, hamming.Plan(5, 1), hamming.Plan(6, 2), hamming.Plan(9, 5)]


@pytest.fixture(params=PLANS, ids=str)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches in one given way (for radius 4), in small chunks."""
    monkeypatch.setattr(hamming, "_plan", lambda *_: request.param)
    monkeypatch.setattr(hamming, "CHUNK", 7)


def test_a_pair_is_found_once_with_its_distance():
    hashes = np.array([0b0000, 0b0011, 1 << 63, 0b0001], dtype=np.uint64)
    assert collected(hamming.pairs_within(hashes, 1)) == [(0, 2, 1), (0, 3, 1), (1, 3, 1)]


def test_equal_hashes_are_pairs_at_distance_nought():
    hashes = np.full(4, 2**64 - 1, dtype=np.uint64)
    assert [pair[2] for pair in collected(hamming.pairs_within(hashes, 0))] == [0] * 6


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_hashes_have_no_pairs(count: int):
    assert collected(hamming.pairs_within(np.zeros(count, dtype=np.uint64), 4)) == []


@pytest.mark.parametrize("radius", [-1, 65])
def test_a_radius_that_no_distance_can_have_is_refused(radius: int):
    with pytest.raises(ValueError, match="between 0 and 64"):
        list(hamming.pairs_within(np.zeros(2, dtype=np.uint64), radius))


@given(hashes=clumped())
@settings(max_examples=40, deadline=None)
def test_every_way_finds_what_comparing_all_pairs_finds(hashes: np.ndarray):
    for plan in PLANS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hamming, "_plan", lambda *_, plan=plan: plan)
            patch.setattr(hamming, "CHUNK", 7)
            assert collected(hamming.pairs_within(hashes, 4)) == naive_pairs(hashes, 4)


@given(left=clumped(30), right=clumped(30))
@settings(max_examples=40, deadline=None)
def test_matches_between_two_sets(left: np.ndarray, right: np.ndarray):
    distance = np.bitwise_count(left[:, None] ^ right[None])
    wanted = [(int(i), int(j), int(distance[i, j])) for i, j in np.argwhere(distance <= 4)]
    for plan in PLANS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hamming, "_plan", lambda *_, plan=plan: plan)
            patch.setattr(hamming, "CHUNK", 7)
            assert collected(hamming.matches(left, right, 4)) == wanted


@pytest.mark.parametrize("radius", [0, 2, 4, 8, 12])
def test_the_way_that_is_chosen_for_larger_sets_finds_all(radius: int):
    draw = np.random.default_rng(1)
    hashes = draw.integers(0, 2**64, 6000, dtype=np.uint64)
    hashes[3000:] = hashes[:3000] ^ (np.uint64(1) << draw.integers(0, 64, 3000, dtype=np.uint64))
    assert collected(hamming.pairs_within(hashes, radius)) == naive_pairs(hashes, radius)


def test_a_chunk_is_bounded_however_many_hashes_are_equal():
    hashes = np.zeros(3000, dtype=np.uint64)
    sizes = [len(i) for i, _, _ in hamming.pairs_within(hashes, 4)]
    assert max(sizes) <= hamming.CHUNK
    assert sum(sizes) == 3000 * 2999 // 2


def test_many_equal_hashes_are_searched_by_a_plan_as_well(forced: None):
    found = collected(hamming.pairs_within(np.zeros(40, dtype=np.uint64), 4))
    assert found == [(i, j, 0) for i in range(40) for j in range(i + 1, 40)]


def test_relations_of_some_images_go_both_ways():
    hashes = np.array([[0b0000, 0b0000], [0b1111, 0b0001], [0b0011, 0b0011]], dtype=np.uint64)
    asked = []

    def confirm(i, j):
        asked.extend(zip(i.tolist(), j.tolist(), strict=True))
        return i + j != 2  # 0 and 2 are refused

    def found(*rows):
        one, other = hamming.related(hashes, np.array(rows), confirm, 2)
        return sorted(set(zip(one.tolist(), other.tolist(), strict=True)))

    # 1 is near 0 by its derived hash, and near 2 by its own.
    assert found(1) == [(1, 0), (1, 2)]
    assert found(0, 2) == [(0, 1), (2, 1)]
    assert (0, 2) in asked and (1, 1) not in asked


def everything(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.ones(len(i), dtype=bool)


def test_a_chain_is_not_followed():
    """B is near A and C is near B, but C is not near A: B goes to A, and C survives."""
    a, b, c = 0b0000, 0b0011, 0b1111
    assert hamming.survivors(np.array([a, b, c], np.uint64), everything, 2).tolist() == [0, 0, 2]


def test_the_first_survivor_owns_an_image_that_two_are_related_to():
    first, second, between = 0b0000, 0b1111, 0b0011
    hashes = np.array([first, second, between], dtype=np.uint64)
    assert hamming.survivors(hashes, everything, 2).tolist() == [0, 1, 0]


def test_what_is_not_confirmed_survives():
    hashes = np.zeros(4, dtype=np.uint64)
    owner = hamming.survivors(hashes, lambda i, j: (i + j) % 2 == 0, 0)
    assert owner.tolist() == [0, 1, 0, 1]


def test_a_later_column_is_compared_with_the_first_column_only():
    far = np.uint64(2**64 - 1)
    columns = np.array([[0, 1 << 40], [far, 0], [1 << 20, 1 << 40]], dtype=np.uint64)
    assert hamming.survivors(columns, everything, 0).tolist() == [0, 0, 2]


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_survivors_follow_their_definition(data: st.DataObject):
    width = data.draw(st.integers(1, 3))
    hashes = data.draw(clumped())
    columns = hashes[: len(hashes) // width * width].reshape(-1, width)
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    related = draw.random((len(columns), len(columns))) < data.draw(st.sampled_from([0.2, 0.7, 1]))
    related |= related.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "EDGES", data.draw(st.sampled_from([0, 5, 100_000])))
        patch.setattr(hamming, "EDGES_EACH", 0)
        owner = hamming.survivors(columns, lambda i, j: related[i, j], 4)
    assert owner.tolist() == naive_survivors(columns, related, 4)


def test_a_big_clump_is_settled_without_confirming_all_its_pairs():
    asked = []

    def confirm(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        asked.append(len(i))
        return np.ones(len(i), dtype=bool)

    owner = hamming.survivors(np.zeros(20_000, dtype=np.uint64), confirm, 4)
    assert not owner.any()
    assert sum(asked) < 20_000**2 / 20
