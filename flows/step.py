"""The one wrapper that makes a stage a Prefect task, and shows in Prefect what it did.

Prefect reads its settings when it is imported, so this module imports it when a step is made.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import httpx

from infra.build import Build, Progress, WouldRun
from infra.errors import ConfigError, PairmillError
from infra.store import Outage, one_line
from infra.tables import Table

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PROGRESS_SECONDS = 2.0
LOG_SECONDS = 60.0

_ENVIRONMENT = {
    # Prefect phones home on two channels, also without a server of its own.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The temporary server has taken 10 s on a busy machine; Prefect gives up after 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # A failure is told once, in one line, by whoever ran the flow.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}
_at_work: list[str] = []


class StageFailed(RuntimeError):
    """A stage met what nobody expected, most likely a bug; the cause has the traceback."""


def prefect_environment() -> dict[str, str]:
    """What to set, where it is not set, before Prefect is imported: no telemetry, quiet."""
    return dict(_ENVIRONMENT)


def current_stage() -> str | None:
    """The stage at work in this process, or the one whose failure ended the work."""
    return _at_work[-1] if _at_work else None


def step(stage: Callable[Parameters, Result], **options: Any) -> Callable[Parameters, Result]:
    """A stage that runs as a Prefect task of its name where it is called within a flow run.

    It runs in the flow's own process; of arguments and results nothing is hashed, uploaded or
    persisted. Outside a flow run, and in a build that only plans, it is called as it is.
    `options` are those of `prefect.task`. Every call adds to `build.seconds`. An exception leaves
    with the attribute `stage`, and with stage and shard in its message; one that nobody expected
    becomes a StageFailed with that message.
    """
    from prefect import Task
    from prefect.cache_policies import NO_CACHE
    from prefect.context import FlowRunContext
    from prefect.utilities.annotations import quote

    name = stage.__name__

    def body(given: tuple[Any, ...], named: dict[str, Any], upstream: list[Table]) -> Result:
        build: Build = given[0]
        with _shown_progress(name, build.progress) as progress:
            result = _timed(stage, (replace(build, progress=progress), *given[1:]), named)
        _report(name, result, build.seconds[name])
        return result

    body.__name__ = body.__qualname__ = name
    body.__doc__ = stage.__doc__
    options = {**_RETRIES, "cache_policy": NO_CACHE, "persist_result": False, **options}
    task: Any = Task(body, **{"name": name, **options})

    @wraps(stage)
    def call(*given: Parameters.args, **named: Parameters.kwargs) -> Result:
        build: Any = given[0]
        if FlowRunContext.get() is None or build.planning:
            return _timed(stage, given, named)
        # Quoted, Prefect leaves them alone. The tables are there to draw the graph by.
        return task(quote(given), quote(named), [table for _, table in tables_in(given)])

    return call


def tables_in(value: Any, name: str = "") -> Iterator[tuple[str, Table]]:
    """Every table in nested tuples, lists and mappings, with the innermost name it goes by."""
    if isinstance(value, Table):
        yield name or value.name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tables_in(item, f"{name} {key}".strip())
    elif isinstance(value, tuple | list):
        for key, item in zip(getattr(value, "_fields", [""] * len(value)), value, strict=True):
            yield from tables_in(item, key)


def may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failure is one of storage or network, which another attempt may not meet."""
    return isinstance(state.data, (Outage, ConnectionError, TimeoutError))


_RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": may_pass,
}


def _timed(
    stage: Callable[..., Result], given: tuple[Any, ...], named: Mapping[str, Any]
) -> Result:
    name, seconds = stage.__name__, given[0].seconds
    start = time.perf_counter()
    _at_work[:] = [name]
    try:
        result = stage(*given, **named)
    except WouldRun:
        raise
    except Exception as error:
        failure = _placed(error, name)
        if failure is error:
            raise
        raise failure from error
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    _at_work.clear()
    return result


def _placed(error: Any, stage: str) -> Exception:
    """An error that says where: in which stage, and in which shard where it was in one."""
    if hasattr(error, "stage"):
        return cast(Exception, error)
    # What is wrong with a config is no matter of the shard that met it.
    shard = None if isinstance(error, ConfigError) else getattr(error, "shard", None)
    where = f"{stage}, shard {shard}" if shard else stage
    if isinstance(error, PairmillError):
        error.args = (f"{where}: {error}",)
    elif not isinstance(error, OSError):
        error = StageFailed(f"{where}: {type(error).__name__}: {one_line(error)}")
    error.stage = stage
    return cast(Exception, error)


@contextmanager
def _shown_progress(task: str, also: Progress) -> Iterator[Progress]:
    """Progress that goes to `also` and, every two seconds at most, to an artifact in Prefect."""
    from prefect import get_run_logger
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    artifact: Any = None
    shown = told = time.monotonic()

    def progress(stage: str, done: int, total: int | None, said: str = "") -> None:
        nonlocal artifact, shown, told
        also(stage, done, total, said)
        if not total or time.monotonic() - shown < PROGRESS_SECONDS:
            return
        if said and time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            get_run_logger().info("%s: %s of %s; %s", stage, f"{done:,}", f"{total:,}", said)
        shown, share = time.monotonic(), 100 * done / total
        with suppress(httpx.HTTPError):
            if artifact:
                update_progress_artifact(artifact, share)
            else:
                artifact = create_progress_artifact(share, artifact_key(task, "progress"), stage)

    yield progress
    if artifact:
        with suppress(httpx.HTTPError):
            update_progress_artifact(artifact, 100.0)


def _report(stage: str, result: Any, seconds: float) -> None:
    """The rows of each resulting table, as a log line and as a table in Prefect."""
    from prefect import get_run_logger
    from prefect.artifacts import create_table_artifact

    rows = {name: table.rows for name, table in tables_in(result)}
    counted = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    get_run_logger().info("%s: %s in %.1f s", stage, counted or "done", seconds)
    # A picture of the work must not cost the work: what is lost here is only shown less.
    with suppress(httpx.HTTPError):
        create_table_artifact(
            [{"table": name, "rows": count} for name, count in rows.items()],
            artifact_key(stage, "rows"),
            f"{seconds:.1f} s",
        )


def completed(message: str, result: Result) -> Result:
    """A flow's result, under the message that Prefect shows as the state of the run."""
    from prefect.states import Completed

    # Whoever calls the flow is given the data, not the state.
    return cast(Result, Completed(message=message, data=result))


def link(name: str, uri: str) -> None:
    """A link in Prefect to something the flow run made; nothing outside a flow run."""
    from prefect.artifacts import create_link_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        with suppress(httpx.HTTPError):
            create_link_artifact(uri, link_text=name, key=artifact_key(name, "link"))


def artifact_key(stage: str, kind: str) -> str:
    """A key as Prefect allows it: lower-case letters, digits and dashes."""
    return f"{stage}-{kind}".replace("_", "-").lower()
