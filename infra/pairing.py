"""Which images make pairs, and which are hard negatives of a pair, over arrays.

Images are rows in order of id; -1 stands for none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.neighbours import Scorer

Rows = NDArray[np.int64]
Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]

LEAST, MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
ABSENT = LEAST  # the score of a pair in a space that lacks one of its images
DEPTH = 8  # of each space's list outside the band, entries that are looked at before the rest
AT_ONCE = 2  # candidates judged at a time beyond those wanted


class Space(NamedTuple):
    """One space: neighbours and scores int32[n, k] of all images, and its band, both ends in it.

    `row` int32[n] is an image's vector in `scorer`; `cut` bool[n] says where the list ends before
    the band's low end does, so that it may lack some of the band.
    """

    neighbour: Ints
    score: Ints
    low: int
    high: int
    scorer: Scorer
    row: Ints
    cut: Flags


class Margins(NamedTuple):
    """How far the bands can move before a judgement of a pair changes: int32[p, spaces] each.

    Verdicts stand while below < low <= above and under <= high < over.
    """

    below: Ints
    above: Ints
    under: Ints
    over: Ints


class Judged(NamedTuple):
    """What is known of pairs' candidates: candidate int32[p, c], good bool[p, c]; -1 fills up."""

    candidate: Ints
    good: Flags
    margins: Margins


def targets(spaces: Sequence[Space], queries: slice, most: int) -> tuple[Rows, Rows]:
    """Query and target of every pair: the first images of each query's retrieved set."""
    chosen = retrieved(spaces, queries, most)
    query, place = np.nonzero(chosen >= 0)
    return query + (queries.start or 0), chosen[query, place]


def retrieved(spaces: Sequence[Space], queries: slice, most: int) -> Rows:
    """The first `most` images in the bands of each query, int64[q, most], -1 fills up.

    Spaces in turn, each its best unused one in the band.
    """
    lists = [space.neighbour[queries] for space in spaces]
    open_ = [_inside(space, queries) for space in spaces]
    count = np.zeros(len(lists[0]), np.int64)
    chosen = np.full((len(count), most), -1, np.int64)
    for _ in range(most):
        for mine, mask in zip(lists, open_, strict=True):
            lines = np.flatnonzero(mask.any(axis=1) & (count < most))
            best = mine[lines, mask[lines].argmax(axis=1)]
            chosen[lines, count[lines]] = best
            count[lines] += 1
            for other, theirs in zip(lists, open_, strict=True):
                theirs[lines] &= other[lines] != best[:, None]
    return chosen


def others_retrieved(
    spaces: Sequence[Space], queries: slice, query: Rows, target: Rows, wanted: int
) -> Ints:
    """The first `wanted` images beside the target in the query's retrieved set, int32[p, wanted].

    How MegaPairs draws hard negatives; none is compared with the target. `query` lies in `queries`.
    """
    line = retrieved(spaces, queries, wanted + 1)[query - (queries.start or 0)]
    line[line == target[:, None]] = -1
    return _to_the_front(line)[:, :wanted].astype(np.int32)


def candidates(
    spaces: Sequence[Space], queries: Rows, depth: int | None = DEPTH
) -> tuple[Ints, Flags]:
    """Candidates for negatives of each query: images of its lists in no band of it.

    Spaces in turn, best first, each image once; the first `depth` of each list. Returns
    int32[q, c] and whether that was all there are.
    """
    firsts, whole = [], np.ones(len(queries), bool)
    for space in spaces:
        outside = (space.neighbour[queries] >= 0) & ~_inside(space, queries)
        rank = np.cumsum(outside, axis=1)
        most = depth or rank.shape[1]
        taken = outside & (rank <= most)
        query, _ = np.nonzero(taken)
        first = np.full((len(queries), most), -1, np.int32)
        first[query, rank[taken] - 1] = space.neighbour[queries][taken]
        firsts.append(first)
        whole &= rank[:, -1] <= most
    width = max(first.shape[1] for first in firsts)
    padded = [np.pad(f, ((0, 0), (0, width - f.shape[1])), constant_values=-1) for f in firsts]
    line: Ints = np.stack(padded, axis=2).reshape(len(queries), width * len(spaces))
    line[_related(spaces, queries, line) | _repeated(line)] = -1
    return _to_the_front(line), whole


