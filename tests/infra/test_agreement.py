"""Statistics of agreement, against scipy, published tables and what they must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from infra.agreement import agreed, confusion, kappa, least_size, share

FEW = [(0, 1), (1, 1), (0, 9), (9, 9), (1, 10), (27, 30), (85, 100), (999, 1000)]


@pytest.mark.parametrize(("count", "of"), FEW)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_is_that_of_scipy(count, of, confidence):
    found = share(count, of, confidence)
    known = binomtest(count, of).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)
    assert found.value == count / of


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_lies_in_0_to_1(row):
    count, of = row
    found = share(count, of)
    assert 0 <= found.low <= count / of <= found.high <= 1
    other = share(of - count, of)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


def test_of_nothing_nothing_is_known():
    assert share(0, 0) == (0, 0, 0.0, 1.0)
    assert share(0, 0).value == 0.0
    with pytest.raises(ValueError, match="7 of 5"):
        share(7, 5)


@pytest.mark.parametrize(("bound", "size"), [(0.5, 4), (0.8, 16), (0.9, 35), (0.95, 73)])
def test_how_many_items_a_bound_needs(bound, size):
    assert least_size(bound) == size
    assert share(size, size).low >= bound > share(size - 1, size - 1).low


@given(st.floats(0.01, 0.99))
def test_one_item_less_is_too_few(bound):
    size = least_size(bound)
    assert share(size, size).low >= bound
    assert size == 1 or share(size - 1, size - 1).low < bound


def test_kappa_of_known_tables():
    # Cohen 1960, table 1: two psychologists, 200 patients.
    cohen = {("a", "a"): 88, ("a", "b"): 14, ("a", "c"): 18, ("b", "a"): 10, ("b", "b"): 40,
             ("b", "c"): 10, ("c", "a"): 2, ("c", "b"): 6, ("c", "c"): 12}  # fmt: skip
    assert agreed(cohen).value == 0.70
    assert kappa(cohen) == pytest.approx(0.492, abs=5e-4)
    grants = {("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}
    assert kappa(grants) == pytest.approx(0.4)


def test_agreement_without_chance_has_no_kappa():
    assert kappa(confusion([])) is None
    assert kappa(confusion([("fits", "fits")] * 9)) is None
    assert agreed(confusion([("fits", "fits")] * 9))[:2] == (9, 9)


def test_all_apart_is_less_than_chance():
    apart = confusion([("fits", "wrong"), ("wrong", "fits")] * 3)
    assert agreed(apart).part == 0
    assert kappa(apart) == -1


def test_a_judge_that_always_says_yes_agrees_often_and_knows_nothing():
    lazy = confusion([("fits", "fits")] * 90 + [("wrong", "fits")] * 10)
    assert agreed(lazy).value == 0.9
    assert kappa(lazy) == 0
