"""Paid answers: kept before anything is made of them, and given to whoever asks the same again.

    responses/segments/<epoch>-<number>.jsonl    the newest, written every 64 answers or 2 s
    ledger/describe/responses/all/...            a growing table of all others

An answer is found by the key of its request, whichever dataset of the store asked. Of two answers
under one key the first holds: that of the table, then by epoch and number. One process at a time
adds answers, under the lease `responses`; the lease's epoch is in the names of its segments.
"""

import asyncio
import hashlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import growing, tables
from infra.canonical import canonical
from infra.captions import encodable
from infra.corpus import RangeFile
from infra.errors import PairmillError
from infra.growing import Grown
from infra.lease import LIFE, Lease, hold
from infra.ledger import Ledger
from infra.schema import SCHEMAS
from infra.store import NotFound, Stat, Store, listed
from infra.tables import Shard, Table
from infra.tombstones import Tombstones

_log = logging.getLogger(__name__)

SEGMENTS = "responses/segments/"
LEASE = "responses"
KIND, FAMILY = "responses", "all"
RECORDS = f"ledger/describe/{KIND}/"
FLUSH_ANSWERS, FLUSH_SECONDS = 64, 2.0
PILE = 128  # segments above which they are compacted
SMALL_SHARDS = 64  # above which they are joined
READERS = 8
CACHE_BYTES = 128 << 20  # of decoded rows
FOOTERS = 64  # of shards, kept
WHOLE = 1 << 20  # bytes of a shard up to which it is read whole, and its digest compared
BLOCK, BLOCKS = 64, 64  # rows made Python values at once, and how many such are kept
FORMAT = 1
DIGITS = 64  # of a key
_NAME = re.compile(rf"{SEGMENTS}(\d{{8,}})-(\d{{8,}})\.jsonl")
# 0 to 15 for the digits of ids, 255 for everything else.
_DIGITS = np.full(256, 255, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


class Stored(NamedTuple):
    """An answer as it is kept. `key` is the digest of its request, of which `attempt` is a part.

    Tokens and cost (10^-9 of the currency) are None where they are not known. `images` and
    `captions` are ids of what it is about: forgetting goes by them. `created` is in seconds.
    """

    key: str
    attempt: int
    status: str
    text: str
    finish_reason: str | None
    model: str
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    cost: int | None
    images: tuple[str, ...]
    captions: tuple[str, ...]
    stage: str
    created: int


class Segment(NamedTuple):
    """A small file of answers, in the order in which they came."""

    key: str
    answers: Sequence[Stored]


class DamagedSegment(PairmillError):
    """A segment holds answers that can't be vouched for."""


class View:
    """All answers of a store as they were when it was opened. For one thread at a time.

    It holds 24 bytes for each answer of the table, and a few decoded shards. What an older view,
    `before`, knows is not read again; that one must not be used any more.
    """

    def __init__(
        self,
        store: Store,
        grown: Grown,
        recent: Iterable[Stored] = (),
        before: "View | None" = None,
    ):
        self.store, self.grown = store, grown
        self._bodies, self._runs = _Bodies(store), list[_Run]()
        shards = grown.table.shards
        if before and shards[: len(before._bodies.shards)] == tuple(before._bodies.shards):
            self._bodies, self._runs = before._bodies, list(before._runs)
        new = shards[len(self._bodies.shards) :]
        with ThreadPoolExecutor(READERS) as threads:
            self._index(new, list(threads.map(lambda shard: _keys(store, shard), new)))
        self._recent: dict[str, Stored] = {}
        for stored in recent:
            if stored.key not in self:
                self._recent[stored.key] = stored

    def __contains__(self, key: str) -> bool:
        return key in self._recent or self._place(key) is not None

    @property
    def count(self) -> int:
        return len(self._recent) + sum(len(run.high) for run in self._runs)

    def get(self, key: str, attempt: int = 0) -> Stored | None:
        """The answer to a request, or None. `attempt` is in the key already.

        Raises Damaged where there is an answer that can't be read.
        """
        place = self._place(key)
        return self._read(key, place) if place else self._recent.get(key)

    async def find(self, key: str) -> Stored | None:
        """As `get`, but what is not at hand is read in a thread."""
        place = self._place(key)
        if place is None:
            return self._recent.get(key)
        if self._bodies.has(*place):
            return self._read(key, place)
        return await asyncio.to_thread(self._read, key, place)

    def _read(self, key: str, place: tuple[int, int]) -> Stored:
        stored = self._bodies.row(*place)
        if stored.key != key:
            raise tables.damaged(self.store, KIND, self._bodies.shards[place[0]])
        return stored

    def about(self, images: Iterable[str]) -> Iterator[Stored]:
        """Answers that are about all these images. Reads one column of the whole table."""
        wanted = set(images)
        for number, shard in enumerate(self._bodies.shards):
            found = growing.columns(self.store, KIND, shard, ("images",))["images"].to_pylist()
            for row in (at for at, ids in enumerate(found) if wanted <= {*ids}):
                yield self._bodies.row(number, row)
        yield from (stored for stored in self._recent.values() if wanted <= {*stored.images})

    def _place(self, key: str) -> tuple[int, int] | None:
        """Numbers of the shard and of the row in it that hold a key."""
        found = (run.find(key) for run in self._runs)
        return next((place for place in found if place), None)

    def _index(self, shards: Sequence[Shard], keys: Sequence[np.ndarray]) -> None:
        """Make shards known that come after all others, by the halves of their keys."""
        if not shards:
            return
        self._runs.append(_Run.of(keys, len(self._bodies.shards)))
        self._bodies.shards += shards
        # Runs of about one length become one, so that few stay.
        while len(self._runs) > 1 and len(self._runs[-2].high) <= 2 * len(self._runs[-1].high):
            last = self._runs.pop()
            self._runs.append(self._runs.pop().with_later(last))


class Responses(View):
    """The answers of a store, open for more, in the process that holds the lease."""

    def __init__(self, store: Store, lease: Lease, before: View | None = None):
        super().__init__(store, _table(store), before=before)
        self.lease = lease
        self._segments: list[Segment] = []
        self._waiting: dict[str, tuple[Stored, asyncio.Future[Stored]]] = {}
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._closing = False
        self._compaction: asyncio.Task[None] | None = None
        names = _segments(store)
        self._number = max((n for _, epoch, n in names if epoch == lease.epoch), default=0)
        # What processes before this one left.
        for at in range(0, len(names), PILE):
            segments = _read(store, [key for key, *_ in names[at : at + PILE]])
            self._known(self._move(segments))

    async def add(self, stored: Stored, at_once: bool = False) -> Stored:
        """Keep an answer; returns when it is stored, with the one that holds under its key.

        With `at_once` no others are waited for. Raises PairmillError where it could not be stored:
        then nothing may be made of it.
        """
        stored = _storable(stored)
        if held := self.get(stored.key):
            return held
        if stored.key not in self._waiting:
            if self._closing:
                raise RuntimeError("an answer came after the responses were closed")
            self._waiting[stored.key] = stored, asyncio.get_running_loop().create_future()
            self._some.set()
            if at_once or len(self._waiting) >= FLUSH_ANSWERS:
                self._enough.set()
        # Who is cancelled while waiting must not cancel it for others.
        return await asyncio.shield(self._waiting[stored.key][1])

    async def _keep_flushing(self) -> None:
        while self._waiting or not self._closing:
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._enough.wait()
            self._some.clear()
            self._enough.clear()
            if self._waiting:
                await self._flush()
            if self._waiting:
                self._some.set()
            if self._closing or len(self._waiting) >= FLUSH_ANSWERS:
                self._enough.set()
            if len(self._segments) > PILE and not self._compaction:
                self._compaction = asyncio.create_task(self._compact())

    async def _flush(self) -> None:
        answers = [stored for stored, _ in self._waiting.values()]
        # A number is used once: a write that failed may have been done all the same.
        self._number += 1
        segment = Segment(f"{SEGMENTS}{self.lease.epoch:08d}-{self._number:08d}.jsonl", answers)
        error: Exception | None = None
        try:
            await asyncio.to_thread(self._write, segment)
            self._segments.append(segment)
            self._recent |= {stored.key: stored for stored in answers}
        except Exception as failure:  # every `add` that waits raises it
            error = failure
        for stored in answers:
            _, future = self._waiting.pop(stored.key)
            if error:
                future.set_exception(error)
                future.exception()  # whoever waited may have been cancelled
            else:
                future.set_result(stored)

    def _write(self, segment: Segment) -> None:
        self.lease.check()
        self.store.put(segment.key, encode(segment.answers), if_absent=True)

    async def _compact(self, last: bool = False) -> None:
        """Move the segments there are into the table, while others are written."""
        segments = list(self._segments)
        try:
            self._known(await asyncio.to_thread(self._move, segments))
            del self._segments[: len(segments)]
            for stored in chain.from_iterable(segment.answers for segment in segments):
                self._recent.pop(stored.key, None)
            if last:
                await asyncio.to_thread(self._join)
        except PairmillError as error:
            # Nothing is lost: who opens the store next does it.
            _log.warning("answers could not be compacted: %s", error)
        finally:
            self._compaction = None

    def _move(self, segments: Sequence[Segment]) -> "_Moved":
        """Write the answers of segments as a shard, record it, then delete the segments."""
        moved = self._late()
        late = _Run.of(moved.keys, 0) if moved.keys else None
        firsts: dict[str, Stored] = {}
        for stored in chain.from_iterable(segment.answers for segment in segments):
            if not self._place(stored.key) and not (late and late.find(stored.key)):
                firsts.setdefault(stored.key, stored)
        if firsts:
            rows = pa.Table.from_pylist([s._asdict() for s in firsts.values()], SCHEMAS[KIND])
            shard = tables.write_shard(self.store, rows, KIND)
            self.lease.check()
            after = growing.append(Ledger(self.store), moved.grown, [shard], "")
            moved = _Moved(after, (*moved.shards, shard), (*moved.keys, _halves(rows["key"])))
        # What is not deleted now is a double, which the next process deletes.
        with suppress(PairmillError), ThreadPoolExecutor(READERS) as threads:
            self.lease.check()
            list(threads.map(lambda segment: self.store.delete(segment.key), segments))
        return moved

    def _late(self) -> "_Moved":
        """The table, with shards of a record whose write seemed to have failed."""
        grown = _table(self.store)
        shards = grown.table.shards[len(self.grown.table.shards) :]
        return _Moved(grown, shards, tuple(_keys(self.store, shard) for shard in shards))

    def _known(self, moved: "_Moved") -> None:
        self.grown = moved.grown
        self._index(moved.shards, moved.keys)

    def _join(self) -> None:
        """Join small shards, where many have come together."""
        table = growing.compact(self.store, self.grown, None, 1.0, SMALL_SHARDS)
        if table != self.grown.table:
            self.lease.check()
            self.grown = growing.save(Ledger(self.store), self.grown, table, self.grown.free_of)

    async def _close(self, flushing: "asyncio.Task[None]") -> None:
        """Store what waits."""
        self._closing = True
        self._some.set()
        self._enough.set()
        await flushing
        if self._compaction:
            await self._compaction


class _Moved(NamedTuple):
    """The table after segments were moved into it; the shards that came, with their keys."""

    grown: Grown
    shards: tuple[Shard, ...]
    keys: tuple[np.ndarray, ...]


@asynccontextmanager
async def open_responses(
    store: Store, lease: Lease, before: View | None = None
) -> AsyncIterator[Responses]:
    """The answers of a store, open for more, while a lease of the name LEASE is held.

    What a view of them from `before` knows is not read again; it must be used no more. What waits
    to be stored when the block ends, in whatever way, is stored. Raises PairmillError for a damaged
    segment that an earlier process left.
    """
    responses = await asyncio.to_thread(Responses, store, lease, before)
    flushing = asyncio.create_task(responses._keep_flushing())
    try:
        yield responses
    finally:
        await responses._close(flushing)
    if responses._segments:
        await responses._compact(last=True)


def look(store: Store) -> View:
    """The answers of a store as they are now, without a lease.

    Raises PairmillError for a damaged segment or shard.
    """
    # Segments first: one that is gone a moment later is in the table by then.
    recent = [
        s for part in _read(store, [key for key, *_ in _segments(store)]) for s in part.answers
    ]
    return View(store, _table(store), recent)


@contextmanager
def settled(store: Store) -> Iterator[None]:
    """All answers in the table and none added, for the length of a `with` block."""
    if not listed(store, "responses/") and not _table(store).table.shards:
        yield
        return
    with hold(store, LEASE, wait_s=2 * LIFE) as lease:
        Responses(store, lease)
        yield


def encode(answers: Sequence[Stored]) -> bytes:
    """A segment: a line that says how many follow, then a line an answer, each with a digest."""
    head = canonical({"format": FORMAT, "answers": len(answers)})
    return b"".join(line + b"\n" for line in (head, *map(_line, answers)))


def decode(key: str, data: bytes) -> list[Stored]:
    """The answers of a segment. Raises DamagedSegment where one of them can't be vouched for."""
    answers, lost = readable(key, data)
    if lost:
        raise DamagedSegment(
            f"{lost} of {len(answers) + lost} paid answers in {key} can't be read; restore that "
            "file from a backup, or let `pairmill verify-store --repair` give them up"
        )
    return answers


def readable(key: str, data: bytes) -> tuple[list[Stored], int]:
    """The answers of a segment that can be vouched for, and how many can't: at least one of two.

    Raises PairmillError for a segment that a newer Pairmill wrote.
    """
    head, *lines = data.splitlines() or [b""]
    about = _parsed(head)
    if about.get("format", FORMAT) != FORMAT:
        raise PairmillError(
            f"{key} has format {about['format']}, this Pairmill reads {FORMAT}; use the Pairmill "
            "that wrote the store"
        )
    answers = [stored for stored in map(_answer, lines) if stored]
    expected = about.get("answers")
    count = expected if isinstance(expected, int) else len(lines) + 1
    return answers, max(count, len(lines)) - len(answers)


def damaged(store: Store) -> tuple[int, dict[str, str]]:
    """How many segments there are, and those that are damaged, by key, with what is lost."""
    keys = [key for key, *_ in _segments(store)]
    found: dict[str, str] = {}
    for key in keys:
        with suppress(NotFound):
            answers, lost = readable(key, store.get(key))
            if lost:
                found[key] = f"{lost} of {len(answers) + lost} can't be read"
    return len(keys), found


def salvage(store: Store, key: str) -> int:
    """Leave of a damaged segment what can be read; returns how many answers are left."""
    answers, _ = readable(key, store.get(key))
    if answers:
        store.put(key, encode(answers))
    else:
        store.delete(key)
    return len(answers)


def rescue(store: Store, gone: Tombstones) -> int:
    """Record all shards of answers that there are, where the record that named them is lost.

    Those that it named once and did no more come back too: doubles, save what was forgotten, which
    is left out. Returns how many rows came back.
    """
    grown = _table(store)
    stats = sorted(listed(store, "data/"), key=lambda stat: stat.mtime)
    with ThreadPoolExecutor(READERS) as threads:
        found = [shard for shard in threads.map(lambda s: _of_answers(store, s), stats) if shard]
    all_of_them = Table(grown.table.name, tuple(dict.fromkeys([*grown.table.shards, *found])))
    table, _ = growing.clean(store, grown._replace(table=all_of_them), gone)
    growing.save(Ledger(store), grown, table, "")
    return table.rows - grown.table.rows


def _of_answers(store: Store, stat: Stat) -> Shard | None:
    """A shard that is whole and holds answers."""
    try:
        file = pa.PythonFile(RangeFile(store, stat.key, stat.size, window=1 << 16), mode="r")
        names = pq.ParquetFile(file).schema_arrow.names
        if names != SCHEMAS[KIND].names:
            return None
        data = store.get(stat.key)
        rows = pq.read_metadata(pa.BufferReader(data)).num_rows
        shard = Shard(hashlib.sha256(data).hexdigest(), rows, len(data))
    except (NotFound, pa.ArrowException, OSError):
        return None
    return shard if tables.shard_key(shard.sha256) == stat.key else None


class _Run:
    """Where answers lie: keys as two numbers, sorted by the first, with shard and row of each."""

    def __init__(self, high: np.ndarray, low: np.ndarray, shard: np.ndarray, row: np.ndarray):
        order = np.argsort(high, kind="stable")  # of two rows of one key, the first
        self.high, self.low, self.shard, self.row = (
            part[order] for part in (high, low, shard, row)
        )

    @classmethod
    def of(cls, keys: Sequence[np.ndarray], first: int) -> "_Run":
        """Of shards numbered from `first` on, by the halves of their keys, uint64[n, 2] each."""
        both = np.concatenate(keys)
        shard = np.repeat(np.arange(first, first + len(keys), dtype=np.int32), [*map(len, keys)])
        row = np.concatenate([np.arange(len(part), dtype=np.int32) for part in keys])
        return cls(both[:, 0], both[:, 1], shard, row)

    def with_later(self, other: "_Run") -> "_Run":
        names = ("high", "low", "shard", "row")
        return _Run(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))

    def find(self, key: str) -> tuple[int, int] | None:
        high, low = np.uint64(int(key[:16], 16)), np.uint64(int(key[16:32], 16))
        at = int(np.searchsorted(self.high, high))
        while at < len(self.high) and self.high[at] == high:
            if self.low[at] == low:
                return int(self.shard[at]), int(self.row[at])
            at += 1
        return None


