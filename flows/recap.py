"""Recap-DataComp: every image gets a detailed caption beside its own (arXiv 2406.08478)."""

from typing import Any

from prefect import flow
from pydantic import Field

from flows.recipe import Made, Recipe, RecipeConfig, known, pictured, run_recipe
from infra.build import Build
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.report import Story


class Captioned(Answer):
    recaption: str


class Captioner(ModelParams):
    """The captioner, asked greedily as the paper's LLaVA-1.5-LLaMA3-8B; its README says so."""

    max_tokens: int = Field(128, ge=1, description="Tokens a caption may have, as the README.")


class RecapConfig(RecipeConfig):
    """Recap-DataComp-1B."""

    name = "recap"
    model: Captioner = Captioner()
    least_characters: int = Field(
        20, ge=1, description="Shorter captions are dropped. Our own default: the paper has none."
    )


CAPTION = Question("recap/caption", Captioned, pictures={"image_id": ""})


def stages(run: Build, config: RecapConfig, step: Any) -> Made:
    """Figure 2 of the paper: an image goes in, the captioner writes, both captions are kept."""
    listed, seen = known(run, config, step)
    files, taken = pictured(run, seen, step)
    told = step(ask_model)(run, taken.samples, seen.objects, Asking(CAPTION, config.model))
    length = Rule("short_caption", "recaption", "longer", config.least_characters)
    kept = step(filter_samples)(run, told.samples, Rules((length,)))
    return Made(
        listed, seen, files, kept.samples, {"caption": told, "length": kept}, "lines",
        Story("What the captioner says of each picture, beside what the corpus says.",
              {"image_id": ""}, [("recaption", "recaption"), ("caption", "caption")]),
    )  # fmt: skip


RECIPE = Recipe(
    "recap",
    "a detailed caption for every image, beside its own",
    "images, captions where there are any",
    "JSON lines, Parquet",
    "a vision-language model",
    RecapConfig,
    stages,
)


@flow(name="recap", flow_run_name="{config.dataset}")
def recap(config: RecapConfig) -> dict[str, Any]:
    """Give every image a detailed caption, redoing only what changed."""
    return run_recipe(RECIPE, config)
