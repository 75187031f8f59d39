"""Oasis: instructions that a model writes of itself when it is shown a picture and nothing else.

ICCV 2025, arXiv 2503.08741, github.com/Letian2003/MM_INF.
"""

from collections.abc import Mapping
from typing import Any, Literal

from prefect import flow
from pydantic import Field, create_model, field_validator

from flows.recipe import Made, Recipe, RecipeConfig, known, run_recipe
from infra import tables
from infra.build import Build
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.continue_prefix import ContinueParams, continue_prefix
from tasks.filter_instructions import InstructionFilter, filter_instructions
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.report import Story
from tasks.take_images import take_images


class Extracted(Answer):
    found: Literal["instruction", "none"]
    instruction: str

    @field_validator("instruction")
    @classmethod
    def _bare(cls, text: str) -> str:
        # The code strips the letters of the word, and with them those that the text begins with.
        return text.strip().removeprefix("Instruction:").strip()


class Answered(Answer):
    response: str = Field(min_length=1)


class OasisConfig(RecipeConfig):
    """Oasis."""

    name = "oasis"
    prefix: ContinueParams = ContinueParams()
    model: ModelParams = Field(
        ModelParams(),
        description="The model that sees: it judges, and answers greedily in at most 1,024 tokens,"
        " as the code.",
    )
    reader: ModelParams | None = Field(
        None,
        description="The model of text that extracts instructions and judges their language. null:"
        " `model`, without the picture; our own default, to need one model less than the paper.",
    )
    filter: InstructionFilter = InstructionFilter()


PICTURE, TEXT = {"image_id": ""}, ("instruction",)
EXTRACT = Question("oasis/extract", Extracted, {}, ("continuation",))
ANSWER = Question("oasis/answer", Answered, PICTURE, TEXT)
IS_ONE = Rules(
    (Rule("no_instruction", "found", "is", "instruction"),
     Rule("no_instruction", "instruction", "longer", 1))
)  # fmt: skip


def grade(name: str, pictures: Mapping[str, str]) -> Question:
    """The question for one grade of an instruction, from 1 to 5, the best."""
    most: Any = (int, Field(ge=1, le=5))
    return Question(
        f"oasis/{name}", create_model(name, __base__=Answer, **{name: most}), pictures, TEXT
    )


def stages(run: Build, config: OasisConfig, step: Any) -> Made:
    """As the paper: a picture alone, what the model goes on to write, the instruction in
    it, four judges, and an answer that nothing filters: the paper found that this hurts.
    """
    listed, seen = known(run, config, step)
    taken = step(take_images)(run, seen.images, seen.image_captions, seen.captions)
    ran: dict[str, Any] = {}
    ran["continue"] = step(continue_prefix)(run, taken.samples, seen.objects, config.prefix)
    rows, reader = ran["continue"].samples, config.reader or config.model
    ran["extract"] = step(ask_model)(run, rows, seen.objects, Asking(EXTRACT, reader))
    ran["instruction"] = step(filter_samples)(run, ran["extract"].samples, IS_ONE)
    rows = ran["instruction"].samples
    for name in ("nonsense", "hallucination", "solvability", "clarity"):
        blind = name == "nonsense"
        asking = Asking(grade(name, {} if blind else PICTURE), reader if blind else config.model)
        ran[name] = step(ask_model)(run, rows, seen.objects, asking)
        rows = ran[name].samples
    ran["grades"] = step(filter_instructions)(run, rows, config.filter)
    asking = Asking(ANSWER, config.model)
    ran["answer"] = step(ask_model)(run, ran["grades"].samples, seen.objects, asking)
    files = tables.write(run.store, "files", [])
    return Made(listed, seen, files, ran["answer"].samples, ran, "llava", STORY)


STORY = Story(
    "What the model took to be asked when it saw a picture and nothing else, and its answer.",
    PICTURE,
    [("went on", "continuation"), ("instruction", "instruction"), ("response", "response")],
    [("solvability", "solvability"), ("clarity", "clarity"), ("hallucination", "hallucination"),
     ("nonsense", "nonsense")],
)  # fmt: skip
RECIPE = Recipe(
    "oasis",
    "instructions that a model writes when it is shown a picture alone, judged, with answers",
    "images",
    "LLaVA conversations, Parquet",
    "a vision-language model in process, and one at an endpoint or in process",
    OasisConfig,
    stages,
)


@flow(name="oasis", flow_run_name="{config.dataset}")
def oasis(config: OasisConfig) -> dict[str, Any]:
    """Let a model write instructions about pictures, redoing only what changed."""
    return run_recipe(RECIPE, config)
