"""Pace: how many calls a server gets at once, and when it gets none.

The limit on calls in flight grows while answers come and halves when the server says that it is
too much (AIMD: Chiu and Jain 1989, with TCP's slow start). A server that answers nothing but
failures gets one call at a time, at growing distances, and is given up after a while.
"""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

FIRST = 16  # calls in flight to begin with
SLOWER = 2.0  # times the usual latency at its best, above which the limit does not grow
BLEND = 1 / 32  # weight of an answer in the usual latency
LONGEST_PROBE_S = 30.0


@dataclass
class Lane:
    """The pace of one server. Times are seconds of the running loop's clock."""

    most: int
    weight: float
    backoff_s: float
    patience_s: float
    limit: float = 0.0
    in_flight: int = 0
    grows_fast: bool = True
    not_before: float = 0.0
    lowered: float = -1.0
    latency: float = 0.0
    best_latency: float = float("inf")
    failures: int = 0  # in a row
    failing_since: float | None = None
    is_dead: bool = False

    def __post_init__(self) -> None:
        self.limit = float(min(self.most, FIRST))

    @property
    def room(self) -> float:
        """Calls that may still start; one that is failing gets one at a time."""
        probing = self.failures > self.limit
        return (1 if probing else int(self.limit)) - self.in_flight

    def answered(self, started: float, now: float) -> None:
        """A call brought an answer."""
        self.failures, self.failing_since = 0, None
        taken = now - started
        self.latency = taken if not self.latency else self.latency + BLEND * (taken - self.latency)
        self.best_latency = min(self.best_latency, self.latency)
        busy = self.in_flight >= 0.8 * self.limit
        if busy and self.latency < SLOWER * self.best_latency:
            grown = self.limit + (1.0 if self.grows_fast else 1.0 / self.limit)
            self.limit = min(float(self.most), grown)

    def refused(self, started: float, now: float, retry_after: float | None) -> None:
        """The server said that it is asked too much."""
        self._failed(now)
        if started > self.lowered:  # calls that were under way together count once
            self.limit, self.lowered, self.grows_fast = max(1.0, self.limit / 2), now, False
        pause = retry_after if retry_after is not None else self._pause()
        jitter = random.uniform(0, self.backoff_s)
        self.not_before = max(self.not_before, now + pause + jitter)

    def failed(self, now: float) -> None:
        """A call ended without an answer, and not since the server was asked too much."""
        self._failed(now)
        if self.failures > self.limit:
            self.not_before = max(self.not_before, now + self._pause())

    def _failed(self, now: float) -> None:
        self.failures += 1
        self.failing_since = now if self.failing_since is None else self.failing_since
        if now - self.failing_since > self.patience_s:
            self.is_dead = True

    def _pause(self) -> float:
        doubled = self.backoff_s * 2.0 ** min(10, self.failures / max(1.0, self.limit))
        return min(LONGEST_PROBE_S, doubled) * random.uniform(0.5, 1.0)


class Lanes:
    """Hands out turns on several servers by their weights, first come, first served.

    Safe for one event loop.
    """

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = lanes
        self._waiting: deque[asyncio.Future[int | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self) -> int | None:
        """The number of the lane on which a call may start now; None where all are dead.

        Whoever gets a turn gives it back by `over`.
        """
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._hand_out()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result() is not None:
                self.over(waiter.result())
            raise

    def over(self, at: int) -> None:
        """A turn ended; those that may start now do."""
        self.lanes[at].in_flight -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            alive = [at for at, lane in enumerate(self.lanes) if not lane.is_dead]
            now = asyncio.get_running_loop().time()
            free = [
                at for at in alive if self.lanes[at].room > 0 and self.lanes[at].not_before <= now
            ]
            if alive and not free:
                return self._alarm([self.lanes[at].not_before for at in alive])
            chosen = min(free, key=self._load) if free else None
            if chosen is not None:
                self.lanes[chosen].in_flight += 1
            self._waiting.popleft().set_result(chosen)

    def _load(self, at: int) -> float:
        return (self.lanes[at].in_flight + 1) / self.lanes[at].weight

    def _alarm(self, times: Sequence[float]) -> None:
        """Look again once a lane opens by time."""
        loop = asyncio.get_running_loop()
        later = [time for time in times if time > loop.time()]
        if not later or (self._timer and self._timer.when() <= min(later)):
            return
        if self._timer:
            self._timer.cancel()
        self._timer = loop.call_at(min(later), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._hand_out()
