"""Oasis: instructions that a model writes of itself when it is shown a picture and nothing else.

ICCV 2025, arXiv 2503.08741, github.com/Letian2003/MM_INF.
"""

from collections.abc import Mapping
from typing import Any, Literal

from prefect import flow
from pydantic import Field, create_model, field_validator

from flows.recipe import Made, Recipe, RecipeConfig, known, pictured, run_recipe
from infra.build import Build
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.continue_prefix import ContinueParams, continue_prefix
from tasks.filter_instructions import InstructionFilter, filter_instructions
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.report import Story


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


class Seeing(ModelParams):
    """The model that sees: it judges, and answers greedily."""

    max_tokens: int = Field(1_024, ge=1, description="Tokens an answer may have, as the code.")


class OasisConfig(RecipeConfig):
    """Oasis."""

    name = "oasis"
    prefix: ContinueParams = ContinueParams()
    model: Seeing = Seeing()
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


def grade(name: str, pictures: Mapping[str, str] = PICTURE) -> Question:
    """The question for one grade of an instruction, from 1 to 5, the best."""
    scale: Any = (int, Field(ge=1, le=5))
    answer = create_model(name, __base__=Answer, **{name: scale})
    return Question(f"oasis/{name}", answer, pictures, TEXT)


GRADES = (grade("nonsense", {}), grade("hallucination"), grade("solvability"), grade("clarity"))


def stages(run: Build, config: OasisConfig, step: Any) -> Made:
    """A picture alone, what the model goes on to write, the instruction in it, four judges, and an
    answer that nothing filters: the paper found that this hurts.
    """
    listed, seen = known(run, config, step)
    sees, reads = config.model, config.reader or config.model
    files, taken = pictured(run, seen, step)
    written = step(continue_prefix)(run, taken.samples, seen.objects, config.prefix)
    read = step(ask_model)(run, written.samples, seen.objects, Asking(EXTRACT, reads))
    asked = step(filter_samples)(run, read.samples, IS_ONE)
    graded, rows = {}, asked.samples
    for question in GRADES:
        asking = Asking(question, sees if question.pictures else reads)
        graded[question.name] = step(ask_model)(run, rows, seen.objects, asking)
        rows = graded[question.name].samples
    good = step(filter_instructions)(run, rows, config.filter)
    told = step(ask_model)(run, good.samples, seen.objects, Asking(ANSWER, sees))
    ran = {"continue": written, "extract": read, "instruction": asked, **graded, "grades": good,
           "answer": told}  # fmt: skip
    return Made(listed, seen, files, told.samples, ran, "llava", STORY)


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
