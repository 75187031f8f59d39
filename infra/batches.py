"""The provider's batch API: cheaper answers, which may take a day.

    responses/batches/<id>.json    the requests of a batch that is not finished, and its name there

The file is written before its requests are uploaded, carries the provider's name of the batch
before the first look at it, and goes when all answers are stored. So whoever dies in between, the
next build finds the batch again, by that name or by the id that the provider keeps with it.
"""

import asyncio
import contextlib
import json
import logging
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from infra import budget, mllm
from infra.budget import Amount, OverBudget, Spending
from infra.errors import PairmillError
from infra.mllm import BatchParams, CallFailed, Client, Endpoint, Request, Response, Unanswered
from infra.store import Store, listed

PREFIX = "responses/batches/"
ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
MARK = "pairmill"  # under which a provider keeps the id of our file with a batch
DONE = ("completed", "failed", "expired", "cancelled")
WRITING = 32  # requests that are written out at once
DAY_S = 86_400
FIRST_LOOK_S = 30.0

Outcome = Response | CallFailed
log = logging.getLogger(__name__)


class Line(NamedTuple):
    """A request of a batch, without its words; `about` are ids of images and captions."""

    key: str
    attempt: int
    images: tuple[str, ...]
    about: tuple[str, ...]
    stage: str


class Intent(BaseModel):
    """A batch that is not finished. `batch` is the provider's name of it, once there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    url: str
    created: int
    batch: str | None = None
    lines: tuple[Line, ...]

    @property
    def place(self) -> str:
        return f"{PREFIX}{self.id}.json"

    @property
    def file_name(self) -> str:
        return f"{MARK}-{self.id}.jsonl"


class Single(Protocol):
    """Sends requests one by one."""

    async def send(self, request: Request) -> Response: ...


Keep = Callable[[Line, Response], Awaitable[None]]


def unfinished(store: Store) -> Iterator[Intent]:
    """Batches whose answers are not all stored. Raises PairmillError for a damaged file."""
    for stat in listed(store, PREFIX):
        try:
            yield Intent.model_validate_json(store.get(stat.key))
        except ValidationError:
            raise PairmillError(
                f"{stat.key} in {store.uri} is damaged, so the answers of a batch can't be told;"
                " restore it, or delete it: its requests are then asked, and paid, again"
            ) from None


def forget(store: Store, is_forgotten: Callable[[str], bool]) -> int:
    """Take what is about forgotten images or captions out of unfinished batches; how many.

    Their answers are then nobody's: they are not stored when they come.
    """
    gone = 0
    for intent in [*unfinished(store)]:
        kept = [n for n in intent.lines if not any(map(is_forgotten, (*n.images, *n.about)))]
        if len(kept) < len(intent.lines):
            gone += len(intent.lines) - len(kept)
            changed = intent.model_copy(update={"lines": tuple(kept)})
            store.put(intent.place, changed.model_dump_json().encode())
    return gone


def discounted(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with what a call in a batch costs for prices."""
    if endpoint.prices is None:
        return endpoint
    names = ("input", "output", "cached_input", "call")
    full = {name: getattr(endpoint.prices, name) for name in names}
    less = {name: price and price * endpoint.prices.batch for name, price in full.items()}
    return endpoint.model_copy(update={"prices": endpoint.prices.model_copy(update=less)})


def line_of(key: str, request: Request, stage: str) -> Line:
    """What is known of a request without its words."""
    # Of a picture of a part, the image: forgetting goes by it.
    images = tuple(picture.image_id.partition("#")[0] for picture in request.pictures)
    return Line(key, request.attempt, images, request.about, stage)


@dataclass
class _Pile:
    """Requests that wait to be sent together, written out."""

    file: Any = field(default_factory=lambda: tempfile.TemporaryFile())  # noqa: SIM115
    lines: list[Line] = field(default_factory=list)
    size: int = 0

    def add(self, line: Line, text: bytes) -> None:
        self.file.write(text)
        self.lines.append(line)
        self.size += len(text)


class _Unsure(CallFailed):
    """Nobody knows whether the batch was made."""


