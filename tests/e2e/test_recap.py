"""The shortest recipe, whole: what every recipe over samples has by being one."""

import json
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from flows.absent import verify_absent
from flows.config import load_config, open_build
from flows.diff import as_json, compare
from flows.forget import Options, forget
from flows.plan import plan
from flows.recap import RECIPE
from flows.recipe import build_recipe, discover
from flows.summary import outcome
from flows.versions import listed
from infra import corpus, versions
from infra.errors import ConfigError
from infra.store import Location, open_store
from infra.versions import find_version
from tests import trainers
from tests.mllm_server import MllmServer
from tests.recipes import write_config


@pytest.fixture
def config(few, tmp_path):
    """A config of the recipe for a few pictures."""

    def write(server, **changed):
        return load_config(write_config(tmp_path, "recap", few, server, **changed))

    return write


@pytest.fixture
def recap(config):
    """Runs the recipe on a few pictures."""

    def run(server, **changed):
        parsed = config(server, **changed)
        with open_build(parsed) as opened:
            return build_recipe(opened, RECIPE, parsed)

    return run


def test_every_image_gets_a_caption_beside_its_own(recap):
    with MllmServer() as server:
        result = recap(server, publish={"images": True})
        again = recap(server, publish={"images": True})
        assert server.counts.total() == result["records"] > 100
    assert (again["fresh"], again["digest"]) == (False, result["digest"])
    folder = Path(result["manifest"]).parent
    records = pl.read_parquet(folder / "records/*.parquet")
    assert records["recaption"].str.len_chars().min() >= 20
    lines = [json.loads(line) for line in (folder / "jsonl/train.jsonl").open()]
    assert {line["sample_id"] for line in lines} == set(records["sample_id"])
    assert trainers.rows(folder / "jsonl/train.jsonl", "json") == lines
    said = {}
    for sample in trainers.samples(folder / "images/train-00000.tar"):
        [picture] = [value for value in sample.values() if isinstance(value, Image.Image)]
        assert picture.size == (sample["json"]["width"], sample["json"]["height"])
        said |= {r["sample_id"]: r["recaption"] for r in sample["json"]["records"]}
    assert said == {line["sample_id"]: line["recaption"] for line in lines}
    fates = pl.read_parquet(folder / "fates.parquet")
    assert fates.filter(pl.col("level") == "sample")["fate"].value_counts().to_dicts() == [
        {"fate": "recorded", "count": result["records"]}
    ]
    of_objects = {fate: count for fate, count in result["fates"].items() if count}
    assert sum(of_objects.values()) == result["work"]["objects_listed"]
    report, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    for fate, count in of_objects.items():
        assert f'{fate.replace("_", " ")}</th><td class="right">{count:,}</td>' in report
    assert "A detailed caption for every image, beside its own. Made by Pairmill" in card
    assert "pairs" not in card


def test_a_stricter_rule_asks_nothing_and_a_longer_answer_everything(recap, config, tmp_path):
    with MllmServer() as server:
        first = recap(server)
        count = first["records"]
        rule = plan(config(server, least_characters=45))
        assert (rule.items[0].stage, rule.items[0].why) == (
            "length", "changed parameter short_caption: 20 to 45",
        )  # fmt: skip
        assert rule.calls is None
        stricter = recap(server, least_characters=45)
        assert server.counts.total() == count
        assert 0 < stricter["records"] < count
        _says_what_a_rule_took(open_store(Location(uri=str(tmp_path / "store"))), first, stricter)

        longer = plan(config(server, model={"max_tokens": 256}))
        assert longer.items[0].calls[:3] == (0, count, 2 * count)
        assert longer.calls == longer.items[0].calls
        assert recap(server, model={"max_tokens": 256})["records"] == count
        assert server.counts.total() == 2 * count


def _says_what_a_rule_took(store, first, stricter):
    found = as_json(compare(store, "recap", "1", "2"))
    lost = first["records"] - stricter["records"]
    told = {(row["level"], row["change"]): (row["reason"], row["count"])
            for row in found["changes"] if row["level"] in ("sample", "record")}  # fmt: skip
    assert told == {
        ("sample", "changed"): ("recorded became short_caption", lost),
        ("record", "removed"): ("recorded became short_caption", lost),
    }
    assert found["config"] == [["least_characters", 20, 45]]
    manifest = find_version(store, "recap", "2")
    assert ["sample", "changed", "recorded became short_caption", lost] in (
        manifest["since"]["changes"]
    )


def test_a_plan_says_what_it_may_cost_and_what_is_paid(recap, config, tmp_path):
    def planned(server, **model):
        asked = {**model.pop("endpoint", {}), "url": server.url, "model": "scripted"}
        return plan(config(server, model={"endpoint": asked, **model}))

    prices = {"prices": {"input": 2, "output": 10, "currency": "EUR"}}
    with MllmServer() as server:
        before = planned(server, endpoint=prices)
        assert (before.last, before.calls.kind) == (None, "unknown")
        result = recap(server, model={"budget": {"calls": 10}})
        left = planned(server, endpoint=prices, budget={"money": 3, "month": {"calls": 50}})
    (version,) = listed(open_store(Location(uri=str(tmp_path / "store"))), "recap")
    assert version.waiting == result["waiting"]["over_budget"]
    assert outcome(result).endswith(f"{version.waiting} samples wait for the budget")
    # 10 are paid for. 128 tokens of output cost 1.28 thousandths, input that of at least its words.
    count = result["waiting"]["over_budget"]
    calls = left.items[0].calls
    assert calls[:3] == (10, count, 2 * count)
    assert 2 * count * 1.28e6 < calls.money < 2 * count * 30e6
    assert left.budgets == [
        "budget of a build: 3 EUR; beyond it questions wait",
        "budget of a month: 50 calls, of which 10.00 is spent; beyond it questions wait",
    ]


def test_what_is_forgotten_is_in_no_sample_answer_or_table(recap, tmp_path):
    with MllmServer() as server:
        first = recap(server)
        store = open_store(Location(uri=str(tmp_path / "store")))
        row = versions.records(store, find_version(store, "recap", "1")).row(0, named=True)
        name = corpus.object_id(row["key"], row["member"])
        list(forget(store, [name], None, Options(exact=True, purge=True)))
        second = recap(server)
        assert server.counts.total() == first["records"] == second["records"] + 1
    assert [(v.number, v.state) for v in listed(store, "recap")] == [
        (1, "withdrawn"), (2, "latest"),
    ]  # fmt: skip
    # It raises where anything of it is left.
    assert "for 1 forgotten images" in "".join(verify_absent(store))
    held = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*.json*"))
    assert row["recaption"].encode() not in held


def test_recipes_are_found_and_misspelled_ones_are_told(few, tmp_path):
    assert "recap" in [recipe.name for recipe in discover()]
    with MllmServer() as server, pytest.raises(ConfigError, match="did you mean 'recap'"):
        load_config(write_config(tmp_path, "recpa", few, server))
