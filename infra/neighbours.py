"""Exact k nearest neighbours of float16 vectors, ranked by integer score.

FAISS finds candidates in float32; all that lie within a proven error of the k-th are scored again
exactly, so a list depends on the set of vectors only, not on blocks, threads or device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.errors import PairmillError

ONE = 1_000_000  # the score of a vector with itself
BLOCK = 4096  # queries searched at a time
TILE = 4096  # rows of a FAISS tile; its own 1024 costs a quarter more at k = 50
EXTRA = 12  # candidates beyond k that the first search asks for
WIDEST = 2048  # candidates that FAISS gives on a GPU at most
TF32 = 2.0**-9  # relative error of a product whose factors a GPU may round to 10 bits
SIGNED = 512  # vectors that are signed at a time, so that they stay in the cache
CHUNK = 4 << 20  # bytes of float64 vectors scored at a time by one thread

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Progress = Callable[[int, int], None]

NONE = np.iinfo(np.int64).max  # sorts after every candidate


class VectorError(PairmillError):
    """Vectors that can't be scored exactly."""


class Lists(NamedTuple):
    """Neighbour lists: row numbers and scores [n, k], best first, -1 and 0 where there are fewer.

    Both are int32, ordered by (score descending, row ascending). `computed` counts the dot
    products that it took.
    """

    neighbour: Ints
    score: Ints
    computed: int


class Groups(NamedTuple):
    """Rows with equal vectors: `first` int64[g] ascending, `inverse` int64[n], `own` int32[g].

    `own` is the score of a group's vector with itself: 1,000,000, or 0 for the zero vector.
    """

    first: NDArray[np.int64]
    inverse: NDArray[np.int64]
    own: Ints


def bound(dimension: int) -> float:
    """The most by which an approximate cosine differs from the score it stands for, times 1e-6.

    With u = 2^-24, vectors a, b of length 1, and d dimensions:
    - normalising in float32 (round 1 / length, multiply) makes each component wrong by at most
      2u of itself (to first order), hence the exact product of the rounded vectors by at most
      4u sum |a_i b_i| <= 4u;
    - a float32 product summed in any order, fused or not, errs by at most
      d u / (1 - d u) * sum |a_i b_i| (Higham, Accuracy and Stability, section 3.1);
    - rint moves a score by at most 0.5e-6, and comparing in float32 costs less than 2u more.
    Components are 2^-29 or 0 at least, so nothing underflows. The second-order terms are covered
    by the factor 1.01 for d <= 65,536. At d = 512 the bound is 32 units of score.
    """
    return 1.01 * (dimension + 8) * 2.0**-24 + 0.5e-6


def scores(a: NDArray[np.float16], b: NDArray[np.float16]) -> Ints:
    """The scores rint(cos * 10^6) of the rows of a with the rows of b, 0 for a zero vector.

    a, b: float16[m, d]; returns int32[m]. Raises VectorError where a vector is not finite or is
    longer than sqrt(32).

    It doesn't depend on the order of summation: a float16 is a multiple of 2^-24, so a product
    and every partial sum are multiples of 2^-48; by Cauchy-Schwarz no partial sum exceeds
    |a| |b| <= 32 = 2^5; so each has at most 53 bits and float64 holds it exactly. What follows
    (square root, product, division, rint) is one correctly rounded operation per element.
    """
    _check(a, b)
    lengths_a, lengths_b = _lengths(a), _lengths(b)

    def part(rows: slice) -> Ints:
        left, right = a[rows].astype(np.float64), b[rows].astype(np.float64)
        return _round(np.einsum("ij,ij->i", left, right), lengths_a[rows] * lengths_b[rows])

    return _join(part, len(a), a.shape[1])


def search(
    queries: NDArray[np.float16],
    base: NDArray[np.float16],
    k: int,
    *,
    same: bool = False,
    own: NDArray[np.int64] | None = None,
    device: str = "auto",
    block: int | None = None,
    progress: Progress | None = None,
) -> Lists:
    """The first k rows of base by (score descending, row ascending), for every query.

    queries: float16[n, d]; base: float16[m, d]; returns Lists [n, k]. With `same`, queries are
    base and a row is not its own neighbour. With `own`, int64[n], query i is row own[i] of base
    and is likewise left out of its own list. device: "cpu", "cuda" or "auto". Neither device nor
    block changes the result. progress is called with (queries done, queries). Raises VectorError
    like `scores`.

    Why it is exact: let e = `bound(d)`, v an approximate and s an exact score in units of one,
    |v - s| <= e. k candidates have v at or above the k-th largest, v_k, so s_k >= v_k - e, and a
    row with s >= s_k has v >= v_k - 2e. A query whose last candidate lies below v_k - 2e has seen
    all such rows; the others are searched wider, and at last scored against every row.
    """
    _check(queries, base)
    if same and (queries.shape != base.shape or own is not None):
        raise ValueError("same=True takes the same vectors twice and no rows of its own")
    n, m = len(queries), len(base)
    if k < 1 or not n or not m:
        return Lists(np.full((n, k), -1, np.int32), np.zeros((n, k), np.int32), 0)
    vectors = _Vectors(queries, base, np.arange(n) if same else own)
    engine = _Flat(vectors, device)
    keys = np.full((n, k), NONE)
    for span in _slices(n, block or BLOCK):
        keys[span] = engine.first(np.arange(span.start, span.stop), k, k + EXTRA)
        if progress:
            progress(span.stop, n)
    neighbour, score = unpack(keys)
    return Lists(neighbour, score, engine.computed)


