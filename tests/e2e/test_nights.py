"""Kill -9 of the worker and its flow while a night is PENDING or RUNNING: the next one starts."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.guard import free_places
from infra.store import Location, open_store
from infra.versions import find_version
from tests.e2e.installation import ROOT, Prefect, sample_parameters, small_corpus

SECONDS_BETWEEN = 6


class Nights(Prefect):
    """The nightly deployment, with seconds between the nights and a small corpus."""

    def __init__(self, folder: Path) -> None:
        (folder / "prefect").mkdir()
        super().__init__(folder / "prefect")
        self.store = folder / "store"
        self.corpus = small_corpus(folder / "corpus", pictures=60)
        self.file = folder / "deployments.yaml"
        self.seen: set[str] = set()

    def deploy(self) -> None:
        declared = yaml.safe_load((ROOT / "deployments.yaml").read_text())
        [nightly] = [d for d in declared["deployments"] if d["name"] == "nightly"]
        nightly["parameters"] = sample_parameters(self.corpus, self.store)
        nightly["schedules"] = [{"slug": "nightly", "interval": SECONDS_BETWEEN}]
        self.file.write_text(yaml.safe_dump(declared | {"deployments": [nightly]}))
        self.run("work-pool", "create", "pairmill", "--type", "process")
        self.run("--no-prompt", "deploy", "--all", "--prefect-file", str(self.file))

    def runs(self) -> list[FlowRun]:
        build = FlowFilter.model_validate({"name": {"any_": ["build"]}})
        with self.client() as client:
            return client.read_flow_runs(
                flow_filter=build, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=200
            )

    def wait(self, fits: Callable[[FlowRun], bool], seconds: float = 90) -> FlowRun:
        """The first new run that fits; one that was waited for before is not new."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for run in self.runs():
                if str(run.id) not in self.seen and run.state and fits(run):
                    self.seen.add(str(run.id))
                    return run
            time.sleep(0.1)
        raise AssertionError([(str(r.id), r.state) for r in self.runs() if r.state])

    def state(self, run: FlowRun) -> str:
        with self.client() as client:
            state = client.read_flow_run(run.id).state
        assert state is not None
        return state.type.value

    def guard(self) -> list[str]:
        with self.client() as client:
            return free_places(client, timedelta(0), "pairmill")


def at(state: str) -> Callable[[FlowRun], bool]:
    return lambda run: run.state is not None and run.state.type.value == state


@pytest.fixture
def nights(tmp_path: Path) -> Iterator[Nights]:
    nights = Nights(tmp_path)
    try:
        nights.start_server()
        nights.deploy()
        yield nights
    finally:
        nights.stop()


@pytest.mark.timeout(420)
def test_after_a_kill_the_guard_says_so_and_the_next_night_starts(nights: Nights) -> None:
    for moment in ("PENDING", "RUNNING"):
        worker = nights.start_worker()
        left = nights.wait(at(moment))
        nights.kill(worker)
        [said] = nights.guard()
        assert f"({left.id}) is marked as crashed" in said
        assert nights.state(left) == "CRASHED"
    nights.start_worker()
    done = nights.wait(at("COMPLETED"))
    assert done.state and (done.state.message or "").startswith("published version 1 ")
    store = open_store(Location(uri=str(nights.store)))
    assert find_version(store, "deployed", "latest")["version"] == 1


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_after_a_kill_the_next_night_starts_when_the_lease_has_ended(nights: Nights) -> None:
    """Without the guard, and with a server that restarts meanwhile."""
    server = nights.processes[0]
    for moment in ("PENDING", "RUNNING"):
        worker = nights.start_worker()
        left = nights.wait(at(moment))
        nights.kill(worker)
        nights.kill(server)
        server = nights.start_server()
        worker = nights.start_worker()
        stays = nights.state(left)
        cancelled = nights.wait(at("CANCELLED"))
        assert cancelled.state
        assert cancelled.state.message == "Deployment concurrency limit reached."
        nights.wait(at("RUNNING"), seconds=420)
        assert nights.state(left) == stays in ("PENDING", "RUNNING")
        nights.kill(worker)
        nights.guard()
