from collections import Counter
from typing import NamedTuple

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import get_run_context
from pydantic import BaseModel

from flows import step as step_module
from flows.step import (
    StageFailed,
    artifact_key,
    completed,
    current_stage,
    may_pass,
    step,
    tables_in,
)
from infra.build import Build, WouldRun
from infra.cluster import ClusterParams, open_pool
from infra.errors import ConfigError, PairmillError, Refused
from infra.store import Conflict, Location, NotFound, Outage, StoreError, open_store
from infra.tables import Shard, Table

IMAGES = Table("images", (Shard("0" * 64, 3, 300), Shard("1" * 64, 4, 400)))
DROPS = Table("drops")


class Listed(NamedTuple):
    images: Table
    vectors: dict[str, Table]
    drops: Table


class CountParams(BaseModel):
    least: int = 1


class Unpicklable:
    def __reduce__(self):
        raise AssertionError("an argument of a stage was serialised")


def list_objects(build: Build, params: CountParams) -> Listed:
    build.progress("list_objects", 1, 4)
    build.progress("list_objects", 4, 4)
    return Listed(IMAGES, {"clip": IMAGES}, DROPS)


def count_images(build: Build, images: Table, params: CountParams, blob: object) -> int:
    build.work["images_decoded"] += images.rows
    return images.rows + params.least


@pytest.fixture
def build(tmp_path) -> Build:
    store = open_store(Location(uri=str(tmp_path)))
    with open_pool(ClusterParams(kind="threads")) as pool:
        yield Build(store, store, pool)


def run_in_flow(function):
    """Run a function as a flow; returns its result and the id of the flow run."""

    @flow(name="test")
    def body():
        return function(), get_run_context().flow_run.id

    return body()


def test_a_step_is_its_function_outside_a_flow(build):
    assert step(count_images)(build, IMAGES, CountParams(), None) == 8
    assert build.work == Counter(images_decoded=7)
    assert list(build.seconds) == ["count_images"]
    assert current_stage() is None


def test_stages_become_linked_tasks_with_artifacts(build, prefect_server, monkeypatch):
    monkeypatch.setattr(step_module, "PROGRESS_SECONDS", 0)
    blob = Unpicklable()

    def stages():
        listed = step(list_objects)(build, CountParams())
        return step(count_images)(build, listed.images, CountParams(least=2), blob)

    total, run_id = run_in_flow(stages)
    assert total == 9
    assert build.work == Counter(images_decoded=7)
    assert list(build.seconds) == ["list_objects", "count_images"]

    tasks, artifacts = stored(run_id)
    assert {task.state_name for task in tasks.values()} == {"Completed"}
    upstream = [link.id for link in tasks["count_images"].task_inputs["upstream"]]
    assert upstream == [tasks["list_objects"].id]
    assert tasks["count_images"].task_inputs["given"] == []
    assert '"rows": 7' in artifacts["list-objects-rows"].data
    assert '"table": "vectors clip"' in artifacts["list-objects-rows"].data
    assert artifacts["list-objects-progress"].data == 100


def stored(run_id):
    """Task runs and artifacts of a flow run, once the server has filed their events."""
    with get_client(sync_client=True) as client:
        tasks = {}
        while len(tasks) < 2 or any(not task.state.is_final() for task in tasks.values()):
            runs = client.read_task_runs()
            tasks = {run.name.rpartition("-")[0]: run for run in runs if run.flow_run_id == run_id}
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    return tasks, {artifact.key: artifact for artifact in found}


def test_an_outage_is_retried(build, prefect_server):
    answers = [Outage("no answer"), ConnectionResetError("gone"), 7]

    def publish(build: Build) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    total, _ = run_in_flow(lambda: step(publish, retry_delay_seconds=0)(build))
    assert (total, answers) == (7, [])


def test_a_refusal_is_not_retried_and_names_its_stage(build, prefect_server):
    calls = []

    def publish(build: Build) -> None:
        calls.append(1)
        raise Refused("only 3 records; lower publish.min_records")

    @flow(name="refusing")
    def refusing():
        step(publish)(build)

    state = refusing(return_state=True)
    assert calls == [1]
    assert "publish: only 3 records; lower publish.min_records" in state.message
    with pytest.raises(Refused) as caught:
        state.result()
    assert caught.value.stage == current_stage() == "publish"


def test_a_bug_in_a_shard_names_stage_shard_and_cause(build, prefect_server):
    def describe(build: Build) -> None:
        list(build.pool.map(int, ["1", "two"]))

    @flow(name="failing")
    def failing():
        step(describe)(build)

    state = failing(return_state=True)
    assert "describe, shard two: ValueError: invalid literal for int()" in state.message
    with pytest.raises(StageFailed) as caught:
        state.result()
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.stage == "describe"


def test_a_mistake_in_the_config_is_no_matter_of_the_shard_that_met_it():
    mistake, lost = ConfigError("no such model"), PairmillError("gone")
    mistake.shard = lost.shard = "two"
    assert str(step_module._placed(mistake, "ask_model")) == "ask_model: no such model"
    assert str(step_module._placed(lost, "ask_model")) == "ask_model, shard two: gone"


def test_a_message_is_the_state_of_the_run_and_the_caller_has_the_result(prefect_server):
    @flow(name="quiet")
    def quiet():
        return completed("nothing new: still version 3", {"version": 3})

    assert quiet() == {"version": 3}
    assert quiet(return_state=True).message == "nothing new: still version 3"


def test_a_plan_is_not_a_task_run(build, prefect_server):
    def describe(build: Build) -> None:
        build.begin("describe", {"images": 7})

    planning = Build(build.corpus, build.store, build.pool, planning=True)
    with pytest.raises(WouldRun) as caught:
        run_in_flow(lambda: step(describe)(planning))
    assert caught.value.stage == "describe"


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (Outage("no answer"), True),
        (StoreError("the disk is full"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (NotFound("no such key"), False),
        (Conflict("taken"), False),
        (ConfigError("typo"), False),
        (Refused("too few"), False),
        (PairmillError("no"), False),
        (KeyError("bug"), False),
    ],
)
def test_only_outages_are_worth_another_attempt(error, retried):
    from prefect.states import Failed

    assert may_pass(None, None, Failed(data=error)) is retried


def test_tables_are_found_by_the_name_they_go_by():
    result = Listed(IMAGES, {"clip": IMAGES, "dino": DROPS}, DROPS)
    assert [(name, table.rows) for name, table in tables_in((result, 3, [DROPS]))] == [
        ("images", 7),
        ("vectors clip", 7),
        ("vectors dino", 0),
        ("drops", 0),
        ("drops", 0),
    ]


def test_an_artifact_key_is_one_that_prefect_takes():
    assert artifact_key("filter_captions", "rows") == "filter-captions-rows"
