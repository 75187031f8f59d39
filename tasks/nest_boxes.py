"""Nest boxes: from the smallest region that a question needs to its context, source named.

Source: LFPC's nested boxes (arXiv 2603.27494), drawn by people; where only one box is known, the
context is that box enlarged, which is ours.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

Box = tuple[int, int, int, int]
COLUMNS: dict[str, Any] = {
    "boxes": pl.List(pl.Int64),
    "boxes_given": pl.Int64,
    "box_source": pl.String,
}


class Nesting(BaseModel):
    """Where boxes come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    annotated: str = Field("boxes", description="The column of boxes that the records came with.")
    annotated_source: str = Field(
        "annotation",
        description="What those are called in `box_source`; `human` only where people drew them.",
    )
    derived: str = Field(
        "roi_boxes",
        description="The column of boxes that a model made, such as those of roi_labels; taken"
        " where none are annotated, the smallest alone.",
    )
    derived_source: str = Field(
        "roi_labels", description="What those are called in `box_source`: never human."
    )
    enlarge: float = Field(
        1.75,
        gt=1,
        le=4,
        description="Sides of B2 over those of B1 where only B1 is known. Not given in the source;"
        " our own default, the middle of 1.5 to 2.",
    )
    required: bool = Field(
        False,
        description="Drop samples without boxes, as the paper's second stage of training needs it."
        " Its first stage needs none.",
    )

    @field_validator("derived_source")
    @classmethod
    def _is_no_human(cls, name: str) -> str:
        if "human" in name.casefold() or "annot" in name.casefold():
            raise ValueError("boxes that a model made are neither human nor annotated")
        return name


class Nested(NamedTuple):
    """Samples with COLUMNS: boxes in pixels of the original, B1 first, four numbers each, perhaps
    none; how many of them were given; and samples whose boxes can't be used.
    """

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL})
def nest_boxes(build: Build, given: Table, params: Nesting) -> Nested:
    """Order, clip and complete the boxes of each sample; `given` has `width` and `height`."""
    rows = tables.frame(build.store, given)
    found: list[dict[str, Any]] = []
    drops: list[dict[str, Any]] = []
    for row in rows.iter_rows(named=True):
        boxes, source = _boxes(row, params)
        given_count, rule = len(boxes), None
        if boxes:
            boxes, rule = nested(boxes, (row["width"], row["height"]), params.enlarge)
        elif params.required:
            rule = "no_boxes"
        if rule:
            drops.append({"id": row["sample_id"], "rule": rule, "value": given_count})
        flat = [side for box in boxes for side in box]
        values = zip(COLUMNS, (flat, given_count, source), strict=True)
        found.append({"sample_id": row["sample_id"], **dict(values)})
    columns = pl.DataFrame(found, {"sample_id": pl.String, **COLUMNS}, orient="row")
    gone = [drop["id"] for drop in drops]
    kept = rows.drop(list(COLUMNS), strict=False).join(columns, on="sample_id")
    return Nested(
        samples.write(build.store, kept.filter(~pl.col("sample_id").is_in(gone))),
        samples.write_drops(build.store, samples.drops(drops, "nest_boxes")),
    )


def nested(
    boxes: Sequence[Box], size: tuple[int, int], enlarge: float
) -> tuple[list[Box], str | None]:
    """Boxes from the smallest outwards, each inside the next; or the rule by which they fail.

    One box gets its enlargement as context, unless it is the whole picture already.
    """
    inside = [clipped(box, size) for box in boxes]
    if any(_area(box) <= 0 for box in inside):
        return [], "box_outside"
    ordered = sorted({*inside}, key=lambda box: (_area(box), box))
    if any(not contains(large, small) for small, large in pairwise(ordered)):
        return [], "boxes_not_nested"
    if len(ordered) == 1:
        context = enlarged(ordered[0], size, enlarge)
        ordered += [context] if context != ordered[0] else []
    return ordered, None


def enlarged(box: Box, size: tuple[int, int], factor: float) -> Box:
    """A box with its sides so many times as long, about its centre, within the picture."""
    left, top, right, bottom = box
    wide = round((right - left) * (factor - 1) / 2)
    high = round((bottom - top) * (factor - 1) / 2)
    return clipped((left - wide, top - high, right + wide, bottom + high), size)


def clipped(box: Sequence[int], size: tuple[int, int]) -> Box:
    """The part of a box that lies in the picture."""
    left, top, right, bottom = box
    return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)


def contains(large: Box, small: Box) -> bool:
    """Whether no side of the small box lies outside the large one."""
    starts = large[0] <= small[0] and large[1] <= small[1]
    return starts and small[2] <= large[2] and small[3] <= large[3]


def _boxes(row: Mapping[str, Any], params: Nesting) -> tuple[list[Box], str | None]:
    for column, source, most in (
        (params.annotated, params.annotated_source, None),
        (params.derived, params.derived_source, 1),
    ):
        flat = row.get(column) or []
        boxes: list[Box] = [tuple(flat[at : at + 4]) for at in range(0, len(flat), 4)]
        if boxes:
            return sorted(boxes, key=_area)[:most], source
    return [], None


def _area(box: Box) -> int:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])
