"""The client of OpenAI-compatible chat servers: pictures and a schema go in, a checked answer or
the reason for none comes out. Every call goes through `ask`.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random_exponential,
)

from infra.canonical import digest, settings
from infra.errors import ConfigError, PairmillError
from infra.instructions import clean

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_log = logging.getLogger(__name__)
_prompts = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "prompts"), undefined=StrictUndefined
)

Format = Literal["json_schema", "json_object", "prompt"]
Status = Literal["answered", "refused", "truncated", "empty", "too_long"]
Flaw = Literal["refused", "truncated", "empty", "too_long", "wrong_schema", "endpoint_error"]
Answer = TypeVar("Answer", bound=BaseModel)

_FORMATS: tuple[Format, ...] = ("json_schema", "json_object", "prompt")
_ANSWER_LIMIT = 20_000  # characters
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


class Endpoint(BaseModel):
    """An OpenAI-compatible server and how patiently it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Base URL of the server, up to and including /v1.")
    model: str = Field(min_length=1, description="Name of the model, as the server knows it.")
    api_key_env: str | None = Field(
        None,
        description="Environment variable that holds the API key. Local servers need none.",
    )
    concurrency: int = Field(16, ge=1, le=1024, description="Calls in flight.")
    timeout_s: float = Field(120.0, gt=0, description="Seconds for one call, all of it.")
    attempts: int = Field(
        6, ge=1, le=20, description="Tries per call on 429, 5xx, lost connections and timeouts."
    )
    backoff_s: float = Field(
        1.0, ge=0, le=60, description="Seconds before the second try; doubled for each further one."
    )
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name under which the server takes the limit on answer tokens."
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


class EndpointUnavailable(PairmillError):
    """The endpoint has never answered, so that a build has nothing to wait for."""


class CallFailed(PairmillError):
    """One call brought no answer that could have been billed."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.retry_after = retry_after


class Picture(NamedTuple):
    """A picture of a request: what it is called in the prompt, and its image_id."""

    name: str
    image_id: str


@dataclass(frozen=True)
class Request:
    """One question. What all requests of a kind share comes first, so that prefix caches hit.

    `resize` names the rule by which pictures were made smaller. `turns` are (role, text) of the
    talk so far, where an answer is to be repaired.
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


@dataclass(frozen=True)
class Response:
    """An answer as it came; every one may have been billed. `usage` is None where not reported."""

    status: Status
    text: str
    finish_reason: str | None
    model: str
    usage: dict[str, int] | None


class Flawed(NamedTuple):
    """Why a request has no usable answer."""

    rule: Flaw
    detail: str


def request_key(request: Request) -> str:
    """SHA-256 of what a request means: never of picture bytes, endpoint, pace or answer format."""
    meaning = {
        "instructions": request.instructions,
        "pictures": [list(picture) for picture in request.pictures],
        "text": request.text,
        "schema": request.answer.model_json_schema(),
        "resize": request.resize,
        "model": request.model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "turns": [list(turn) for turn in request.turns],
    }
    return digest(settings(meaning))


