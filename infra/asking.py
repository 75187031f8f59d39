"""Asking models: every answer is stored before it is used, and none is paid for twice.

An answer comes from the response store; else it is paid for, within budget and pace, by one
process at a time, which holds the lease of the store.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import budget, lease, mllm, responses
from infra.batches import Batches, Line, discounted, line_of
from infra.budget import NANO, Amount, Budget, OverBudget, Prices, Spending
from infra.build import Build
from infra.errors import ConfigError
from infra.foreseeing import Calls, WouldAsk, foresee
from infra.ledger import unless_dropped_by
from infra.local_mllm import InProcess, LocalModel
from infra.mllm import CallFailed, Endpoint, EndpointUnavailable, Request, Response, Unanswered
from infra.pace import Lane, Lanes
from infra.segments import Stored

LEASE = "responses"
LEASE_WAIT_S = 3_600.0
OPENINGS = 3  # calls that may fail, one after the other, before the first answer
PAUSE_MOST_S = 30.0

Item = TypeVar("Item")
Row = TypeVar("Row")
log = logging.getLogger(__name__)


class AskParams(BaseModel):
    """Which model answers, and what may be spent on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Endpoint | None = Field(
        None, description="An OpenAI-compatible server of the model, or several."
    )
    local: LocalModel | None = Field(
        None, description="In place of an endpoint, a model that the workers of the build run."
    )
    budget: Budget = Field(Budget(), description="What may be spent.")
    attempt: int = Field(
        0,
        ge=0,
        le=10,
        description="Questions with a flawed answer (refused, truncated, not as asked for) are paid"
        " for anew up to this attempt. Raising it asks those questions alone.",
    )

    @model_validator(mode="after")
    def _prices_for_money(self) -> "AskParams":
        if self.budget.needs_prices and (self.endpoint is None or self.endpoint.prices is None):
            raise ValueError("a budget in money needs endpoint.prices; set them, or bound calls")
        if self.endpoint and self.local:
            raise ValueError("give endpoint or local, not both")
        return self

    @property
    def model(self) -> str:
        """The model as requests name it."""
        model = self.local or self.endpoint
        if model is None:
            raise ConfigError(
                "the config names no model to ask; give its section an `endpoint` (url, model), or"
                " a `local` model (name)"
            )
        return model.model

    @property
    def currency(self) -> str | None:
        """The currency of the prices, where there are any."""
        return self.endpoint.prices.currency if self.endpoint and self.endpoint.prices else None

    @property
    def concurrency(self) -> int:
        """Calls in flight, at most."""
        if self.local:
            return self.local.in_flight
        assert self.endpoint is not None
        return sum(server.concurrency for server in self.endpoint.servers)

    @property
    def in_flight(self) -> int:
        """Items that are worth having under way: some wait until their answer is stored."""
        if self.endpoint and self.endpoint.batch:
            return self.endpoint.batch.most
        return 4 * self.concurrency + 64


class Backend(Protocol):
    """What brings answers: servers, a provider's batches, a model in process."""

    async def send(self, request: Request) -> Response:
        """The answer, paid for. Raises Unanswered where there is none yet."""
        ...


def ask_all(
    build: Build,
    stage: str,
    items: Sequence[Item],
    work: Callable[[mllm.Ask, Item], Awaitable[Row]],
    params: AskParams,
    images: Callable[[str], bytes],
    calls: int = 1,
) -> list[Row]:
    """`await work(ask, item)` for every item, many at once; rows in the order of items.

    Items are begun in their order; within a budget, while it covers `calls` for each. `images`
    gives the JPEG of an image_id; it is called in threads, and no sooner than its picture is sent.
    Raises EndpointUnavailable where no server has ever answered, ConfigError for a missing key,
    and WouldAsk in a planning build.
    """
    if build.planning:
        raise WouldAsk(_foreseen(build, items, work, params, calls))
    return asyncio.run(_ask_all(build, stage, items, work, params, images, calls)) if items else []


def _foreseen(
    build: Build,
    items: Sequence[Item],
    work: Callable[[mllm.Ask, Item], Awaitable[Row]],
    params: AskParams,
    calls: int,
) -> Calls:
    """What asking would come to: at full price in batches too, as some calls go by themselves."""
    asked = params.local or params.endpoint
    assert asked is not None
    price = partial(most, asked)
    return foresee(
        responses.look(build.store), items, work, params.attempt, calls, price, _response
    )


none_waits = unless_dropped_by(*mllm.PENDING)


