"""RegionGPT: detailed captions of regions, written from the crop and its context (2403.02330)."""

from typing import Annotated, Any

from prefect import flow
from pydantic import BaseModel, Field, StringConstraints

from flows.recipe import Made, Recipe, RecipeConfig, imported, known, run_recipe
from infra.build import Build
from infra.errors import ConfigError
from tasks.ask_model import Asking, ModelParams, Question, ask_model
from tasks.crop_regions import CropParams, crop_regions
from tasks.draw_variants import Draws, draw_variants
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.import_records import ImportParams
from tasks.keep_quantile import Quantile, keep_quantile
from tasks.measure_copying import Copying, measure_copying
from tasks.report import Story
from tasks.score_crops import ScoreParams, Scoring, score_crops

WORDINGS = 10  # of each question, as the notes on the paper
Said = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Whole(BaseModel, extra="forbid"):
    global_caption: Said


class Region(BaseModel, extra="forbid"):
    region_caption: Said


class Around(BaseModel, extra="forbid"):
    context_caption: Said


WHOLE = Question("regions/whole", Whole, {"image_id": ""}, values=["whole_wording"])
REGION = Question(
    "regions/region", Region, {"region": "close-up"}, ["class_name", "global_caption"],
    ["region_wording"],
)  # fmt: skip
AROUND = Question(
    "regions/around", Around, {"around": "part"}, ["class_name", "global_caption"],
    ["around_wording"],
)  # fmt: skip


class Captioner(ModelParams):
    """The model that is asked all questions."""

    max_tokens: int = Field(
        256, ge=1, description="Tokens an answer may have. Not given in the source; our own"
        " default, because captions of regions have 87 words on average (notes on the paper).",
    )  # fmt: skip


class RegionsConfig(RecipeConfig):
    """RegionGPT. The paper's own pipeline is not released; its numbers come from notes on it."""

    name = "regions"
    records: ImportParams = Field(description="Files with the boxes.")
    crop: CropParams = CropParams()
    model: Captioner = Captioner()
    score: ScoreParams = ScoreParams()
    clip_min: float | None = Field(
        None, ge=-1, le=1, description="Least cosine of crop and caption. The paper's is not given"
        " in the source; none is our own default, since cosines don't carry over between models.",
    )  # fmt: skip
    clip_keep: float = Field(
        0.9, gt=0, le=1, description="Share of each class that is kept, best cosine first. Not"
        " given in the source; our own default.",
    )  # fmt: skip
    class_rank: int = Field(
        5, ge=1, description="The crop must rank its class so high among `score.classes`. Not in"
        " the source; an addition of ours against boxes on the wrong thing.",
    )  # fmt: skip
    copy_max: float | None = Field(
        None, ge=0, le=1, description="Most of its 5-grams that a caption may share with that of"
        " the whole; null measures only. Not in the source; an addition of ours.",
    )  # fmt: skip
    context: bool = Field(
        True, description="Also describe the region with what is around it. Our own addition."
    )
    seed: int = Field(0, description="Of the draw of wordings.")


def stages(run: Build, config: RegionsConfig, step: Any) -> Made:
    """Caption the whole, then each region with that as context, then filter by CLIP."""
    if config.score.model not in config.models:
        raise ConfigError(f"score.model: {config.score.model!r} is not one of models; add it there")
    listed, seen = known(run, config, step)
    files, read = imported(run, config.records, seen, step)
    cropped = step(crop_regions)(run, read.samples, seen.images, config.crop)
    names = {"whole_wording": "image_id", "region_wording": "sample_id"}
    draws = {name: (by, WORDINGS) for name, by in [*names.items(), ("around_wording", "sample_id")]}
    drawn = step(draw_variants)(run, cropped.samples, Draws(draws, config.seed))
    # The regions of an image ask the same of the whole, so it is paid for once.
    whole = step(ask_model)(run, drawn.samples, seen.objects, Asking(WHOLE, config.model))
    told = step(ask_model)(run, whole.samples, seen.objects, Asking(REGION, config.model))
    scoring = Scoring(
        "region", "region_caption", "class_name", config.score, config.models[config.score.model],
        config.describe.device,
    )  # fmt: skip
    vectors = seen.vectors[config.score.model]
    scored = step(score_crops)(run, told.samples, seen.objects, vectors, scoring)
    copied = step(measure_copying)(run, scored.samples, Copying("region_caption", "global_caption"))
    checked = step(filter_samples)(run, copied.samples, Rules(tuple(_rules(config))))
    best = Quantile("clip_score", config.clip_keep, per="class_name")
    kept = step(keep_quantile)(run, checked.samples, best)
    ran = {"import": read, "crop": cropped, "whole": whole, "region": told, "checks": checked,
           "best": kept}  # fmt: skip
    if config.context:
        kept = step(ask_model)(run, kept.samples, seen.objects, Asking(AROUND, config.model))
        ran["context"] = kept
    return Made(
        listed, seen, files, kept.samples, ran, "regions",
        Story(
            "Parts of pictures as they were described, with the picture they are from.",
            {"image_id": ""},
            [("region", "region_caption"), ("around it", "context_caption"),
             ("whole", "global_caption")],
            [("class", "class_name"), ("rank", "class_rank"), ("CLIP, millionths", "clip_score"),
             ("copied, millionths", "region_caption_copied"), ("words", "region_caption_words")],
            "box", "class_name",
        ),
    )  # fmt: skip


def _rules(config: RegionsConfig) -> list[Rule]:
    rules = [Rule("unlike_its_class", "class_rank", "most", config.class_rank, null_passes=True)]
    if config.clip_min is not None:
        rules.append(Rule("low_clip_score", "clip_score", "least", round(1e6 * config.clip_min)))
    if config.copy_max is not None:
        most = round(1e6 * config.copy_max)
        rules.append(Rule("copies_the_whole", "region_caption_copied", "most", most))
    return rules


RECIPE = Recipe(
    "regions",
    "detailed captions of regions, with their boxes",
    "images with boxes (COCO, Objects365, RefCOCO, rows)",
    "conversations with <region>, COCO captions JSON, Parquet",
    "a vision-language model, a CLIP",
    RegionsConfig,
    stages,
)


@flow(name="regions", flow_run_name="{config.dataset}")
def regions(config: RegionsConfig) -> dict[str, Any]:
    """Describe regions of pictures in detail, redoing only what changed."""
    return run_recipe(RECIPE, config)
