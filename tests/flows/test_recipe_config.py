"""Sections of a recipe's config that name models: where their files lie, and what is published."""

from pathlib import Path

import pytest
import yaml

from flows.config import load_config
from flows.recap import RecapConfig
from infra.errors import ConfigError
from infra.local_mllm import LocalModel
from tasks.ask_model import ModelParams
from tests.recipes import write_config

ROOT = Path(__file__).parents[2]


class SecondOpinion(RecapConfig):
    second: ModelParams = ModelParams()


def test_a_model_in_process_lies_beside_the_config_and_is_published_without_place(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    path = write_config(tmp_path, "recap", corpus, None)
    local = {"local": {"name": "./models/tiny"}}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": local}))
    found = load_config(path)
    assert found.model.local == LocalModel(name=str(tmp_path / "models/tiny"))
    both = SecondOpinion(**{**dict(found), "second": ModelParams(local=found.model.local)})
    for section in ("model", "second"):
        shown = both.published()[section]
        assert shown["model"] == "tiny"
        assert shown.keys().isdisjoint({"endpoint", "local", "budget"})
    assert str(tmp_path) not in repr(both.published())


@pytest.mark.parametrize(("recipe", "tokens"), [("recap", 128), ("regions", 256)])
def test_a_config_that_names_its_endpoint_keeps_the_settings_of_the_recipe(recipe, tokens):
    assert load_config(ROOT / f"sample/recipes/{recipe}.yaml").model.max_tokens == tokens


def test_a_model_that_is_not_named_is_told_in_one_line():
    with pytest.raises(ConfigError, match="names no model to ask; give its section an `endpoint`"):
        _ = ModelParams().model