@dataclass
class Client:
    """An open endpoint: the connection, what was found out about it, and what it was asked."""

    endpoint: Endpoint
    images: Callable[[str], bytes]
    openai: "AsyncOpenAI"
    secret: str
    format: Format = "json_schema"
    asked: int = 0
    answered: bool = False
    failures: int = 0  # in a row
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    urls: dict[str, "asyncio.Task[str]"] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def connect(endpoint: Endpoint, images: Callable[[str], bytes]) -> AsyncIterator[Client]:
    """Opens a client for the running event loop; `images` gives the JPEG of an image_id.

    Raises ConfigError where the variable that should hold the key is not set.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    secret = _secret(endpoint)
    key = secret or "none"
    openai = AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key,
        max_retries=0,
        timeout=Timeout(endpoint.timeout_s, connect=min(10.0, endpoint.timeout_s)),
        http_client=DefaultAsyncHttpxClient(
            follow_redirects=False, event_hooks={"request": [_only_own_headers(key)]}
        ),
    )
    async with openai:
        client = Client(endpoint, images, openai, secret)
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


def _secret(endpoint: Endpoint) -> str:
    if endpoint.api_key_env is None:
        return ""
    if secret := os.environ.get(endpoint.api_key_env, "").strip():
        return secret
    raise ConfigError(
        f"endpoint.api_key_env: the environment variable {endpoint.api_key_env} is not set;"
        " export the API key in it, or leave the setting out for a server without keys"
    )


async def ask(client: Client, request: Request) -> Response:
    """One answer to one request, after retries of what can't have been billed.

    Until the endpoint has answered once, calls go one at a time and find out which answer format
    it takes. Raises EndpointUnavailable where it never answers, CallFailed for this call alone.
    """
    client.asked += 1
    if not client.answered:
        async with client.opening:
            if not client.answered:
                return await _open(client, request)
    if client.failures >= 4 * client.endpoint.concurrency:
        raise CallFailed(f"{client.endpoint.host} stopped answering; run again when it is back")
    return await _try(client, request, client.format)


async def ask_for(client: Client, request: Request, answer: type[Answer]) -> Answer | Flawed:
    """The answer as a model, after at most one repair, or what is wrong with it."""
    try:
        found = _read(response := await ask(client, request), answer)
        if isinstance(found, Flawed) and found.rule == "wrong_schema":
            found = _read(await ask(client, _repair(request, response.text, found.detail)), answer)
    except CallFailed as failure:
        return Flawed("endpoint_error", str(failure))
    return found


def _read(response: Response, answer: type[Answer]) -> Answer | Flawed:
    if response.status != "answered":
        return Flawed(response.status, _excerpt(response.text))
    found = parse(response.text, answer)
    return found if isinstance(found, answer) else Flawed("wrong_schema", str(found))


def parse(text: str, answer: type[Answer]) -> Answer | str:
    """The first JSON object of a text that fits the model, or what is wrong with the text."""
    complaint = "there is no JSON object in it"
    for found in _objects(text.rpartition("</think>")[2]):
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


async def _open(client: Client, request: Request) -> Response:
    try:
        response, client.format = await _find_format(client, request)
    except CallFailed as failure:
        if not _tolerable(failure) or client.failures >= _OPENINGS:
            raise EndpointUnavailable(str(failure)) from None
        raise
    client.answered = True
    if client.format != "json_schema":
        _log.warning(
            "%s takes no JSON schema; asking it by %s", client.endpoint.host, client.format
        )
    return response


def _tolerable(failure: CallFailed) -> bool:
    """Whether a failure may be the fault of one request or moment instead of the endpoint's."""
    return failure.transient if failure.status in _TRANSIENT else failure.status in _PASSING


async def _find_format(client: Client, request: Request) -> tuple[Response, Format]:
    for form in _FORMATS[:-1]:
        try:
            return await _try(client, request, form), form
        except CallFailed as failure:
            if failure.status not in _UNSUPPORTED:
                raise
            client.failures -= 1
    return await _try(client, request, "prompt"), "prompt"


async def _try(client: Client, request: Request, form: Format) -> Response:
    attempts = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, CallFailed) and error.transient),
        stop=stop_after_attempt(client.endpoint.attempts),
        wait=lambda state: _pause(state, client.endpoint.backoff_s),
        reraise=True,
    )
    try:
        response: Response = await attempts(_send, client, request, form)
    except CallFailed:
        client.failures += 1
        raise
    client.failures = 0
    return response


def _pause(state: RetryCallState, backoff_s: float) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, CallFailed) else None
    if asked is not None:
        return asked + random.uniform(0, backoff_s)
    half = {"multiplier": backoff_s / 2, "max": 30}
    return (wait_exponential(**half) + wait_random_exponential(**half))(state)


