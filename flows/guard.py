"""Runs whose process ended without a word are marked as crashed and free their place.

Prefect lets a killed run stay RUNNING or PENDING for ever. Its place is freed when its lease ends,
but never where the server restarted with its leases in memory: every later night is cancelled then.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    FlowRunFilter,
    TaskRunFilter,
    WorkPoolFilter,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Crashed

AT_WORK = {"state": {"type": {"any_": [StateType.PENDING, StateType.RUNNING]}}}


@flow(name="guard")
def guard(silent_minutes: float = 10, work_pool: str = "pairmill") -> list[str]:
    """Mark runs of a work pool that have been silent for too long, and free their places.

    The process of a run gives a sign every three minutes (PREFECT_FLOWS_HEARTBEAT_FREQUENCY).
    Returns one line for each run marked and each deployment whose places were put right.
    """
    with get_client(sync_client=True) as client:
        said = free_places(client, timedelta(minutes=silent_minutes), work_pool)
    for line in said or ["nothing to do"]:
        get_run_logger().info(line)
    return said


def free_places(client: SyncPrefectClient, silence: timedelta, work_pool: str) -> list[str]:
    """What `guard` does, by a client; one line for each thing done."""
    pool = WorkPoolFilter.model_validate({"name": {"any_": [work_pool]}})
    said = []
    for deployment in client.read_deployments(work_pool_filter=pool):
        now = datetime.now(UTC)
        quiet = [(run, now - _last_sign(client, run)) for run in _at_work(client, deployment)]
        dead = [(run, time) for run, time in quiet if time > silence]
        said += [_mark(client, run, time) for run, time in dead]
        said += _put_right(client, deployment, dead)
    return said


def _at_work(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(AT_WORK),
        deployment_filter=DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}}),
    )


def _last_sign(client: SyncPrefectClient, run: FlowRun) -> datetime:
    """When a run was last heard of: a change of state, a heartbeat, an event of its tasks."""
    assert run.state is not None
    about = {"any_resource": {"id": [f"prefect.flow-run.{run.id}"]}, "order": "DESC"}
    answer: Any = client.request("POST", "/events/filter", json={"filter": about, "limit": 1})
    heard = [datetime.fromisoformat(event["occurred"]) for event in answer.json()["events"]]
    return max([run.state.timestamp, *heard])


def _mark(client: SyncPrefectClient, run: FlowRun, quiet: timedelta) -> str:
    assert run.state is not None
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}),
        task_run_filter=TaskRunFilter.model_validate(AT_WORK),
    )
    stages = sorted({task.name.rpartition("-")[0] for task in tasks})
    where = f"in stage {', '.join(stages)}" if stages else f"while {run.state.type.value}"
    minutes = quiet.total_seconds() / 60
    message = (
        f"the process of this run ended without a word {where} (killed, out of memory, or its "
        f"machine went away): silent for {minutes:.0f} minutes; what was done is kept, and the "
        "next run goes on from there"
    )
    client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return f"run {run.name} ({run.id}) is marked as crashed: it ended {where}"


def _put_right(
    client: SyncPrefectClient, deployment: DeploymentResponse, dead: Sequence[Any]
) -> list[str]:
    """Count the taken places of a deployment anew: by its runs that are at work."""
    if deployment.global_concurrency_limit is None:
        return []
    name = deployment.global_concurrency_limit.name
    taken = client.read_global_concurrency_limit_by_name(name).active_slots
    held = len(_at_work(client, deployment))
    # A run without a place is left alone, unless the mark above may have cost it that place.
    if taken == held or (taken < held and not dead):
        return []
    if client.read_global_concurrency_limit_by_name(name).active_slots != taken:
        return []  # a run came or went just now
    places = GlobalConcurrencyLimitUpdate(active_slots=held)
    client.update_global_concurrency_limit(name, places)
    return [f"deployment {deployment.name}: {taken} places were taken, {held} runs are at work"]
