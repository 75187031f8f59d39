"""The fault server keeps its own word: what other tests believe its ledger for."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mllm_server import MllmServer, Storm

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": 'Say "instructions"'}]}


def ask(url: str, request: dict[str, Any] = HELLO, timeout: float = 5) -> httpx.Response:
    return httpx.post(f"{url}/chat/completions", json=request, timeout=timeout)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server in a process of its own, and its URL."""
    command = [sys.executable, "-m", "tests.mllm_server", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            yield running.stdout.readline().strip(), running
        finally:
            running.kill()


def test_a_storm_begins_and_ends_by_count():
    with MllmServer() as server:
        server.storms = [Storm(after=1, calls=2, retry_after="7"), Storm(after=4, calls=1)]
        replies = [ask(server.url) for _ in range(6)]
    assert [reply.status_code for reply in replies] == [200, 429, 429, 200, 429, 200]
    assert [reply.headers.get("retry-after") for reply in replies[1:5]] == ["7", "7", None, None]
    assert server.counts == {"good": 3, "storm": 3}


def test_a_storm_ends_by_time():
    with MllmServer() as server:
        server.storms = [Storm(seconds=0.05)]
        replies = [ask(server.url)]
        while replies[-1].status_code == 429:
            replies.append(ask(server.url))
    assert replies[0].status_code == 429


def test_more_than_its_rate_is_refused():
    with MllmServer(per_second=2) as server:
        replies = [ask(server.url).status_code for _ in range(3)]
    assert replies == [200, 200, 429]


def test_what_is_paid_is_counted_by_content_also_where_it_does_not_arrive():
    other = {**HELLO, "model": "large"}
    script = ["good", "429", "closed socket", "closed in the middle", "stalled body", "refusal"]
    with MllmServer(script) as server:
        assert ask(server.url).status_code == 200
        assert ask(server.url).status_code == 429
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                ask(server.url)
        with pytest.raises(httpx.ReadTimeout):
            ask(server.url, timeout=0.1)
        ask(server.url, dict(reversed(other.items())))
        ask(server.url, other)
    assert sorted(server.paid.values()) == [2, 3]
    assert sorted(server.delivered.values()) == [1, 2]


def test_a_duplicate_is_the_answer_to_another_question():
    with MllmServer(["good", "duplicate", "good"]) as server:
        first, second, third = (ask(server.url, {**HELLO, "n": n}).json() for n in range(3))
    assert first == second and third["id"] != first["id"]
    assert server.paid.total() == len(server.paid) == 3


def test_half_a_request_is_no_call():
    with MllmServer() as server:
        with socket.create_connection(("127.0.0.1", int(server.origin.rpartition(":")[2]))) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        assert ask(server.url).status_code == 200
    assert server.counts == {"good": 1}


def test_a_process_takes_orders_and_its_counts_outlive_it(tmp_path: Path):
    told = ("--ledger", str(tmp_path / "ledger"))
    for paid in (2, 4):
        with process(*told) as (url, running):
            origin = url.removesuffix("/v1")
            orders = {"script": ["500", "good"], "storms": [{"calls": 1}], "delay_ms": 1}
            assert httpx.post(f"{origin}/control", json=orders).status_code == 200
            assert [ask(url).status_code for _ in range(4)] == [429, 500, 200, 200]
            ledger = httpx.get(f"{origin}/ledger").json()
            assert [*ledger["paid"].values()] == [*ledger["delivered"].values()] == [paid]
            assert ledger["counts"] == {"storm": paid / 2, "500": paid / 2, "good": paid}
            running.kill()
    assert len([json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]) == 16
