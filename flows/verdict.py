"""Does a new answer keep to the one on record? By rule; where no rule decides, by a judge.

The fidelity check of Bee's HoneyPipe (arXiv 2510.13795). Its prompt is not published.
"""

from collections.abc import Mapping
from typing import Any

from infra.build import Build
from infra.tables import Table
from tasks.ask_model import Answer, Asking, ModelParams, Question, ask_model
from tasks.compare_answers import AnswerComparison, compare_answers
from tasks.describe import Described
from tasks.join_samples import join_samples
from tasks.route_samples import Route, route_samples


class Fidelity(Answer):
    agrees: bool
    comparison: str


FIDELITY = Question(
    "honeypipe/fidelity", Fidelity, {}, ("instruction_used", "response", "conclusion"),
    ("answer_type",),
)  # fmt: skip


def verdict(
    run: Build, given: Table, seen: Described, name: str, judge: ModelParams,
    params: AnswerComparison, step: Any,
) -> tuple[Table, Mapping[str, Any]]:  # fmt: skip
    """Samples with `agrees`, their path ending in `<name>, rule` or `<name>, judge`, and the stages
    that ran. `conclusion` is held against `response`.
    """
    ruled = step(compare_answers)(run, given, params)
    unclear = step(route_samples)(run, ruled.samples, Route("agrees", (None,)))
    said = step(ask_model)(run, unclear.samples, seen.objects, Asking(FIDELITY, judge))
    ways = {f"{name}, rule": unclear.others, f"{name}, judge": said.samples}
    ran = {f"{name}, to the judge": unclear, f"{name}, judged": said}
    return step(join_samples)(run, ways).samples, ran