class Batches:
    """Sends requests in batches. `keep` stores an answer and returns when it is durable.

    The first request goes by `single`, one call at full price: it shows that the server answers
    and which answer format it takes.
    """

    def __init__(
        self,
        client: Client,
        store: Store,
        params: BatchParams,
        keep: Keep,
        single: Single,
        spending: Spending,
        most: Callable[[Request], Amount],
        stage: str = "",
        may_go_on: Callable[[], None] = lambda: None,
    ):
        self._client, self._store, self._params = client, store, params
        self._keep, self._single, self._stage = keep, single, stage
        self._spending, self._most, self._may_go_on = spending, most, may_go_on
        self._prices = discounted(client.endpoint).prices
        self._coming: dict[str, asyncio.Future[Response]] = {}
        self._stuck: dict[str, str] = {}  # in batches that can't be followed: why not
        self._reserved: dict[str, Amount] = {}
        self._pile = _Pile()
        self._writing = asyncio.Semaphore(WRITING)
        self._being_written = 0
        self._timer: asyncio.TimerHandle | None = None
        self._opening = asyncio.Lock()
        self._said: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Future[None]] = set()

    def in_batch(self, key: str) -> bool:
        """Whether a request is in a batch that is not finished, or about to be in one."""
        return key in self._coming or key in self._stuck

    async def send(self, request: Request) -> Response:
        """The answer, once its batch is done. Raises Unanswered, EndpointUnavailable."""
        key = mllm.request_key(request)
        if key in self._stuck:
            raise Unanswered("in_batch", self._stuck[key])
        for _ in range(self._params.tries):
            if key not in self._coming:
                if self._client.format is None:
                    async with self._opening:
                        if self._client.format is None:
                            return await self._single.send(request)
                await self._collect(key, request)
            try:
                return await self._wait(key)
            except CallFailed as error:
                failure = error
            if not failure.transient:
                break
        raise Unanswered("endpoint_error", str(failure))

    async def _wait(self, key: str) -> Response:
        coming = self._coming[key]
        await asyncio.wait([coming], timeout=self._params.wait_s)
        if coming.done():
            return coming.result()
        self._settle(key, CallFailed("", maybe_billed=True))
        raise Unanswered(
            "in_batch", f"{self._client.server.host} has not finished its batch; run again later"
        )

    def _settle(self, key: str, outcome: Outcome) -> None:
        if (reserved := self._reserved.pop(key, None)) is None:
            return
        if isinstance(outcome, Response):
            cost = budget.price(self._prices, outcome.usage)
            self._spending.settle(reserved, cost, outcome.usage)
        elif outcome.maybe_billed:
            self._spending.lose(reserved)
        else:
            self._spending.release(reserved)

    async def close(self) -> None:
        """Leave what is not finished to the next build; answers that are here are stored."""
        if self._timer:
            self._timer.cancel()
        for line in self._pile.lines:
            self._settle(line.key, CallFailed("not sent"))
        self._pile.file.close()
        await asyncio.gather(*self._ending, return_exceptions=True)
        left = [*self._tasks]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for key in [*self._reserved]:
            self._settle(key, CallFailed("left in a batch", maybe_billed=True))

    # Collecting -----------------------------------------------------------------------------------

    async def _collect(self, key: str, request: Request) -> None:
        """Write a request out, and see that what is written is sent sooner or later."""
        self._coming[key] = coming = _future()
        try:
            self._reserved[key] = await self._reserve(request)
            text = await self._written(key, request)
        except BaseException:
            self._settle(key, CallFailed("not sent"))
            del self._coming[key]
            coming.cancel()
            raise
        size = self._pile.size + len(text)
        if len(self._pile.lines) >= self._params.most or size > self._params.megabytes * 10**6:
            self._send_pile()
        self._pile.add(line_of(key, request, self._stage), text)
        self._set_timer()

    async def _reserve(self, request: Request) -> Amount:
        try:
            return await self._spending.reserve(self._most(request))
        except OverBudget:
            raise Unanswered("over_budget", "the budget is spent") from None

    async def _written(self, key: str, request: Request) -> bytes:
        self._being_written += 1
        try:
            async with self._writing:
                assert self._client.format is not None
                body = await mllm.body(self._client, request, self._client.format)
        finally:
            self._being_written -= 1
        line = {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}
        return json.dumps(line).encode() + b"\n"

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._params.collect_s, self._ring)

    def _ring(self) -> None:
        if self._being_written:
            self._set_timer()
        else:
            self._send_pile()

    def _send_pile(self) -> None:
        pile, self._pile = self._pile, _Pile()
        if pile.lines:
            intent = Intent(
                id=uuid4().hex,
                url=self._client.server.url,
                created=int(time.time()),
                lines=tuple(pile.lines),
            )
            self._start(intent, self._submit(intent, pile))

    def _start(self, intent: Intent, work: Awaitable[None]) -> None:
        """Do the work of a batch on the side; its requests hear of what goes wrong."""

        async def watched() -> None:
            try:
                await work
            except CallFailed as failure:
                told = f"a batch waits: {failure}; or delete {intent.place} to give its answers up"
                log.warning("%s", told)
                self._tell(intent, Unanswered("in_batch", told))
            except Exception as error:
                self._tell(intent, error)

        task = asyncio.create_task(watched())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, intent: Intent, error: Exception) -> None:
        """The answers of a batch will not come in this build, and the batch may be at work."""
        for line in intent.lines:
            self._stuck[line.key] = str(error)
            self._settle(line.key, CallFailed("", maybe_billed=True))
            coming = self._coming.pop(line.key, None)
            if coming and not coming.done():
                coming.set_exception(error)

    async def _to_its_end(self, work: Awaitable[None]) -> None:
        """Do what `close` waits for."""
        task = asyncio.ensure_future(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)

    # Sending --------------------------------------------------------------------------------------

    async def _submit(self, intent: Intent, pile: _Pile) -> None:
        """Upload a batch, have it made, and follow it to its end."""
        try:
            await self._write(intent)
            try:
                batch = await self._create(intent, await self._upload(intent, pile))
            except _Unsure:
                raise
            except CallFailed as failure:
                return await self._give_up(intent, failure)
        finally:
            pile.file.close()
        await self._follow(await self._named(intent, batch))

    async def _named(self, intent: Intent, batch: str) -> Intent:
        named = intent.model_copy(update={"batch": batch})
        await self._write(named)
        return named

    async def _write(self, intent: Intent) -> None:
        self._may_go_on()
        await asyncio.to_thread(_write, self._store, intent)

    async def _upload(self, intent: Intent, pile: _Pile) -> str:
        from openai.types import FileObject

        async def upload() -> Any:
            pile.file.seek(0)
            file = (intent.file_name, pile.file, "application/jsonl")
            return await self._client.openai.files.create(file=file, purpose="batch")

        return (await self._patiently(upload, FileObject)).id

    async def _create(self, intent: Intent, file_id: str) -> str:
        """The provider's name of a new batch; where its answer is lost, the batch is sought."""
        from openai.types import Batch

        create = partial(
            self._client.openai.batches.create,
            input_file_id=file_id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={MARK: intent.id},
        )
        endpoint = self._client.endpoint
        for tries in range(1, endpoint.attempts + 1):
            self._may_go_on()
            try:
                return (await self._call(create, Batch)).id
            except CallFailed as error:
                failure = error
            if failure.status is None or failure.status >= 500:
                if found := await self._find(intent, time.time()):
                    return found
            elif not failure.transient:
                break
            await asyncio.sleep(_pause(failure, tries, endpoint.backoff_s))
        raise failure

    async def _find(self, intent: Intent, asked: float) -> str | None:
        """The batch that carries our id; None where there is none `settle_s` after `asked`."""
        until = asked + self._params.settle_s
        while True:
            try:
                found = await self._patiently(partial(self._seek, intent))
            except CallFailed as failure:
                raise _Unsure(f"whether it was made can't be found out: {failure}") from None
            if found or time.time() >= until:
                return found
            await asyncio.sleep(min(self._params.poll_s, max(0.01, until - time.time())))

    async def _seek(self, intent: Intent) -> str | None:
        async for batch in self._client.openai.batches.list(limit=100):
            if (batch.metadata or {}).get(MARK) == intent.id:
                return batch.id
            if batch.created_at < intent.created - DAY_S:
                break
        return None

    async def _give_up(self, intent: Intent, failure: CallFailed) -> None:
        """Nothing of this batch is or will be answered, or billed."""

        async def clean() -> None:
            with contextlib.suppress(CallFailed):
                files = self._client.openai.files.list(purpose="batch")
                found = await self._patiently(partial(_called, files, intent.file_name))
                await self._delete_files(found)

        await self._finish(intent, {line.key: failure for line in intent.lines})
        await self._to_its_end(clean())

    # Following ------------------------------------------------------------------------------------

    async def pick_up(self) -> None:
        """Take up the batches that earlier builds left, and look at each once."""
        looks = []
        for intent in await asyncio.to_thread(lambda: [*unfinished(self._store)]):
            if intent.url == self._client.server.url:
                self._coming |= {line.key: _future() for line in intent.lines}
                looked = asyncio.Event()
                self._start(intent, self._resume(intent, looked))
                looks.append(asyncio.create_task(looked.wait()))
            else:
                told = (
                    f"a batch of {intent.url} is not finished: set the endpoint to that url once"
                    f" more, or delete {intent.place} to give its answers up"
                )
                log.warning("%s", told)
                self._stuck |= dict.fromkeys((line.key for line in intent.lines), told)
        if looks:
            await asyncio.wait(looks, timeout=FIRST_LOOK_S)
        for look in looks:
            look.cancel()

    async def _resume(self, intent: Intent, looked: asyncio.Event) -> None:
        try:
            if intent.batch is None:
                batch = await self._find(intent, intent.created)
                if batch is None:
                    lost = CallFailed("its batch was never made", transient=True)
                    return await self._give_up(intent, lost)
                intent = await self._named(intent, batch)
            await self._follow(intent, looked)
        finally:
            looked.set()

    async def _follow(self, intent: Intent, looked: asyncio.Event | None = None) -> None:
        """Look at a batch until it is done, then take its answers. Raises CallFailed."""
        from openai.types import Batch

        assert intent.batch is not None
        look, tries = partial(self._client.openai.batches.retrieve, intent.batch), 0
        while True:
            pause = self._params.poll_s * random.uniform(0.8, 1.2)
            try:
                batch = await self._call(look, Batch)
                tries = 0
            except CallFailed as failure:
                if not failure.transient:
                    raise
                tries += 1
                pause = max(pause, _pause(failure, tries, self._client.endpoint.backoff_s))
            else:
                self._say(batch)
                if batch.status in DONE:
                    return await self._to_its_end(self._gather(intent, batch))
            if looked:
                looked.set()
            await asyncio.sleep(pause)

    def _say(self, batch: Any) -> None:
        """Log how far a batch is, when that changed."""
        counts = batch.request_counts
        done = f", {counts.completed} of {counts.total} answered" if counts else ""
        told = f"batch {batch.id} is {batch.status}{done}"
        if self._said.get(batch.id) != told:
            log.info("%s: %s", self._client.server.host, told)
        self._said[batch.id] = told

    async def _gather(self, intent: Intent, batch: Any) -> None:
        """Store the answers of a batch, then forget the batch here and there."""
        files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        outcomes: dict[str, Outcome] = {}
        for name in files:
            content = await self._patiently(partial(self._client.openai.files.content, name))
            await asyncio.to_thread(read_lines, self._client, content.text, outcomes)
        lost = _missing(self._client, batch)
        # What was forgotten meanwhile is no longer in the file.
        known = {line.key for line in (await asyncio.to_thread(_read, self._store, intent)).lines}
        outcomes = {
            line.key: outcomes.get(line.key, lost) if line.key in known else lost
            for line in intent.lines
        }
        answers = [(line, outcomes[line.key]) for line in intent.lines]
        await asyncio.gather(*(self._keep(n, o) for n, o in answers if isinstance(o, Response)))
        await self._finish(intent, outcomes)
        with contextlib.suppress(CallFailed):
            await self._delete_files([batch.input_file_id, *files])

    async def _finish(self, intent: Intent, outcomes: Mapping[str, Outcome]) -> None:
        await asyncio.to_thread(self._store.delete, intent.place)
        for key, outcome in outcomes.items():
            self._settle(key, outcome)
            coming = self._coming.pop(key, None)
            if coming is None or coming.done():
                continue
            if isinstance(outcome, Response):
                coming.set_result(outcome)
            else:
                coming.set_exception(outcome)

    async def _delete_files(self, names: Iterable[str]) -> None:
        for name in names:
            await self._patiently(partial(self._client.openai.files.delete, name))

    # Calling --------------------------------------------------------------------------------------

    async def _patiently(self, call: Callable[[], Awaitable[Any]], kind: type = object) -> Any:
        """What a call that costs nothing returns, after some tries. Raises CallFailed."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda e: isinstance(e, CallFailed) and e.transient),
            stop=stop_after_attempt(self._client.endpoint.attempts),
            wait=partial(_wait, self._client.endpoint.backoff_s),
            reraise=True,
        )
        return await retrying(self._call, call, kind)

    async def _call(self, call: Callable[[], Awaitable[Any]], kind: type = object) -> Any:
        import openai

        found: Any = None
        try:
            with mllm.failures(self._client):
                found = await call()
        except (ValueError, openai.APIError):
            pass
        # The package takes any JSON for whatever was expected.
        if not isinstance(found, kind) or not getattr(found, "id", True):
            raise CallFailed(
                f"{self._client.server.host} answered with something that is none of the batch API;"
                " check endpoint.url (it usually ends in /v1)",
                transient=True,
            )
        return found


def _future() -> asyncio.Future[Response]:
    """A future that nobody has to wait for."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _write(store: Store, intent: Intent) -> None:
    store.put(intent.place, intent.model_dump_json().encode())


