"""The client of OpenAI-compatible chat servers: pictures and a schema go in, a checked answer or
the reason for none comes out. `send` makes one call; who may call, and when, is for infra.asking.
"""

import asyncio
import base64
import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, TypeVar, get_args
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from infra.budget import Prices
from infra.canonical import digest, settings
from infra.errors import PairmillError
from infra.instructions import clean

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_log = logging.getLogger(__name__)
_prompts = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "prompts"), undefined=StrictUndefined
)

Format = Literal["json_schema", "json_object", "prompt"]
Status = Literal["answered", "refused", "truncated", "empty", "too_long"]
Pending = Literal["endpoint_error", "over_budget", "in_batch"]
PENDING: tuple[str, ...] = get_args(Pending)  # rules of questions that a later build asks again
Flaw = Literal["refused", "truncated", "empty", "too_long", "wrong_schema"]
Answer = TypeVar("Answer", bound=BaseModel)

_FORMATS: tuple[Format, ...] = ("json_schema", "json_object", "prompt")
_ANSWER_LIMIT = 20_000  # characters
HEARD = 4_096  # answers whose ids are remembered
_LONGEST_PAUSE_S = 300.0
_OPENINGS = 3  # calls that may fail, one after the other, before the first answer
_UNSUPPORTED = {400, 415, 422, 501}
_TRANSIENT = {408, 409, 425, 429}
_PASSING = _UNSUPPORTED | {413, *range(500, 600)}
_HEADERS = {
    *("accept", "accept-encoding", "connection", "content-length"),
    *("content-type", "host", "transfer-encoding", "user-agent"),
}
_REMEDIES = {
    401: "the key was refused; check the variable that endpoint.api_key_env names",
    403: "the key may not use this; check the key and endpoint.model",
    404: "check endpoint.url (it usually ends in /v1) and endpoint.model",
    405: "check endpoint.url (it usually ends in /v1)",
    429: "check the account's quota",
}


class Server(BaseModel):
    """One server of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Base URL of the server, up to and including /v1.")
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the API key. Local servers need none.",
    )
    api_key_block: str | None = Field(
        None, description="Prefect Secret block that holds the API key, in place of a variable."
    )
    concurrency: int = Field(
        16,
        ge=1,
        le=1024,
        description="Calls in flight at most; fewer while the server answers 429 or slows down.",
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the calls, where the model has several servers."
    )

    @field_validator("url")
    @classmethod
    def _plain_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must be a bare URL: keys go into the variable that api_key_env names")
        return url

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


class BatchParams(BaseModel):
    """The provider's batch API: cheaper, and slow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    most: int = Field(10_000, ge=1, le=50_000, description="Requests in a batch.")
    megabytes: int = Field(100, ge=1, le=200, description="Size of a batch, pictures included.")
    collect_s: float = Field(
        5.0, gt=0, description="A batch is sent when nothing was added to it for so many seconds."
    )
    poll_s: float = Field(60.0, gt=0, description="Seconds between two looks at a batch.")
    wait_s: float = Field(
        86_400.0,
        gt=0,
        description="Seconds that a build waits for a batch. What is not answered by then stays"
        " pending, and a later build takes the answers.",
    )
    settle_s: float = Field(
        60.0,
        ge=0,
        description="Seconds after which a batch that was asked for, and that the provider does"
        " not list, counts as never made.",
    )
    tries: int = Field(
        2, ge=1, le=10, description="Batches of one build that a request is put into at most."
    )


class Endpoint(Server):
    """A model behind one or several OpenAI-compatible servers, and how patiently it is asked."""

    model: str = Field(min_length=1, description="Name of the model, as the server knows it.")
    also: tuple[Server, ...] = Field(
        (), description="Further servers of the same model, by the same name."
    )
    timeout_s: float = Field(120.0, gt=0, description="Seconds for one call, all of it.")
    attempts: int = Field(
        6, ge=1, le=20, description="Tries per call on 5xx, lost connections and timeouts."
    )
    backoff_s: float = Field(
        1.0, ge=0, le=60, description="Seconds before the second try; doubled for each further one."
    )
    patience_s: float = Field(
        600.0,
        gt=0,
        description="Seconds without any answer after which a server that did answer is given up"
        " for this build.",
    )
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name under which the server takes the limit on answer tokens."
    )
    batch: BatchParams | None = Field(
        None,
        description="Ask by the provider's batch API, cheaper and answered within a day; `{}` takes"
        " the defaults.",
    )
    prices: Prices | None = Field(
        None, description="What the provider charges; needed by a budget in money."
    )
    image_tokens: int = Field(
        1_600,
        ge=1,
        description="Tokens that a picture may cost at most. Budgets reserve by it before a call;"
        " what is charged is what the server reports.",
    )

    @property
    def servers(self) -> tuple[Server, ...]:
        return (self, *self.also)


