"""An OpenAI-compatible chat server with real HTTP; it answers from a table and misbehaves on order.

In a thread: `with MllmServer() as server: ... server.url`. As a process, told what to do over HTTP
(`POST /control`) and asked what it was asked (`GET /ledger`):
`python -m tests.mllm_server --port 8000 --delay-ms 500`.
"""

import argparse
import asyncio
import hashlib
import json
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.mllm_answers import (
    BEHAVIOURS,
    Reply,
    completion,
    digests,
    error,
    good_content,
    said,
)
from tests.mllm_batches import Batches

__all__ = ["BEHAVIOURS", "MllmServer", "Reply", "completion", "digests", "good_content", "said"]

Headers = dict[str, str]


@dataclass
class Storm:
    """429 for every call from the `after`th call on, until `calls` were refused or `seconds` old.

    A storm without an end lasts until `server.storms.clear()`.
    """

    after: int = 0
    calls: int | None = None
    seconds: float | None = None
    retry_after: str | None = None
    refused: int = 0
    since: float | None = None

    def rages(self, call: int) -> bool:
        if call <= self.after:
            return False
        self.since = self.since or time.monotonic()
        over = self.seconds is not None and time.monotonic() - self.since >= self.seconds
        if over or (self.calls is not None and self.refused >= self.calls):
            return False
        self.refused += 1
        return True