async def _send(client: Client, request: Request, form: Format) -> Response:
    import openai

    messages = await _messages(client, request, form)
    host = client.endpoint.host
    try:
        async with asyncio.timeout(client.endpoint.timeout_s):
            completion = await client.openai.chat.completions.create(
                messages=messages, **_parameters(client.endpoint, request, form)
            )
    except (openai.APITimeoutError, TimeoutError):
        raise CallFailed(
            f"{host} did not answer in {client.endpoint.timeout_s:g} s;"
            " check the server or raise endpoint.timeout_s",
            transient=True,
        ) from None
    except openai.APIConnectionError as error:
        cause = _told(client, str(error.__cause__ or error))
        raise CallFailed(
            f"no connection to {host} ({cause}); start the server or check endpoint.url",
            transient=True,
        ) from None
    except openai.APIStatusError as error:
        raise _status_failure(client, error) from None
    except (ValueError, openai.APIError):
        completion = None
    return _response(host, completion)


def _status_failure(client: Client, error: Any) -> CallFailed:
    status, host = error.status_code, client.endpoint.host
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
        f"{host} answered {status}: {_told(client, error.message)}; {remedy}",
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


def _told(client: Client, message: str) -> str:
    """What a server says, on one line, without the key it may repeat."""
    return _excerpt(message.replace(client.secret, "***") if client.secret else message)


def _excerpt(text: str) -> str:
    line = clean(text[:2_000])
    return line if len(line) <= 200 else f"{line[:199]}\u2026"


def _response(host: str, completion: Any) -> Response:
    from openai.types.chat import ChatCompletion

    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise CallFailed(
            f"{host} answered with something that is no chat completion;"
            " check endpoint.url (it usually ends in /v1)"
        )
    choice = completion.choices[0]
    text = (choice.message.content or "").encode("utf-8", "replace").decode()
    refusal = getattr(choice.message, "refusal", None)
    status: Status = "answered"
    if refusal or choice.finish_reason == "content_filter":
        status, text = "refused", refusal or text
    elif choice.finish_reason == "length":
        status = "truncated"
    elif not text.strip():
        status = "empty"
    elif len(text) > _ANSWER_LIMIT:
        status = "too_long"
    usage = completion.usage
    return Response(
        status,
        text[:_ANSWER_LIMIT],
        choice.finish_reason,
        completion.model,
        {"input": usage.prompt_tokens, "output": usage.completion_tokens} if usage else None,
    )


def _parameters(endpoint: Endpoint, request: Request, form: Format) -> dict[str, Any]:
    schema = {"name": request.answer.__name__, "strict": True, "schema": _schema(request)}
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


def _schema(request: Request) -> dict[str, Any]:
    return request.answer.model_json_schema()


async def _messages(client: Client, request: Request, form: Format) -> list[Any]:
    system = request.instructions
    if form != "json_schema":
        shape = json.dumps(_schema(request), ensure_ascii=False)
        system += "\n\n" + _prompts.get_template("json_only.jinja").render(schema=shape)
    parts: list[dict[str, Any]] = []
    for picture in request.pictures:
        url = await _data_url(client, picture.image_id)
        parts.append({"type": "text", "text": f"{picture.name}:"})
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": request.text})
    turns = [{"role": role, "content": text} for role, text in request.turns]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}, *turns]


async def _data_url(client: Client, image_id: str) -> str:
    """The picture as a data URL; a few are kept, because neighbouring pairs share pictures."""
    task = client.urls.get(image_id)
    if task is None:
        task = asyncio.create_task(asyncio.to_thread(_encode, client.images, image_id))
        client.urls[image_id] = task
        while len(client.urls) > 2 * client.endpoint.concurrency:
            del client.urls[next(iter(client.urls))]
    return await asyncio.shield(task)


def _encode(images: Callable[[str], bytes], image_id: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images(image_id)).decode("ascii")
