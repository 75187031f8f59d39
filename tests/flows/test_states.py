"""What Prefect shows of a night: quiet, published, or failed with stage, shard and cause."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.build import build
from flows.config import parse_config
from infra.store import Location, open_store
from tests.faults.buckets import config, fill
from tests.flows.test_verify_store import flip, shards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "corpus"
    fill(folder, 0, 20)
    return folder


def night(corpus: Path, store: Path, **sections: Any) -> Any:
    """The state in which a run ends, as the server keeps it."""
    state = build(parse_config(config(corpus, store, **sections)), return_state=True)
    with get_client(sync_client=True) as client:
        kept = client.read_flow_run(state.state_details.flow_run_id).state
    assert kept is not None and kept.message == state.message
    return kept


def test_a_night_says_what_it_came_to(corpus, tmp_path, prefect_server):
    first, second = (night(corpus, tmp_path / "store") for _ in range(2))
    assert first.message.startswith("published version 1 (")
    assert second.message.startswith("nothing new: still version 1 (")
    assert {first.name, second.name} == {"Completed"}


def test_a_damaged_shard_is_named_with_its_stage_and_remedy(corpus, tmp_path, prefect_server):
    night(corpus, tmp_path / "store")
    store = open_store(Location(uri=str(tmp_path / "store")))
    key = shards(store, "describe/headers/")[0]
    flip(store, key)
    failed = night(corpus, tmp_path / "store")
    assert failed.name == "Failed"
    assert f"describe: shard {key[8:20]} of table headers-" in failed.message
    assert "`pairmill verify-store --repair`" in failed.message


def test_a_broken_caption_file_is_named_with_its_line(corpus, tmp_path, prefect_server):
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name"\n')
    failed = night(tmp_path / "corpus", tmp_path / "store")
    assert failed.name == "Failed"
    assert "snapshot: " in failed.message and "metadata.jsonl" in failed.message
    assert "line 2" in failed.message


def test_a_crash_in_a_shard_names_its_first_file(corpus, tmp_path, prefect_server, monkeypatch):
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("infra.features.look", broken)
    failed = night(corpus, tmp_path / "store")
    assert "describe, shard images/" in failed.message
    assert failed.message.endswith("ZeroDivisionError: a bug")
