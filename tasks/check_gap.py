"""Check gaps: a crop must bring what the small picture lacks, and noise in its place must not."""

from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.short_answers import matches
from infra.tables import Table

COLUMNS: dict[str, Any] = {
    "right_with_crop": pl.Boolean,
    "right_with_noise": pl.Boolean,
    "gap": pl.Int64,
}


class GapCheck(BaseModel):
    """What becomes of samples without a gap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    without_gap: Literal["drop", "keep"] = Field(
        "drop",
        description="`drop` what is wrong with the crop or right with noise; `keep` stores the gap"
        " only. Not given in the source, which measures the gap over a benchmark; our own default.",
    )
    containment: bool = Field(
        True, description="One answer may contain the other's words. Not given in the source."
    )


class Checked(NamedTuple):
    """Samples with COLUMNS, null where there was nothing to crop, and those without a gap."""

    samples: Table
    drops: Table


@stage(
    version=2,
    reads={
        "given": tables.ALL,
        "answers": ("sample", "kind", "said"),
        "unanswered": ("id", "rule"),
    },
)
def check_gap(
    build: Build, given: Table, answers: Table, unanswered: Table, params: GapCheck
) -> Checked:
    """gap = right_with_crop - right_with_noise, as the sample's `answer` has it. A sample without a
    usable answer to either is a drop that says why.

    Source: LFPC's test by replacement (arXiv 2603.27494).
    """
    asked = tables.frame(build.store, answers, ["sample", "kind", "said"])
    said = {(sample, kind): text for sample, kind, text in asked.iter_rows()}
    lost = tables.frame(build.store, unanswered, ["id", "rule"])
    lacking = {name.rpartition("@")[0]: rule for name, rule in lost.iter_rows()}
    rows = tables.frame(build.store, given)
    found: list[dict[str, Any]] = []
    drops: list[dict[str, Any]] = []
    for name, answer in rows.select("sample_id", "answer").iter_rows():
        right = [
            matches(said[name, kind], answer, params.containment) if (name, kind) in said else None
            for kind in ("crop", "noise")
        ]
        gap = None if None in right else int(bool(right[0])) - int(bool(right[1]))
        rule = lacking.get(name) or _fate(right, params)
        if rule:
            drops.append({"id": name, "rule": rule, "value": gap, "detail": "gap"})
        found.append({"sample_id": name, **dict(zip(COLUMNS, (*right, gap), strict=True))})
    columns = pl.DataFrame(found, {"sample_id": pl.String, **COLUMNS}, orient="row")
    gone = [drop["id"] for drop in drops]
    kept = rows.join(columns, on="sample_id").filter(~pl.col("sample_id").is_in(gone))
    return Checked(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(drops, "check_gap")),
    )


def _fate(right: list[bool | None], params: GapCheck) -> str | None:
    """The rule by which a sample is dropped, or None."""
    if params.without_gap == "keep" or None in right:
        return None
    if not right[0]:
        return "wrong_with_crop"
    return "right_with_noise" if right[1] else None