class Noted:
    """Asks, and notes the keys of what it asked, in order."""

    def __init__(self, ask: mllm.Ask):
        self.attempt, self.keys, self._ask = ask.attempt, list[str](), ask

    async def __call__(self, request: Request) -> Response:
        self.keys.append(mllm.request_key(request))
        return await self._ask(request)


async def _ask_all(
    build: Build,
    stage: str,
    items: Sequence[Item],
    work: Callable[[mllm.Ask, Item], Awaitable[Row]],
    params: AskParams,
    images: Callable[[str], bytes],
    calls: int,
) -> list[Row]:
    rows: dict[int, Row] = {}
    waiting = iter(enumerate(items))
    async with AsyncExitStack() as stack:
        asker = Asker(build, stage, params, images, stack)
        admission = Admission(partial(asker.may_begin, calls))

        async def worker() -> None:
            while True:
                async with admission:
                    at, item = next(waiting, (len(items), None))
                    if item is None:
                        return
                    rows[at] = await work(asker, item)
                build.progress(stage, len(rows), len(items), asker.said(len(rows), len(items)))

        try:
            workers = [worker() for _ in range(min(params.in_flight, len(items)))]
            await _all_or_first_error(workers)
        finally:
            await asker.end()
    return [rows[at] for at in range(len(items))]


async def _all_or_first_error(work: list[Any]) -> None:
    # A TaskGroup would wrap the one line that a user should read in an ExceptionGroup.
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Admission:
    """Lets items begin while `may_begin(items under way)`, so that those begun can be finished."""

    def __init__(self, may_begin: Callable[[int], bool]):
        self._may_begin, self._open, self._changed = may_begin, 0, asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._may_begin(self._open))
            self._open += 1
            self._changed.notify()

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._open -= 1
            self._changed.notify()


