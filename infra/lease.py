"""Leases: of several processes that want the same part of a store, one at a time has it.

    leases/<name>.json    who has it, or nobody; and an epoch, a number that rises with every holder

A lease that was not renewed for its life is over, by the store's own clock; that of a process that
has ended is over at once, where this can be seen: on the same machine. The object stays at the end,
for its epoch; where somebody has deleted or damaged it, epochs go on from the store's time in
seconds, which so many holders have never reached. So an epoch never comes twice.
"""

import asyncio
import platform
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from infra import pins, signs
from infra.canonical import canonical
from infra.errors import PairmillError
from infra.store import Conflict, NotFound, Store, StoreError
from infra.text import plain

PREFIX = "leases/"
LIFE = 60.0  # seconds
WAIT = 6 * 3600.0
TICK = 0.5
FORMAT = 1


@dataclass
class Lease:
    """A lease while it is held. `epoch` is higher than that of every holder before."""

    store: Store
    name: str
    life: float
    epoch: int
    renewed: float
    holder: str = field(default_factory=lambda: uuid4().hex)
    lost: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raises PairmillError where somebody else may have it by now.

        One that is late is renewed first: while nobody took it, it is ours still.
        """
        if self._is_late():
            with suppress(StoreError):
                self.renew()
        if self.lost or self._is_late():
            raise PairmillError(
                f"this build's lease on the {self.name} of {self.store.uri} could not be renewed "
                f"for {0.8 * self.life:.0f} s, so another build may have it; run this one again"
            )

    def renew(self) -> None:
        """Write the sign of life once more, unless another holder is there already."""
        with self.lock:
            while not self.lost:
                start, found = signs.now(), _read(self.store, self.name)
                if found.sign.get("holder") != self.holder:
                    self.lost = True
                    return
                with suppress(Conflict):
                    self._put(found.etag)
                    self.renewed = start
                    return

    def release(self) -> None:
        """Leave it to others at once; the epoch stays."""
        with self.lock:
            found = _read(self.store, self.name)
            if found.sign.get("holder") == self.holder:
                free = canonical({"format": FORMAT, "epoch": self.epoch})
                self.store.put(_key(self.name), free, if_match=found.etag)
            self.lost = True

    def _put(self, etag: str | None) -> None:
        """Write this holder in the place of what has this etag, or of nothing. Raises Conflict."""
        body = {
            "format": FORMAT,
            "epoch": self.epoch,
            "holder": self.holder,
            "life_ms": int(self.life * 1000),
            # Two signs are never the same bytes: on S3 an etag names content.
            "sign": uuid4().hex,
            "host": platform.node(),
            **signs.this_process(),
        }
        condition: dict[str, Any] = {"if_match": etag} if etag else {"if_absent": True}
        self.store.put(_key(self.name), canonical(body), **condition)

    def _is_late(self) -> bool:
        return signs.now() - self.renewed > 0.8 * self.life


class Found(NamedTuple):
    """A lease as it stands in the store; no etag where it was never taken."""

    etag: str | None
    sign: dict[str, Any]
    written: float

    @property
    def epoch(self) -> int:
        epoch = self.sign.get("epoch")
        return epoch if isinstance(epoch, int) else 0

    @property
    def who(self) -> str:
        host = plain(str(self.sign.get("host") or "an unknown machine"), 80)
        return f"process {self.sign.get('process', '?')} on {host}"


@contextmanager
def hold(
    store: Store,
    name: str,
    life: float = LIFE,
    wait_s: float = WAIT,
    on_wait: Callable[[str], None] = lambda who: None,
) -> Iterator[Lease]:
    """Have a lease for the length of a `with` block, once nobody else has it.

    `on_wait` is told who has it, once for each holder. Raises PairmillError after `wait_s` seconds.

    Without conditional writes (`store.single_writer: true`) waiting for a holder works too, and one
    who was overtaken learns it from the next renewal; but of two that begin in the same moment both
    can have it for a fifth of `life`. That there are no two is then the user's promise.
    """
    waiting = _Waiting(store, name, wait_s, on_wait)
    while not (lease := _taken(store, name, life, waiting)):
        time.sleep(min(TICK, life / 5))
    try:
        with signs.renewed("lease", life / 5, lease.renew):
            yield lease
    finally:
        _let_go(lease)


@asynccontextmanager
async def hold_async(
    store: Store,
    name: str,
    life: float = LIFE,
    wait_s: float = WAIT,
    on_wait: Callable[[str], None] = lambda who: None,
) -> AsyncIterator[Lease]:
    """As `hold`; who is cancelled waits no longer, and leaves no lease behind."""
    waiting = _Waiting(store, name, wait_s, on_wait)
    while True:
        trying = asyncio.create_task(asyncio.to_thread(_taken, store, name, life, waiting))
        try:
            lease = await asyncio.shield(trying)
        except asyncio.CancelledError:
            if lease := await trying:
                await asyncio.to_thread(_let_go, lease)
            raise
        if lease:
            break
        await asyncio.sleep(min(TICK, life / 5))
    try:
        with signs.renewed("lease", life / 5, lease.renew):
            yield lease
    finally:
        await asyncio.to_thread(_let_go, lease)


@dataclass
class _Waiting:
    """Who waits for whom: since when, and how long at most."""

    store: Store
    name: str
    wait_s: float
    on_wait: Callable[[str], None]
    since: float = field(default_factory=signs.now)
    told: str | None = None

    def see(self, found: "Found") -> None:
        """Raises PairmillError after the wait; else tells who has it, once for each."""
        if signs.now() - self.since > self.wait_s:
            raise PairmillError(
                f"the {self.name} of {self.store.uri} are in use by {found.who}, for more than "
                f"{self.wait_s:.0f} s; run this again when that build has ended, or end it if it "
                "hangs"
            )
        holder = str(found.sign.get("holder"))
        if holder != self.told:
            self.told = holder
            self.on_wait(found.who)


def _taken(store: Store, name: str, life: float, waiting: _Waiting) -> Lease | None:
    """The lease, or None while another one has it."""
    while True:
        before, found = signs.now(), _read(store, name)
        if not _is_free(store, found):
            waiting.see(found)
            return None
        epoch = found.epoch + 1 if found.epoch else int(pins.clock(store))
        lease = Lease(store, name, life, epoch, before)
        with suppress(Conflict):
            lease._put(found.etag)
            return lease


def _let_go(lease: Lease) -> None:
    with suppress(StoreError):
        lease.release()


def _read(store: Store, name: str) -> Found:
    try:
        # The etag first: where the body is a later one, a write on this etag fails.
        stat = store.head(_key(name))
        return Found(stat.etag, signs.parsed(store.get(_key(name))), stat.mtime)
    except NotFound:
        return Found(None, {}, 0.0)


def _is_free(store: Store, found: Found) -> bool:
    if found.etag is None or (found.sign and not found.sign.get("holder")):
        return True
    if signs.has_ended(found.sign):
        return True
    life = found.sign.get("life_ms")
    seconds = life / 1000 if isinstance(life, int) else LIFE
    return pins.clock(store) - found.written > seconds


def _key(name: str) -> str:
    return f"{PREFIX}{name}.json"
