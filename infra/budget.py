"""Budgets: what an answer may cost is reserved before a call, and settled from what it did cost.

    spending/<month>/<epoch>.json    what one holder of the lease may have spent in that month

A journal holds an upper bound, written before the calls that it covers are made; at the end it
holds what was spent. So a process that dies leaves what it had in flight charged.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from infra.canonical import canonical
from infra.errors import PairmillError
from infra.store import Store, listed

PREFIX = "spending/"
NANO = 10**9  # parts of the currency's unit that money is counted in
AHEAD = 64  # calls that a journal covers beyond those in flight


class Prices(BaseModel):
    """What a provider charges, in one currency."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Decimal = Field(ge=0, description="For a million tokens of input.")
    output: Decimal = Field(ge=0, description="For a million tokens of output.")
    cached_input: Decimal | None = Field(
        None, ge=0, description="For a million tokens of input that were cached; default `input`."
    )
    call: Decimal = Field(Decimal(0), ge=0, description="For a call, whatever its length.")
    batch: Decimal = Field(
        Decimal("0.5"), ge=0, le=1, description="Factor for calls of the batch API."
    )
    currency: str = Field("USD", max_length=8, description="The currency; it is shown, no more.")


class Limits(BaseModel):
    """Bounds on spending; what is null has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    money: Decimal | None = Field(None, ge=0, description="In the currency of the prices.")
    tokens: int | None = Field(None, ge=0, description="Tokens of input and output together.")
    calls: int | None = Field(None, ge=0, description="Calls that reach the endpoint.")


class Budget(Limits):
    """What one build may spend, over all its stages, and what a calendar month (UTC) may."""

    hours: float | None = Field(
        None, gt=0, description="Hours from the first call of a build; then no call is begun."
    )
    month: Limits = Field(
        Limits(), description="The same bounds for a calendar month over all builds in the store."
    )

    @property
    def is_bounded(self) -> bool:
        """Whether there is any bound, so that the work may not all be done."""
        own = (self.money, self.tokens, self.calls, self.hours)
        return any(bound is not None for bound in (*own, *self.month.model_dump().values()))

    @property
    def needs_prices(self) -> bool:
        return self.money is not None or self.month.money is not None


class Amount(NamedTuple):
    """Money in 10^-9 of the currency, tokens of input and output, calls."""

    money: int = 0
    tokens: int = 0
    calls: int = 0

    def plus(self, other: "Amount", times: int = 1) -> "Amount":
        return Amount(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass
class Bill:
    """What the calls of one build came to so far: counts by stage, and what was charged.

    `began` is when the first call was made, in seconds since 1970.
    """

    stages: dict[str, Counter[str]] = field(default_factory=dict)
    charged: Amount = field(default_factory=Amount)
    began: float | None = None


class OverBudget(Exception):
    """What is left does not cover the call."""


def price(prices: Prices | None, usage: dict[str, int] | None) -> int | None:
    """What an answer cost, in 10^-9 of the currency, rounded up; None where that is unknown."""
    if prices is None or usage is None:
        return None
    of_cached = prices.input if prices.cached_input is None else prices.cached_input
    fresh = usage["input"] - usage["cached"]
    millionths = fresh * prices.input + usage["cached"] * of_cached
    millionths += usage["output"] * prices.output
    return math.ceil(millionths * (NANO // 10**6) + prices.call * NANO)


def bound(prices: Prices | None, text_bytes: int, image_tokens: int, output: int) -> Amount:
    """The most that a call can cost: a token stands for at least one byte of text."""
    tokens = {"input": text_bytes + image_tokens, "output": output, "cached": 0}
    return Amount(price(prices, tokens) or 0, tokens["input"] + output, 1)


class Spending:
    """Reserves and settles the calls of one build while it holds the lease of its epoch.

    `before` is what this build has spent already, in stages before this one; `started` is when it
    made its first call, in seconds since 1970. Safe for one event loop.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        budget: Budget,
        before: Amount,
        started: float,
        now: Callable[[], float] = time.time,
    ):
        self._store, self._epoch, self._budget, self._now = store, epoch, budget, now
        self._before, self._started = before, started
        self._month = ""
        self._elsewhere = Amount()  # this month, by other epochs
        self.settled = self.lost = self._reserved = Amount()
        self._in_month = Amount()  # settled and lost since the month began
        self._written = Amount()
        self._excess = 1.0
        self._writing = asyncio.Lock()
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def spent(self) -> Amount:
        """What was charged in this epoch: answers, and calls whose answer was lost."""
        return self.settled.plus(self.lost)

    @property
    def in_flight(self) -> int:
        """Calls that are reserved and not over."""
        return self._reserved.calls

    @property
    def affords(self) -> float:
        """Calls that what is left would pay for, at what calls cost so far; those in flight count
        as spent. Infinite without bounds, 0 before the first answer.
        """
        calls = self.settled.calls
        if not calls:
            return 0.0
        mean = [part / calls for part in self.settled]
        build = self._before.plus(self.spent)
        month = self._elsewhere.plus(self._in_month)
        rooms = [(self._budget, build), (self._budget.month, month)]
        left = [
            (bound - used) / each if each else math.inf
            for limits, amount in rooms
            for bound, used, each in zip(_bounds(limits), amount, mean, strict=True)
            if bound is not None
        ]
        return min(left, default=math.inf) - self.in_flight

    async def reserve(self, wanted: Amount) -> Amount:
        """Set aside what a call may cost; returns what was. Raises OverBudget.

        Waits while calls in flight may yet turn out to be cheaper than what they reserved.
        """
        money, tokens = (math.ceil(part * self._excess) for part in wanted[:2])
        wanted = Amount(money, tokens, wanted.calls)
        while True:
            if self._month != month_of(self._now()):
                await self._begin_month()
            if not self._fits(wanted, Amount()):
                raise OverBudget
            if self._fits(wanted, self._reserved):
                break
            await self._change()
        self._reserved = self._reserved.plus(wanted)
        try:
            await self._cover()
        except BaseException:
            self.release(wanted)
            raise
        return wanted

    def settle(self, reserved: Amount, cost: int | None, usage: dict[str, int] | None) -> None:
        """An answer came. Where its usage is unknown, what was reserved is charged."""
        tokens = usage["input"] + usage["output"] if usage else reserved.tokens
        actual = Amount(reserved.money if cost is None else cost, tokens, 1)
        if reserved.tokens and tokens > reserved.tokens:
            # The bound was none: from here on it is as much larger as this answer showed.
            self._excess *= tokens / reserved.tokens
        self.settled = self.settled.plus(actual)
        self._in_month = self._in_month.plus(actual)
        self.release(reserved)

    def lose(self, reserved: Amount) -> None:
        """A call was sent and its answer never came: it may have been billed, so it is charged."""
        self.lost = self.lost.plus(reserved)
        self._in_month = self._in_month.plus(reserved)
        self.release(reserved)

    def release(self, reserved: Amount) -> None:
        """A call was not billed, or is settled."""
        self._reserved = self._reserved.plus(reserved, -1)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def close(self) -> None:
        """Journal what was spent in the end."""
        if self._month:
            await self._write(self._in_month.plus(self._reserved))

    def _fits(self, wanted: Amount, reserved: Amount) -> bool:
        hours = self._budget.hours
        if hours is not None and self._now() - self._started > 3600 * hours:
            return False
        after = wanted.plus(reserved)
        build = self._before.plus(self.spent).plus(after)
        month = self._elsewhere.plus(self._in_month).plus(after)
        return _within(build, self._budget) and _within(month, self._budget.month)

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    async def _cover(self) -> None:
        """Have the journal cover all that is reserved."""
        async with self._writing:
            needed = self._in_month.plus(self._reserved)
            if any(a > b for a, b in zip(needed, self._written, strict=True)):
                calls = max(1, self._reserved.calls)
                each = Amount(*(math.ceil(part / calls) for part in self._reserved))
                await self._write(needed.plus(each, AHEAD))

    async def _begin_month(self) -> None:
        async with self._writing:
            month = month_of(self._now())
            if month == self._month:
                return
            if self._month:
                await self._write(self._in_month)
            self._elsewhere = await asyncio.to_thread(charged, self._store, month, self._epoch)
            self._month, self._in_month, self._written = month, Amount(), Amount()

    async def _write(self, amount: Amount) -> None:
        key = f"{PREFIX}{self._month}/{self._epoch:08d}.json"
        body = canonical({"format": 1, **amount._asdict()})
        await asyncio.to_thread(self._store.put, key, body)
        self._written = amount


