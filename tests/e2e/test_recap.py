"""The shortest recipe, whole: what every recipe over samples has by being one."""

import json
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config, open_build
from flows.recap import RECIPE
from flows.recipe import build_recipe, discover
from infra.errors import ConfigError
from tests.mllm_server import MllmServer
from tests.recipes import write_config


@pytest.fixture
def recap(few, tmp_path):
    """Runs the recipe on a few pictures."""

    def run(server, **changed):
        config = load_config(write_config(tmp_path, "recap", few, server, **changed))
        with open_build(config) as opened:
            return build_recipe(opened, RECIPE, config)

    return run


def test_every_image_gets_a_caption_beside_its_own(recap):
    with MllmServer() as server:
        result = recap(server)
        again = recap(server)
        assert server.counts.total() == result["records"] > 100
    assert (again["fresh"], again["digest"]) == (False, result["digest"])
    folder = Path(result["manifest"]).parent
    records = pl.read_parquet(folder / "records/*.parquet")
    assert records["recaption"].str.len_chars().min() >= 20
    lines = [json.loads(line) for line in (folder / "jsonl/train.jsonl").open()]
    assert {line["sample_id"] for line in lines} == set(records["sample_id"])
    fates = pl.read_parquet(folder / "fates.parquet")
    assert fates.filter(pl.col("level") == "sample")["fate"].value_counts().to_dicts() == [
        {"fate": "recorded", "count": result["records"]}
    ]


def test_a_stricter_rule_asks_nothing_and_a_longer_answer_everything(recap):
    with MllmServer() as server:
        first = recap(server)
        stricter = recap(server, least_characters=45)
        assert server.counts.total() == first["records"]
        assert 0 < stricter["records"] < first["records"]
        longer = recap(server, model={"max_tokens": 256})
        assert server.counts.total() == 2 * first["records"] == 2 * longer["records"]


def test_a_budget_makes_a_partial_version(recap):
    with MllmServer() as server:
        result = recap(server, model={"budget": {"calls": 10}})
    assert result["records"] == 10 == server.counts.total()
    assert result["waiting"]["over_budget"] > 100


def test_recipes_are_found_and_misspelled_ones_are_told(few, tmp_path):
    assert "recap" in [recipe.name for recipe in discover()]
    with MllmServer() as server, pytest.raises(ConfigError, match="did you mean 'recap'"):
        load_config(write_config(tmp_path, "recpa", few, server))
