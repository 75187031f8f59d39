"""Exact Hamming search over 64-bit hashes that does not compare all pairs.

Small radii: of b blocks of bits, two hashes within r agree on some b - r, so a sort by each choice
of b - r blocks brings them together (Manku, Jain and Das Sarma, "Detecting near-duplicates for web
crawling", WWW 2007, section 3). Large radii and small sets: a tiled scan.
"""

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]
Matches = tuple[Rows, Rows, NDArray[np.uint8]]

CHUNK = 1 << 20  # candidates looked at in one go
EDGES, EDGES_EACH = 100_000, 16  # related pairs kept at a time: at least, and for each image
SAMPLE = 1 << 14

# Nanoseconds, measured on one core; they decide which way is taken, never what is found.
SORTING, LOOKING, SCANNING, STARTING = 90.0, 9.0, 1.6, 100_000.0


class Plan(NamedTuple):
    """How to search: by sorting on every choice of `agreeing` out of `blocks`, or by a scan."""

    blocks: int
    agreeing: int

    def masks(self) -> NDArray[np.uint64]:
        """The bits of each block, uint64 [blocks]."""
        edges = [64 * k // self.blocks for k in range(self.blocks + 1)]
        bits = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
        return np.array(bits, dtype=np.uint64)


SCAN = Plan(0, 0)


def pairs_within(hashes: Hashes, radius: int) -> Iterator[Matches]:
    """Finds every pair of hashes, uint64 [n], at most `radius` bits apart, each once.

    Yields (i int64 [m], j int64 [m], distance uint8 [m]) with i < j, in chunks of bounded size,
    however many hashes are equal; the order of pairs is unspecified.
    """
    for i, j, distance in _joined(hashes, hashes, radius, same=True):
        yield np.minimum(i, j), np.maximum(i, j), distance


def matches(queries: Hashes, hashes: Hashes, radius: int) -> Iterator[Matches]:
    """Finds each (query row, hash row, distance) at most `radius` apart once; as `pairs_within`."""
    yield from _joined(queries, hashes, radius, same=False)


def survivors(
    hashes: Hashes, confirm: Callable[[Rows, Rows], NDArray[np.bool_]], radius: int
) -> Rows:
    """Ties each image to the first surviving image before it that it is related to, or to itself.

    hashes, uint64 [n] or [n, v], are in the total order of images. Images i and j are related where
    column 0 of one lies within `radius` of any column of the other, and confirm(i int64 [m],
    j int64 [m]) -> bool [m], symmetric, says yes. Returns int64 [n]. A set with many related
    pairs is halved until they fit in memory: what follows is compared with survivors only.
    """
    columns = hashes[:, None] if hashes.ndim == 1 else hashes
    owner = np.arange(len(columns))
    _settle(columns, np.arange(len(columns)), owner, confirm, radius)
    return owner


def related(
    hashes: Hashes, rows: Rows, confirm: Callable[[Rows, Rows], NDArray[np.bool_]], radius: int
) -> tuple[Rows, Rows]:
    """All related pairs (one of rows, any other row) of the relation of `survivors`."""
    found: list[tuple[Rows, Rows]] = [(rows[:0], rows[:0])]
    for i, j in _related(hashes, rows, np.arange(len(hashes)), radius):
        i, j = i[i != j], j[i != j]
        yes = confirm(i, j)
        found.append((i[yes], j[yes]))
    one, other = (np.concatenate(column) for column in zip(*found, strict=True))
    return one, other


def _joined(left: Hashes, right: Hashes, radius: int, same: bool) -> Iterator[Matches]:
    """Matches of left and right rows; with `same`, of one set with itself, i and j in any order."""
    if not 0 <= radius <= 64:
        raise ValueError(f"radius {radius} is not between 0 and 64")
    if not len(left) or not len(right):
        return
    plan = _plan(left, right, radius, same)
    if plan == SCAN:
        yield from _scanned(left, right, radius, same)
        return
    masks = plan.masks()
    for choice in combinations(range(plan.blocks), plan.agreeing):
        mask = np.bitwise_or.reduce(masks[list(choice)])
        # A pair that agrees on more blocks is found under the first choice that it agrees on.
        missing = [masks[block] for block in range(choice[-1]) if block not in choice]
        for i, j, differing in _agreeing(left, right, mask, same):
            distance = np.bitwise_count(differing)
            near = distance <= radius
            i, j, differing, distance = i[near], j[near], differing[near], distance[near]
            first = np.ones(len(i), dtype=np.bool_)
            for block in missing:
                first &= (differing & block) != 0
            if first.any():
                yield i[first], j[first], distance[first]


def _agreeing(
    left: Hashes, right: Hashes, mask: np.uint64, same: bool
) -> Iterator[tuple[Rows, Rows, Hashes]]:
    """Row pairs that are equal under `mask`, with their XOR, at most CHUNK at a time."""
    order = np.argsort(left & mask)
    ordered = left[order]
    if same:
        beside, besides = order, ordered
        first = np.arange(1, len(left) + 1)
        end = np.searchsorted(ordered & mask, ordered & mask, side="right")
    else:
        beside = np.argsort(right & mask)
        besides = right[beside]
        first, end = (
            np.searchsorted(besides & mask, ordered & mask, side=side) for side in ("left", "right")
        )
    shared = np.flatnonzero(end > first)
    for position, place in _expanded(shared, first[shared], end[shared]):
        yield order[position], beside[place], ordered[position] ^ besides[place]


def _expanded(position: Rows, first: Rows, end: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Each position with first, first + 1, ... end - 1, at most CHUNK of them at a time."""
    total = np.cumsum(end - first)
    for start in range(0, int(total[-1]) if len(total) else 0, CHUNK):
        stop = min(start + CHUNK, int(total[-1]))
        low, high = np.searchsorted(total, [start, stop - 1], side="right")
        part = slice(low, high + 1)
        upto = np.minimum(total[part], stop) - start
        count = np.diff(upto, prepend=0)
        skipped = np.zeros(len(count), dtype=np.int64)
        skipped[0] = end[low] - first[low] - (int(total[low]) - start)
        inside = np.arange(stop - start) - np.repeat(upto - count, count)
        yield np.repeat(position[part], count), np.repeat(first[part] + skipped, count) + inside


def _scanned(left: Hashes, right: Hashes, radius: int, same: bool) -> Iterator[Matches]:
    """Compares all, a tile of CHUNK at a time."""
    across = min(len(right), 1 << 14)
    down = max(1, CHUNK // across)
    for top in range(0, len(left), down):
        for start in range(0, len(right), across):
            if same and start + across <= top:
                continue
            tile = left[top : top + down, None] ^ right[None, start : start + across]
            distance = np.bitwise_count(tile)
            i, j = np.nonzero(distance <= radius)
            if same:
                later = j + start > i + top
                i, j = i[later], j[later]
            if len(i):
                yield i + top, j + start, distance[i, j]


def _plan(left: Hashes, right: Hashes, radius: int, same: bool) -> Plan:
    """The way with the least estimated cost."""
    scan = len(left) * len(right) * SCANNING / (2 if same else 1)
    costs = {SCAN: scan}
    for agreeing in range(1, 6):
        plan = Plan(radius + agreeing, agreeing)
        sorting = comb(*plan) * (SORTING * (len(left) + (not same) * len(right)) + STARTING)
        if plan.blocks <= 32 and sorting < min(costs.values()):
            costs[plan] = sorting + _candidates(plan, left, right) * LOOKING / (2 if same else 1)
    return min(costs, key=lambda plan: costs[plan])


def _candidates(plan: Plan, left: Hashes, right: Hashes) -> float:
    """How many pairs agree on some choice of blocks, estimated from samples and three choices."""
    one, other = (side[:: -(-len(side) // SAMPLE)] for side in (left, right))
    masks = plan.masks()
    share = 0.0
    for start in (0, (plan.blocks - plan.agreeing) // 2, plan.blocks - plan.agreeing):
        mask = np.bitwise_or.reduce(masks[start : start + plan.agreeing])
        keys = np.sort(other & mask)
        low, high = (np.searchsorted(keys, one & mask, side=side) for side in ("left", "right"))
        itself = len(one) if left is right else 0
        found = (float((high - low).sum()) - itself) / (len(one) * len(other))
        share += max(found, 0.5 ** int(np.bitwise_count(mask))) / 3
    return share * comb(*plan) * len(left) * len(right)


def _settle(
    columns: Hashes,
    rows: Rows,
    owner: Rows,
    confirm: Callable[[Rows, Rows], NDArray[np.bool_]],
    radius: int,
) -> None:
    """Decides `owner` of ascending `rows`, which no survivor outside them is related to."""
    if len(rows) < 2:
        return
    edges = _edges(columns, rows, confirm, radius)
    if edges is not None:
        _greedy(*edges, owner)
        return
    early, late = np.array_split(rows, 2)
    _settle(columns, early, owner, confirm, radius)
    early = early[owner[early] == early]
    first = np.full(len(late), len(columns))
    for i, j in _related(columns, late, early, radius):
        place = np.searchsorted(late, i)
        sooner = np.flatnonzero(j < first[place])
        yes = sooner[confirm(i[sooner], j[sooner])]
        np.minimum.at(first, place[yes], j[yes])
    owned = first < len(columns)
    owner[late[owned]] = first[owned]
    _settle(columns, late[~owned], owner, confirm, radius)


def _edges(
    columns: Hashes,
    rows: Rows,
    confirm: Callable[[Rows, Rows], NDArray[np.bool_]],
    radius: int,
) -> tuple[Rows, Rows] | None:
    """The related pairs among rows as (earlier, later), or None where they are too many to keep."""
    earlier, later, count = [], [], 0
    for i, j in _related(columns, rows, rows, radius):
        yes = confirm(i, j)
        earlier.append(np.minimum(i[yes], j[yes]))
        later.append(np.maximum(i[yes], j[yes]))
        count += len(earlier[-1])
        if count > max(EDGES, EDGES_EACH * len(rows)):
            return None
    if not earlier:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(earlier), np.concatenate(later)


def _greedy(earlier: Rows, later: Rows, owner: Rows) -> None:
    """Ties each later row, least first, to its first earlier row that survives."""
    order = np.lexsort((earlier, later))
    for a, b in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
        if owner[b] == b and owner[a] == a:
            owner[b] = a


def _related(columns: Hashes, one: Rows, other: Rows, radius: int) -> Iterator[tuple[Rows, Rows]]:
    """Row pairs (of one, of other) with column 0 of either near a column of the other; may repeat.

    With `one` the same as `other`, each pair comes in one of its two orders or in both.
    """
    width = columns.shape[1]
    wholes, derived = columns[:, 0], columns[:, 1:]
    if one is other:
        found = pairs_within(wholes[one], radius)
    else:
        found = matches(wholes[one], wholes[other], radius)
    yield from ((one[i], other[j]) for i, j, _ in found)
    if width == 1:
        return
    for i, j, _ in matches(wholes[one], derived[other].reshape(-1), radius):
        yield from _once(one[i], other[j // (width - 1)], len(columns))
    if one is not other:
        for j, i, _ in matches(wholes[other], derived[one].reshape(-1), radius):
            yield from _once(one[i // (width - 1)], other[j], len(columns))


def _once(i: Rows, j: Rows, count: int) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of different rows, each once."""
    keys = np.unique((i * count + j)[i != j])
    if len(keys):
        yield keys // count, keys % count