class EndpointUnavailable(PairmillError):
    """The endpoint has never answered, so that a build has nothing to wait for."""


class CallFailed(PairmillError):
    """One call brought no answer. `maybe_billed`: it had been sent, so it may cost all the same."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        retry_after: float | None = None,
        maybe_billed: bool = False,
    ):
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.retry_after = retry_after
        self.maybe_billed = maybe_billed


class Unanswered(PairmillError):
    """A request has no answer yet; nothing is known to be wrong with it, so it stays pending."""

    def __init__(self, rule: Pending, detail: str):
        super().__init__(detail)
        self.rule = rule


class Picture(NamedTuple):
    """A picture of a request: what it is called in the prompt, and its image_id."""

    name: str
    image_id: str


@dataclass(frozen=True)
class Request:
    """One question. What all requests of a kind share comes first, so that prefix caches hit.

    `resize` names the rule by which pictures were made smaller. `turns` are (role, text) of the
    talk so far, where an answer is to be repaired. `attempt` tells questions apart that are asked
    anew on purpose. `about` are ids of images and captions, beyond `pictures`, that the text was
    made from: forgetting goes by them, and they are no part of what a request means.
    """

    instructions: str
    pictures: tuple[Picture, ...]
    text: str
    answer: type[BaseModel]
    resize: str
    model: str
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None
    turns: tuple[tuple[Literal["assistant", "user"], str], ...] = ()
    attempt: int = 0
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """An answer as it came; every one may have been billed.

    `usage` has tokens of input, output, and input that was cached; None where it was not reported.
    """

    status: Status
    text: str
    finish_reason: str | None
    model: str
    usage: dict[str, int] | None


class Flawed(NamedTuple):
    """Why a request has no usable answer: a flaw is final, what is pending is asked again."""

    rule: Flaw | Pending
    detail: str


class Ask(Protocol):
    """Asks one request: the stored answer where there is one. Raises Unanswered.

    A question with a flawed answer is asked anew up to `attempt`, which counts from 0.
    """

    attempt: int

    async def __call__(self, request: "Request") -> "Response": ...


def request_key(request: Request) -> str:
    """SHA-256 of what a request means: never of picture bytes, endpoint, pace or answer format."""
    meaning = {
        "instructions": request.instructions,
        "pictures": [list(picture) for picture in request.pictures],
        "text": request.text,
        "schema": schema_of(request.answer),
        "resize": request.resize,
        "model": request.model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "turns": [list(turn) for turn in request.turns],
        "attempt": request.attempt,
    }
    return digest(settings(meaning))


@dataclass
class Client:
    """An open server: the connection, and what was found out about it."""

    endpoint: Endpoint
    server: Server
    images: Callable[[str], bytes]
    openai: "AsyncOpenAI"
    secret: str
    format: Format | None = None
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    urls: dict[str, "asyncio.Task[str]"] = field(default_factory=dict)
    heard: dict[str, tuple[int, str]] | None = field(default_factory=dict)


@contextlib.asynccontextmanager
async def connect(
    endpoint: Endpoint, server: Server, images: Callable[[str], bytes], secret: str = ""
) -> AsyncIterator[Client]:
    """Opens a client for the running event loop; `images` gives the JPEG of an image_id."""
    from openai import DEFAULT_CONNECTION_LIMITS as LIMITS
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    key = secret or "none"
    openai = AsyncOpenAI(
        base_url=server.url,
        api_key=key,
        max_retries=0,
        timeout=Timeout(endpoint.timeout_s, connect=min(10.0, endpoint.timeout_s)),
        http_client=DefaultAsyncHttpxClient(
            follow_redirects=False,
            event_hooks={"request": [_only_own_headers(key)]},
            # Of the package: 100 connections are kept, the others are opened for each call.
            limits=type(LIMITS)(
                max_connections=None, max_keepalive_connections=server.concurrency + 8
            ),
        ),
    )
    async with openai:
        client = Client(endpoint, server, images, openai, secret)
        try:
            yield client
        finally:
            for task in client.urls.values():
                task.cancel()


def _only_own_headers(key: str) -> Callable[[Any], Awaitable[None]]:
    """A hook that undoes what the package adds from its environment variables, whatever the host.

    These name an organisation, a project, and any header, the one with the key included.
    """

    async def before_sending(request: Any) -> None:
        for name in set(request.headers) - _HEADERS:
            del request.headers[name]
        request.headers["authorization"] = f"Bearer {key}"

    return before_sending


async def ask_for(ask: Ask, request: Request, answer: type[Answer]) -> Answer | Flawed:
    """The answer as a model, after at most one repair, or what is wrong with it.

    A flawed answer was paid for and stays; it is asked for anew up to `ask.attempt`.
    """
    found: Answer | Flawed = Flawed("empty", "")
    for attempt in range(ask.attempt + 1):
        try:
            found = await _ask_and_repair(ask, replace(request, attempt=attempt), answer)
        except Unanswered as pending:
            return Flawed(pending.rule, str(pending))
        if not isinstance(found, Flawed):
            break
    return found


async def _ask_and_repair(ask: Ask, request: Request, answer: type[Answer]) -> Answer | Flawed:
    found = _read(response := await ask(request), answer)
    if isinstance(found, Flawed) and found.rule == "wrong_schema":
        found = _read(await ask(_repair(request, response.text, found.detail)), answer)
    return found


def _read(response: Response, answer: type[Answer]) -> Answer | Flawed:
    if response.status != "answered":
        return Flawed(response.status, _excerpt(response.text))
    found = parse(response.text, answer)
    return found if isinstance(found, answer) else Flawed("wrong_schema", str(found))


def parse(text: str, answer: type[Answer]) -> Answer | str:
    """The first JSON object of a text that fits the model, or what is wrong with the text."""
    complaint = "there is no JSON object in it"
    # Thoughts come before an answer; one that begins at once may hold their mark as a word.
    begins = text.lstrip().startswith("{")
    for found in _objects(text if begins else text.rpartition("</think>")[2]):
        try:
            return answer.model_validate(found)
        except ValidationError as error:
            flaws = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            complaint = _excerpt("; ".join(flaws))
    return complaint


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, start = json.JSONDecoder(), text.find("{")
    for _ in range(100):
        if start < 0:
            return
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield found
        start = text.find("{", end)


def _repair(request: Request, text: str, complaint: str) -> Request:
    words = _prompts.get_template("repair.jinja").render(complaint=complaint)
    return replace(request, turns=(*request.turns, ("assistant", text), ("user", words)))


def is_tolerable(failure: CallFailed) -> bool:
    """Whether a failure may be the fault of one request or moment instead of the endpoint's."""
    return failure.transient if failure.status in _TRANSIENT else failure.status in _PASSING


