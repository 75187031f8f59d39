"""Reasons for answers on record: short ones, and long ones where the short lead elsewhere.

The second half of Bee's HoneyPipe (arXiv 2510.13795). Its prompts are not published.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flows.verdict import verdict
from infra.build import Build
from infra.tables import Table
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.branch_samples import Branch, branch_samples
from tasks.compare_answers import AnswerComparison
from tasks.compose_texts import Composition, compose_texts
from tasks.describe import Described
from tasks.filter_samples import Rule, Rules, filter_samples
from tasks.join_samples import join_samples
from tasks.route_samples import Route, route_samples


def without_marks(text: str) -> str:
    """A text without the marks around thoughts, which are for the record to set."""
    while (less := re.sub("</?think>", "", text)) != text:
        text = less
    return text.strip()


Words = Annotated[str, AfterValidator(without_marks)]


class Short(Answer):
    reasoning: Words
    conclusion: Words


class Long(Answer):
    think: Words
    conclusion: Words


PICTURE, ASKED = {"image_id": "Picture"}, "instruction_used"
SHORT = Question("honeypipe/short", Short, PICTURE, (ASKED,), on_flaw="null")
LONG = Question("honeypipe/long", Long, PICTURE, (ASKED,))
FAITHFUL = Rules((Rule("unfaithful", "agrees", "is", True),))
KEPT = {"instruction_original": "{instruction}", "response_original": "{response}"}
NEW = {**KEPT, "instruction": "{instruction_used}"}
UNTOUCHED = Composition({**KEPT, "cot_level": "none"})
WITH_SHORT = Composition(
    {**NEW, "response": "{reasoning}\n\n{conclusion}", "cot_level": "short"}, (ASKED,)
)
WITH_LONG = Composition(
    {**NEW, "response": "<think>\n{think}\n</think>\n\n{conclusion}", "cot_level": "long"},
    (ASKED, "reasoning"),
)


class Thinker(ModelParams):
    """The model of the long loop."""

    max_tokens: int = Field(
        4_096, ge=1, description="Tokens of thoughts and answer. Not given in the source; our own"
        " default. A model in process needs as many `local.max_new_tokens`.",
    )  # fmt: skip


class ReasonParams(BaseModel):
    """Which samples take which way to their reasons."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    comparison: AnswerComparison = AnswerComparison()
    long_sources: tuple[str, ...] = Field(
        (),
        description="Sources that go to the long loop at once: in the paper sets that others"
        " validated, such as Vision-R1.",
    )
    both_sources: tuple[str, ...] = Field(
        (),
        description="Sources that get long reasons beside their short ones, as two records:"
        " VisualWebInstruct in the paper.",
    )


class Models(NamedTuple):
    """Who writes short reasons, who long ones, and who compares answers."""

    short: ModelParams
    long: ModelParams
    judge: ModelParams


class Reasoned(NamedTuple):
    """Samples that have reasons, a table a level, and the stages that ran."""

    short: Table
    long: Table
    ran: Mapping[str, Any]


def reasons(
    run: Build, given: Table, seen: Described, models: Models, params: ReasonParams, step: Any
) -> Reasoned:
    """Short reasons where they keep to the answer on record, else long ones, else none."""

    def judged(given: Table, question: Question, model: ModelParams) -> tuple[Table, Any]:
        """Ask anew, and hold what is concluded against the answer on record."""
        name, asking = question.name, Asking(question, model)
        told = step(ask_model)(run, given, seen.objects, asking)
        found, ran = verdict(run, told.samples, seen, name, models.judge, params.comparison, step)
        return found, {f"{name}, answered": told, **ran}

    hard = step(route_samples)(run, given, Route("source", params.long_sources))
    short, asked_short = judged(hard.others, SHORT, models.short)
    faithful = step(route_samples)(run, short, Route("agrees", (True,)))
    both = Route("source", params.both_sources)
    twice = step(route_samples)(run, faithful.samples, both)
    twins = step(branch_samples)(run, twice.samples, Branch("long"))
    ways = {"_hard": hard.samples, "_failed": faithful.others, "_twins": twins.samples}
    long, asked_long = judged(step(join_samples)(run, ways).samples, LONG, models.long)
    kept = step(filter_samples)(run, long, FAITHFUL)
    ran = {
        "straight to the long loop": hard, **asked_short, "short, kept": faithful,
        "long as well": twice, **asked_long, "long, kept": kept,
    }  # fmt: skip
    return Reasoned(
        step(compose_texts)(run, faithful.samples, WITH_SHORT).samples,
        step(compose_texts)(run, kept.samples, WITH_LONG).samples,
        ran,
    )
