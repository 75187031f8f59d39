"""A proxy before a real S3 server that breaks a share of the requests, drawn by seed."""

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "silence", "reset", "truncated", "lost answer")
_ERROR = "<Error><Code>{}</Code><Message>drawn by the proxy</Message></Error>"
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "server", "date")


class Proxy:
    """Passes requests on. `share` of them meet a fault of `faults`; none passes while `cut`.

    A lost answer is a request that the server carried out, whose answer never arrives; silence
    keeps the connection and says nothing for `patience` seconds. The first write to a key that
    has `cut_before` in it cuts the connection for good, as does request number `cut_at`.
    """

    def __init__(self, upstream: str, seed: int = 0, faults: tuple[str, ...] = FAULTS):
        self.upstream = upstream.removeprefix("http://")
        self.draw, self.faults, self.share = random.Random(seed), faults, 0.0
        self.patience = 1.5
        self.cut, self.cut_at, self.cut_before = False, -1, ""
        self.passed, self.drawn = 0, Counter[str]()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, command: str, path: str) -> str | None:
        """What becomes of the next request."""
        with self.lock:
            self.passed += 1
            reached = self.cut_before and command == "PUT" and self.cut_before in path
            if self.cut or reached or self.passed - 1 == self.cut_at:
                self.cut = True
                return "reset"
            if self.draw.random() >= self.share:
                return None
            fault = self.draw.choice(self.faults)
            self.drawn[fault] += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = owner.fault(self.command, self.path)
                _ACTS.get(fault or "", _pass_on)(owner, self, body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _ask(owner: Proxy, handler: Any, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(owner.upstream, timeout=30)
    headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("connection",)}
    connection.request(handler.command, handler.path, body or None, headers)
    answer = connection.getresponse()
    data = answer.read()
    headers_back = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
    length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(data))
    connection.close()
    return answer.status, [*headers_back, ("Content-Length", length or "0")], data


def _pass_on(owner: Proxy, handler: Any, body: bytes, share: float = 1.0) -> None:
    status, headers, data = _ask(owner, handler, body)
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data[: int(len(data) * share)])


def _truncate(owner: Proxy, handler: Any, body: bytes) -> None:
    """The body ends half-way; where there is none to cut, the answer is lost."""
    if handler.command != "GET":
        return _lose(owner, handler, body)
    _pass_on(owner, handler, body, 0.5)
    handler.wfile.flush()
    _reset(owner, handler, body)


def _lose(owner: Proxy, handler: Any, body: bytes) -> None:
    _ask(owner, handler, body)
    _reset(owner, handler, body)


def _reset(owner: Proxy, handler: Any, body: bytes) -> None:
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RD)
    handler.connection.close()


def _say_nothing(owner: Proxy, handler: Any, body: bytes) -> None:
    time.sleep(owner.patience)
    _reset(owner, handler, body)


def _refuse(status: int, code: str) -> Callable[[Proxy, Any, bytes], None]:
    def refuse(owner: Proxy, handler: Any, body: bytes) -> None:
        data = b"" if handler.command == "HEAD" else _ERROR.format(code).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return refuse


_ACTS: dict[str, Callable[[Proxy, Any, bytes], None]] = {
    "500": _refuse(500, "InternalError"),
    "503": _refuse(503, "SlowDown"),
    "silence": _say_nothing,
    "reset": _reset,
    "truncated": _truncate,
    "lost answer": _lose,
}


class Impatient:
    """Makes a night give up a silent server sooner and pause less, so that a test need not wait.

    Called in the process of the night; what is retried, and how often, stays as it is.
    """

    def __init__(self, read_seconds: float = 1.0, attempts: int | None = None):
        self.read_seconds, self.attempts = read_seconds, attempts

    def __call__(self) -> None:
        import botocore.retries.standard as standard

        import infra.s3

        infra.s3.READ_SECONDS = self.read_seconds  # type: ignore[assignment]
        standard.ExponentialBackoff.delay_amount = lambda self, context: 0.02  # type: ignore
        if self.attempts:
            infra.s3.S3Store.__init__.__defaults__ = (self.attempts,)  # type: ignore[misc]
        os.environ["AWS_MAX_ATTEMPTS"] = "8"
