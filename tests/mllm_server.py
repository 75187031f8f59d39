"""An OpenAI-compatible chat server with real HTTP; it answers from a table and misbehaves on order.

In a thread: `with MllmServer() as server: ... server.url`. As a process:
`python -m tests.mllm_server --port 8000`.
"""

import argparse
import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
THINGS = ("arrow", "leaf", "card", "moon", "flag", "button", "house", "fish")


@dataclass
class Reply:
    """What goes over the wire; `cut` closes the socket instead of answering."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False


def digests(request: dict[str, Any]) -> list[str]:
    """SHA-256 of the pictures of a request, in their order."""
    found = []
    for message in request["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition("base64,")[2]
                found.append(hashlib.sha256(base64.b64decode(data, validate=True)).hexdigest())
    return found


def said(request: dict[str, Any]) -> str:
    """All text of a request."""
    texts = []
    for message in request["messages"]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


def good_content(request: dict[str, Any]) -> str:
    """A valid answer: a function of the pictures, or of the text where there are none."""
    text = said(request)
    seeds = digests(request) or [hashlib.sha256(text.encode()).hexdigest()] * 2
    query, target = (
        f"a {COLOURS[int(seed[:2], 16) % 8]} {THINGS[int(seed[2:4], 16) % 8]} ({seed[:6]})"
        for seed in seeds[:2]
    )
    comparison = {
        "common": "flat drawings of one thing",
        "differences": {"query": query, "target": target},
    }
    written = {
        "instructions": [
            f"Like this one, but {target}",
            f"Show me {target} in the same style",
            f"The same kind of drawing, this time with {target}",
        ]
    }
    wants = [part for part in (comparison, written) if f'"{next(iter(part))}"' in text]
    return json.dumps({key: value for part in wants for key, value in part.items()})


def completion(request: dict[str, Any], content: str | None, **changed: Any) -> Reply:
    message = {"role": "assistant", "content": content, "refusal": changed.get("refusal")}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": changed.get("finish_reason", "stop"),
    }
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }
    return Reply(body=body)


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "type": "error", "code": code}}, names)


def _slow(request: dict[str, Any]) -> Reply:
    reply = completion(request, good_content(request))
    reply.delay_s = 1.5
    return reply


BEHAVIOURS: dict[str, Callable[[dict[str, Any]], Reply]] = {
    "good": lambda request: completion(request, good_content(request)),
    "chatty": lambda request: completion(
        request, f"<think>{{hm}}</think>Sure:\n```json\n{good_content(request)}\n```"
    ),
    "429": lambda _: error(429, "slow down"),
    "429 retry-after": lambda _: error(429, "slow down", retry_after="0"),
    "429 come back tomorrow": lambda _: error(429, "slow down", retry_after="86400"),
    "429 no quota": lambda _: error(429, "you owe us money", "insufficient_quota"),
    "500": lambda _: error(500, "oh no"),
    "503": lambda _: error(503, "loading"),
    "400": lambda _: error(400, "this picture is not to our liking"),
    "404": lambda _: error(404, "no such model"),
    "redirect": lambda _: Reply(307, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
    "html": lambda _: Reply(body="<html>welcome</html>", headers={"Content-Type": "text/html"}),
    "broken body": lambda _: Reply(body='{"choices": [', headers={}),
    "refusal": lambda request: completion(request, None, refusal="I'd rather not"),
    "content filter": lambda request: completion(request, "", finish_reason="content_filter"),
    "truncated": lambda request: completion(
        request, good_content(request)[:20], finish_reason="length"
    ),
    "not json": lambda request: completion(request, "They are both nice."),
    "wrong schema": lambda request: completion(request, '{"verdict": 7}'),
    "empty": lambda request: completion(request, ""),
    "over-long": lambda request: completion(request, "x" * 50_000),
    "slow": _slow,
    "closed socket": lambda _: Reply(cut=True),
}


class MllmServer:
    """Serves on loopback and keeps a ledger of what it was asked.

    The next behaviours come from `script`, then from `rule` (a function of the request), which
    is "good" unless told otherwise. `formats` are the response formats it takes; with a `key`
    it wants that bearer token. `ledger` holds (behaviour, request, headers) in order.
    """

    def __init__(
        self,
        script: Iterable[str] = (),
        rule: Callable[[dict[str, Any]], str] = lambda request: "good",
        formats: Iterable[str] = ("json_schema", "json_object"),
        key: str | None = None,
        port: int = 0,
    ):
        self.script = list(script)
        self.rule = rule
        self.formats = set(formats)
        self.key = key
        self.ledger: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def counts(self) -> Counter[str]:
        return Counter(behaviour for behaviour, _, _ in self.ledger)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for _, request, _ in self.ledger]

    def __enter__(self) -> "MllmServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def serve(self) -> None:
        self._http.serve_forever()

    def answer(self, path: str, request: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            behaviour, reply = self._choose(path, request, headers)
            self.ledger.append((behaviour, request, headers))
        return reply

    def busy(self, change: int) -> None:
        with self._lock:
            self.in_flight += change
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def _choose(
        self, path: str, request: dict[str, Any], headers: dict[str, str]
    ) -> tuple[str, Reply]:
        if not path.endswith("/v1/chat/completions"):
            return "wrong path", error(404, "no such path")
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return "wrong key", error(401, f"bad key {headers.get('authorization')}")
        form = request.get("response_format", {}).get("type")
        if form and form not in self.formats:
            return "wrong format", error(400, f"response_format {form} is not supported")
        behaviour = self.script.pop(0) if self.script else self.rule(request)
        return behaviour, BEHAVIOURS[behaviour](request)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    owner: MllmServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Http

    def do_POST(self) -> None:
        owner = self.server.owner
        owner.busy(+1)
        try:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._send(owner.answer(self.path, json.loads(data), headers))
        finally:
            owner.busy(-1)

    def _send(self, reply: Reply) -> None:
        if reply.cut:
            self.close_connection = True
            return
        time.sleep(reply.delay_s)
        raw = isinstance(reply.body, str)
        body = (reply.body if raw else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (headers | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--script", nargs="*", default=[], choices=sorted(BEHAVIOURS))
    arguments = parser.parse_args()
    server = MllmServer(arguments.script, port=arguments.port)
    print(server.url, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