Value = TypeVar("Value")


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


class _Bodies:
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
        return _stored(block[row % BLOCK])

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


def _table(store: Store) -> Grown:
    return growing.load(Ledger(store), KIND, FAMILY)


def _segments(store: Store) -> list[tuple[str, int, int]]:
    """Keys of all segments with epoch and number, by these."""
    names = (_NAME.fullmatch(stat.key) for stat in listed(store, SEGMENTS))
    found = [(name[0], int(name[1]), int(name[2])) for name in names if name]
    return sorted(found, key=lambda name: name[1:])


def _read(store: Store, keys: Sequence[str]) -> list[Segment]:
    """Segments by key, without those that are gone. Raises DamagedSegment."""

    def read(key: str) -> Segment | None:
        try:
            return Segment(key, decode(key, store.get(key)))
        except NotFound:
            return None

    with ThreadPoolExecutor(READERS) as threads:
        return [segment for segment in threads.map(read, keys) if segment]


def _keys(store: Store, shard: Shard) -> np.ndarray:
    """The halves of the keys of a shard. Raises Damaged for what is no key."""
    try:
        return _halves(growing.columns(store, KIND, shard, ("key",))["key"])
    except ValueError as error:
        raise tables.damaged(store, KIND, shard) from error


def _halves(keys: pa.ChunkedArray) -> np.ndarray:
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


def _storable(stored: Stored) -> Stored:
    """With text that UTF-8 can hold, which an answer's JSON need not be."""
    return stored._replace(
        text=encodable(stored.text),
        model=encodable(stored.model),
        finish_reason=None if stored.finish_reason is None else encodable(stored.finish_reason),
    )


def _line(stored: Stored) -> bytes:
    fields = stored._asdict()
    return canonical({**fields, "sum": _sum(fields)})


def _answer(line: bytes) -> Stored | None:
    """The answer of a line; None where it is not what was written."""
    fields = _parsed(line)
    said = fields.pop("sum", None)
    try:
        is_whole = fields.keys() == set(Stored._fields) and said == _sum(fields)
    except (TypeError, ValueError):
        return None
    return _stored(fields) if is_whole else None


def _sum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(fields)).hexdigest()[:16]


def _stored(fields: dict[str, Any]) -> Stored:
    lists = {name: tuple(fields[name]) for name in ("images", "captions")}
    return Stored(**(fields | lists))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
