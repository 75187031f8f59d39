"""LFPC: what a model can answer only when it looks closer, and where (arXiv 2603.27494)."""

from typing import Any

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from flows.recipe import Made, Recipe, RecipeConfig, imported, known, run_recipe
from infra.build import Build
from tasks.ask_model import Asking, ModelParams, Question, ask_model
from tasks.check_gap import GapCheck, check_gap
from tasks.crop_views import Crops, crop_views
from tasks.import_records import ImportParams
from tasks.ladder_views import Ladder, ladder_views
from tasks.match_answers import Matching, match_answers
from tasks.nest_boxes import Nesting, nest_boxes
from tasks.report import Story
from tasks.route_samples import Route, route_samples
from tasks.select_resolution import Selection, select_resolution
from tasks.size_originals import Sizes, size_originals


class Answered(BaseModel):
    model_config = ConfigDict(extra="forbid")
    said: str


class Trainee(ModelParams):
    """The model that is to be trained."""

    max_pixels: int = Field(
        12_845_056,
        ge=784,
        description="Pixels of an original as it is shown: 16384 tokens of 28 x 28, the larger of"
        " the paper's two budgets at evaluation.",
    )
    max_tokens: int = Field(
        64,
        ge=1,
        description="Tokens an answer may have. Not given in the source; our own default, enough"
        " for answers of a few words.",
    )


class CropGapConfig(RecipeConfig):
    """LFPC: offline resolution selection, nested boxes, and the information gap."""

    name = "crop_gap"
    needs = ("question", "answer")
    records: ImportParams = Field(
        description="Questions and answers (`image`, `question`, `answer`, perhaps `boxes`)."
    )
    model: Trainee = Field(
        Trainee(), description="The model that is to be trained, asked greedily, as the paper."
    )
    ladder: Ladder = Ladder()
    selection: Selection = Selection()
    boxes: Nesting = Nesting()
    crops: Crops = Crops()
    gap: GapCheck = GapCheck()


PARTS = {"global_view": "the picture", "part_view": "the part"}
AT_FULL = Question("crop_gap/answer", Answered, {"image_id": ""}, ("question",))
AT_A_LEVEL = Question("crop_gap/answer", Answered, {"view": ""}, ("question",))
WITH_PART = Question("crop_gap/answer_with_part", Answered, PARTS, ("question",))
STORY = Story(
    "Questions that the model answers at full resolution and no longer at a lower one, with the"
    " boxes that hold what it then needs: the smallest, and its context.",
    {"image_id": ""},
    [("question", "question"), ("answer", "answer"), ("in the small picture", "global_answer")],
    facts=[("reason", "reason"), ("tokens", "global_tokens"), ("difficulty", "difficulty"),
           ("boxes from", "box_source"), ("gap", "gap")],
    boxes="boxes",
    by="global_tokens",
)  # fmt: skip


def stages(run: Build, config: CropGapConfig, step: Any) -> Made:
    """What the model gets right at full resolution goes down a ladder to where it first fails: the
    small picture. Then boxes, and a crop that must bring back what was lost, while noise must not.
    """
    listed, seen = known(run, config, step)
    files, found = imported(run, config.records, seen, step)
    sizes = Sizes(config.ladder.min_tokens, config.ladder.patch)
    large = step(size_originals)(run, found.samples, seen.images, sizes)
    told = step(ask_model)(run, large.samples, seen.objects, Asking(AT_FULL, config.model))
    full = step(match_answers)(run, told.samples, Matching(config.selection.containment))
    right = step(route_samples)(run, full.samples, Route("right", (True,)))
    levels = step(ladder_views)(run, right.samples, config.ladder)
    down = step(ask_model)(run, levels.views, seen.objects, Asking(AT_A_LEVEL, config.model))
    chosen = step(select_resolution)(run, full.samples, down.samples, down.drops, config.selection)
    boxed = step(nest_boxes)(run, chosen.samples, config.boxes)
    parts = step(crop_views)(run, boxed.samples, config.crops)
    looked = step(ask_model)(run, parts.views, seen.objects, Asking(WITH_PART, config.model))
    checked = step(check_gap)(run, boxed.samples, looked.samples, looked.drops, config.gap)
    return Made(
        listed, seen, files, checked.samples,
        {"import": found, "originals": large, "answers": told, "resolution": chosen,
         "boxes": boxed, "gap": checked},
        "grpo", STORY,
    )  # fmt: skip


RECIPE = Recipe(
    "crop_gap",
    "questions that need a closer look, at the resolution where they do, with nested boxes",
    "high-resolution images, questions and answers, boxes where there are any",
    "JSON lines and Parquet for GRPO trainers",
    "the vision-language model that is to be trained",
    CropGapConfig,
    stages,
)


@flow(name="crop_gap", flow_run_name="{config.dataset}")
def crop_gap(config: CropGapConfig) -> dict[str, Any]:
    """Select resolutions, nest boxes and check the gap, redoing only what changed."""
    return run_recipe(RECIPE, config)
