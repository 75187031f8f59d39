"""RegionGPT: detailed captions of regions, written from the crop and its context (2403.02330)."""

from typing import Annotated, Any

from prefect import flow
from pydantic import Field, StringConstraints

from flows.recipe import Made, Recipe, RecipeConfig, embedder, imported, known, run_recipe
from infra.build import Build
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.crop_regions import CropParams, crop_regions
from tasks.draw_variants import Draws, draw_variants
from tasks.filter_crops import CropFilter, Filtering, filter_crops
from tasks.import_records import ImportParams
from tasks.measure_copying import Copying, measure_copying
from tasks.report import Story
from tasks.score_crops import ScoreParams, Scoring, score_crops

WORDINGS = 10  # of each question, as the notes on the paper
Said = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Whole(Answer):
    global_caption: Said


class Region(Answer):
    region_caption: Said


class Around(Answer):
    context_caption: Said


KNOWN = ("class_name", "global_caption")
WHOLE = Question("regions/whole", Whole, {"image_id": ""}, values=["whole_wording"])
REGION = Question("regions/region", Region, {"region": "close-up"}, KNOWN, ["region_wording"])
AROUND = Question("regions/around", Around, {"around": "part"}, KNOWN, ["around_wording"])
DRAWS = {"whole_wording": "image_id", "region_wording": "sample_id", "around_wording": "sample_id"}


class Captioner(ModelParams):
    """The model that is asked all questions."""

    max_tokens: int = Field(
        256, ge=1, description="Tokens an answer may have. Not given in the source; our own"
        " default, because captions of regions have 87 words on average (notes on the paper).",
    )  # fmt: skip


class RegionsConfig(RecipeConfig):
    """RegionGPT. The paper's own pipeline is not released; its numbers come from notes on it."""

    name = "regions"
    needs = ("box", "class_name")
    records: ImportParams = Field(description="Files with the boxes.")
    crop: CropParams = CropParams()
    model: Captioner = Captioner()
    score: ScoreParams = ScoreParams()
    filter: CropFilter = CropFilter()
    context: bool = Field(
        True, description="Also describe the region with what is around it. Our own addition."
    )
    seed: int = Field(0, description="Of the draw of wordings.")


def stages(run: Build, config: RegionsConfig, step: Any) -> Made:
    """Caption the whole, then each region with that as context, then filter by CLIP."""
    clip = embedder(config, config.score.model)
    listed, seen = known(run, config, step)
    files, read = imported(run, config.records, seen, step)
    cropped = step(crop_regions)(run, read.samples, seen.images, config.crop)
    drawn = step(draw_variants)(run, cropped.samples, Draws(DRAWS, WORDINGS, config.seed))
    # The regions of an image ask the same of the whole, so it is paid for once.
    whole = step(ask_model)(run, drawn.samples, seen.objects, Asking(WHOLE, config.model))
    told = step(ask_model)(run, whole.samples, seen.objects, Asking(REGION, config.model))
    scoring = Scoring(
        "region", "region_caption", "class_name", config.score, clip, config.describe.device
    )
    vectors = seen.vectors[config.score.model]
    scored = step(score_crops)(run, told.samples, seen.objects, vectors, scoring)
    copied = step(measure_copying)(run, scored.samples, Copying("region_caption", "global_caption"))
    fitting = Filtering(config.filter, "region_caption", "class_name")
    kept: Any = step(filter_crops)(run, copied.samples, fitting)
    ran = {"import": read, "crop": cropped, "whole": whole, "region": told, "filter": kept}
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
            [("class", "class_name"), ("rank", "class_rank"), ("CLIP", "clip_score"),
             ("copied", "region_caption_copied"), ("words", "region_caption_words")],
            "box", "class_name", millionths=("clip_score", "region_caption_copied"),
        ),
    )  # fmt: skip


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
