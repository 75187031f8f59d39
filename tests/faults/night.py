"""One night in a process of its own, which may end at any write to the store.

A server process has everything imported and is forked for each night, so a night costs what it
does, not what it imports. Nothing in `flows`, `tasks` or `infra` knows of this.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = [
    *("flows.build", "flows.config", "infra.folder", "infra.s3", "infra.models", "boto3"),
    *("flows.honeypipe", "flows.regions"),
    *("torch", "open_clip", "timm", "faiss", "polars", "matplotlib.pyplot", "tests.faults.night"),
]
WRITES = ("put", "upload", "delete")


class End(NamedTuple):
    """How a night ended: exit status (negative: the signal), what it said, writes it made."""

    status: int
    said: dict[str, Any]
    writes: int

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Night:
    """A build that runs in a process of its own. `before` and `after` are called with the number
    of each write to the store and its key, in that process; `prepare` is called first there.
    Without `report` the version's report is a line: its charts take half of a small night.
    """

    def __init__(
        self,
        config: dict[str, Any],
        told: Path,
        before: Callable[[int, str], None] | None = None,
        after: Callable[[int, str], None] | None = None,
        prepare: Callable[[], None] | None = None,
        report: bool = False,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.told = told
        told.unlink(missing_ok=True)
        self.process = context.Process(
            target=_run, args=(config, told, before, after, prepare, report, {**os.environ})
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds: float = 120) -> End:
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the night did not end"
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        last = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return End(self.process.exitcode, last, sum(line == "write" for line in lines))


def no_report(*args: Any, **named: Any) -> bytes:
    return b"<!doctype html><title>no charts</title>"


class Die:
    """Kills its own process at a given write to the store."""

    def __init__(self, at: int):
        self.at = at

    def __call__(self, number: int, key: str) -> None:
        if number == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(
    config: dict[str, Any],
    told: Path,
    before: Callable[[int, str], None] | None,
    after: Callable[[int, str], None] | None,
    prepare: Callable[[], None] | None,
    report: bool,
    environment: dict[str, str],
) -> None:
    # The server process has that of when it started.
    os.environ.update(environment)
    import flows.build
    import flows.recipe
    from flows.config import open_build, parse_config
    from infra.errors import PairmillError

    if not report:
        flows.build.render = no_report  # type: ignore[assignment]
        flows.recipe.render_samples = no_report  # type: ignore[assignment]
    if prepare:
        prepare()
    with told.open("a", buffering=1) as file, counted_writes(file, before, after):
        try:
            parsed = parse_config(config)
            with open_build(parsed) as build:
                result = _built(build, parsed)
        except PairmillError as error:
            file.write(json.dumps({"error": str(error)}) + "\n")
            status = error.exit_code
        else:
            file.write(json.dumps(result) + "\n")
            status = 0
    os._exit(status)


def _built(build: Any, config: Any) -> dict[str, Any]:
    """What the main job, or the recipe that a config is of, makes."""
    from flows.build import stages
    from flows.recipe import RecipeConfig, build_recipe

    if not isinstance(config, RecipeConfig):
        return stages(build, config)
    return build_recipe(build, import_module(f"flows.{config.recipe}").RECIPE, config)


@contextmanager
def counted_writes(
    file: Any,
    before: Callable[[int, str], None] | None,
    after: Callable[[int, str], None] | None,
) -> Iterator[None]:
    """Number every write to a store in this process, and call the hooks around it."""
    from infra.folder import FolderStore
    from infra.s3 import S3Store

    lock, count = threading.Lock(), 0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, key: str, *args: Any, **named: Any) -> Any:
            nonlocal count
            with lock:
                number, count = count, count + 1
                file.write("write\n")
            if before:
                before(number, key)
            result = method(self, key, *args, **named)
            if after:
                after(number, key)
            return result

        return write

    for kind in (FolderStore, S3Store):
        for name in WRITES:
            setattr(kind, name, watched(getattr(kind, name)))
    yield