def _read(store: Store, intent: Intent) -> Intent:
    return Intent.model_validate_json(store.get(intent.place))


async def _called(files: Any, name: str) -> list[str]:
    return [file.id async for file in files if file.filename == name]


def _wait(backoff_s: float, state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, CallFailed)
    return _pause(error, state.attempt_number, backoff_s)


def _pause(failure: CallFailed, tries: int, backoff_s: float) -> float:
    if failure.retry_after is not None:
        return failure.retry_after + random.uniform(0, backoff_s)
    return min(30.0, backoff_s * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)


def read_lines(client: Client, text: str, outcomes: dict[str, Outcome]) -> None:
    """Add what the lines of a result file say, by request key. An answer outweighs an error, and
    of two answers the first holds.
    """
    strange = 0
    for raw in text.split("\n"):
        try:
            line = json.loads(raw) if raw.strip() else None
        except ValueError:
            line = {}
        key = line.get("custom_id") if isinstance(line, dict) else None
        if line is None or not isinstance(key, str):
            strange += line is not None
            continue
        outcome = _outcome(client, line)
        if key not in outcomes or (
            isinstance(outcome, Response) and not isinstance(outcomes[key], Response)
        ):
            outcomes[key] = outcome
    if strange:
        log.warning("%s: %d lines of a batch are no results", client.server.host, strange)


def _outcome(client: Client, line: dict[str, Any]) -> Outcome:
    host, found = client.server.host, line.get("response")
    response = found if isinstance(found, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        try:
            return mllm.read_completion(mllm.completion_of(client, body))
        except CallFailed as failure:
            return failure
    wrong = line.get("error") or body or {}
    wrong = wrong.get("error", wrong) if isinstance(wrong, dict) else wrong
    told = wrong.get("message", wrong) if isinstance(wrong, dict) else wrong
    transient = isinstance(status, int) and (status == 429 or status >= 500)
    said = f"{host} failed it in a batch: {mllm.told(client, str(told))}"
    return CallFailed(said, status=status, transient=transient)


def _missing(client: Client, batch: Any) -> CallFailed:
    """What became of a request that a batch which is over says nothing about."""
    errors = getattr(batch.errors, "data", None) or []
    why = "".join(f": {mllm.told(client, str(error.message))}" for error in errors[:1])
    return CallFailed(
        f"{client.server.host} ended its batch ({batch.status}) without an answer to it{why}",
        maybe_billed=batch.status != "failed",
    )