def content_digest(request: dict[str, Any]) -> str:
    """Names what a request asks, however its JSON is laid out."""
    text = json.dumps(request, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class MllmServer:
    """Serves on loopback and keeps a ledger of what it was asked.

    The next behaviours come from `script`, then from `rule` (a function of the request), which
    is "good" unless told otherwise. `formats` are the response formats it takes; with a `key`
    it wants that bearer token. `ledger` holds (behaviour, request, headers) in order, if `keep`.

    Every call takes `delay_ms`. More than `most` at once, more than `per_second`, or a call in one
    of the `storms` is answered by 429. `paid` counts the completions made for each digest of a
    request's content, whoever still listened, and `delivered` those that were sent whole to one
    who had not hung up; with `told`, a file, the counts outlive the server. Batches: see
    `tests.mllm_batches`.
    """

    def __init__(
        self,
        script: Iterable[str] = (),
        rule: Callable[[dict[str, Any]], str] = lambda request: "good",
        formats: Iterable[str] = ("json_schema", "json_object"),
        key: str | None = None,
        port: int = 0,
        delay_ms: float = 0.0,
        most: int | None = None,
        per_second: float | None = None,
        keep: bool = True,
        told: Path | None = None,
    ):
        self.script, self.rule, self.formats, self.key = list(script), rule, set(formats), key
        self.delay_ms, self.most, self.per_second, self.keep = delay_ms, most, per_second, keep
        self.storms: list[Storm] = []
        self.ledger: list[tuple[str, dict[str, Any], Headers]] = []
        self.in_flight = self.most_in_flight = self.calls = 0
        self.counts: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.batches = Batches(self._answer_line)
        self._sent: deque[Any] = deque(maxlen=32)
        self._recent: deque[float] = deque()
        self._told = self._open_ledger(told)
        self._socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.origin = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"{self.origin}/v1"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._ready = threading.Event()

    def _open_ledger(self, told: Path | None) -> Any:
        if told is None:
            return None
        for line in told.read_text().splitlines() if told.exists() else ():
            what, name = json.loads(line)
            getattr(self, what)[name] += 1
        return told.open("a", buffering=1)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for _, request, _ in self.ledger]

    def summary(self) -> dict[str, Any]:
        """The counts as JSON, and the CPU seconds of this process."""
        return {
            **{"calls": self.calls, "counts": self.counts, "paid": self.paid},
            **{"delivered": self.delivered, "most_in_flight": self.most_in_flight},
            **{"batches": len(self.batches.batches), "files": len(self.batches.files)},
            **{"storms": [storm.refused for storm in self.storms], "cpu_s": time.process_time()},
        }

    def control(self, orders: dict[str, Any]) -> None:
        """Change settings: script, delay_ms, most, per_second, storms, formats; of batches
        script (as `batch_script`), polls, faults, retry_after.
        """
        of_batches = {"batch_script": "script"} | {
            name: name for name in ("polls", "faults", "retry_after")
        }
        for name, value in orders.items():
            if name in of_batches:
                setattr(self.batches, of_batches[name], value)
            elif name == "storms":
                self.storms = [Storm(**storm) for storm in value]
            elif name in ("script", "delay_ms", "most", "per_second"):
                setattr(self, name, value)
            elif name == "formats":
                self.formats = set(value)
            else:
                raise ValueError(f"no such order: {name}")

    def __enter__(self) -> "MllmServer":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def serve(self) -> None:
        """Answer until the loop is stopped."""
        loop = self._loop
        asyncio.set_event_loop(loop)
        start = asyncio.start_server(self._connection, sock=self._socket, limit=2**20)
        server = loop.run_until_complete(start)
        loop.call_soon(self._ready.set)
        try:
            loop.run_forever()
        finally:
            server.close()
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply; whether the connection may be used again."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        method, target, _ = first.split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        body = await _body(reader, headers)
        if method != "POST" or not target.endswith("/chat/completions"):
            return await _send(self._other(method, target, headers, body), reader, writer)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply, name = self._call(target, json.loads(body), headers)
            await asyncio.sleep(reply.delay_s)
            open_still = await _send(reply, reader, writer)
            gone = writer.is_closing() or reader.at_eof()
            if reply.paid and reply.share == 1.0 and not gone:
                self._count("delivered", name)
                self._sent.append(reply.body)
        finally:
            self.in_flight -= 1
        return open_still

    def _call(self, target: str, request: dict[str, Any], headers: Headers) -> tuple[Reply, str]:
        behaviour, reply = self._choose(target, request, headers)
        reply.delay_s += self.delay_ms / 1000
        return reply, self._enter(behaviour, reply, request, headers)

    def _enter(
        self, behaviour: str, reply: Reply, request: dict[str, Any], headers: Headers
    ) -> str:
        """Write a call into the ledger; gives the digest of what it asked."""
        if self.keep:
            self.ledger.append((behaviour, request, headers))
        self._count("counts", behaviour)
        name = content_digest(request) if reply.paid else ""
        if reply.paid:
            self._count("paid", name)
        return name

    def _count(self, what: str, name: str) -> None:
        getattr(self, what)[name] += 1
        if self._told:
            self._told.write(json.dumps([what, name]) + "\n")

    def _choose(self, target: str, request: dict[str, Any], headers: Headers) -> tuple[str, Reply]:
        self.calls += 1
        if target != "/v1/chat/completions":
            return "wrong path", error(404, "no such path")
        if refused := self._wrong_key(headers):
            return "wrong key", refused
        for storm in self.storms:
            if storm.rages(self.calls):
                after = {"retry_after": storm.retry_after} if storm.retry_after else {}
                return "storm", error(429, "there is a storm", **after)
        if self._too_many():
            return "too many", error(429, "too many requests")
        form = request.get("response_format", {}).get("type")
        if form and form not in self.formats:
            return "wrong format", error(400, f"response_format {form} is not supported")
        return self._behave(request)

    def _behave(self, request: dict[str, Any]) -> tuple[str, Reply]:
        behaviour = self.script.pop(0) if self.script else self.rule(request)
        reply = BEHAVIOURS[behaviour](request)
        if behaviour == "duplicate" and self._sent:
            reply.body = self._sent[0]
        return behaviour, reply

    def _too_many(self) -> bool:
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 1:
            self._recent.popleft()
        if self.most is not None and self.in_flight > self.most:
            return True
        if self.per_second is not None and len(self._recent) >= self.per_second:
            return True
        self._recent.append(now)
        return False

    def _wrong_key(self, headers: Headers) -> Reply | None:
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return error(401, f"bad key {headers.get('authorization')}")
        return None

    def _answer_line(self, request: dict[str, Any]) -> Reply:
        behaviour, reply = self._behave(request)
        name = self._enter(f"batch: {behaviour}", reply, request, {})
        if reply.paid:
            self._count("delivered", name)
        return reply

    def _other(self, method: str, target: str, headers: Headers, body: bytes) -> Reply:
        url = urlsplit(target)
        if (method, url.path) == ("GET", "/ledger"):
            return Reply(body=self.summary())
        if (method, url.path) == ("POST", "/control"):
            self.control(json.loads(body))
            return Reply(body={})
        if refused := self._wrong_key(headers):
            return refused
        if not url.path.startswith(("/v1/files", "/v1/batches")):
            return error(404, "no such path")
        query = dict(parse_qsl(url.query))
        return self.batches.handle(method, url.path.removeprefix("/v1"), query, body)


async def _body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


async def _send(reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    raw = isinstance(reply.body, str)
    body = (reply.body if raw else json.dumps(reply.body)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = "".join(f"{k}: {v}\r\n" for k, v in (headers | reply.headers).items())
    head = f"HTTP/1.1 {reply.status} Reply\r\n{lines}\r\n".encode()
    if reply.share == 1.0:
        writer.write(head + body)
    elif reply.share:
        writer.write(head + body[: int(len(body) * reply.share)])
    await writer.drain()
    if reply.ends == "stalled":
        await reader.read()  # until the other side gives up
    return reply.ends == "whole"


def main() -> None:
    from tests.reading import rule

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--script", nargs="*", default=[], choices=sorted(BEHAVIOURS))
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--most", type=int, help="calls at once; more are answered by 429")
    parser.add_argument("--per-second", type=float)
    parser.add_argument("--ledger", type=Path, help="a file that keeps the counts")
    parser.add_argument("--keep", action="store_true", help="keep every request in memory")
    given = vars(parser.parse_args())
    server = MllmServer(rule=rule, told=given.pop("ledger"), **given)
    print(server.url, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
