"""A real Prefect server and worker run what deployments.yaml declares."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.sorting import FlowRunSort

from infra.store import Location, open_store
from infra.versions import find_version
from tests.e2e.installation import Prefect, declared, sample_parameters, small_corpus
from tests.mllm_server import MllmServer
from tests.recipes import write_corpus


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[Prefect]:
    (tmp_path / "prefect").mkdir()
    installation = Prefect(tmp_path / "prefect")
    try:
        installation.start_server()
        yield installation
    finally:
        installation.stop()


@pytest.mark.timeout(420)
def test_deployments_publish_versions(prefect: Prefect, tmp_path: Path) -> None:
    prefect.run("work-pool", "create", "pairmill", "--type", "process")
    prefect.run("--no-prompt", "deploy", "--all", "--prefect-file", "deployments.yaml")
    prefect.start_worker()

    corpus, store = small_corpus(tmp_path / "corpus", pictures=80), tmp_path / "store"
    parameters = json.dumps(sample_parameters(corpus, store))
    told = prefect.run("deployment", "run", "build/sample", "--watch", "--params", parameters)

    assert "Completed" in told
    manifest = find_version(open_store(Location(uri=str(store))), "deployed", "latest")
    assert manifest["version"] == 1
    assert manifest["counts"]["records"] > 0

    told = prefect.run("deployment", "run", "build/sample", "--watch", "--params", parameters)
    assert "Completed" in told
    with prefect.client() as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC)
    # The guard may have run as well, and coming nights be scheduled already.
    last, first = (run for run in runs if run.state.is_completed() and "config" in run.parameters)
    assert first.state.message.startswith("published version 1 ")
    assert last.state.message.startswith("nothing new: still version 1 ")
    assert last.total_run_time.total_seconds() < 60
    a_recipe_runs_on_dask(prefect, tmp_path)


def a_recipe_runs_on_dask(prefect: Prefect, folder: Path) -> None:
    """With work for its worker beyond reading pictures: crops against captions, by CLIP."""
    corpus, store = write_corpus("regions", folder / "sheets"), folder / "regions"
    with MllmServer() as server:
        endpoint = {"endpoint": {"url": server.url, "model": "scripted"}}
        changes = {"corpus": {"uri": str(corpus)}, "store": {"uri": str(store)},
                   "model": endpoint, "cluster": {"kind": "local", "workers": 1}}  # fmt: skip
        parameters = json.dumps(declared("regions", changes))
        told = prefect.run(
            "deployment", "run", "regions/regions", "--watch", "--params", parameters
        )
    assert "Completed" in told
    manifest = find_version(open_store(Location(uri=str(store))), "regions-sample", "latest")
    assert manifest["counts"]["records"] > 0
    questions = ("whole", "region", "around")
    assert server.counts["good"] == sum(manifest["cost"][name]["calls"] for name in questions)
