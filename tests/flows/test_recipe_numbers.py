"""Every number of a recipe is the source's, and then this one, or is told as Pairmill's own."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from flows import regions
from flows.recipe import RecipeConfig, discover
from infra import attention_maps, crop_rewards
from infra.asking import AskParams
from infra.provenance import OWN
from tasks.continue_prefix import ContinueParams

GREEDY = 0.0
# What papers, their code, or notes on them state; each parameter's description says which.
GIVEN: dict[str, dict[str, Any]] = {
    "crop_gap": {"model.max_pixels": 16_384 * 28 * 28, "model.temperature": GREEDY},
    "honeypipe": {"bypass": ("OCR", "Detection")},
    "llavar2": {},
    "oasis": {
        "prefix.temperature": 1.0, "prefix.top_k": 20, "prefix.top_p": 1.0,
        "prefix.least_tokens": 50, "prefix.most_tokens": 512,
        "filter.solvability_least": 3, "filter.clarity_least": 3, "filter.sum_least": 7,
        "filter.hallucination_least": 5, "filter.nonsense_least": 5,
        "model.max_tokens": 1_024, "model.temperature": GREEDY,
    },
    "recap": {"model.max_tokens": 128, "model.temperature": GREEDY},
    "regions": {},
    "roi_labels": {
        "questions.modes": {"gqa": "natural", "ocr_vqa": "textual"},
        "model.max_tokens": 128, "model.temperature": GREEDY,
        "attention.square_pixels": 576 * 28**2, "attention.heads.sink_threshold": 1e-2,
        "labels.foreground": 0.2, "labels.background": 0.1, "labels.largest": 0.5,
        "labels.weakest": 5e-3, "labels.margin": 1,
    },
}  # fmt: skip
# Facts about a model, draws, and how pictures are drawn say nothing of a method.
NEITHER = ("patch", "seed", "temperature", "quality", "side")
RECIPES = {recipe.name: recipe.config for recipe in discover() if recipe.stages}


def numbers(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, default, description) of numbers, and of lists, in what a recipe has of its own."""
    for name, field in model.model_fields.items():
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel)]
        for kind in inner:
            # How a model is reached and paid is everybody's.
            if kind.__module__.startswith(("tasks.", "flows.")):
                yield from numbers(kind, f"{place}{name}.")
        default = field.get_default(call_default_factory=True)
        of_asking = name in AskParams.model_fields and issubclass(model, AskParams)
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        is_list = isinstance(default, tuple | list | dict) and len(default) > 0
        if (is_number or is_list) and not inner and not of_asking:
            yield f"{place}{name}", default, field.description or ""


def own_numbers(recipe: str) -> Iterator[tuple[str, Any, str]]:
    shared = RecipeConfig.model_fields.keys() - {"model"}
    for key, default, said in numbers(RECIPES[recipe]):
        if key.partition(".")[0] not in shared:
            yield key, default, said


def test_every_recipe_is_here():
    assert GIVEN.keys() == RECIPES.keys()


@pytest.mark.parametrize("recipe", sorted(GIVEN))
def test_a_number_is_the_sources_or_is_marked(recipe):
    found = {key: (default, bool(OWN.search(said))) for key, default, said in own_numbers(recipe)}
    given = {key: (value, False) for key, value in GIVEN[recipe].items()}
    assert {key: found.get(key) for key in given} == given
    unmarked = {key for key, (_, is_own) in found.items() if not is_own} - given.keys()
    assert [key for key in unmarked if key.rpartition(".")[2] not in NEITHER] == []


def test_numbers_that_are_no_parameters():
    assert regions.WORDINGS == 10
    assert attention_maps.GIVEN == (0.2, 0.1, 0.5, 5e-3)
    assert (attention_maps.SMALLEST, attention_maps.LARGEST) == (4, 225)
    assert attention_maps.GREY == (127, 127, 127)
    assert crop_rewards.LEAST_OVERLAP == 0.9
    assert ContinueParams().sampling.repetition_penalty is None
