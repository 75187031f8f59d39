"""Where paid answers lie in the shards of their table, and those of them that were used of late."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import growing, tables
from infra.corpus import RangeFile
from infra.segments import Stored, from_row
from infra.store import NotFound, Store
from infra.tables import Shard, Table

KIND = "responses"
READERS = 8
CACHE_BYTES = 128 << 20  # of decoded rows
FOOTERS = 64  # of shards, kept
WHOLE = 1 << 20  # bytes of a shard up to which it is read whole, and its digest compared
BLOCK, BLOCKS = 64, 64  # rows made Python values at once, and how many such are kept
DIGITS = 64  # of a key
# 0 to 15 for the digits of ids, 255 for everything else.
_DIGITS = np.full(256, 255, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

Value = TypeVar("Value")


class Run:
    """Where answers lie: keys as two numbers, sorted by the first, with shard and row of each."""

    def __init__(self, high: np.ndarray, low: np.ndarray, shard: np.ndarray, row: np.ndarray):
        order = np.argsort(high, kind="stable")  # of two rows of one key, the first
        self.high, self.low, self.shard, self.row = (
            part[order] for part in (high, low, shard, row)
        )

    @classmethod
    def of(cls, keys: Sequence[np.ndarray], first: int) -> "Run":
        """Of shards numbered from `first` on, by the halves of their keys, uint64[n, 2] each."""
        both = np.concatenate(keys)
        shard = np.repeat(np.arange(first, first + len(keys), dtype=np.int32), [*map(len, keys)])
        row = np.concatenate([np.arange(len(part), dtype=np.int32) for part in keys])
        return cls(both[:, 0], both[:, 1], shard, row)

    def with_later(self, other: "Run") -> "Run":
        names = ("high", "low", "shard", "row")
        return Run(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))

    def find(self, key: str) -> tuple[int, int] | None:
        high, low = np.uint64(int(key[:16], 16)), np.uint64(int(key[16:32], 16))
        at = int(np.searchsorted(self.high, high))
        while at < len(self.high) and self.high[at] == high:
            if self.low[at] == low:
                return int(self.shard[at]), int(self.row[at])
            at += 1
        return None


class _Kept(Generic[Value]):
    """What was used of late, up to a total weight. For many threads."""

    def __init__(self, most: int):
        self._most, self._total, self._lock = most, 0, threading.Lock()
        self._items: OrderedDict[Any, tuple[Value, int]] = OrderedDict()

    def get(self, key: Any) -> Value | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Any, value: Value, weight: int = 1) -> Value:
        with self._lock:
            if key not in self._items:
                self._items[key] = value, weight
                self._total += weight
            while self._total > self._most and len(self._items) > 1:
                self._total -= self._items.popitem(last=False)[1][1]
        return value


class Bodies:
    """Rows of shards by number. Those used of late are kept: who asks again asks in that order."""

    def __init__(self, store: Store):
        self.store = store
        self.shards: list[Shard] = []
        # Who waits for rows that another thread reads finds them then.
        self._reading = [threading.Lock() for _ in range(READERS)]
        self._footers: _Kept[tuple[Any, np.ndarray]] = _Kept(FOOTERS)
        self._groups: _Kept[pa.Table] = _Kept(CACHE_BYTES)
        self._blocks: _Kept[list[dict[str, Any]]] = _Kept(BLOCKS)

    def has(self, shard: int, row: int) -> bool:
        """Whether a row is at hand."""
        return self._blocks.get((shard, row // BLOCK)) is not None

    def row(self, shard: int, row: int) -> Stored:
        """A row, read where it is not at hand. Raises Damaged."""
        key = shard, row // BLOCK
        block = self._blocks.get(key)
        if block is None:
            with self._reading[shard % READERS]:
                block = self._blocks.get(key)
                if block is None:
                    rows = self._rows(shard, key[1] * BLOCK).to_pylist()
                    block = self._blocks.put(key, rows)
        return from_row(block[row % BLOCK])

    def _rows(self, number: int, first: int) -> pa.Table:
        """Up to BLOCK rows from `first` on."""
        shard, parts, at = self.shards[number], [], first
        end = min(first + BLOCK, shard.rows)
        try:
            while at < end:
                part, start = self._group(number, at)
                parts.append(part.slice(at - start, end - at))
                at += parts[-1].num_rows
        except (NotFound, pa.ArrowException, OSError) as error:
            gone = isinstance(error, NotFound)
            raise tables.damaged(self.store, KIND, shard, gone) from error
        return pa.concat_tables(parts)

    def _group(self, number: int, row: int) -> tuple[pa.Table, int]:
        """The group of rows that holds a row, and the number of its first."""
        shard = self.shards[number]
        if shard.bytes <= WHOLE:
            rows = self._groups.get((number, 0))
            if rows is None:
                rows = tables.read(self.store, Table(KIND, (shard,)))
                self._groups.put((number, 0), rows, rows.nbytes)
            return rows, 0
        file = pa.PythonFile(RangeFile(self.store, tables.shard_key(shard.sha256), shard.bytes))
        about, starts = self._footers.get(number) or self._footers.put(number, _footer(file))
        group = int(np.searchsorted(starts, row, side="right")) - 1
        rows = self._groups.get((number, group))
        if rows is None:
            opened = pq.ParquetFile(file, metadata=about, page_checksum_verification=True)
            rows = opened.read_row_group(group, use_threads=False)
            self._groups.put((number, group), rows, rows.nbytes)
        return rows, int(starts[group])


def _footer(file: pa.PythonFile) -> tuple[Any, np.ndarray]:
    """What the footer of a shard says, and the first row of each group."""
    about = pq.read_metadata(file)
    counts = [about.row_group(at).num_rows for at in range(about.num_row_groups)]
    return about, np.cumsum([0, *counts[:-1]])


def keys_of(store: Store, shard: Shard) -> np.ndarray:
    """The halves of the keys of a shard. Raises Damaged for what is no key."""
    try:
        return halves(growing.columns(store, KIND, shard, ("key",))["key"])
    except ValueError as error:
        raise tables.damaged(store, KIND, shard) from error


def halves(keys: pa.ChunkedArray) -> np.ndarray:
    """The first 32 digits of keys as two numbers each, uint64[n, 2]. Raises ValueError."""
    array = keys.cast(pa.large_binary()).combine_chunks()
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, "<i8")[array.offset : array.offset + len(array) + 1]
    if array.null_count or (np.diff(ends) != DIGITS).any():
        raise ValueError("a key is not of 64 digits")
    text = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]].reshape(-1, DIGITS)
    digits = _DIGITS[text]
    if digits.max(initial=0) > 15:
        raise ValueError("a key is not hexadecimal")
    half = digits[:, : DIGITS // 2]
    return np.ascontiguousarray(half[:, ::2] << 4 | half[:, 1::2]).view(">u8").astype(np.uint64)
