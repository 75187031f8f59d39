"""Sections of a recipe's config that name models: where their files lie, and what is published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from flows.config import load_config
from flows.honeypipe import HoneypipeConfig
from flows.recap import RecapConfig
from flows.recipe import RecipeConfig, discover, embedder
from infra.errors import ConfigError
from infra.local_mllm import LocalModel
from infra.provenance import OWN, own
from tasks.ask_model import ModelParams
from tasks.import_records import ImportParams
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


@pytest.mark.parametrize(
    ("recipe", "tokens"), [("recap", 128), ("regions", 256), ("roi_labels", 128)]
)
def test_a_config_that_names_its_model_keeps_the_settings_of_the_recipe(recipe, tokens):
    assert load_config(ROOT / f"sample/recipes/{recipe}.yaml").model.max_tokens == tokens


def test_a_stronger_model_for_the_long_loop_has_room_for_its_thoughts():
    config = load_config(ROOT / "sample/recipes/honeypipe.yaml").model_dump(mode="json")
    config["long"] = {"local": {"name": "thinker"}}
    assert HoneypipeConfig(**config).long.max_tokens == 4_096


def test_a_model_that_is_not_named_is_told_in_one_line():
    with pytest.raises(ConfigError, match="names no model to ask; give its section an `endpoint`"):
        _ = ModelParams().model


@pytest.mark.parametrize(
    ("recipe", "records", "lacking"),
    [
        ("crop_gap", {"format": "conversations"}, "question and answer"),
        ("crop_gap", {"format": "rows", "columns": {"image": "i", "question": "q"}}, "answer"),
        ("honeypipe", {"format": "coco"}, "instruction and response"),
        ("regions", {"format": "coco_captions"}, "box and class_name"),
        ("roi_labels", {"format": "rows", "columns": {"instruction": "q"},
                        "optional": ["instruction"]}, "instruction"),
    ],
)  # fmt: skip
def test_records_without_what_a_recipe_asks_about_are_refused_before_any_work(
    tmp_path, recipe, records, lacking
):
    config = {"recipe": recipe, "dataset": "one", "corpus": {"uri": "c"}, "store": {"uri": "s"}}
    config |= {"records": {"files": ["r.json"], **records}, "model": {"local": {"name": "tiny"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=f"{recipe} needs records with {lacking}: use"):
        load_config(tmp_path / "config.yaml")


def test_an_optional_column_that_is_none_is_told_in_one_line():
    with pytest.raises(ValueError, match="optional: 'captoin' is no column of these records"):
        ImportParams(
            files=["r.json"], format="rows", columns={"caption": "text"}, optional=["captoin"]
        )


def test_an_embedding_model_that_is_not_there_is_told_in_one_line():
    config = load_config(ROOT / "sample/recipes/regions.yaml")
    assert embedder(config, "clip").library == "open_clip"
    with pytest.raises(ConfigError, match="regions needs the embedding model 'siglip'; add it to"):
        embedder(config, "siglip")


def test_numbers_that_are_not_the_sources_are_told_with_who_set_them():
    config = load_config(ROOT / "sample/recipes/llavar2.yaml")
    told = {row.key: (row.value, row.default) for row in own(config, config.published())}
    assert told["filter.mifd_max"] == (1.05, False)
    assert told["filter.keep_top_quantile"] == (1.0, True)
    assert told["difficulty.vision"] == ("noise_llava", False)
    assert "difficulty.text" not in told  # the paper's code names it


def test_no_description_speaks_of_our_choice_in_words_that_no_manifest_finds():
    speaks = re.compile(r"\b(of ours|default is ours|our default|not stated|not given)\b", re.I)
    unmarked = [
        f"{recipe.name} {place}"
        for recipe in discover()
        if issubclass(recipe.config, RecipeConfig)
        for place, said in descriptions(recipe.config)
        if speaks.search(said) and not OWN.search(said)
    ]
    assert unmarked == []


def descriptions(model, place="") -> Iterator[tuple[str, str]]:
    """Of all parameters below a model."""
    for name, field in model.model_fields.items():
        yield f"{place}{name}", field.description or ""
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from descriptions(inner, f"{place}{name}.")