class _Flat:
    """A FAISS flat index over the base, and the exact layer on top of it."""

    def __init__(self, vectors: _Vectors, device: str) -> None:
        import faiss

        self.vectors, self.computed = vectors, 0
        faiss.cvar.distance_compute_blas_database_bs = TILE
        dimension = vectors.base.shape[1]
        self.index: Any = faiss.IndexFlatIP(dimension)
        on_gpu = device == "cuda" or (device == "auto" and _gpus(faiss) > 0)
        if on_gpu:
            self.index = faiss.index_cpu_to_all_gpus(self.index)
        self.window = 2 * (bound(dimension) + (TF32 if on_gpu else 0.0))
        for span in _slices(len(vectors.base), 1 << 16):
            self.index.add(_normalised(vectors.base[span], vectors.base_lengths[span]))

    def first(self, lines: NDArray[np.int64], k: int, width: int) -> NDArray[np.int64]:
        """Keys int64[len(lines), k] of the first k rows of the queries `lines`, NONE beyond."""
        m = len(self.vectors.base)
        if width > WIDEST and width < m:
            return self._against_all(lines, k)
        value, row, last = self._candidates(lines, min(width, m))
        place = min(k, value.shape[1]) - 1
        kth = -np.partition(-value, place, axis=1)[:, place]
        keys = self._keys(lines, row, value >= (kth - self.window)[:, None])
        keys = np.pad(keys, ((0, 0), (0, max(0, k - keys.shape[1]))), constant_values=NONE)[:, :k]
        if width < m:
            open_ = np.flatnonzero(last >= kth - self.window)
            for part in _slices(len(open_), max(1, (1 << 22) // (8 * width))):
                keys[open_[part]] = self.first(lines[open_[part]], k, 8 * width)
        return keys

    def _candidates(
        self, lines: NDArray[np.int64], width: int
    ) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Approximate scores, rows, and the last score, which no row that is missing exceeds.

        The query itself has the score -inf, also where it comes last.
        """
        vectors = self.vectors
        wide = _normalised(vectors.queries[lines], vectors.query_lengths[lines])
        value, row = self.index.search(wide, width)
        self.computed += len(lines) * len(vectors.base)
        last = value[:, -1].copy()
        if vectors.own is not None:
            value[row == vectors.own[lines][:, None]] = -np.inf
        return value, row, last

    def _keys(
        self, lines: NDArray[np.int64], row: NDArray[np.int64], near: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Exact keys of the candidates that are near enough, ascending."""
        vectors, keys = self.vectors, np.full(row.shape, NONE)
        if vectors.own is not None:
            near = near & (row != vectors.own[lines][:, None])
        at, column = np.nonzero(near)
        found = row[at, column]
        self.computed += len(at)
        keys[at, column] = pack(vectors.pairs(lines[at], found), found)
        keys.sort(axis=1)
        return keys

    def _against_all(self, lines: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Keys of the first k rows from the exact scores of every row."""
        vectors, best = self.vectors, np.full((len(lines), 0), NONE)
        for columns in _slices(len(vectors.base), 1 << 14):
            rows = np.arange(columns.start, columns.stop)
            keys = pack(vectors.table(lines, columns), rows[None, :])
            if vectors.own is not None:
                keys[rows[None, :] == vectors.own[lines][:, None]] = NONE
            best = np.sort(np.concatenate([best, keys], axis=1), axis=1)[:, :k]
            self.computed += keys.size
        return best


def _gpus(faiss: Any) -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


def _normalised(vectors: NDArray[np.float16], lengths: NDArray[np.float64]) -> Floats:
    return np.ascontiguousarray(vectors.astype(np.float32) * _inverse(lengths)[:, None])


def distinct(vectors: NDArray[np.float16]) -> Groups:
    """Group the rows of float16[n, d] that hold the same vector; -0.0 is 0.0.

    Groups are ordered by their first row.
    """
    plain = np.ascontiguousarray(vectors).view(np.uint16)
    signature = np.empty(len(plain), np.uint64)
    lanes = -(-plain.shape[1] // 4)  # four numbers to a word
    some = np.random.default_rng(0).integers(1, 2**63, lanes, np.uint64) | np.uint64(1)
    words = np.zeros((SIGNED, 4 * lanes), np.uint16)
    for part in _slices(len(plain), SIGNED):
        bits = words[: part.stop - part.start]
        bits[:, : plain.shape[1]] = np.where(plain[part] == 0x8000, 0, plain[part])  # -0.0 is 0.0
        signature[part] = bits.view(np.uint64) @ some
    _, place, count = np.unique(signature, return_inverse=True, return_counts=True)
    # Vectors of one signature are few; only those are compared.
    shared = np.flatnonzero(count[place] > 1)
    bits = np.where(plain[shared] == 0x8000, 0, plain[shared])
    first_of: dict[bytes, int] = {}
    firsts = np.arange(len(plain))
    for row, vector in zip(shared.tolist(), bits, strict=True):
        firsts[row] = first_of.setdefault(vector.tobytes(), row)
    first, inverse = np.unique(firsts, return_inverse=True)
    zero = ~np.where(plain[first] == 0x8000, 0, plain[first]).any(axis=1)
    return Groups(first, inverse, np.where(zero, 0, ONE).astype(np.int32))


def expand(lists: Lists, groups: Groups, k: int) -> Lists:
    """Turn lists over distinct vectors into lists over all rows.

    lists: `search(vectors[groups.first], same=True)` with at least k neighbours; returns Lists
    [n, k] over the n rows of groups.inverse: the first k other rows by (score descending, row
    ascending), rows with the same vector among them.

    k distinct vectors are enough: a vector that was cut ranks, by its first row, after the
    first rows of the k that were kept.
    """
    if len(groups.first) == len(groups.inverse):
        return Lists(lists.neighbour[:, :k], lists.score[:, :k], lists.computed)
    members = np.argsort(groups.inverse, kind="stable")
    starts = np.searchsorted(groups.inverse[members], np.arange(len(groups.first) + 1))
    neighbour = np.full((len(members), k), -1, np.int32)
    score = np.zeros((len(members), k), np.int32)
    for part in _slices(len(groups.first), BLOCK):
        keys = _expand_groups(lists, groups, part, members, starts, k)
        rows = members[starts[part.start] : starts[part.stop]]
        keys = keys[groups.inverse[rows] - part.start]
        keys[_rows_of(keys) == rows[:, None]] = NONE
        keys.sort(axis=1)
        neighbour[rows], score[rows] = unpack(keys[:, :k])
    return Lists(neighbour, score, lists.computed)


def _expand_groups(
    lists: Lists,
    groups: Groups,
    part: slice,
    members: NDArray[np.int64],
    starts: NDArray[np.int64],
    k: int,
) -> NDArray[np.int64]:
    """The first k + 1 rows of each group's list, itself included, as keys [groups, k + 1]."""
    own = np.arange(part.start, part.stop)
    vector = np.column_stack([own, lists.neighbour[part]])
    score = np.column_stack([groups.own[part], lists.score[part]])
    size = np.where(vector >= 0, np.minimum(np.diff(starts)[vector], k + 1), 0)
    order = np.argsort(-score, axis=1, kind="stable")
    vector, score, size = (np.take_along_axis(x, order, 1) for x in (vector, score, size))
    # Once k + 1 rows are certain, only what ties with the last of them can still come in.
    before = np.cumsum(size, axis=1) - size
    last = np.where(before <= k, score, ONE + 1).min(axis=1)
    size = np.where(score >= last[:, None], size, 0)
    count = size.ravel()
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    rows = members[np.repeat(starts[vector.ravel()], count) + within]
    keys = pack(np.repeat(score.ravel(), count), rows)
    line = np.repeat(np.arange(len(own)), size.sum(axis=1))
    ranked = np.lexsort((keys, line))
    position = np.arange(len(line)) - np.searchsorted(line, line)
    out = np.full((len(own), k + 1), NONE)
    kept = position <= k
    out[line[kept], position[kept]] = keys[ranked[kept]]
    return out


class Scorer:
    """Exact scores between rows of float16[n, d]. Raises VectorError like `scores`."""

    def __init__(self, vectors: NDArray[np.float16]) -> None:
        _check(vectors, vectors)
        self._vectors = _Vectors(vectors, vectors, None)
        self._wide: Floats | None = None

    def scores(self, rows: NDArray[Any], others: NDArray[Any]) -> Ints:
        """Scores int32[m] of rows with others, both int64[m], one by one."""
        return self._vectors.pairs(rows, others)

    def at_least(
        self, rows: NDArray[Any], others: NDArray[Any], least: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All pairs (one of rows, one of others) whose score is at least `least`, in any order."""
        wide, found = self.normalised(), [(rows[:0], others[:0])]
        limit = least / ONE - bound(wide.shape[1])
        for part in _slices(len(rows), max(1, (1 << 25) // max(1, len(others)))):
            i, j = np.nonzero(wide[rows[part]] @ wide[others].T >= limit)
            i, j = rows[part][i], others[j]
            close = self.scores(i, j) >= least
            found.append((i[close], j[close]))
        one, other = (np.concatenate(column) for column in zip(*found, strict=True))
        return one, other

    def products(self, rows: NDArray[Any]) -> Floats:
        """Cosines of some rows with all, float32[m, n], that err by `bound(d)` at most."""
        base, lengths = self._vectors.base, self._vectors.base_lengths
        left = _normalised(base[rows], lengths[rows])
        out = np.empty((len(rows), len(base)), np.float32)
        for part in _slices(len(base), 1024):
            np.matmul(left, _normalised(base[part], lengths[part]).T, out=out[:, part])
        return out

    def normalised(self) -> Floats:
        """The vectors at length 1 in float32."""
        if self._wide is None:
            self._wide = _normalised(self._vectors.base, self._vectors.base_lengths)
        return self._wide


class _Vectors:
    """Both sides of a search with their float64 lengths, and the exact scores between them."""

    def __init__(
        self,
        queries: NDArray[np.float16],
        base: NDArray[np.float16],
        own: NDArray[np.int64] | None,
    ) -> None:
        self.queries, self.base, self.own = queries, base, own
        self.base_lengths = _lengths(base)
        self.query_lengths = self.base_lengths if queries is base else _lengths(queries)

    def pairs(self, rows: NDArray[Any], columns: NDArray[Any]) -> Ints:
        """Scores int32[r] of queries[rows] with base[columns], row by row."""

        def part(span: slice) -> Ints:
            left = self.queries[rows[span]].astype(np.float64)
            right = self.base[columns[span]].astype(np.float64)
            lengths = self.query_lengths[rows[span]] * self.base_lengths[columns[span]]
            return _round(np.einsum("ij,ij->i", left, right), lengths)

        return _join(part, len(rows), self.base.shape[1])

    def table(self, rows: NDArray[Any], columns: slice) -> Ints:
        """Scores [r, w] of queries[rows] with the block base[columns]."""
        left = self.queries[rows].astype(np.float64)
        dots = left @ self.base[columns].astype(np.float64).T
        return _round(dots, self.query_lengths[rows][:, None] * self.base_lengths[columns])


def _check(a: NDArray[Any], b: NDArray[Any]) -> None:
    for vectors in (a, b):
        if vectors.dtype != np.float16 or vectors.ndim != 2:
            raise ValueError(f"vectors are float16[n, d], not {vectors.dtype}{vectors.shape}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"vectors of {a.shape[1]} and {b.shape[1]} dimensions")


def _lengths(vectors: NDArray[np.float16]) -> NDArray[np.float64]:
    """Lengths float64[n]: the square root, correctly rounded, of an exact sum."""

    def part(rows: slice) -> NDArray[np.float64]:
        wide = vectors[rows].astype(np.float64)
        return np.einsum("ij,ij->i", wide, wide)

    squared = _join(part, len(vectors), vectors.shape[1])
    wrong = np.flatnonzero(~(squared <= 32))
    if wrong.size:
        raise VectorError(
            f"vector {wrong[0]} has squared length {squared[wrong[0]]:g}, more than 32 or no "
            "number: normalise vectors to length 1 before they are stored as float16"
        )
    return np.sqrt(squared)


def _inverse(lengths: NDArray[np.float64]) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(lengths > 0, 1 / lengths, 0).astype(np.float32)


def _round(dots: NDArray[np.float64], lengths: NDArray[np.float64]) -> Ints:
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return np.rint(cosines * ONE).astype(np.int32)


def pack(score: NDArray[Any], row: NDArray[Any]) -> NDArray[np.int64]:
    """One integer that ascends as (score descending, row ascending)."""
    return -score.astype(np.int64) << 32 | row.astype(np.int64)


def _rows_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(keys == NONE, -1, keys & 0xFFFFFFFF)


def unpack(keys: NDArray[np.int64]) -> tuple[Ints, Ints]:
    """Rows, -1 for NONE, and scores, 0 for NONE."""
    score = np.where(keys == NONE, 0, -(keys >> 32))
    return _rows_of(keys).astype(np.int32), score.astype(np.int32)


def _join(part: Callable[[slice], NDArray[Any]], n: int, dimension: int) -> NDArray[Any]:
    """part over slices of n rows, on all cores."""
    slices = list(_slices(n, max(1, CHUNK // (8 * max(1, dimension)))))
    if len(slices) <= 1:
        return part(slice(0, n))
    with ThreadPoolExecutor(_cores()) as threads:
        return np.concatenate(list(threads.map(part, slices)))


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
