"""What the next run would compute, and why: asked of a store with real versions."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from flows.plan import plan as make_plan
from flows.walk import seconds_for
from tests.flows.conftest import run_build


@pytest.fixture
def plan(history):
    """Plans a changed config: the stages with work to do and why, and the whole plan."""

    def ask(**sections):
        from flows.config import parse_config

        data = yaml.safe_load(history.config.read_text("utf-8"))
        found = make_plan(parse_config(data | sections))
        return {item.stage: item.why for item in found.items}, found

    return ask


def config_of(history):
    return yaml.safe_load(history.config.read_text("utf-8"))


def test_nothing_new_is_said_in_one_line(history, pairmill):
    out, status = pairmill("plan", history.config)
    digest = json.loads((history.dataset / "latest.json").read_bytes())["digest"]
    assert status == 0
    assert out == f"nothing to do: version 3 ({digest[:12]}) is up to date\n"


def test_a_changed_parameter_is_named_and_what_follows_from_it(plan, history):
    stages, found = plan(pairs={"targets": 1})
    assert stages["mine_pairs"] == "changed parameter targets: 2 to 1"
    assert stages["label_pairs"] == "follows mine_pairs"
    assert not {"describe", "deduplicate", "find_neighbours"} & set(stages)
    assert found.settings == [("pairs.targets", 2, 1)]
    assert found.corpus["new"] == found.corpus["gone"] == 0


def test_each_parameter_is_found_in_its_stage(plan):
    stages, _ = plan(dedup={"radius": 3})
    assert stages["deduplicate"] == "changed parameter radius: 10 to 3"
    assert next(iter(stages)) == "deduplicate"
    stages, _ = plan(clip_score={"fraction": 0.5})
    assert "changed parameter fraction: 0.9 to 0.5" in stages["filter_captions"]
    stages, _ = plan(split={"validation": 0.2})
    assert list(stages) == ["make_records", "publish"]


def test_new_bytes_are_counted(elsewhere, plan):
    corpus = elsewhere.folder / "corpus"
    shutil.copy(corpus / "smaller.png", corpus / "unseen.png")
    with (corpus / "unseen.png").open("ab") as file:
        file.write(b"\0")
    stages, found = plan()
    assert stages["describe"].startswith("new bytes: 1 new or changed file (")
    assert stages["deduplicate"].startswith("follows describe")
    assert stages["publish"] == "a new version, unless the same comes out"
    assert found.corpus["new"] == 1
    assert all(item.seconds is not None for item in found.items)


def test_what_left_is_read_from_the_listing(elsewhere, plan):
    (elsewhere.folder / "corpus" / elsewhere.keys[10]).unlink()
    stages, found = plan()
    assert found.corpus["gone"] == 1
    assert "describe" not in stages
    assert stages["align_captions"].startswith("changed input: images")


def test_changed_code_is_told_by_its_version(plan, monkeypatch):
    from tasks import mine_pairs as module

    stage = module.mine_pairs
    monkeypatch.setattr(stage, "version", stage.version + 1)
    # The walk asks the ledger by the key of the code as it was, so it has to miss as well.
    stages, _ = plan(pairs={"targets": 1})
    code = f"changed code: version {stage.version - 1} to {stage.version}"
    assert stages["mine_pairs"] == f"{code}; changed parameter targets: 2 to 1"


def test_a_changed_model_moves_all_that_follows(plan, history):
    models = config_of(history)["models"]
    models["dino"]["batch"] = 3
    stages, found = plan(models=models)
    count = found.last["counts"]["images"]
    assert stages["describe"] == f"changed model: {count} images lack dino"
    assert "follows" in stages["mine_pairs"]


def test_another_model_and_space_can_be_planned(plan, history):
    data = config_of(history)
    data["models"]["other"] = data["models"]["dino"] | {"image_size": 48}
    spaces = data["spaces"] | {"more": {"model": "other"}}
    stages, _ = plan(models=data["models"], spaces=spaces)
    assert "describe" in stages
    assert "publish" in stages


def test_a_labeller_that_is_paid_is_counted_by_its_questions(plan):
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m", "prices": {"input": 1, "output": 4}}
    _, found = plan(labels={"labeller": "mllm", "endpoint": endpoint, "budget": {"tokens": 9}})
    pairs = found.last["counts"]["pairs"]
    calls = next(item.calls for item in found.items if item.stage == "label_pairs")
    # Two questions a pair, either of which may have to be repaired.
    assert (calls.stored, calls.plain, calls.most, calls.kind) == (
        0,
        2 * pairs,
        4 * pairs,
        "counted",
    )
    assert calls.money > 4 * pairs * 1_000
    assert found.budgets == ["budget of a build: 9 tokens; beyond it questions wait"]
    _, moved = plan(labels={"labeller": "mllm", "endpoint": endpoint}, pairs={"targets": 1})
    assert (moved.calls.kind, moved.calls.plain, moved.calls.money) == ("expected", 2 * pairs, None)


def test_before_the_first_version_everything_is_new(plan, tmp_path):
    stages, found = plan(store={"uri": str(tmp_path / "empty")})
    assert found.last is None
    assert stages["align_captions"] == "never done in this store"
    assert list(stages)[-1] == "publish"


def test_a_plan_publishes_nothing_and_is_what_happens(plan, history):
    before = sorted(str(p) for p in history.dataset.rglob("*"))
    stages, _ = plan(pairs={"targets": 1})
    assert sorted(str(p) for p in history.dataset.rglob("*")) == before
    data = config_of(history) | {"pairs": {"targets": 1}}
    result = run_build(data)
    assert (result["version"], result["work"]["images_decoded"]) == (4, 0)
    assert "label_pairs" in stages
    assert plan(pairs={"targets": 1})[1].items == []


def test_damaged_records_and_manifests_do_not_stop_a_plan(plan, history):
    for path in Path(history.folder, "store/ledger/mine_pairs").rglob("*.json"):
        path.write_text("{")
    stages, _ = plan(pairs={"targets": 1})
    assert stages["mine_pairs"] == "never done in few"
    (history.dataset / "v000003/manifest.json").write_text("{")
    assert plan(pairs={"targets": 1})[1].last is None


def test_a_plan_as_json(history, pairmill):
    found = json.loads(pairmill("plan", history.config, "--set", "pairs.targets=1", "--json").out)
    assert found["last"] == 3
    assert found["stages"][0]["stage"] == "mine_pairs"
    assert found["nothing_to_do"] is False
    wrong = pairmill("plan", history.config, "--set", "pairs.targts=1")
    assert (wrong.status, "did you mean 'targets'?" in wrong.out) == (2, True)


@pytest.mark.parametrize(
    ("runs", "images", "seconds"),
    [
        ([], 100, None),
        # One run: five seconds are its start, the rest its pace.
        ([(1_000, 25.0)], 100, 7.0),
        ([(1_000, 25.0)], 1_000, 25.0),
        ([(10, 2.0)], 10, 2.0),
        # Two: the line through them.
        ([(1_000, 24.0), (100, 6.0)], 500, 14.0),
        ([(1_000, 24.0), (100, 6.0)], 0, 4.0),
        # Runs of one size, and a small one that took longer, tell no pace.
        ([(1_000, 25.0), (999, 5.0)], 100, 7.0),
        ([(1_000, 25.0), (10, 60.0)], 100, 7.0),
    ],
)
def test_time_is_a_start_and_a_pace(runs, images, seconds):
    found = seconds_for(images, runs)
    assert found is None if seconds is None else found == pytest.approx(seconds)
