"""A run that its process left behind: marked as crashed, its place free for the next night."""

import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.states import Pending, Running, Scheduled

from flows.guard import free_places

AT_ONCE, SOON = timedelta(0), timedelta(minutes=10)


@flow(name="night")
def night() -> None:
    pass


class Nights:
    """A deployment with one place, which its runs take and leave as a worker makes them."""

    def __init__(self, client: SyncPrefectClient):
        self.client, self.pool = client, f"pool-{uuid4().hex[:8]}"
        client.create_work_pool(WorkPoolCreate(name=self.pool, type="process"))
        self.deployment = client.create_deployment(
            flow_id=client.create_flow(night),
            name=self.pool,
            work_pool_name=self.pool,
            concurrency_limit=1,
            concurrency_options={"collision_strategy": ConcurrencyLimitStrategy.CANCEL_NEW},
        )

    def start(self, running: bool = True) -> UUID:
        """A new night, RUNNING or PENDING if it got the place."""
        run = self.client.create_flow_run_from_deployment(self.deployment, state=Scheduled())
        self.client.set_flow_run_state(run.id, Pending())
        if running and self.state(run.id) == "PENDING":
            self.client.set_flow_run_state(run.id, Running())
        return run.id

    def state(self, run: UUID) -> str:
        state = self.client.read_flow_run(run).state
        assert state is not None
        return state.type.value

    def message(self, run: UUID) -> str:
        state = self.client.read_flow_run(run).state
        assert state is not None
        return state.message or ""

    def places(self, taken: int | None = None) -> int:
        limit = self.client.read_deployment(self.deployment).global_concurrency_limit
        assert limit is not None
        if taken is not None:
            update = GlobalConcurrencyLimitUpdate(active_slots=taken)
            self.client.update_global_concurrency_limit(limit.name, update)
        return self.client.read_global_concurrency_limit_by_name(limit.name).active_slots

    def guard(self, silence: timedelta) -> list[str]:
        return free_places(self.client, silence, self.pool)


@pytest.fixture
def nights(prefect_server) -> Iterator[Nights]:
    with get_client(sync_client=True) as client:
        yield Nights(client)


@pytest.mark.parametrize("running", [True, False], ids=["running", "pending"])
def test_a_run_left_behind_is_marked_and_the_next_one_starts(nights, running):
    left = nights.start(running)
    assert nights.state(nights.start()) == "CANCELLED"
    assert nights.guard(SOON) == []
    [said] = nights.guard(AT_ONCE)
    word = "RUNNING" if running else "PENDING"
    assert said.endswith(f"({left}) is marked as crashed: it ended while {word}")
    assert nights.state(left) == "CRASHED"
    assert "ended without a word" in nights.message(left)
    assert nights.places() == 0
    assert nights.state(nights.start()) == "RUNNING"


def test_a_place_that_nobody_holds_is_freed(nights):
    """As after a restart of a server that keeps its leases in memory."""
    nights.places(1)
    assert nights.state(nights.start()) == "CANCELLED"
    assert nights.guard(SOON) == [
        f"deployment {nights.pool}: 1 places were taken, 0 runs are at work"
    ]
    assert nights.state(nights.start()) == "RUNNING"


def test_a_run_at_work_keeps_its_place_when_one_left_behind_is_marked(nights):
    left = nights.start()
    nights.places(0)  # its lease ended
    time.sleep(4)
    at_work = nights.start()
    assert nights.places() == 1
    nights.guard(timedelta(seconds=4))
    assert [nights.state(run) for run in (left, at_work)] == ["CRASHED", "RUNNING"]
    assert nights.places() == 1
    assert nights.state(nights.start()) == "CANCELLED"


def test_with_nothing_amiss_nothing_is_done(nights):
    run = nights.start()
    assert nights.guard(SOON) == []
    assert (nights.state(run), nights.places()) == ("RUNNING", 1)
