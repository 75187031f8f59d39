"""Exact k nearest neighbours of float16 vectors, ranked by integer score.

A float32 product finds candidates; all that lie within a proven error of the k-th are scored
again exactly, so a list depends on the set of vectors only, not on blocks, threads or device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from infra.errors import PairmillError

ONE = 1_000_000  # the score of a vector with itself
BLOCK = 2048  # a tile of float32 products (16 MiB) stays in the last-level cache
GPU_BLOCK = 16_384
GPU_FROM = 1 << 30  # products below which loading torch costs more than a GPU saves
RESIDENT = 256 << 20  # bytes of normalised float32 vectors kept rather than made again per tile
CHUNK = 4 << 20  # bytes of float64 vectors scored at a time by one thread

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Progress = Callable[[int, int], None]

_NONE = np.iinfo(np.int64).max  # sorts after every candidate


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
    offset: int | None = None,
    device: str = "auto",
    block: int | None = None,
    progress: Progress | None = None,
) -> Lists:
    """The first k rows of base by (score descending, row ascending), for every query.

    queries: float16[n, d]; base: float16[m, d]; returns Lists [n, k]. With `same`, queries are
    base, half of the product is computed, and a row is not its own neighbour. With `offset`,
    query i is row offset + i of base and is likewise left out of its own list. device: "cpu"
    (NumPy), a torch device such as "cuda" or "cuda:1" ("torch:cpu" for its CPU), or "auto".
    Neither device nor block changes the result. progress is called with (tiles done, tiles).
    Beside the result it takes about 22 bytes per query and k with `same`, and blocks otherwise.
    Raises VectorError like `scores`.

    Why it is exact: let e = `bound(d)`, v an approximate and s an exact score in units of one,
    |v - s| <= e. k candidates have v at or above the k-th largest, v_k, so s_k >= v_k - e, and a
    row with s >= s_k has v >= v_k - 2e. v_k only rises as more rows are seen, so a candidate
    below v_k - 2e is never needed. The others are scored exactly at the end, or at once where
    more of them are tied than the buffer of 2 k + 32 holds.
    """
    _check(queries, base)
    if same and (queries.shape != base.shape or offset is not None):
        raise ValueError("same=True takes the same vectors twice and no offset")
    n, m = len(queries), len(base)
    if k < 1 or not n or not m:
        return Lists(np.full((n, k), -1, np.int32), np.zeros((n, k), np.int32), 0)
    k_found = min(k, m)
    with ThreadPoolExecutor(_cores()) as threads:
        engine = _engine(device, n * m, threads)
        size = block or engine.block
        vectors = _Vectors(queries, base, 0 if same else offset)
        blocks = _Blocks(engine, base, vectors.base_lengths, size)
        if same:
            found = _search_same(vectors, blocks, k_found, progress)
        else:
            found = _search_other(vectors, blocks, k_found, progress)
    if k_found == k:
        return found
    fill = ((0, 0), (0, k - k_found))
    neighbour = np.pad(found.neighbour, fill, constant_values=-1)
    return Lists(neighbour, np.pad(found.score, fill), found.computed)


def distinct(vectors: NDArray[np.float16]) -> Groups:
    """Group the rows of float16[n, d] that hold the same vector; -0.0 is 0.0.

    Groups are ordered by their first row. Raises VectorError like `scores`.
    """
    lengths = _lengths(vectors)
    seen: dict[bytes, int] = {}
    inverse = np.empty(len(vectors), np.int64)
    for rows in _slices(len(vectors), BLOCK):
        for row, vector in enumerate(vectors[rows] + np.float16(0), rows.start):
            digest = blake2b(vector, digest_size=16).digest()
            inverse[row] = seen.setdefault(digest, len(seen))
    first = np.full(len(seen), len(vectors), np.int64)
    np.minimum.at(first, inverse, np.arange(len(vectors)))
    return Groups(first, inverse, np.where(lengths[first] > 0, ONE, 0).astype(np.int32))


def expand(lists: Lists, groups: Groups, k: int) -> Lists:
    """Turn lists over distinct vectors into lists over all rows.

    lists: `search(vectors[groups.first], same=True)` with at least k neighbours; returns Lists
    [n, k] over the n rows of groups.inverse: the first k other rows by (score descending, row
    ascending), rows with the same vector among them.

    k distinct vectors are enough: a vector that was cut ranks, by its first row, after the
    first rows of the k that were kept.
    """
    members = np.argsort(groups.inverse, kind="stable")
    starts = np.searchsorted(groups.inverse[members], np.arange(len(groups.first) + 1))
    neighbour = np.full((len(members), k), -1, np.int32)
    score = np.zeros((len(members), k), np.int32)
    for part in _slices(len(groups.first), BLOCK):
        keys = _expand_groups(lists, groups, part, members, starts, k)
        rows = members[starts[part.start] : starts[part.stop]]
        keys = keys[groups.inverse[rows] - part.start]
        keys[_rows_of(keys) == rows[:, None]] = _NONE
        keys.sort(axis=1)
        neighbour[rows], score[rows] = _unpack(keys[:, :k])
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
    keys = _pack(np.repeat(score.ravel(), count), rows)
    line = np.repeat(np.arange(len(own)), size.sum(axis=1))
    ranked = np.lexsort((keys, line))
    position = np.arange(len(line)) - np.searchsorted(line, line)
    out = np.full((len(own), k + 1), _NONE)
    kept = position <= k
    out[line[kept], position[kept]] = keys[ranked[kept]]
    return out


def _search_same(vectors: _Vectors, blocks: _Blocks, k: int, progress: Progress | None) -> Lists:
    """Every tile of the upper half serves its rows, and unless on the diagonal its columns."""
    best = _Best(vectors, slice(0, len(vectors.base)), k)
    done, total = 0, len(blocks.spans) * (len(blocks.spans) + 1) // 2
    for i, rows in enumerate(blocks.spans):
        left = blocks.load(i)
        for j, columns in enumerate(blocks.spans[i:], i):
            tile = blocks.engine.product(left, blocks.load(j))
            best.computed += _area(rows, columns)
            best.collect(blocks.engine, tile, 0, rows, columns)
            if i != j:
                best.collect(blocks.engine, tile, 1, columns, rows)
            done += 1
            if progress:
                progress(done, total)
    neighbour, score = best.finish(blocks.engine.threads)
    return Lists(neighbour, score, best.computed)


def _search_other(vectors: _Vectors, blocks: _Blocks, k: int, progress: Progress | None) -> Lists:
    spans = list(_slices(len(vectors.queries), blocks.size))
    neighbour = np.empty((len(vectors.queries), k), np.int32)
    score = np.empty_like(neighbour)
    computed = done = 0
    for rows in spans:
        best = _Best(vectors, rows, k)
        lengths = vectors.query_lengths[rows]
        left = blocks.engine.load(vectors.queries[rows], _inverse(lengths))
        for j, columns in enumerate(blocks.spans):
            tile = blocks.engine.product(left, blocks.load(j))
            best.computed += _area(rows, columns)
            best.collect(blocks.engine, tile, 0, rows, columns)
            done += 1
            if progress:
                progress(done, len(spans) * len(blocks.spans))
        neighbour[rows], score[rows] = best.finish(blocks.engine.threads)
        computed += best.computed
    return Lists(neighbour, score, computed)


class _Vectors:
    """Both sides of a search with their float64 lengths, and the exact scores between them."""

    def __init__(
        self, queries: NDArray[np.float16], base: NDArray[np.float16], offset: int | None
    ) -> None:
        self.queries, self.base, self.offset = queries, base, offset
        self.base_lengths = _lengths(base)
        self.query_lengths = self.base_lengths if queries is base else _lengths(queries)

    def pairs(self, rows: NDArray[Any], columns: NDArray[Any]) -> Ints:
        """Scores [r, w] of queries[rows] with base[columns], columns [r, w]."""
        left = self.queries[rows].astype(np.float64)
        right = self.base[columns].astype(np.float64)
        dots = np.matmul(right, left[:, :, None])[:, :, 0]
        return _round(dots, self.query_lengths[rows][:, None] * self.base_lengths[columns])

    def table(self, rows: NDArray[Any], columns: slice) -> Ints:
        """Scores [r, w] of queries[rows] with the block base[columns]."""
        left = self.queries[rows].astype(np.float64)
        dots = left @ self.base[columns].astype(np.float64).T
        return _round(dots, self.query_lengths[rows][:, None] * self.base_lengths[columns])


class _Best:
    """The candidates of the queries in `span`: approximate scores that may be among the first k.

    A line is a query counted from the start of the span. floor[line] is v_k - 2e of `search`,
    -inf until k candidates are known; what is not above it is never needed again.
    """

    def __init__(self, vectors: _Vectors, span: slice, k: int) -> None:
        n = span.stop - span.start
        self.vectors, self.start, self.k = vectors, span.start, k
        self.window = np.float32(2.001 * bound(vectors.base.shape[1]))
        self.room = 2 * k + 32
        self.value = np.full((n, self.room), -np.inf, np.float32)
        self.row = np.zeros((n, self.room), np.int32)
        self.count = np.zeros(n, np.int32)
        self.floor = np.full(n, -np.inf, np.float32)
        self.computed = 0

    def collect(self, engine: _Engine, tile: Any, axis: int, rows: slice, columns: slice) -> None:
        """Take a tile's candidates for the queries `rows` (its rows, or columns on axis 1)."""
        here = slice(rows.start - self.start, rows.stop - self.start)
        floor, count = self.floor[here], self.count[here]
        if axis == 0:
            self._hide(engine, tile, rows, columns)
        fresh = np.flatnonzero(np.isneginf(floor))
        if fresh.size:
            self._raise(engine, tile, axis, here, fresh, columns)
        line, other, value = engine.above(tile, floor, axis)
        full = np.bincount(line, minlength=len(count)) + count > self.room
        if full.any():
            self._compact(here.start + np.flatnonzero(full))
            found = np.bincount(line, minlength=len(count))
            busy = np.flatnonzero(found + count > self.room)
            if busy.size:
                self._raise(engine, tile, axis, here, busy, columns)
            kept = value > floor[line]
            line, other, value = line[kept], other[kept], value[kept]
            crowded = np.bincount(line, minlength=len(count)) + count > self.room
            if crowded.any():
                kept = ~crowded[line]
                line, other, value = line[kept], other[kept], value[kept]
                self._settle(here.start + np.flatnonzero(crowded), columns)
        self._append(here.start + line, columns.start + other, value)

    def finish(self, threads: ThreadPoolExecutor) -> tuple[Ints, Ints]:
        """Score what is left exactly; neighbour and score, int32[n, k] each."""
        neighbour = np.empty((len(self.count), self.k), np.int32)
        score = np.empty_like(neighbour)

        def part(span: slice) -> int:
            lines = np.arange(span.start, span.stop)
            self._compact(lines)
            keys = self._keys(lines)
            computed = keys.size
            if keys.shape[1] < self.k:
                keys = np.pad(keys, ((0, 0), (0, self.k - keys.shape[1])), constant_values=_NONE)
            keys.sort(axis=1)
            neighbour[span], score[span] = _unpack(keys[:, : self.k])
            return computed

        self.computed += sum(threads.map(part, _slices(len(self.count), 512)))
        return neighbour, score

    def _hide(self, engine: _Engine, tile: Any, rows: slice, columns: slice) -> None:
        """A query is not its own neighbour."""
        if self.vectors.offset is None:
            return
        shift = rows.start + self.vectors.offset - columns.start
        line = np.arange(max(0, -shift), min(rows.stop - rows.start, _length(columns) - shift))
        if line.size:
            engine.hide(tile, line, line + shift)

    def _raise(
        self,
        engine: _Engine,
        tile: Any,
        axis: int,
        here: slice,
        lines: NDArray[np.int64],
        columns: slice,
    ) -> None:
        """The k-th best of one tile alone is already a floor."""
        if _length(columns) >= self.k:
            floor = self.floor[here]
            kth = engine.kth(tile, lines, self.k, axis)
            floor[lines] = np.maximum(floor[lines], kth - self.window)

    def _append(self, line: NDArray[np.int64], row: NDArray[np.int64], value: Floats) -> None:
        """Add candidates, given in ascending order of their lines."""
        if not line.size:
            return
        head = np.flatnonzero(np.diff(line, prepend=-1))
        added = np.diff(head, append=len(line))
        place = np.arange(len(line)) - np.repeat(head, added) + self.count[line]
        self.value[line, place] = value
        self.row[line, place] = row
        self.count[line[head]] += added.astype(np.int32)

    def _compact(self, lines: NDArray[np.int64]) -> None:
        """Raise the floor to what the candidates allow and drop those that it covers."""
        order = np.argsort(-self.value[lines], axis=1)
        value = np.take_along_axis(self.value[lines], order, 1)
        self.floor[lines] = np.maximum(self.floor[lines], value[:, self.k - 1] - self.window)
        value[value <= self.floor[lines][:, None]] = -np.inf
        self.value[lines] = value
        self.row[lines] = np.take_along_axis(self.row[lines], order, 1)
        self.count[lines] = np.isfinite(value).sum(axis=1)

    def _settle(self, lines: NDArray[np.int64], columns: slice) -> None:
        """More ties than there is room for: score all of a tile exactly and keep the first k."""
        for part in _slices(len(lines), 256):
            some = lines[part]
            held = self._keys(some)
            row = np.arange(columns.start, columns.stop)
            met = _pack(self.vectors.table(self.start + some, columns), row)
            if self.vectors.offset is not None:
                met[row == (self.start + some + self.vectors.offset)[:, None]] = _NONE
            self.computed += held.size + met.size
            keys = np.concatenate([held, met], axis=1)
            keys = np.sort(np.partition(keys, self.k - 1, axis=1)[:, : self.k], axis=1)
            neighbour, score = _unpack(keys)
            self.value[some] = -np.inf
            self.value[some, : self.k] = np.where(keys == _NONE, -np.inf, score / ONE)
            self.row[some, : self.k] = neighbour
            self.count[some] = (keys != _NONE).sum(axis=1)

    def _keys(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """The candidates with their exact scores as keys, as wide as the longest line."""
        width = int(self.count[lines].max())
        keys = np.empty((len(lines), width), np.int64)
        for part in _slices(len(lines), max(1, CHUNK // (8 * max(width, 1) * self._dimension))):
            row = self.row[lines[part], :width]
            keys[part] = _pack(self.vectors.pairs(self.start + lines[part], row), row)
        keys[np.arange(width) >= self.count[lines][:, None]] = _NONE
        return keys

    @property
    def _dimension(self) -> int:
        return max(1, self.vectors.base.shape[1])


class _Engine(Protocol):
    """Where the float32 products are computed. Lines are rows of a tile, or columns on axis 1."""

    block: int
    threads: ThreadPoolExecutor

    def load(self, vectors: NDArray[np.float16], inverse: Floats) -> Any:
        """Normalised float32 rows."""

    def product(self, left: Any, right: Any) -> Any:
        """The tile left @ right.T, valid until the next call."""

    def hide(self, tile: Any, row: NDArray[np.int64], column: NDArray[np.int64]) -> None:
        """Set elements to -inf."""

    def kth(self, tile: Any, lines: NDArray[np.int64], k: int, axis: int) -> Floats:
        """The k-th largest value of some lines."""

    def above(
        self, tile: Any, floor: Floats, axis: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """What lies above its line's floor: (line ascending, other index, value)."""


class _Cpu:
    """NumPy: its BLAS uses the cores it likes for the product, `threads` scan the tile."""

    block = BLOCK

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.parts = min(_cores(), 16)
        # Fresh memory for every tile would cost more page faults than the scan costs time.
        self._tile = np.empty(0, np.float32)
        self._mask = np.empty(0, np.bool_)

    def load(self, vectors: NDArray[np.float16], inverse: Floats) -> Floats:
        out = vectors.astype(np.float32)
        out *= inverse[:, None]
        return out

    def product(self, left: Floats, right: Floats) -> Floats:
        size = len(left) * len(right)
        if self._tile.size < size:
            self._tile, self._mask = np.empty(size, np.float32), np.empty(size, np.bool_)
        tile = self._tile[:size].reshape(len(left), len(right))
        return np.matmul(left, right.T, out=tile)

    def hide(self, tile: Floats, row: NDArray[np.int64], column: NDArray[np.int64]) -> None:
        tile[row, column] = -np.inf

    def kth(self, tile: Floats, lines: NDArray[np.int64], k: int, axis: int) -> Floats:
        def part(some: NDArray[np.int64]) -> Floats:
            values = tile[some] if axis == 0 else np.ascontiguousarray(tile[:, some].T)
            at = values.shape[1] - k
            return np.partition(values, at, axis=1)[:, at]

        return np.concatenate(list(self.threads.map(part, np.array_split(lines, self.parts))))

    def above(
        self, tile: Floats, floor: Floats, axis: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        mask = self._mask[: tile.size].reshape(tile.shape)

        def part(rows: slice) -> NDArray[np.int64]:
            limit = floor[rows, None] if axis == 0 else floor[None, :]
            np.greater(tile[rows], limit, out=mask[rows])
            return np.flatnonzero(mask[rows]) + rows.start * tile.shape[1]

        step = -(-len(tile) // self.parts)
        flat = np.concatenate(list(self.threads.map(part, _slices(len(tile), step))))
        value = tile.reshape(-1)[flat]
        row, column = np.divmod(flat, tile.shape[1])
        if axis == 0:
            return row, column, value
        # 16-bit integers are sorted by radix, ten times faster.
        order = np.argsort(column.astype(np.min_scalar_type(tile.shape[1])), kind="stable")
        return column[order], row[order], value[order]


class _Torch:
    """The same on a torch device; only candidates leave it."""

    block = GPU_BLOCK

    def __init__(self, threads: ThreadPoolExecutor, device: str) -> None:
        import torch

        self.torch, self.threads, self.device = torch, threads, device
        probe = torch.full((64, 64), 1 + 2.0**-20, device=device)
        if not torch.equal(probe @ torch.eye(64, device=device), probe):
            raise PairmillError(
                "torch rounds float32 products on this device (TF32 or bfloat16), which breaks "
                "exact search: call torch.set_float32_matmul_precision('highest')"
            )

    def load(self, vectors: NDArray[np.float16], inverse: Floats) -> Any:
        rows = self._put(vectors).to(self.torch.float32)
        return rows * self._put(inverse)[:, None]

    def product(self, left: Any, right: Any) -> Any:
        return left @ right.T

    def hide(self, tile: Any, row: NDArray[np.int64], column: NDArray[np.int64]) -> None:
        tile[self._put(row), self._put(column)] = -self.torch.inf

    def kth(self, tile: Any, lines: NDArray[np.int64], k: int, axis: int) -> Floats:
        values = tile.index_select(axis, self._put(lines))
        kth: Floats = values.topk(k, dim=1 - axis).values.select(1 - axis, k - 1).cpu().numpy()
        return kth

    def above(
        self, tile: Any, floor: Floats, axis: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        lines = tile if axis == 0 else tile.T
        found = (lines > self._put(floor)[:, None]).nonzero(as_tuple=True)
        line, other = (x.cpu().numpy() for x in found)
        return line, other, lines[found].cpu().numpy()

    def _put(self, array: NDArray[Any]) -> Any:
        return self.torch.tensor(array, device=self.device)


def _engine(device: str, products: int, threads: ThreadPoolExecutor) -> _Engine:
    if device == "auto":
        device = "cpu"
        if products >= GPU_FROM:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return _Cpu(threads)
    return _Torch(threads, device.removeprefix("torch:"))


class _Blocks:
    """The base in blocks of normalised float32 rows, kept as far as RESIDENT bytes allow."""

    def __init__(
        self,
        engine: _Engine,
        base: NDArray[np.float16],
        lengths: NDArray[np.float64],
        size: int,
    ) -> None:
        self.engine, self.size, self._base = engine, size, base
        self._inverse = _inverse(lengths)
        self.spans = list(_slices(len(base), size))
        self._keep = RESIDENT // max(1, 4 * size * base.shape[1])
        self._kept: dict[int, Any] = {}

    def load(self, number: int) -> Any:
        if number in self._kept:
            return self._kept[number]
        span = self.spans[number]
        rows = self.engine.load(self._base[span], self._inverse[span])
        if number < self._keep:
            self._kept[number] = rows
        return rows


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


def _pack(score: NDArray[Any], row: NDArray[Any]) -> NDArray[np.int64]:
    """One integer that ascends as (score descending, row ascending)."""
    return -score.astype(np.int64) << 32 | row.astype(np.int64)


def _rows_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(keys == _NONE, -1, keys & 0xFFFFFFFF)


def _unpack(keys: NDArray[np.int64]) -> tuple[Ints, Ints]:
    score = np.where(keys == _NONE, 0, -(keys >> 32))
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


def _length(span: slice) -> int:
    return int(span.stop - span.start)


def _area(rows: slice, columns: slice) -> int:
    return _length(rows) * _length(columns)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
