"""Survivors of near-duplicates that are kept up to date while images come and go.

The rule is that of `hamming.survivors`: an image's survivor is the first surviving image before it
that it is related to; if there is none, it survives. That is a function of the set, so a change can
be followed through the images that it touches, and ends where a computation from nothing would.
"""

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

AT_ONCE = 4096  # images whose relations are sought together


def update(known: Rows, related: Callable[[Rows], tuple[Rows, Rows]]) -> Rows:
    """The survivor of each image, int64[n], rows being in the total order of images.

    known: int64[n], the survivor an image had, itself where it survived, -1 where it is new or its
    survivor left. related(rows int64[m]) gives all related pairs (one of rows, any other row), in
    any order; they may repeat. Images are settled least first; one whose survivor changes has
    those after it looked at that this concerns, so each is final when its turn comes.
    """
    owner = known.copy()
    waiting = np.flatnonzero(known < 0).tolist()
    heapq.heapify(waiting)
    queued = set(waiting)
    near: dict[int, Rows] = {}
    while waiting:
        row = heapq.heappop(waiting)
        queued.discard(row)
        if row not in near:
            near |= _relations([row, *waiting[: AT_ONCE - 1]], near, related)
        others = near.pop(row)
        for touched in _settle(owner, row, others):
            if touched not in queued:
                queued.add(touched)
                heapq.heappush(waiting, touched)
    return owner


def _settle(owner: Rows, row: int, others: Rows) -> list[int]:
    """Give a row its survivor; returns the later rows whose survivor may change by that."""
    earlier, later = others[others < row], others[others > row]
    surviving = earlier[owner[earlier] == earlier]
    before, now = owner[row], int(surviving.min()) if len(surviving) else row
    owner[row] = now
    if now == row and before != row:
        held = owner[later]
        touched = later[(held == later) | (held > row)]
    elif now != row and before == row:
        touched = later[owner[later] == row]
    else:
        return []
    return [int(other) for other in touched]


def _relations(
    rows: list[int], known: dict[int, Rows], related: Callable[[Rows], tuple[Rows, Rows]]
) -> dict[int, Rows]:
    """Of each row that is not known yet the rows that it is related to."""
    wanted = np.unique(np.array([row for row in rows if row not in known], np.int64))
    one, other = related(wanted)
    order = np.argsort(one, kind="stable")
    ends = np.searchsorted(one[order], [wanted, wanted + 1])
    return {
        row: np.unique(other[order[start:end]])
        for row, start, end in zip(wanted.tolist(), *ends.tolist(), strict=True)
    }
