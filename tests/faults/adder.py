"""A process that adds paid answers for as long as it lives, or contends for a lease.

Run as a server that forks one for each line it reads, so that a life costs what it does, not what
it imports. Nothing in `infra` knows of this.
"""

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import lease, responses
from infra.errors import PairmillError
from infra.folder import FolderStore
from tests.answers import answer, key
from tests.faults.night import Die, counted_writes

WORKERS = 12
FOR_EVER = 1 << 30
REFUSED = 3  # the exit status of who lost the lease


class Server:
    """Starts lives; `begin` gives the process id of one, `ended` waits for its exit status."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.adder"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def begin(self, **how: Any) -> int:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(how) + "\n")
        self.process.stdin.flush()
        return self._said()

    def ended(self) -> int:
        """0, or the negative signal that killed it."""
        return self._said()

    def _said(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@contextmanager
def served() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.process.communicate(timeout=60)


def serve() -> None:
    for line in sys.stdin:
        how = json.loads(line)
        process = os.fork()
        if not process:
            try:
                live(**how)
            except PairmillError:
                os._exit(REFUSED)
            except BaseException:
                traceback.print_exc()
                os._exit(2)
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def live(
    store: str,
    told: str,
    name: str,
    at: int | None = None,
    mode: str = "add",
    rounds: int = 40,
    life: float = 60.0,
) -> None:
    """Add answers, or contend; `at` is the write to the store before which it dies."""
    responses.FLUSH_SECONDS, responses.FLUSH_ANSWERS = 0.005, 8
    responses.PILE, responses.SMALL_SHARDS = 3, 4
    lease.TICK = 0.001
    with Path(told).open("ab", buffering=0) as file, Path(os.devnull).open("w") as nobody:
        before = None if at is None else Die(at)
        with counted_writes(nobody, before, None):
            if mode == "add":
                asyncio.run(add(FolderStore(store), name, file, rounds, life))
            else:
                contend(FolderStore(store), file, rounds)


async def add(store: FolderStore, name: str, told: Any, rounds: int, life: float) -> None:
    with lease.hold(store, responses.LEASE, life) as held:
        async with responses.open_responses(store, held) as opened:

            async def work(worker: int) -> None:
                for number in range(rounds):
                    one = answer(f"{name} {worker} {number}")
                    await opened.add(one)
                    told.write(one.key.encode() + b"\n")

            await asyncio.gather(*map(work, range(WORKERS)))


def contend(store: FolderStore, told: Any, rounds: int) -> None:
    """Take the lease again and again; who has it must find a lock free that dies with a process."""
    for _ in range(rounds):
        with lease.hold(store, "answers") as held:
            fcntl.flock(told, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told.write(f"{held.epoch}\n".encode())
            held.check()
            fcntl.flock(told, fcntl.LOCK_UN)


def keys(told: Path) -> list[str]:
    """Keys whose `add` returned before the kill."""
    lines = told.read_text().splitlines() if told.exists() else []
    return [line for line in lines if len(line) == len(key(""))]


if __name__ == "__main__":
    serve()
