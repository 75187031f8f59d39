"""Paid answers: kept before anything is made of them, and given to whoever asks the same again.

    responses/segments/<epoch>-<number>.jsonl    the newest, written every 64 answers or 2 s
    ledger/describe/responses/all/...            a growing table of all others

An answer is found by the key of its request, whichever dataset of the store asked. Of two answers
under one key the first holds: that of the table, then by epoch and number. One process at a time
adds answers, under the lease `responses`; the lease's epoch is in the names of its segments.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import growing, tables
from infra.answer_index import KIND, READERS, Bodies, Run, halves, keys_of
from infra.corpus import RangeFile
from infra.errors import PairmillError
from infra.growing import Grown
from infra.lease import LIFE, Lease, hold
from infra.ledger import Ledger
from infra.schema import SCHEMAS
from infra.segments import Segment, Stored, decode, encode, readable, storable
from infra.store import NotFound, Stat, Store, listed
from infra.tables import Shard, Table
from infra.tombstones import Tombstones

_log = logging.getLogger(__name__)

SEGMENTS = "responses/segments/"
LEASE = "responses"
FAMILY = "all"
RECORDS = f"ledger/describe/{KIND}/"
FLUSH_ANSWERS, FLUSH_SECONDS = 64, 2.0
PILE = 128  # segments above which they are compacted
SMALL_SHARDS = 64  # above which they are joined
_NAME = re.compile(rf"{SEGMENTS}(\d{{8,}})-(\d{{8,}})\.jsonl")


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
        self._bodies, self._runs = Bodies(store), list[Run]()
        shards = grown.table.shards
        if before and shards[: len(before._bodies.shards)] == tuple(before._bodies.shards):
            self._bodies, self._runs = before._bodies, list(before._runs)
        new = shards[len(self._bodies.shards) :]
        with ThreadPoolExecutor(READERS) as threads:
            self._index(new, list(threads.map(lambda shard: keys_of(store, shard), new)))
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
        self._runs.append(Run.of(keys, len(self._bodies.shards)))
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
        stored = storable(stored)
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
        error: BaseException | None = None
        try:
            await asyncio.to_thread(self._write, segment)
            self._segments.append(segment)
            self._recent |= {stored.key: stored for stored in answers}
        except BaseException as failure:  # every `add` that waits raises it
            error = failure
        for stored in answers:
            _, future = self._waiting.pop(stored.key)
            if error:
                future.set_exception(error)
                future.exception()  # whoever waited may have been cancelled
            else:
                future.set_result(stored)
        if error and not isinstance(error, Exception):
            raise error

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
        late = Run.of(moved.keys, 0) if moved.keys else None
        firsts: dict[str, Stored] = {}
        for stored in chain.from_iterable(segment.answers for segment in segments):
            if not self._place(stored.key) and not (late and late.find(stored.key)):
                firsts.setdefault(stored.key, stored)
        if firsts:
            rows = pa.Table.from_pylist([s._asdict() for s in firsts.values()], SCHEMAS[KIND])
            shard = tables.write_shard(self.store, rows, KIND)
            self.lease.check()
            after = growing.append(Ledger(self.store), moved.grown, [shard], "")
            moved = _Moved(after, (*moved.shards, shard), (*moved.keys, halves(rows["key"])))
        # What is not deleted now is a double, which the next process deletes.
        with suppress(PairmillError), ThreadPoolExecutor(READERS) as threads:
            self.lease.check()
            list(threads.map(lambda segment: self.store.delete(segment.key), segments))
        return moved

    def _late(self) -> "_Moved":
        """The table, with shards of a record whose write seemed to have failed."""
        grown = _table(self.store)
        shards = grown.table.shards[len(self.grown.table.shards) :]
        return _Moved(grown, shards, tuple(keys_of(self.store, shard) for shard in shards))

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