async def send(client: Client, request: Request) -> Response:
    """One call, and the answer as it came. Raises CallFailed.

    Until the server has answered once, calls go one at a time and find out which answer format
    it takes.
    """
    if client.format is None:
        async with client.opening:
            if client.format is None:
                return await _find_format(client, request)
    return await _send(client, request, client.format)


async def _find_format(client: Client, request: Request) -> Response:
    for form in _FORMATS:
        try:
            response = await _send(client, request, form)
        except CallFailed as failure:
            if failure.status not in _UNSUPPORTED or form == _FORMATS[-1]:
                raise
            continue
        client.format = form
        if form != "json_schema":
            _log.warning("%s takes no JSON schema; asking it by %s", client.server.host, form)
        return response
    raise AssertionError


async def _send(client: Client, request: Request, form: Format) -> Response:
    import openai

    asked = await body(client, request, form)
    found: Any = None
    try:
        with failures(client):
            async with asyncio.timeout(client.endpoint.timeout_s):
                # As `chat.completions.create`, which walks through the whole body once more.
                found = await client.openai.post("/chat/completions", body=asked, cast_to=object)
    except (ValueError, openai.APIError):
        pass
    completion = completion_of(client, found)
    response = read_completion(completion)
    if _is_anothers(client, request, completion, response.text):
        raise CallFailed(
            f"{client.server.host} gave the answer to another question; see the server's log",
            transient=True,
            maybe_billed=True,
        )
    return response