class Asker:
    """Answers requests of one stage of a build. See `mllm.Ask`."""

    def __init__(
        self,
        build: Build,
        stage: str,
        params: AskParams,
        images: Callable[[str], bytes],
        stack: AsyncExitStack,
    ):
        self.attempt = params.attempt
        self._build, self._stage, self._params, self._images = build, stage, params, images
        self._stack = stack
        self._known: responses.View = responses.look(build.store)
        self._paying: responses.Responses | None = None
        self._spending: Spending | None = None
        self._backend: Backend | None = None
        self._opening = asyncio.Lock()
        self._running: dict[str, asyncio.Task[Response]] = {}
        self._began = time.monotonic()
        self.cost = build.bill.stages.setdefault(stage, Counter())

    async def __call__(self, request: Request) -> Response:
        key = mllm.request_key(request)
        if key not in self._running:
            task = asyncio.create_task(self._answer(key, request))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(self._running[key])

    async def end(self) -> None:
        """End what is under way, and put it on the bill of the build."""
        left = list(self._running.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._spending:
            bill = self._build.bill
            bill.charged = bill.charged.plus(self._spending.spent)
            self.cost["money"] += self._spending.spent.money
            self.cost["lost_money"] += self._spending.lost.money
            self.cost["lost"] += self._spending.lost.calls
        self.cost["milliseconds"] += round(1000 * (time.monotonic() - self._began))

    def may_begin(self, calls: int, under_way: int) -> bool:
        """Whether another item of so many calls should begin beside those under way."""
        if not self._params.budget.is_bounded or not under_way:
            return True
        if self._spending is None or not self._spending.settled.calls:
            return under_way < self._params.concurrency
        return self._spending.affords >= calls * (under_way + 1)

    def said(self, done: int, total: int) -> str:
        """Rate, what was spent, and what all items would come to at this rate."""
        rate = done / max(0.001, time.monotonic() - self._began)
        words = f"{rate:.1f}/s"
        prices = self._params.endpoint.prices if self._params.endpoint else None
        if self._spending and prices:
            spent = self._spending.spent.money / NANO
            words += f", {spent:.2f} {prices.currency}, {spent * total / done:.2f} for all"
        return words

    async def _answer(self, key: str, request: Request) -> Response:
        found = await (self._paying or self._known).find(key)
        if found is None:
            return await self._pay(key, request)
        self.cost["cached"] += 1
        return _response(found)

    async def _pay(self, key: str, request: Request) -> Response:
        paying, backend = await self._open()
        if found := await paying.find(key):
            self.cost["cached"] += 1
            return _response(found)
        response = await backend.send(request)
        self._count(response)
        # With no call under way, nothing would come to fill a segment with.
        is_last = self._spending is None or not self._spending.in_flight
        prices = self._params.endpoint.prices if self._params.endpoint else None
        stored = self._stored(line_of(key, request, self._stage), response, prices)
        return _response(await paying.add(stored, at_once=is_last))

    async def _open(self) -> tuple[responses.Responses, Backend]:
        """The response store to write to and the models, once something is to be paid for."""
        async with self._opening:
            if self._paying is None or self._backend is None:
                bill, build = self._build.bill, self._build
                held = lease.hold_async(build.store, LEASE, wait_s=LEASE_WAIT_S, on_wait=self._wait)
                granted = await self._stack.enter_async_context(held)
                bill.began = bill.began or time.time()
                self._spending = Spending(
                    build.store, granted.epoch, self._params.budget, bill.charged, bill.began
                )
                self._stack.push_async_callback(self._spending.close)
                store = responses.open_responses(build.store, granted, self._known)
                self._paying = await self._stack.enter_async_context(store)
                self._backend = await self._connect(granted, self._spending)
        return self._paying, self._backend

    def _wait(self, who: str) -> None:
        log.warning(
            "%s: waiting for %s, which is paying for answers in this store", self._stage, who
        )

    async def _connect(self, granted: lease.Lease, spending: Spending) -> Backend:
        endpoint, local = self._params.endpoint, self._params.local
        if local:
            inner = InProcess(local, self._build.pool, self._images)
            self._stack.push_async_callback(inner.close)
            return Metered(local, inner, spending, granted.check)
        assert endpoint is not None
        clients = []
        for server in endpoint.servers:
            opened = mllm.connect(endpoint, server, self._images, secret(server, self._build))
            clients.append(await self._stack.enter_async_context(opened))
        if endpoint.batch is None:
            return Servers(endpoint, clients, spending, granted.check)
        batches = Batches(
            clients[0],
            self._build.store,
            endpoint.batch,
            keep=self._keep,
            single=Servers(endpoint, clients[:1], spending, granted.check),
            spending=spending,
            most=partial(most, discounted(endpoint)),
            stage=self._stage,
            may_go_on=granted.check,
        )
        self._stack.push_async_callback(batches.close)
        await batches.pick_up()
        return batches

    async def _keep(self, line: Line, response: Response) -> None:
        """Store an answer that came in a batch, whether or not anybody waits for it."""
        assert self._paying and self._params.endpoint
        prices = discounted(self._params.endpoint).prices
        await self._paying.add(self._stored(line, response, prices))

    def _stored(self, line: Line, response: Response, prices: Prices | None) -> Stored:
        usage = response.usage
        return Stored(
            key=line.key,
            attempt=line.attempt,
            status=response.status,
            text=response.text,
            finish_reason=response.finish_reason,
            model=response.model,
            input_tokens=usage["input"] if usage else None,
            output_tokens=usage["output"] if usage else None,
            cached_tokens=usage["cached"] if usage else None,
            cost=budget.price(prices, usage),
            images=tuple(dict.fromkeys((*line.images, *line.about))),
            captions=line.about,
            stage=line.stage,
            created=int(time.time()),
        )

    def _count(self, response: Response) -> None:
        self._build.work["labels_requested"] += 1
        self.cost["calls"] += 1
        if response.usage is None:
            self.cost["unknown_usage"] += 1
        for name, count in (response.usage or {}).items():
            self.cost[f"{name}_tokens"] += count


def _response(stored: Stored) -> Response:
    usage = None
    if stored.input_tokens is not None and stored.output_tokens is not None:
        counts = stored.input_tokens, stored.output_tokens, stored.cached_tokens or 0
        usage = dict(zip(("input", "output", "cached"), counts, strict=True))
    status: Any = stored.status
    return Response(status, stored.text, stored.finish_reason, stored.model, usage)


def secret(server: mllm.Server, build: Build) -> str:
    """The API key of a server; empty for one without. Raises ConfigError where it is not there."""
    if server.api_key_block:
        if build.secrets is None:
            raise ConfigError(
                f"endpoint.api_key_block: the Prefect block {server.api_key_block} can only be "
                "read in a flow; use api_key_env here"
            )
        return build.secrets(server.api_key_block)
    if server.api_key_env is None:
        return ""
    if found := os.environ.get(server.api_key_env, "").strip():
        return found
    raise ConfigError(
        f"endpoint.api_key_env: the environment variable {server.api_key_env} is not set;"
        " export the API key in it, or leave the setting out for a server without keys"
    )


class Metered:
    """A model of our own, held to the bounds of a budget as one that is paid."""

    def __init__(
        self,
        local: LocalModel,
        backend: Backend,
        spending: Spending,
        may_go_on: Callable[[], None],
    ):
        self._local, self._backend = local, backend
        self._spending, self._may_go_on = spending, may_go_on

    async def send(self, request: Request) -> Response:
        """The answer. Raises Unanswered."""
        try:
            reserved = await self._spending.reserve(most(self._local, request))
        except OverBudget:
            raise Unanswered("over_budget", "the budget is spent") from None
        try:
            self._may_go_on()
            response = await self._backend.send(request)
        except BaseException:
            self._spending.release(reserved)
            raise
        self._spending.settle(reserved, 0, response.usage)
        return response


class Servers:
    """A model behind servers: one call after the other on each lane, tried again where unbilled."""

    def __init__(
        self,
        endpoint: Endpoint,
        clients: Sequence[mllm.Client],
        spending: Spending,
        may_go_on: Callable[[], None] = lambda: None,
    ):
        self._endpoint, self._clients = endpoint, clients
        self._spending, self._may_go_on = spending, may_go_on
        lane = partial(Lane, backoff_s=endpoint.backoff_s, patience_s=endpoint.patience_s)
        servers = [client.server for client in clients]
        self._lanes = Lanes([lane(most=s.concurrency, weight=s.weight) for s in servers])
        self._openings, self._unanswered = Counter[int](), Counter[int]()
        self._last = ""

    async def send(self, request: Request) -> Response:
        """The answer of whichever server has room. Raises Unanswered, EndpointUnavailable."""
        tries = 0
        while True:
            at = await self._lanes.turn()
            if at is None:
                raise Unanswered("endpoint_error", f"no server answers any more: {self._last}")
            try:
                return await self._call(at, request)
            except CallFailed as failure:
                self._last = str(failure)
                has_answered = self._clients[at].format is not None
                tries += failure.status != 429
                # Before the first answer tries are counted over all requests: none need wait long.
                self._unanswered[at] += 1
                counted = tries if has_answered else self._unanswered[at]
                spent = not failure.transient or counted >= self._endpoint.attempts
                if spent and not has_answered and self._gives_up(at, failure):
                    continue
                if spent:
                    raise Unanswered("endpoint_error", str(failure)) from None
            finally:
                self._lanes.over(at)
            await asyncio.sleep(_pause(tries, self._endpoint.backoff_s))

    async def _call(self, at: int, request: Request) -> Response:
        """One call on a lane, reserved before and settled after. Raises CallFailed, Unanswered."""
        client, lane, loop = self._clients[at], self._lanes.lanes[at], asyncio.get_running_loop()
        try:
            reserved = await self._spending.reserve(most(self._endpoint, request))
        except OverBudget:
            raise Unanswered("over_budget", "the budget is spent") from None
        started, sent = loop.time(), Amount()
        try:
            self._may_go_on()
            sent = reserved
            response = await mllm.send(client, request)
        except CallFailed as failure:
            (self._spending.lose if failure.maybe_billed else self._spending.release)(reserved)
            if failure.status == 429 and failure.transient:
                lane.refused(started, loop.time(), failure.retry_after)
            else:
                lane.failed(loop.time())
            raise
        except BaseException:
            (self._spending.lose if sent else self._spending.release)(reserved)
            raise
        cost = budget.price(self._endpoint.prices, response.usage)
        self._spending.settle(reserved, cost, response.usage)
        lane.answered(started, loop.time())
        return response

    def _gives_up(self, at: int, failure: CallFailed) -> bool:
        """Whether a server that has never answered is left aside from now on.

        Raises EndpointUnavailable where it was the last one.
        """
        self._openings[at] += 1
        if mllm.is_tolerable(failure) and self._openings[at] <= OPENINGS:
            return False
        lanes = self._lanes.lanes
        if not lanes[at].is_dead:
            lanes[at].is_dead = True
            if all(lane.is_dead for lane in lanes):
                raise EndpointUnavailable(str(failure))
            log.warning("%s; going on with the other servers", failure)
        return True


def most(asked: Endpoint | LocalModel, request: Request) -> Amount:
    """The most that one call of a request may cost, its schema in the prompt included."""
    texts = (request.instructions, request.text, *(text for _, text in request.turns))
    schema = 2_000 + 2 * len(str(mllm.schema_of(request.answer)))
    size = schema + sum(len(text.encode("utf-8", "replace")) for text in texts)
    pictures = asked.image_tokens * len(request.pictures)
    prices = asked.prices if isinstance(asked, Endpoint) else None
    return budget.bound(prices, size, pictures, request.max_tokens)


def _pause(tries: int, backoff_s: float) -> float:
    return min(PAUSE_MOST_S, backoff_s * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)
