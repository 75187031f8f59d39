"""Kill -9 of a recipe at a write to its store: a re-run reaches what an undisturbed run does."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.folder import FolderStore
from tests.e2e.test_recipes import AFTER, answer, cases, write_bucket
from tests.faults.buckets import content, published, reader
from tests.faults.night import End, Night
from tests.mllm_answers import BEHAVIOURS
from tests.mllm_server import MllmServer
from tests.recipes import write_config


class DieAt:
    """Kills its own process at the first write to a place in the store."""

    def __init__(self, place: str):
        self.place = place

    def __call__(self, number: int, key: str) -> None:
        if self.place in key:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def unworded(monkeypatch):
    """A server whose answers hang on what it is shown alone."""
    monkeypatch.setitem(BEHAVIOURS, "unworded", answer)
    with MllmServer(rule=lambda request: "unworded") as server:
        yield server


def night(recipe: str, server: MllmServer, corpus: Path, folder: Path, **hooks: Any) -> End:
    """The recipe once, into `folder/store`."""
    folder.mkdir(exist_ok=True)
    # No recipe here has a model in process: nothing of transformers is loaded for a night.
    sections = cases(dict.fromkeys(("qwen", "llava", "blind"), folder))[recipe].config
    config = yaml.safe_load(write_config(folder, recipe, corpus, server, **sections).read_text())
    return Night(config, folder / "told", **hooks).end()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("recipe", "kills"),
    [
        ("honeypipe", [("after", "responses/segments/"), ("before", "latest.json")]),
        ("regions", [("before", "ledger/score_crops/"), ("after", "records/train.parquet")]),
    ],
)
def test_after_a_kill_a_recipe_reaches_the_version_of_an_undisturbed_run(
    recipe, kills, unworded, tmp_path
):
    run = partial(night, recipe, unworded, write_bucket(tmp_path / "corpus", AFTER))
    calm = run(tmp_path / "calm")
    assert calm.status == 0, calm.said
    expected = content(published(FolderStore(str(tmp_path / "calm/store")), recipe))
    assert expected[0] == calm.said["digest"]
    for when, place in kills:
        folder = tmp_path / f"killed {when}"
        store = FolderStore(str(folder / "store"))
        with reader(store, recipe) as seen:
            assert run(folder, **{when: DieAt(place)}).killed
            end = run(folder)
        assert end.status == 0, end.said
        assert content(published(store, recipe)) == expected
        assert [content(version) for version in seen[-1:]] in ([], [expected])
    asked = unworded.counts.total()
    assert not run(folder).said["fresh"] and unworded.counts.total() == asked