@contextlib.contextmanager
def failures(client: Client) -> Iterator[None]:
    """Has what goes wrong with a request to the server raised as CallFailed."""
    import openai

    host = client.server.host
    try:
        yield
    except (openai.APITimeoutError, TimeoutError):
        raise CallFailed(
            f"{host} did not answer in {client.endpoint.timeout_s:g} s;"
            " check the server or raise endpoint.timeout_s",
            transient=True,
            maybe_billed=True,
        ) from None
    except openai.APIConnectionError as error:
        raise _connection_failure(client, error) from None
    except openai.APIStatusError as error:
        raise _status_failure(client, error) from None


def _connection_failure(client: Client, error: Any) -> CallFailed:
    cause = error.__cause__ or error
    return CallFailed(
        f"no connection to {client.server.host} ({told(client, str(cause))});"
        " start the server or check endpoint.url",
        transient=True,
        # By name, since the package picks its HTTP library by what is installed.
        maybe_billed=type(cause).__name__ not in ("ConnectError", "ConnectTimeout"),
    )


def _status_failure(client: Client, error: Any) -> CallFailed:
    status, host = error.status_code, client.server.host
    if 300 <= status < 400:
        return CallFailed(
            f"{host} redirects elsewhere, which is refused; set endpoint.url to the final address",
            status=status,
        )
    wait = _retry_after(error.response.headers)
    spent = error.code == "insufficient_quota"
    transient = (status in _TRANSIENT or (status >= 500 and status != 501)) and not spent
    remedy = _REMEDIES.get(status, "see the server's log")
    return CallFailed(
        f"{host} answered {status}: {told(client, error.message)}; {remedy}",
        status=status,
        transient=transient and (wait or 0) <= _LONGEST_PAUSE_S,
        retry_after=wait,
    )


def _retry_after(headers: Any) -> float | None:
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def told(client: Client, message: str) -> str:
    """What a server says, on one line, without the key it may repeat."""
    return _excerpt(message.replace(client.secret, "***") if client.secret else message)


def _excerpt(text: str) -> str:
    line = clean(text[:2_000])
    return line if len(line) <= 200 else f"{line[:199]}\u2026"


