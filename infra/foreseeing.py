"""Foreseeing: what a stage would ask and what that may cost, told by the answers that are stored.

The questions are put as the stage puts them, to a model that knows only what was paid for before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from infra import mllm
from infra.budget import Amount
from infra.mllm import Request, Response, Unanswered
from infra.responses import View
from infra.segments import Stored

TRIES = 2  # an answer and its repair
COMPLAINT = 2_000  # bytes of what is wrong with an answer, at most

Item = TypeVar("Item")


Kind = Literal["counted", "bounded", "expected", "unknown"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Calls(NamedTuple):
    """Calls of a stage: answers that are stored, calls where no answer has to be repaired, and the
    most, with what they cost in 10^-9 of the currency; None where that can't be known.

    `counted` calls are those that will be made, and their cost is a bound; `bounded` ones are at
    most so many; `expected` ones as many as before. Cost of the latter two is by past calls.
    """

    stored: int = 0
    plain: int | None = 0
    most: int | None = 0
    money: int | None = 0
    kind: Kind = "counted"


def total(parts: Sequence[Calls]) -> Calls:
    """Calls of several stages together, as sure as the least sure of them."""
    plain, most, money = (
        _sum([getattr(part, name) for part in parts]) for name in ("plain", "most", "money")
    )
    kind = max((part.kind for part in parts), key=KINDS.index)
    return Calls(sum(part.stored for part in parts), plain, most, money, kind)


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


class WouldAsk(Exception):
    """Raised in a planning build where a stage would ask."""

    def __init__(self, calls: Calls):
        super().__init__(calls)
        self.calls = calls


class _Known:
    """Answers what is stored; the first question that is not is noted, and goes unanswered."""

    def __init__(self, view: View, attempt: int, as_response: Callable[[Stored], Response]):
        self.attempt, self._view, self._as_response = attempt, view, as_response
        self.answered: set[str] = set()
        self.missing: Request | None = None

    async def __call__(self, request: Request) -> Response:
        key = mllm.request_key(request)
        found = self._view.get(key)
        if found is None:
            self.missing = request
            raise Unanswered("over_budget", "a plan pays for nothing")
        self.answered.add(key)
        return self._as_response(found)


def foresee(
    view: View,
    items: Iterable[Item],
    work: Callable[[Any, Item], Awaitable[Any]],
    attempt: int,
    calls: int,
    price: Callable[[Request], Amount],
    as_response: Callable[[Stored], Response],
) -> Calls:
    """What `work(ask, item)` would ask for all items, with `calls` questions an item.

    `price` gives the most that a request may cost. A question that follows an answer, or repairs
    it, holds that answer as well.
    """

    async def walk() -> Calls:
        stored, asked = set[str](), set[str]()
        plain = most = money = 0
        for item in items:
            ask = _Known(view, attempt, as_response)
            await work(ask, item)
            stored.update(ask.answered)
            if ask.missing is None or (key := mllm.request_key(ask.missing)) in asked:
                continue
            asked.add(key)
            left = max(1, calls - len(ask.answered))
            times = max(left, TRIES * calls * (attempt + 1) - len(ask.answered))
            plain, most = plain + left, most + times
            later = replace(ask.missing, text=ask.missing.text + "x" * _answer(ask.missing))
            money += price(ask.missing).money + (times - 1) * price(later).money
        return Calls(len(stored), plain, most, money)

    return asyncio.run(walk())


def _answer(request: Request) -> int:
    """Bytes that an answer and a complaint add to a later question; there a byte is a token."""
    return request.max_tokens + COMPLAINT
