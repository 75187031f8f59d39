"""Neighbour lists that are kept up to date, exactly, while vectors come and go.

A list keeps more entries than are looked at, and a floor: every other vector that scores above the
floor is in the list. Removals then only delete, additions only insert, and a list is searched again
when it no longer holds all of its first k.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra import neighbours
from infra.neighbours import NONE, Lists, Progress, pack, unpack

COSINES = 1 << 26  # that are held at a time, in float32
MERGED = 8192  # lists that are merged at a time
# Where more of the vectors than this are new, all lists are searched: it costs no more.
MOST_ADDED = 1 / 3

Keys = NDArray[np.int64]
Rows = NDArray[np.int64]

ALL = np.iinfo(np.int32).min  # the floor of a list that holds all others


class Kept(NamedTuple):
    """Lists over n vectors: keys int64[n, width] ascending, NONE beyond; floor int32[n].

    A key sorts as (score descending, row ascending), see `neighbours.pack`. Of entries that score
    just the floor some may be missing.
    """

    keys: Keys
    floor: NDArray[np.int32]


def scores_of(keys: Keys) -> NDArray[np.int32]:
    """Scores of packed entries; ALL for NONE."""
    return np.where(keys == NONE, ALL, -(keys >> 32)).astype(np.int32)


def view(kept: Kept, k: int, computed: int = 0) -> Lists:
    """The first k entries of every list."""
    keys = kept.keys[:, :k]
    if keys.shape[1] < k:
        keys = np.pad(keys, ((0, 0), (0, k - keys.shape[1])), constant_values=NONE)
    return Lists(*unpack(keys), computed)


def search(
    vectors: NDArray[np.float16],
    width: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[Kept, int]:
    """Lists of `width` entries for distinct vectors, float16[n, d], and the scores computed."""
    found = neighbours.search(vectors, vectors, width, same=True, device=device, progress=progress)
    return _kept(found, len(vectors)), found.computed


def update(
    before: Kept,
    place: Rows,
    vectors: NDArray[np.float16],
    k: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[Kept, int]:
    """Lists over `vectors`, float16[n, d], from lists over older ones; and the scores computed.

    place: int64[m], the row that each older vector has now, -1 where it left. The first k entries
    are those of a search of its own. Work: one product of the added vectors with all, which serves
    the lists of both, and a search for lists that ran short.
    """
    n, width = len(vectors), before.keys.shape[1]
    stayed = place[place >= 0]
    added = np.setdiff1d(np.arange(n), stayed)
    if len(added) > MOST_ADDED * n:
        return search(vectors, width, device, progress)
    kept = Kept(np.full((n, width), NONE), np.full(n, ALL, np.int32))
    kept.keys[stayed] = _moved(before.keys[place >= 0], place)
    kept.floor[stayed] = before.floor[place >= 0]
    computed = _add(kept, added, stayed, vectors, progress) if len(added) else 0
    short = _short(kept, k)
    if len(short):
        found = neighbours.search(vectors[short], vectors, width, own=short, device=device)
        kept.keys[short], kept.floor[short] = _kept(found, n)
        computed += found.computed
    return kept, computed


def _kept(found: Lists, n: int) -> Kept:
    """Lists of a search among n vectors with their floors."""
    keys = np.where(found.neighbour < 0, NONE, pack(found.score, np.maximum(found.neighbour, 0)))
    last = scores_of(keys[:, -1])
    return Kept(keys, np.full_like(last, ALL) if keys.shape[1] >= n - 1 else last)


def _moved(keys: Keys, place: Rows) -> Keys:
    """Entries under the rows of today, those that left deleted."""
    out = np.empty_like(keys)
    for part in _slices(len(keys), MERGED):
        known = keys[part] != NONE
        row = np.where(known, place[np.where(known, keys[part] & 0xFFFFFFFF, 0)], -1)
        out[part] = np.where(row < 0, NONE, keys[part] >> 32 << 32 | row)
    out.sort(axis=1)
    return out


def _add(
    kept: Kept, added: Rows, stayed: Rows, vectors: NDArray[np.float16], progress: Progress | None
) -> int:
    """Make the lists of added vectors and insert these into the lists of all others."""
    scorer = neighbours.Scorer(vectors)
    width = kept.keys.shape[1]
    window = neighbours.bound(vectors.shape[1])
    others = np.zeros(len(vectors), bool)
    others[stayed] = True
    least = np.where(others, kept.floor / neighbours.ONE - window, np.inf).astype(np.float32)
    least[others & (kept.floor == ALL)] = -np.inf
    inserted: list[tuple[Rows, Keys]] = []
    computed = 0
    for part in _slices(len(added), max(64, COSINES // len(vectors))):
        rows = added[part]
        near = scorer.products(rows)
        computed += near.size
        near[np.arange(len(rows)), rows] = -np.inf
        found = _rows_and_keys(*_best(near, width, window), rows, scorer)
        kept.keys[rows] = _first(*found, rows, width)
        kept.floor[rows] = ALL if width >= len(vectors) - 1 else scores_of(kept.keys[rows, -1])
        at, owner = np.nonzero(near >= least)
        score = scorer.scores(rows[at], owner)
        above = score > kept.floor[owner]
        inserted.append((owner[above], pack(score[above], rows[at[above]])))
        computed += len(found[0]) + len(at)
        if progress:
            progress(part.stop, len(added))
    _insert(kept, *(np.concatenate(column) for column in zip(*inserted, strict=True)))
    return computed


def _best(near: NDArray[np.float32], width: int, window: float) -> tuple[Rows, Rows]:
    """Candidates for the first `width` of each line: all within a proven error of the last."""
    if near.shape[1] - 1 <= width:
        at, other = np.nonzero(near > -np.inf)
        return at, other
    at = near.shape[1] - width
    last = np.partition(near, at, axis=1)[:, at]
    at, other = np.nonzero(near >= (last - 2 * window)[:, None])
    return at, other


def _rows_and_keys(
    at: Rows, other: Rows, rows: Rows, scorer: neighbours.Scorer
) -> tuple[Rows, Keys]:
    return rows[at], pack(scorer.scores(rows[at], other), other)


def _first(owner: Rows, keys: Keys, rows: Rows, width: int) -> Keys:
    """The first `width` keys of each of the ascending `rows`, int64[len(rows), width]."""
    line = np.searchsorted(rows, owner)
    order = np.lexsort((keys, line))
    line, keys = line[order], keys[order]
    position = np.arange(len(line)) - np.searchsorted(line, line)
    out = np.full((len(rows), width), NONE)
    kept = position < width
    out[line[kept], position[kept]] = keys[kept]
    return out


def _insert(kept: Kept, owner: Rows, keys: Keys) -> None:
    """Put keys into the lists of their owners; what falls off the end raises a list's floor."""
    width = kept.keys.shape[1]
    order = np.argsort(owner, kind="stable")
    owner, keys = owner[order], keys[order]
    lists, start, count = np.unique(owner, return_index=True, return_counts=True)
    for part in _slices(len(lists), MERGED):
        most = int(count[part].max())
        begin, end = start[part.start], start[part.stop - 1] + count[part.stop - 1]
        line = np.repeat(np.arange(part.stop - part.start), count[part])
        column = np.arange(begin, end) - np.repeat(start[part], count[part])
        merged = np.full((part.stop - part.start, width + most), NONE)
        merged[:, :width] = kept.keys[lists[part]]
        merged[line, width + column] = keys[begin:end]
        merged.sort(axis=1)
        full = merged[:, width] != NONE
        last = np.where(full, scores_of(merged[:, width - 1]), ALL)
        kept.keys[lists[part]] = merged[:, :width]
        kept.floor[lists[part]] = np.maximum(kept.floor[lists[part]], last)


def _short(kept: Kept, k: int) -> Rows:
    """Lists whose first k entries are not certain; also marks those that hold all others."""
    n = len(kept.keys)
    held = (kept.keys != NONE).sum(axis=1)
    kept.floor[held >= n - 1] = ALL
    last = scores_of(kept.keys[:, min(k, kept.keys.shape[1]) - 1])
    return np.flatnonzero((kept.floor != ALL) & (last <= kept.floor))


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))
