"""Choose questions: which samples a model is asked about, and in which words, by their source."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.attention_heads import Mode
from infra.build import Build
from infra.errors import ConfigError
from infra.ledger import stage
from infra.prompting import Prompts
from infra.tables import Table

PROMPTS = Prompts(Path(__file__).parent / "prompts")
# LLaVA's and SD-RPN's records end so; the question about regions stands in its place.
SHORT = "Answer the question using a single word or phrase."


class QuestionParams(BaseModel):
    """Which questions are about scenes and which about text in pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modes: dict[str, Mode] = Field(
        {"gqa": "natural", "ocr_vqa": "textual"},
        description="Mode by a part of the picture's key or of the records file's name; the first"
        " that occurs decides. As the code: llava_v1_5_mix665k has both parts in its paths.",
    )
    otherwise: Mode | Literal["leave_out"] = Field(
        "leave_out",
        description="Mode of all others. As the code: they are left out, as the fate other_source.",
    )
    natural: Literal["regions", "question"] = Field(
        "regions",
        description="What is asked in natural mode: `regions` puts SD-RPN's question for boxes in"
        " place of the one for a short answer, as the code for Qwen; `question` asks the original"
        " one, as the code for LLaVA.",
    )


class Chosen(NamedTuple):
    """Samples with `mode`, `question` and `prompt`, and those of other sources."""

    samples: Table
    drops: Table


def meaning(params: QuestionParams) -> Any:
    # The order of modes decides, and digests of mappings have none.
    names = ["roi_labels/natural", "roi_labels/textual"]
    return [list(params.modes.items()), params.otherwise, params.natural, PROMPTS.digest(names)]


@stage(
    version=1,
    reads={"given": tables.ALL, "images": ("image_id", "key", "member")},
    meaning=meaning,
)
def choose_questions(build: Build, given: Table, images: Table, params: QuestionParams) -> Chosen:
    """The first question of each record (`instruction`), and what a model is asked instead.

    Raises ConfigError where records have no questions.
    """
    rows = tables.frame(build.store, given)
    if "instruction" not in rows.columns:
        raise ConfigError(
            "records: there are no questions; use the format conversations, or name the column of"
            " questions: columns: {image: ..., instruction: ...}"
        )
    places = tables.frame(build.store, images).select("image_id", "key", "member")
    about = rows.join(places, on="image_id", how="left")
    modes = [_mode(row, params) for row in about.iter_rows(named=True)]
    chosen = rows.with_columns(pl.Series("mode", modes, pl.String))
    asked = chosen.filter(pl.col("mode").is_not_null())
    pairs = asked.select("instruction", "mode").iter_rows()
    prompts = [_prompt(question, mode, params) for question, mode in pairs]
    asked = asked.with_columns(
        pl.col("instruction").alias("question"), pl.Series("prompt", prompts, pl.String)
    )
    left = chosen.filter(pl.col("mode").is_null())
    gone = [
        {"id": name, "rule": "other_source", "detail": source}
        for name, source in left.select("sample_id", "source").iter_rows()
    ]
    return Chosen(
        samples.write(build.store, asked),
        samples.write_drops(build.store, samples.drops(gone, "choose_questions")),
    )


def _mode(row: dict[str, Any], params: QuestionParams) -> str | None:
    places = (row["key"] or "", row["member"] or "", row["source"] or "")
    for part, mode in params.modes.items():
        if any(part in place for place in places):
            return mode
    return None if params.otherwise == "leave_out" else params.otherwise


def _prompt(question: str, mode: Mode, params: QuestionParams) -> str:
    """What the model is asked: untrusted words, as they are, for they are all that is asked."""
    if mode == "natural" and params.natural == "regions":
        rest = question.replace(SHORT, "").strip()
        return PROMPTS.render("roi_labels/natural", question=rest)
    return PROMPTS.render("roi_labels/textual", question=question)
