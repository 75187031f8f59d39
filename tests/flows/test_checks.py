"""Checks in a whole build, with a server that labels and judges: what they cost, and what stays."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.checks import judging
from flows.config import load_config
from flows.gold_page import Said
from infra import gold
from infra.errors import ConfigError, Refused
from tests.flows.place import Place, labels
from tests.judges import line_ups, verdicts, wanted
from tests.mllm_server import BEHAVIOURS, MllmServer, Reply

ALL = {
    "checks.judge.share": 1, "checks.line_up.share": 1, "checks.round_trip.mode": "report",
}  # fmt: skip


def answer(request: dict[str, Any]) -> Reply:
    """A server that labels, and judges by the first letter of pictures and words."""
    fields = wanted(request)
    if "best" in fields:
        return line_ups(lambda d: "fits" if d < "2" else "no", max)(request)
    if "i1" in fields:
        return verdicts(lambda text: "wrong untrue" if "red" in text else "fits")(request)
    return labelled(request)


labelled = BEHAVIOURS["good"]


@pytest.fixture
def checked(first_night: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    import shutil

    for name in ("corpus", "store"):
        shutil.copytree(first_night / name, tmp_path / name)
    monkeypatch.setitem(BEHAVIOURS, "good", answer)
    with MllmServer() as server:
        place = Place(tmp_path, labels=labels(server.url), checks={"gold": {"path": "gold.jsonl"}})
        place.build()
        server.ledger.clear()
        yield place, server


def manifest(place: Place) -> dict[str, Any]:
    latest = json.loads(place.store.get("datasets/few/latest.json"))
    name = f"datasets/few/v{latest['version']:06d}/manifest.json"
    return dict(json.loads(place.store.get(name)))


def kinds(server: MllmServer) -> Counter[str]:
    return Counter(
        "line_up" if "best" in (found := wanted(r)) else "judge" if "i1" in found else "label"
        for r in server.requests
    )


def test_checks_are_off_and_then_free(checked: Any) -> None:
    place, server = checked
    assert place.build()["fresh"] is False
    assert server.requests == []
    assert manifest(place)["checks"] == {}
    assert not [s.key for s in place.store.list("ledger/judge_labels")]


def test_a_build_with_checks_balances_says_what_they_counted_and_pays_once(checked: Any) -> None:
    place, server = checked
    before = place.fates_of_latest()
    result = place.build(**ALL)
    assert result["fresh"]
    pairs = [row for row in place.fates_of_latest() if row["level"] == "pair"]
    fates = Counter(row["fate"] for row in pairs)
    assert len(pairs) == len([row for row in before if row["level"] == "pair"])
    assert fates["judged_wrong"] and fates["target_not_preferred"] and fates["published"]
    said = manifest(place)["checks"]
    assert said["judge_labels"]["pairs"] == kinds(server)["judge"]
    assert said["judge_labels"]["verdict wrong"] == said["judge_labels"]["reason untrue"] > 0
    assert said["line_up"]["pairs"] == kinds(server)["line_up"] > 0
    assert said["line_up"]["fits all"] > 0
    assert said["round_trip"]["instructions"] > 0
    assert kinds(server)["label"] == 0
    assert place.build(**ALL)["fresh"] is False
    assert len(server.requests) == kinds(server).total() == sum(
        said[stage]["pairs"] for stage in ("judge_labels", "line_up")
    )  # fmt: skip


def test_the_judge_may_have_a_budget_beyond_that_of_labels(checked: Any) -> None:
    place, server = checked
    result = place.build(**ALL, **{"labels.budget.calls": 4})
    assert result["waiting"]["over_budget"] > 0 and len(server.requests) == 4
    result = place.build(**ALL, **{"labels.budget.calls": 4, "checks.judge.budget.calls": 1000})
    assert result["waiting"] == {} and kinds(server)["line_up"] > 4


def test_why_tells_the_votes_and_plan_what_will_be_asked(checked: Any, pairmill: Any) -> None:
    place, _ = checked
    asked = ("--set", "checks.judge.share=1", "--set", "checks.line_up.share=1")
    said = pairmill("plan", place.config_file, *asked)
    assert said.status == 0, said.out
    for stage in ("judge_labels", "line_up", "make_records"):
        assert stage in said.out
    place.build(**ALL)
    pairs = {row["fate"]: row["id"] for row in place.fates_of_latest() if row["level"] == "pair"}
    for fate, told in (
        ("judged_wrong", "wrong, untrue (by test): "), ("target_not_preferred", ", the best: a h"),
        ("published", "instruction 1: target "),
    ):  # fmt: skip
        said = pairmill("why", pairs[fate], "-c", place.config_file)
        assert said.status == 0 and told in said.out, said.out


def test_false_negatives_are_in_no_record_or_among_its_positives(checked: Any) -> None:
    place, _ = checked
    place.build(**ALL)
    place.build(**ALL, **{"checks.line_up.false_negatives": "positives"})
    version = manifest(place)
    records = pl.concat(
        pl.read_parquet(place.folder / f"store/datasets/few/v{version['version']:06d}" / f["name"])
        for f in version["files"] if f["name"].startswith("records/")
    )  # fmt: skip
    assert records["positives"].list.len().sum() > 0
    assert all(
        not {*positives} & {*negatives, query, target}
        for positives, negatives, query, target in records.select(
            "positives", "negatives", "query", "target"
        ).iter_rows()
    )
    named = set(records["positives"].explode().drop_nulls())
    pictures = pl.read_parquet(
        place.folder / f"store/datasets/few/v{version['version']:06d}/images.parquet"
    )
    assert named <= {*pictures["image_id"]}


def write_gold(place: Place, count: int, wrong: int = 0) -> None:
    """What people say: of the first items the opposite of the judge."""
    from flows.gold import labelled as of_latest
    from flows.gold import sample

    found, pairs, _ = of_latest(place.store, "few")
    items = sample(found, pairs, count)
    rows = []
    for at, item in enumerate(items):
        right = "wrong" if "red" in item.instruction else "fits"
        verdict = {"wrong": "fits", "fits": "wrong"}[right] if at < wrong else right
        rows.append(gold.Verdict(**item._asdict(), verdict=verdict, who="ann", when="today"))
    gold.write(place.folder / "gold.jsonl", rows)


def test_a_judge_that_agrees_too_little_is_refused_before_anything_is_paid_for(
    checked: Any,
) -> None:
    place, server = checked
    gate = {**ALL, "checks.judge.least_agreement": 0.8}
    with pytest.raises(Refused, match=r"the gold set has 0 items: .* label 16 at least"):
        place.build(**gate)
    assert server.requests == []
    write_gold(place, 30, wrong=6)
    with pytest.raises(Refused, match=r"agrees with people on 24 of 30 .*bound is 0\.62"):
        place.build(**gate)
    assert len(server.requests) == 30 and kinds(server)["line_up"] == 0
    write_gold(place, 30, wrong=1)
    assert place.build(**gate)["fresh"]
    calibrated = len(server.requests) - sum(
        manifest(place)["checks"][stage]["pairs"] for stage in ("judge_labels", "line_up")
    )  # fmt: skip
    assert calibrated <= 30  # every item once, whatever people say of it
    asked = len(server.requests)
    assert place.build(**gate)["fresh"] is False
    assert len(server.requests) == asked


def test_pairs_of_the_latest_version_lie_on_the_desk(checked: Any, pairmill: Any) -> None:
    from flows.gold import open_desk

    place, _ = checked
    place.build(**ALL)  # what a judge has dropped is to be judged by people all the same
    config = load_config(place.config_file)
    desk = open_desk(config, 12, "ann")
    assert len(desk.items) == 12 and desk.path == place.folder / "gold.jsonl"
    assert any("red" in item.instruction for item in open_desk(config, 500, "ann").items.values())
    item = next(iter(desk.items.values()))
    assert desk.picture(item.query)[:3] == b"\xff\xd8\xff"
    desk.judge(Said(item=item.name, verdict="partly", reason="vague"))
    assert [row.item for row in gold.read(desk.path)] == [(item.pair_id, item.instruction)]
    desk.path.write_text("no verdict\n")
    said = pairmill("gold", "serve", place.config_file)
    assert said.status == 2 and "line 1" in said.out
    said = pairmill("gold", "serve", place.config_file, "--set", "checks.gold.path=null")
    assert said.status == 2 and "checks.gold.path" in said.out


def test_the_command_line_tells_the_agreement(checked: Any, pairmill: Any) -> None:
    place, server = checked
    said = pairmill("gold", "agree", place.config_file)
    assert said.status == 1 and "the gold set is empty" in said.out
    write_gold(place, 20, wrong=2)
    said = pairmill(
        "gold", "agree", place.config_file, "--set", "checks.judge.least_agreement=0.9",
        "--set", "checks.judge.share=1",
    )  # fmt: skip
    assert said.status == 0, said.out
    assert "agreement on the scale: 18 of 20, 0.900 (0.699 to 0.972)" in said.out
    assert "does not pass the gate at 0.9" in said.out
    assert "Cohen's kappa on the scale: 0." in said.out
    assert len(server.requests) == 20


def test_what_is_forgotten_leaves_verdicts_line_ups_and_the_calibration(checked: Any) -> None:
    place, _ = checked
    write_gold(place, 30)
    place.build(**ALL)
    items = gold.read(place.folder / "gold.jsonl")
    image = items[0].query
    name = next(
        row["id"] for row in place.fates_of_latest()
        if row["level"] == "object" and row["image_id"] == image
    )  # fmt: skip
    place.forget(name, exact=True, purge=True)
    place.build(**ALL)
    assert place.verify() == []
    assert place.holding(image) == set()
    left = [item for item in items if image not in (item.query, item.target)]
    assert 0 < len(left) < 30


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checks.judge.share": 1, "labels.labeller": "captions"}, "the judge needs a model"),
        ({"checks.judge.share": 1, "checks.gold.path": None, "checks.judge.least_agreement": 0.9},
         "needs a gold set"),
        ({"checks.round_trip.model": "other"}, "checks.round_trip.model is 'other'"),
        ({"checks.judge.shares": 1}, "did you mean 'share'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_work(tmp_path: Path, changes: Any, told: str) -> None:
    place = Place(tmp_path, labels=labels("http://localhost:1/v1"), checks={"gold": {"path": "g"}})
    with pytest.raises(ConfigError, match=told):
        load_config(place.config_file, [f"{k}={json.dumps(v)}" for k, v in changes.items()])


def test_a_judge_may_be_another_model_elsewhere(tmp_path: Path) -> None:
    judge = {"endpoint": {"url": "http://there/v1", "model": "big"}, "share": 0.5}
    place = Place(tmp_path, labels=labels("http://here/v1"), checks={"judge": judge})
    config = load_config(place.config_file)
    assert judging(config).judge.asking.endpoint.url == "http://there/v1"
    assert judging(config).judge.meaning["name"] == "big"
    assert config.labels.endpoint and config.labels.endpoint.model == "test"
    told = json.dumps(config.published())
    assert "there" not in told and '"model": "big"' in told


def test_labeller_and_judge_may_be_models_in_process(tmp_path: Path) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    local = {"labeller": "mllm", "local": {"name": "models/small", "gpus": 0.5}}
    judge = {"local": {"name": "owner/big", "revision": "main"}, "share": 0.5}
    place = Place(tmp_path, labels=local, checks={"judge": judge})
    config = load_config(place.config_file)
    assert config.labels.local and config.labels.local.name == str(tmp_path / "models" / "small")
    asking = judging(config).judge.asking
    assert asking.local and asking.local.name == "owner/big" and asking.endpoint is None
    told = json.dumps(config.published())
    assert str(tmp_path) not in told and "revision" not in told
    assert '"model": "small"' in told and '"model": "big"' in told
    both = ['labels.endpoint={"url": "http://here/v1", "model": "test"}']
    with pytest.raises(ConfigError, match="endpoint or local, not both"):
        load_config(place.config_file, both)