def judge(
    spaces: Sequence[Space], query: Rows, target: Rows, known: Judged, wanted: int
) -> tuple[Judged, int]:
    """Judge the candidates of pairs, best first, until `wanted` of each are found good.

    Good: below every band against the target, and in no band of the query. What `known` says is
    not asked again. Whole lists are gone through only for queries that run short. Returns what is
    known then of the candidates gone through, and the number of scores computed.
    """
    queries, line = np.unique(query, return_inverse=True)
    first, whole = candidates(spaces, queries)
    judged, computed = _judge(spaces, query, target, first[line], known, wanted)
    short = np.flatnonzero((judged.good.sum(axis=1) < wanted) & ~whole[line])
    if len(short):
        queries, line = np.unique(query[short], return_inverse=True)
        every, _ = candidates(spaces, queries, None)
        more, further = _judge(
            spaces, query[short], target[short], every[line], take(judged, short), wanted
        )
        judged, computed = put(judged, short, more), computed + further
    return judged, computed


def take(judged: Judged, rows: Rows) -> Judged:
    """What is known of some of the pairs."""
    margins = Margins(*(margin[rows] for margin in judged.margins))
    return Judged(judged.candidate[rows], judged.good[rows], margins)


def put(judged: Judged, rows: Rows, some: Judged) -> Judged:
    """The same with what is known of some of the pairs replaced."""
    width = max(judged.candidate.shape[1], some.candidate.shape[1])
    candidate = np.full((len(judged.candidate), width), -1, np.int32)
    good = np.zeros(candidate.shape, bool)
    every = np.arange(len(candidate))
    for part, of in ((every, judged), (rows, some)):
        candidate[part] = -1
        good[part] = False
        candidate[part, : of.candidate.shape[1]] = of.candidate
        good[part, : of.good.shape[1]] = of.good
    margins = Margins(*(margin.copy() for margin in judged.margins))
    for margin, narrowed in zip(margins, some.margins, strict=True):
        margin[rows] = narrowed
    return Judged(candidate, good, margins)


def chosen(judged: Judged, wanted: int) -> Ints:
    """The first `wanted` good candidates of each pair, int32[p, wanted]."""
    rank = np.cumsum(judged.good, axis=1)
    out = np.full((len(rank), wanted), -1, np.int32)
    pair, column = np.nonzero(judged.good & (rank <= wanted))
    out[pair, rank[pair, column] - 1] = judged.candidate[pair, column]
    return out


def nothing_known(pairs: int, spaces: int) -> Judged:
    """Of so many pairs no candidate is judged yet."""
    low, high = (np.full((pairs, spaces), end, np.int32) for end in (LEAST, MOST))
    none = np.zeros((pairs, 0))
    return Judged(
        none.astype(np.int32), none.astype(bool), Margins(low, high, low.copy(), high.copy())
    )


def stands(margins: Margins, spaces: Sequence[Space]) -> Flags:
    """Whether what is known of each pair, bool[p], holds for the bands of today."""
    low, high = (np.array([getattr(space, end) for space in spaces]) for end in ("low", "high"))
    low_stands = (margins.below < low) & (low <= margins.above)
    high_stands = (margins.under <= high) & (high < margins.over)
    return np.all(low_stands & high_stands, axis=1)


def scores(space: Space, a: NDArray[np.integer], b: NDArray[np.integer]) -> Ints:
    """Scores int32[m] of images a with images b, ABSENT where the space lacks one of them."""
    found = np.full(len(a), ABSENT, np.int32)
    both = np.flatnonzero((space.row[a] >= 0) & (space.row[b] >= 0))
    found[both] = space.scorer.scores(space.row[a[both]], space.row[b[both]])
    return found