def _texts(content: Any) -> Any:
    """Content as one text, where a server sends it in parts."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(part for part in parts if isinstance(part, str))


_Words = Annotated[str | None, BeforeValidator(_texts)]
_Name = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else "")]


class _Message(BaseModel):
    content: _Words = None
    refusal: _Words = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: _Name = ""


class Completion(BaseModel):
    """A chat completion, as far as it is read; the package itself takes anything for one."""

    choices: list[_Choice] = Field(min_length=1)
    id: _Name = ""
    model: _Name = ""
    created: Any = None
    usage: Any = None


def completion_of(client: Client, found: Any) -> Completion:
    """What a server sent, as a chat completion. Raises CallFailed where it is none."""
    try:
        return Completion.model_validate(found)
    except ValidationError:
        said = "; check endpoint.url (it usually ends in /v1)"
        if isinstance(found, dict) and found.get("error"):
            said = f": {told(client, str(found['error']))}"
        raise CallFailed(
            f"{client.server.host} answered with something that is no chat completion{said}",
            maybe_billed=True,
        ) from None


def read_completion(completion: Completion) -> Response:
    """The answer in a chat completion."""
    choice = completion.choices[0]
    text, refusal = (
        (words or "").encode("utf-8", "replace").decode()
        for words in (choice.message.content, choice.message.refusal)
    )
    status: Status = "answered"
    if refusal or choice.finish_reason == "content_filter":
        status, text = "refused", refusal or text
    elif choice.finish_reason == "length":
        status = "truncated"
    elif not text.strip():
        status = "empty"
    elif len(text) > _ANSWER_LIMIT:
        status = "too_long"
    reason, usage = choice.finish_reason or None, _usage(completion.usage)
    return Response(status, text[:_ANSWER_LIMIT], reason, completion.model, usage)


def _usage(found: Any) -> dict[str, int] | None:
    """Tokens as reported; None where they are not, or are no counts."""
    if not isinstance(found, dict):
        return None
    details = found.get("prompt_tokens_details")
    cached = (details.get("cached_tokens") if isinstance(details, dict) else None) or 0
    tokens = found.get("prompt_tokens"), found.get("completion_tokens"), cached
    counts = [count for count in tokens if type(count) is int and count >= 0]
    if len(counts) < 3:
        return None
    if cached > counts[0]:
        counts[2] = 0
    return dict(zip(("input", "output", "cached"), counts, strict=True))


def _is_anothers(client: Client, request: Request, completion: Completion, text: str) -> bool:
    """Whether the same answer came to another question before: somebody mixes up answers.

    Answers are told apart by their ids, unless these turn out to be no names.
    """
    name = f"{completion.id} {completion.created}"
    if client.heard is None or not completion.id:
        return False
    question = hash((request.instructions, request.pictures, request.text, request.turns))
    before = client.heard.setdefault(name, (question, text))
    while len(client.heard) > HEARD:
        del client.heard[next(iter(client.heard))]
    if before[0] == question:
        return False
    if before[1] != text:
        client.heard = None
        return False
    return True


async def body(client: Client, request: Request, form: Format) -> dict[str, Any]:
    """The JSON of a chat completion request, pictures as data URLs."""
    messages = await _messages(client, request, form)
    return {"messages": messages, **_parameters(client.endpoint, request, form)}


def _parameters(endpoint: Endpoint, request: Request, form: Format) -> dict[str, Any]:
    schema = {"name": request.answer.__name__, "strict": True, "schema": schema_of(request.answer)}
    formats: dict[Format, dict[str, Any]] = {
        "json_schema": {"response_format": {"type": "json_schema", "json_schema": schema}},
        "json_object": {"response_format": {"type": "json_object"}},
        "prompt": {},
    }
    sampling = {"temperature": request.temperature, "seed": request.seed}
    return {
        "model": request.model,
        endpoint.token_limit: request.max_tokens,
        **{name: value for name, value in sampling.items() if value is not None},
        **formats[form],
    }


@functools.cache
def schema_of(answer: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of an answer."""
    return answer.model_json_schema()


def with_schema(request: Request) -> tuple[str, str]:
    """Instructions and text of a request, with the schema of its answer for who can't be held to
    it: at the end of the instructions, or of the text where there are none.
    """
    shape = json.dumps(schema_of(request.answer), ensure_ascii=False)
    words = _prompts.get_template("json_only.jinja").render(schema=shape)
    if request.instructions:
        return f"{request.instructions}\n\n{words}", request.text
    return "", f"{request.text}\n\n{words}"


async def _messages(client: Client, request: Request, form: Format) -> list[Any]:
    is_held = form == "json_schema"
    system, text = (request.instructions, request.text) if is_held else with_schema(request)
    first = [{"role": "system", "content": system}] if system else []
    parts: list[dict[str, Any]] = []
    for picture in request.pictures:
        url = await _data_url(client, picture.image_id)
        if picture.name:
            parts.append({"type": "text", "text": f"{picture.name}:"})
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": text})
    turns = [{"role": role, "content": text} for role, text in request.turns]
    return [*first, {"role": "user", "content": parts}, *turns]


async def _data_url(client: Client, image_id: str) -> str:
    """The picture as a data URL; a few are kept, because neighbouring pairs share pictures."""
    task = client.urls.get(image_id)
    if task is None:
        task = asyncio.create_task(asyncio.to_thread(_encode, client.images, image_id))
        client.urls[image_id] = task
        while len(client.urls) > 2 * client.server.concurrency:
            del client.urls[next(iter(client.urls))]
    return await asyncio.shield(task)


def _encode(images: Callable[[str], bytes], image_id: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images(image_id)).decode("ascii")
