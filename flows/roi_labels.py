"""SD-RPN: regions of interest by a model's own answer-to-image attention (arXiv 2509.16944)."""

from functools import partial
from typing import Any, Literal, Self, get_args

from prefect import flow
from pydantic import Field, model_validator

from flows.recipe import Made, Recipe, RecipeConfig, imported, known, run_recipe
from infra import tables
from infra.attention_heads import Mode
from infra.build import Build
from tasks.ask_model import ModelParams
from tasks.choose_heads import BOXES, ChooseParams, Choosing, choose_heads
from tasks.choose_questions import QuestionParams, choose_questions
from tasks.draw_regions import DrawParams, draw_regions, pages
from tasks.import_records import ImportParams
from tasks.label_regions_of_interest import COLUMNS, LabelParams, label_regions_of_interest
from tasks.map_attention import LISTED, AttentionParams, MapParams, map_attention
from tasks.report import Story

OWN = {"mode", "question", "prompt", "answer", "thresholds", *COLUMNS}


class FirstQuestions(ImportParams):
    """Records, of whose dialogues only the first question is asked, as the code."""

    turns: Literal["all", "first"] = Field(
        "first", description="`all` asks each question of a dialogue; the code asks the first."
    )


class Watched(ModelParams):
    """The model that is watched: `local`, since an endpoint gives no attention."""

    max_tokens: int = Field(128, ge=1, description="Tokens an answer may have, as the code.")


class RoiLabelsConfig(RecipeConfig):
    """SD-RPN's pseudo-labels."""

    name = "roi_labels"
    needs = ("instruction",)
    records: FirstQuestions = Field(
        description="Questions about pictures: of each record the first one, as the code."
    )
    questions: QuestionParams = QuestionParams()
    model: Watched = Field(Watched(), description="The model that is watched; it answers greedily.")
    attention: AttentionParams = AttentionParams()
    choose_heads: ChooseParams | None = Field(
        None,
        description="Choose heads by the column `annotated_boxes` of the records, for modes that"
        " `attention.heads` does not name, in place of those that the code lists. null: do not.",
    )
    labels: LabelParams = LabelParams()
    pictures: DrawParams | None = Field(
        DrawParams(),
        description="Pages with a picture of every record for a person to judge, 10 to 40 kB each."
        " null: none.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.model.local is None:
            raise ValueError("model.local is required: an endpoint gives no attention")
        if self.choose_heads and BOXES not in self.records.columns:
            raise ValueError(f"choose_heads needs boxes: records.columns: {{{BOXES}: theirs}}")
        if taken := sorted(OWN.intersection(self.records.columns)):
            raise ValueError(
                f"records.columns: {', '.join(taken)} would be mixed up with the recipe's own;"
                " give them other names"
            )
        return self


def stages(run: Build, config: RoiLabelsConfig, step: Any) -> Made:
    """Figure 2 of the paper: the model answers, its attention is averaged, cleaned of sinks, and
    cut into foreground, background and what is ignored.
    """
    listed, seen = known(run, config, step)
    files, given = imported(run, config.records, seen, step)
    asked = step(choose_questions)(run, given.samples, seen.images, config.questions)
    model = {"local": config.model.local, "max_tokens": config.model.max_tokens}
    heads = LISTED
    if config.choose_heads:
        choosing = Choosing(
            **model, **dict(config.choose_heads), square_pixels=config.attention.square_pixels,
            modes=[mode for mode in get_args(Mode) if mode not in config.attention.heads],
        )  # fmt: skip
        heads = step(choose_heads)(run, asked.samples, seen.objects, seen.images, choosing).heads
    watched = MapParams(**model, **dict(config.attention))
    mapped = step(map_attention)(run, asked.samples, seen.objects, watched, heads)
    labelled = step(label_regions_of_interest)(
        run, mapped.samples, mapped.maps, seen.images, config.labels
    )
    beside = None
    if config.pictures:
        made = labelled.samples
        drawn = step(draw_regions)(run, made, seen.objects, seen.images, config.pictures)
        beside = partial(pages, run.store, drawn.overlays)
    return Made(
        listed, seen, files, labelled.samples,
        {"records": given, "questions": asked, "attention": mapped, "labels": labelled},
        "sd_rpn",
        Story("Where the model looked while it answered, sinks left out, and the regions in it."
              + (" The pages in pictures/ show all records." if beside else ""),
              {"image_id": ""}, [("question", "question"), ("its own answer", "answer")],
              [("mode", "mode"), ("foreground", "foreground"), ("background", "background"),
               ("ignored", "ignored"), ("steps", "steps"), ("heads", "heads")],
              boxes="boxes", by="mode", map=("cleaned", "grid_height", "grid_width"), padded=True),
        {"heads": tables.read(run.store, heads).to_pylist()} if config.choose_heads else {},
        beside,
    )  # fmt: skip


RECIPE = Recipe(
    "roi_labels",
    "where a model looks when it answers: labels of cells, boxes",
    "images, questions about them",
    "SD-RPN's records as JSON lines and Parquet",
    "a vision-language model in process",
    RoiLabelsConfig,
    stages,
)


@flow(name="roi_labels", flow_run_name="{config.dataset}")
def roi_labels(config: RoiLabelsConfig) -> dict[str, Any]:
    """Label regions of interest by a model's own attention, redoing only what changed."""
    return run_recipe(RECIPE, config)