def _judge(
    spaces: Sequence[Space], query: Rows, target: Rows, line: Ints, known: Judged, wanted: int
) -> tuple[Judged, int]:
    """Judge candidates `line`, int32[p, c], in turn."""
    verdict = _recalled(line, known)
    margins = Margins(*(part.copy() for part in known.margins))
    computed = 0
    while True:
        found = np.cumsum(verdict == 1, axis=1)
        open_ = (line >= 0) & (verdict < 0) & (found < wanted)
        pair, column = np.nonzero(open_ & (np.cumsum(open_, axis=1) <= wanted + AT_ONCE))
        if not len(pair):
            return Judged(np.where(verdict >= 0, line, -1), verdict == 1, margins), computed
        good, scored = _judged(spaces, query, target, pair, line[pair, column], margins)
        verdict[pair, column] = good
        computed += scored


def _to_the_front(line: NDArray[np.integer]) -> NDArray[Any]:
    """Each line with what is -1 moved behind the rest, whose order stays."""
    return np.take_along_axis(line, np.argsort(line < 0, axis=1, kind="stable"), 1)


def _inside(space: Space, queries: slice | Rows) -> Flags:
    score = space.score[queries]
    return (space.neighbour[queries] >= 0) & (score >= space.low) & (score <= space.high)


def _related(spaces: Sequence[Space], queries: Rows, line: Ints) -> Flags:
    """Whether candidates are in some band of their query."""
    found = np.zeros(line.shape, bool)
    for space in spaces:
        inside = np.where(_inside(space, queries), space.neighbour[queries], -2)
        for column in range(line.shape[1]):
            found[:, column] |= (line[:, column, None] == inside).any(axis=1)
    return found


def _repeated(line: Ints) -> Flags:
    found = np.zeros(line.shape, bool)
    for column in range(1, line.shape[1]):
        found[:, column] = (line[:, :column] == line[:, column, None]).any(axis=1)
    return found & (line >= 0)


def _recalled(line: Ints, known: Judged) -> NDArray[np.int8]:
    """Verdicts of candidates: 1 good, 0 not, -1 not known."""
    verdict = np.full(line.shape, -1, np.int8)
    for column in range(known.candidate.shape[1]):
        same = (line == known.candidate[:, column, None]) & (line >= 0)
        verdict = np.where(same, known.good[:, column, None].astype(np.int8), verdict)
    return verdict


def _judged(
    spaces: Sequence[Space],
    query: Rows,
    target: Rows,
    pair: Rows,
    candidate: Ints,
    margins: Margins,
) -> tuple[Flags, int]:
    """Verdicts of (pair, candidate) rows; narrows the margins of their pairs."""
    good, computed = np.ones(len(pair), bool), 0
    for number, space in enumerate(spaces):
        inside = space.row[candidate] >= 0
        asked = np.flatnonzero(good & inside & (space.row[target[pair]] >= 0))
        score = scores(space, target[pair[asked]], candidate[asked])
        good[asked] = score < space.low
        _narrow(margins.below, margins.above, number, pair[asked], score, score < space.low)
        # In a list that was cut short, a candidate may be in the query's band and not be listed.
        unseen = np.flatnonzero(good & inside & space.cut[query[pair]])
        own = scores(space, query[pair[unseen]], candidate[unseen])
        good[unseen] = (own < space.low) | (own > space.high)
        _narrow(margins.below, margins.above, number, pair[unseen], own, own < space.low)
        _narrow(margins.under, margins.over, number, pair[unseen], own, own <= space.high)
        computed += len(asked) + len(unseen)
    return good, computed


def _narrow(lower: Ints, upper: Ints, space: int, pair: Rows, score: Ints, is_lower: Flags) -> None:
    np.maximum.at(lower[:, space], pair[is_lower], score[is_lower])
    np.minimum.at(upper[:, space], pair[~is_lower], score[~is_lower])
