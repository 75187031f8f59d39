"""Select resolutions: the first level of a ladder at which the answer leaves that of the original.

Source: LFPC's offline resolution selection (arXiv 2603.27494); that a right answer below a wrong
one ends a sample is Q-Zoom's rule (github.com/YuHengsss/Q-Zoom).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.pictures import View, fitted
from infra.short_answers import matches
from infra.tables import Table

Reason = Literal["selected", "original_wrong", "never_diverges", "non_monotone"]
COLUMNS: dict[str, Any] = {
    "reason": pl.String,
    "level_tokens": pl.List(pl.Int64),
    "level_answers": pl.List(pl.String),
    "global_view": pl.String,
    "global_tokens": pl.Int64,
    "global_width": pl.Int64,
    "global_height": pl.Int64,
    "global_answer": pl.String,
    "difficulty": pl.Int64,
}


class Selection(BaseModel):
    """Which samples are for training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hard_pool: Literal["drop", "flag"] = Field(
        "drop",
        description="What the model gets wrong at full resolution: `drop`, with the fate"
        " `hard_pool`, or `flag`, a record of reason `original_wrong` without a small picture. The"
        " source does not say what becomes of them; our own default.",
    )
    non_monotone: Literal["drop", "keep"] = Field(
        "drop",
        description="What is right again below the first divergence: dropped, as in Q-Zoom; LFPC's"
        " notes don't speak of it.",
    )
    containment: bool = Field(
        True,
        description="One answer may contain the other's words, as in Q-Zoom; `false` wants equal"
        " ones. LFPC's matcher is not given in the source.",
    )


class Choice(NamedTuple):
    """Why a sample is taken or not, and the level from the highest down, where there is one."""

    reason: Reason
    level: int | None = None


class Selected(NamedTuple):
    """Samples with COLUMNS: the answers from the original (0 tokens) down, the small picture with
    its exact size, and `difficulty`, the number of levels below the original that lose the answer.
    """

    samples: Table
    drops: Table


def choose(original_right: bool, agrees: Sequence[bool]) -> Choice:
    """The level of a sample, from whether each answer is that of the original, highest first."""
    if not original_right:
        return Choice("original_wrong")
    if all(agrees):
        return Choice("never_diverges")
    first = list(agrees).index(False)
    return Choice("non_monotone" if any(agrees[first:]) else "selected", first)


@stage(
    version=3,
    reads={
        "given": tables.ALL,
        "answers": ("sample", "tokens", "view", "said"),
        "unanswered": ("id", "rule", "detail"),
    },
)
def select_resolution(
    build: Build, given: Table, answers: Table, unanswered: Table, params: Selection
) -> Selected:
    """Fold the answers at all levels into their sample. `given` has image_id, width, height, what
    was `said` of the original, and whether that is `right`. `answers` are those below the original,
    of samples that are right there. A sample of which a level has no usable answer (cut, refused,
    or awaited) is a drop that says why: a model that stumbles over the form has not diverged.
    """
    lacking = {
        row["id"].rpartition("@")[0]: row["rule"]
        for row in tables.frame(build.store, unanswered, ["id", "rule"]).iter_rows(named=True)
    }
    asked = tables.frame(build.store, answers, ["sample", "tokens", "view", "said"])
    by_sample = asked.sort("tokens", descending=True).partition_by("sample", as_dict=True)
    kept: list[dict[str, Any]] = []
    drops: list[dict[str, Any]] = []
    for row in tables.frame(build.store, given).iter_rows(named=True):
        name = row["sample_id"]
        if name in lacking:
            drops.append({"id": name, "rule": lacking[name], "detail": "ladder"})
            continue
        found = _selected(row, by_sample.get((name,), asked.clear()).to_dicts(), params)
        lost = _fate(found["reason"], params)
        if lost:
            shown = (found["level_answers"][0] or "")[:200]
            drops.append(
                {"id": name, "rule": lost, "value": found["global_tokens"], "detail": shown}
            )
        else:
            kept.append({"sample_id": name, **found})
    columns = pl.DataFrame(kept, {"sample_id": pl.String, **COLUMNS}, orient="row")
    rows = tables.frame(build.store, given).drop("said", "right")
    return Selected(
        samples.write(build.store, rows.join(columns, on="sample_id", how="inner")),
        samples.write_drops(build.store, samples.drops(drops, "select_resolution")),
    )


def _selected(
    row: dict[str, Any], ladder: Sequence[dict[str, Any]], params: Selection
) -> dict[str, Any]:
    """The values of COLUMNS for a sample, from the levels below the original, the highest first."""
    agrees = [matches(level["said"], row["said"], params.containment) for level in ladder]
    reason, at = choose(row["right"], agrees)
    taken = ladder[at] if at is not None else {"view": None, "tokens": None, "said": None}
    pixels = View.of(taken["view"]).pixels if taken["view"] else None
    size = fitted(row["width"], row["height"], pixels) if pixels else (None, None)
    return dict(
        zip(
            COLUMNS,
            (
                reason, [0, *(level["tokens"] for level in ladder)],
                [row["said"], *(level["said"] for level in ladder)],
                taken["view"], taken["tokens"], *size, taken["said"],
                agrees.count(False) if at is not None else None,
            ),
            strict=True,
        )
    )  # fmt: skip


def _fate(reason: Reason, params: Selection) -> str | None:
    """The rule by which a sample is dropped, or None."""
    if reason == "original_wrong":
        return "hard_pool" if params.hard_pool == "drop" else None
    if reason == "non_monotone":
        return "non_monotone" if params.non_monotone == "drop" else None
    return "never_diverges" if reason == "never_diverges" else None
