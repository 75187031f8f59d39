"""Neighbour search against a brute force that scores everything in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import neighbours
from infra.neighbours import Lists, VectorError, bound, distinct, expand, scores, search


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float16)


def brute(queries, base, k, offset=None):
    """All scores in float64; a stable sort keeps equal ones in order of rows."""
    a, b = queries.astype(np.float64), base.astype(np.float64)
    lengths = np.sqrt((a * a).sum(1))[:, None] * np.sqrt((b * b).sum(1))[None, :]
    table = np.rint(np.where(lengths > 0, a @ b.T / np.where(lengths > 0, lengths, 1), 0) * 1e6)
    neighbour = np.full((len(a), k), -1)
    score = np.zeros((len(a), k), int)
    for i, row in enumerate(table.astype(int)):
        ranked = np.argsort(-row, kind="stable")
        first = ranked[ranked != i + offset][:k] if offset is not None else ranked[:k]
        neighbour[i, : len(first)] = first
        score[i, : len(first)] = row[first]
    return neighbour, score


def assert_lists(found: Lists, expected):
    np.testing.assert_array_equal(found.neighbour, expected[0])
    np.testing.assert_array_equal(found.score, expected[1])
    assert found.neighbour.dtype == found.score.dtype == np.int32


@st.composite
def crowds(draw, most=40):
    """Few distinct directions, many copies, near copies and zero vectors."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, d, kinds = draw(st.integers(1, most)), draw(st.integers(1, 19)), draw(st.integers(1, 6))
    centres = rng.integers(-1, 2, (kinds, d)).astype(np.float32)
    noise = draw(st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
    rows = centres[rng.integers(0, kinds, n)]
    return unit(rows + noise * rng.standard_normal((n, d)) * rng.integers(0, 2, (n, 1)))


def test_scores_are_cosines_in_millionths():
    a = np.array([[1, 0], [0.6, 0.8], [0, 0], [0.5, 0.5], [3, 4]], np.float16)
    b = np.array([[1, 0], [0.8, 0.6], [1, 0], [-1, -1], [3, 4]], np.float16)
    assert scores(a, b).tolist() == [1_000_000, 960_109, 0, -1_000_000, 1_000_000]


@given(st.integers(0, 2**32), st.integers(1, 900))
@settings(max_examples=40, deadline=None)
def test_a_vector_scores_exactly_one_with_itself_and_sums_in_any_order(seed, d):
    rng = np.random.default_rng(seed)
    a, b = unit(rng.standard_normal((5, d))), unit(rng.standard_normal((5, d)))
    assert set(scores(a, a)) == {1_000_000}
    order = rng.permutation(d)
    assert scores(a, b).tolist() == scores(a[:, order], b[:, order]).tolist()
    assert scores(a, b).tolist() == scores(b, a).tolist()


@pytest.mark.parametrize("value", [np.inf, np.nan, 300.0])
def test_vectors_that_float64_cannot_sum_exactly_are_refused(value):
    vectors = np.array([[0.5, 0.5], [value, 0]], np.float16)
    for call in (lambda: scores(vectors, vectors), lambda: search(vectors, vectors, 1)):
        with pytest.raises(VectorError, match=r"vector 1 .*normalise"):
            call()


def test_a_list_is_ordered_by_score_and_then_by_row():
    base = np.array([[0, 1], [1, 0], [0.6, 0.8], [1, 0], [-1, 0]], np.float16)
    query = np.array([[1, 0]], np.float16)
    found = search(query, base, 4)
    assert found.neighbour.tolist() == [[1, 3, 2, 0]]
    assert found.score.tolist() == [[1_000_000, 1_000_000, 600_156, 0]]
    assert found.computed == 9  # five approximate, and the four that the list needs


@given(crowds(), st.integers(1, 50), st.sampled_from([1, 3, 16, None]))
@settings(max_examples=400, deadline=None)
def test_all_against_all_equals_brute_force(vectors, k, block):
    expected = brute(vectors, vectors, k, offset=0)
    assert_lists(search(vectors, vectors, k, same=True, block=block), expected)
    assert_lists(search(vectors, vectors, k, own=np.arange(len(vectors)), block=block), expected)


@given(crowds(), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_of_queries_equals_brute_force(vectors, k, data):
    start = data.draw(st.integers(0, len(vectors) - 1))
    some = vectors[start : start + data.draw(st.integers(1, 20))]
    block = data.draw(st.sampled_from([2, 7, None]))
    assert_lists(
        search(some, vectors, k, own=np.arange(len(some)) + start, block=block),
        brute(some, vectors, k, start),
    )
    assert_lists(search(some, vectors, k, block=block), brute(some, vectors, k))


def test_no_vectors_and_one_vector():
    none, one = np.empty((0, 8), np.float16), unit(np.ones((1, 8)))
    assert search(none, none, 3, same=True).neighbour.shape == (0, 3)
    assert_lists(search(one, none, 2), ([[-1, -1]], [[0, 0]]))
    assert_lists(search(one, one, 2, same=True), ([[-1, -1]], [[0, 0]]))
    assert_lists(search(one, one, 2), ([[0, -1]], [[1_000_000, 0]]))
    assert expand(search(none, none, 3, same=True), distinct(none), 3).score.shape == (0, 3)


def test_a_thousand_equal_vectors_overflow_no_list():
    rng = np.random.default_rng(3)
    vectors = unit(rng.standard_normal((1500, 21)))
    vectors[rng.permutation(1500)[:1000]] = vectors[0]
    expected = brute(vectors, vectors, 10, offset=0)
    for block in (200, 1024, None):
        assert_lists(search(vectors, vectors, 10, same=True, block=block), expected)
        assert_lists(
            search(vectors, vectors, 10, own=np.arange(len(vectors)), block=block), expected
        )


def test_a_query_that_is_its_own_last_candidate_is_still_searched_wider():
    vectors = np.full((15, 5), 0.4473, np.float16)
    vectors[[8, 13], 4] = 0.447
    for row in (1, 12):
        expected = brute(vectors, vectors, 1, offset=0)
        found = search(vectors, vectors, 1, same=True, block=1)
        assert found.neighbour[row] == expected[0][row]


def near_ties(n, d, rng):
    """Vectors around one score, closer to each other than float32 can tell apart."""
    query = unit(rng.standard_normal((1, d)))
    base = np.repeat(unit(query + 0.5 * unit(rng.standard_normal((1, d)))), n, axis=0)
    where = rng.integers(0, d, (n, 3))
    steps = np.nextafter(np.take_along_axis(base, where, 1), np.float16(2))
    np.put_along_axis(base, where, steps, 1)
    return query, base


@pytest.mark.parametrize("k", [1, 7, 60])
def test_near_ties_at_the_last_place_are_decided_exactly(k):
    rng = np.random.default_rng(k)
    query, base = near_ties(400, 512, rng)
    neighbour, score = brute(query, base, 400)
    spread = score[0, 0] - score[0, -1]
    assert 0 < spread < 20e6 * bound(512)
    approximate = np.argsort(-(base.astype(np.float32) @ query[0].astype(np.float32)))
    assert approximate[:60].tolist() != neighbour[0, :60].tolist()
    for block in (64, 150, None):
        assert_lists(search(query, base, k, block=block), brute(query, base, k))


def test_the_error_bound_holds_for_float32_products():
    rng = np.random.default_rng(0)
    a, b = (unit(abs(rng.standard_normal((200, 512)))) for _ in range(2))
    inverse = [1 / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b)]
    wide = [x * y.astype(np.float32) for x, y in zip((a, b), inverse, strict=True)]
    exact = scores(np.repeat(a, 200, axis=0), np.tile(b, (200, 1))).reshape(200, 200)
    in_order = np.zeros((200, 200), np.float32)
    for i in range(512):
        in_order += wide[0][:, i, None] * wide[1][None, :, i]
    assert abs(wide[0] @ wide[1].T - exact / 1e6).max() < bound(512)
    assert abs(in_order - exact / 1e6).max() < bound(512)


@given(crowds(), st.integers(1, 8), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_scores_do_not_depend_on_the_order_of_rows(vectors, k, seed):
    order = np.random.default_rng(seed).permutation(len(vectors))
    straight = search(vectors, vectors, k, same=True, block=5)
    mixed = search(vectors[order], vectors[order], k, same=True, block=7)
    np.testing.assert_array_equal(straight.score[order], mixed.score)


def test_equal_vectors_are_grouped_by_their_first_row():
    rows = np.array([[1, 0], [0, 0], [0, 1], [1, -0.0], [-0.0, 0], [1, 0]], np.float16)
    first, inverse, own = distinct(rows)
    assert first.tolist() == [0, 1, 2]
    assert inverse.tolist() == [0, 1, 2, 0, 1, 0]
    assert own.tolist() == [1_000_000, 0, 1_000_000]


def test_a_list_over_distinct_vectors_expands_to_rows():
    rows = np.array([[1, 0], [0.6, 0.8], [1, 0], [0, 1], [1, 0]], np.float16)
    groups = distinct(rows)
    vectors = rows[groups.first]
    found = expand(search(vectors, vectors, 3, same=True), groups, 3)
    assert found.neighbour.tolist() == [[2, 4, 1], [3, 0, 2], [0, 4, 1], [1, 0, 2], [0, 2, 1]]
    assert found.score[0].tolist() == [1_000_000, 1_000_000, 600_156]


@given(crowds(), st.integers(1, 45), st.sampled_from([2, 4096]))
@settings(max_examples=400, deadline=None)
def test_expanded_lists_equal_brute_force_over_all_rows(vectors, k, block):
    groups = distinct(vectors)
    some = vectors[groups.first]
    lists = search(some, some, k, same=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK", block)
        found = expand(lists, groups, k)
    assert_lists(found, brute(vectors, vectors, k, offset=0))


def test_parallel_vectors_tie_with_equal_ones_and_are_ordered_by_row():
    rows = np.array([[0.5, 0], [1, 0], [0.5, 0], [1, 0], [0, 1]], np.float16)
    groups = distinct(rows)
    vectors = rows[groups.first]
    found = expand(search(vectors, vectors, 2, same=True), groups, 2)
    assert_lists(found, brute(rows, rows, 2, offset=0))
    assert found.neighbour[0].tolist() == [1, 2]


@pytest.mark.gpu
def test_a_gpu_gives_the_same_lists():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(5)
    vectors = unit(rng.standard_normal((20_000, 512)) + rng.standard_normal((1, 512)))
    vectors[rng.permutation(20_000)[:3000]] = vectors[7]
    on_cpu = search(vectors, vectors, 50, same=True, device="cpu")
    for block in (4096, None):
        on_gpu = search(vectors, vectors, 50, same=True, device="cuda", block=block)
        assert_lists(on_gpu, (on_cpu.neighbour, on_cpu.score))
