"""Survivors after any change are those of a computation from nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infra.survival import update


def from_nothing(count, edges):
    owner = list(range(count))
    for row in range(count):
        before = [a for a, b in edges if b == row and owner[a] == a]
        owner[row] = min(before, default=row)
    return owner


def relation(edges):
    pairs = np.array([*edges, *((b, a) for a, b in edges)], int).reshape(-1, 2)

    def related(rows):
        kept = pairs[np.isin(pairs[:, 0], rows)]
        return kept[:, 0], kept[:, 1]

    return related


def updated(known, edges):
    return update(np.array(known), relation(edges)).tolist()


def test_all_new_is_the_rule_itself():
    # 0 - 1 - 2: 2 is not chained to 0 through 1, which does not survive.
    assert updated([-1, -1, -1], [(0, 1), (1, 2)]) == [0, 0, 2]


def test_a_newcomer_before_a_survivor_takes_it_and_frees_its_own():
    # 0 is new and like 1, which held 2; 2 is like 3, which survived.
    assert updated([-1, 1, 1, 3], [(0, 1), (1, 2), (2, 3)]) == [0, 0, 2, 2]


def test_a_newcomer_takes_the_duplicates_of_later_survivors():
    assert updated([-1, 1, 1], [(0, 2), (1, 2)]) == [0, 1, 0]


def test_a_duplicate_takes_the_place_of_a_survivor_that_left():
    # What was before 0 held 0, 1 and 2, and left; 1 is like 0, 2 is not.
    assert updated([-1, -1, -1], [(0, 1)]) == [0, 0, 2]


def test_what_nothing_touches_is_not_asked_about():
    asked = []

    def related(rows):
        asked.extend(rows.tolist())
        return np.array([], int), np.array([], int)

    assert update(np.array([0, 1, -1]), related).tolist() == [0, 1, 2]
    assert asked == [2]


@st.composite
def changes(draw):
    """A graph over a universe in order, and which of it was there before and is there now."""
    count = draw(st.integers(1, 24))
    rows = st.integers(0, count - 1)
    edges = draw(st.sets(st.tuples(rows, rows).filter(lambda edge: edge[0] < edge[1])))
    some = st.sets(rows)
    return count, edges, draw(some), draw(some)


@given(changes())
def test_any_change_ends_at_the_rule(change):
    _, edges, before, now = change

    def within(rows):
        place = {row: at for at, row in enumerate(sorted(rows))}
        inside = [(place[a], place[b]) for a, b in edges if a in place and b in place]
        return place, inside

    old_place, old_edges = within(before)
    place, new_edges = within(now)
    old = from_nothing(len(old_place), old_edges)
    name = sorted(before)
    known = [
        place.get(name[old[old_place[row]]], -1) if row in old_place else -1 for row in sorted(now)
    ]
    assert updated(known, new_edges) == from_nothing(len(place), new_edges)