def charged(store: Store, month: str, apart_from: int | None = None) -> Amount:
    """What is charged to a month (`2026-11`) by all epochs of a store save one.

    Raises PairmillError for a journal that is damaged: no budget can be kept without it.
    """
    total = Amount()
    for stat in listed(store, f"{PREFIX}{month}/"):
        if stat.key.endswith(f"/{apart_from or 0:08d}.json"):
            continue
        try:
            body: dict[str, Any] = json.loads(store.get(stat.key))
            total = total.plus(Amount(*(int(body[name]) for name in Amount._fields)))
        except (ValueError, KeyError, TypeError):
            raise PairmillError(
                f"{stat.key} in {store.uri} is damaged, so what was spent in {month} is unknown; "
                "restore it, or delete it and lower labels.budget.month by what it may have held"
            ) from None
    return total


def _within(amount: Amount, limits: Limits) -> bool:
    bounds = _bounds(limits)
    return all(b is None or part <= b for part, b in zip(amount, bounds, strict=True))


def _bounds(limits: Limits) -> tuple[int | None, int | None, int | None]:
    money = None if limits.money is None else int(limits.money * NANO)
    return money, limits.tokens, limits.calls


def month_of(now: float) -> str:
    """The calendar month (UTC) of a time in seconds since 1970, as `2026-11`."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")
