"""A server on which everything goes wrong: by its own ledger nothing it delivered is paid twice."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from infra import mllm
from infra.asking import AskParams, ask_all
from tests.mllm_server import MllmServer, good_content
from tests.tasks.examples import new_build

QUESTIONS = 120
LUCK = {
    **{"429": 3, "429 retry-after": 3, "500": 4, "503": 4, "html": 1},
    **{"closed socket": 3, "closed in the middle": 3, "stalled body": 1, "never": 1, "slow": 1},
    **{"broken body": 1, "no usage": 2, "duplicate": 4, "not json": 3, "wrong schema": 3},
    **{"refusal": 1, "truncated": 1, "empty": 1, "400": 1},
}
FINAL = {"refused", "truncated", "empty", "wrong_schema"}  # what was billed, however useless


class Note(BaseModel):
    instructions: list[str]


def question(number: int) -> mllm.Request:
    return mllm.Request(
        instructions='Answer as JSON: {"instructions": ["..."]}',
        pictures=tuple(mllm.Picture(name, f"{number:064x}") for name in ("One", "Other")),
        text=f"What is on picture {number}?",
        answer=Note,
        resize="none",
        model="tiny",
        max_tokens=100,
    )


def night(
    server: MllmServer, folder: Path, timeout_s: float = 0.25
) -> dict[int, Note | mllm.Flawed]:
    endpoint = {"url": server.url, "model": "tiny", "backoff_s": 0.001, "attempts": 4}
    params = AskParams(endpoint=endpoint | {"timeout_s": timeout_s, "concurrency": 16})

    async def work(ask: mllm.Ask, number: int) -> Note | mllm.Flawed:
        return await mllm.ask_for(ask, question(number), Note)

    numbers = range(QUESTIONS)
    rows = ask_all(new_build(folder), "test", numbers, work, params, lambda i: i.encode())
    return dict(zip(numbers, rows, strict=True))


def test_nights_of_bad_luck(tmp_path):
    script = [name for name, times in LUCK.items() for _ in range(2 * times)]
    script += ["429 retry-after date", *["good"] * 60]
    random.Random(1).shuffle(script)
    with MllmServer(["good", *script], most=6, per_second=100) as server:
        for _ in range(20):
            found = night(server, tmp_path)
            flaws = [row.rule for row in found.values() if isinstance(row, mllm.Flawed)]
            if set(flaws) <= FINAL:
                break
        calls = server.calls
        assert night(server, tmp_path) == found and server.calls == calls
    assert {"refused", "truncated", "empty"} <= set(flaws) <= FINAL
    assert set(server.counts) - {"too many"} == {"good", *script}
    # A duplicate arrives, is told from the answer, and is asked for again.
    again = {asked for asked, times in server.delivered.items() if times > 1}
    assert sum(server.delivered[asked] - 1 for asked in again) <= server.counts["duplicate"]
    for number, row in found.items():
        if isinstance(row, Note):
            assert row.instructions == own_answer(server, number)


def test_of_two_builds_that_meet_one_waits_and_nobody_pays_twice(tmp_path, caplog):
    with MllmServer(delay_ms=5) as server, ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: night(server, tmp_path, 60.0), range(2))
    assert one == other and len(one) == QUESTIONS
    assert server.calls == QUESTIONS and set(server.paid.values()) == {1}
    assert "test: waiting for process " in caplog.text


def own_answer(server: MllmServer, number: int) -> list[str]:
    """What the server says of this picture, and of no other."""
    asked = next(
        r
        for r in server.requests
        if r["messages"][1]["content"][-1]["text"].endswith(f" {number}?")
    )
    return Note.model_validate_json(good_content(asked)).instructions
