"""Label regions of interest: which cells of a map of attention are foreground, background, neither.

SD-RPN, arXiv 2509.16944, and its released code.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import attention_maps, samples, tables
from infra.attention_maps import (
    Cells,
    Square,
    Thresholds,
    find_boxes,
    label_cells,
    padding_cells,
    restored,
    to_pixels,
    without_sinks,
)
from infra.build import Build
from infra.ledger import stage
from infra.tables import Shard, Table

MILLION = 1_000_000
ROWS = 1_024  # labelled samples that are written as one shard: some 8 MB in memory


class LabelParams(BaseModel):
    """Where a cell is foreground or background, and which maps say nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    foreground: float = Field(
        0.2, gt=0, lt=1, description="Foreground: above this share of the map's maximum (the code)."
    )
    background: float = Field(
        0.1, ge=0, lt=1, description="Background: outside the box and below this share (the code)."
    )
    largest: float = Field(
        0.5,
        gt=0,
        description="Share of the grid from which the box is too_large (the code).",
    )
    weakest: float = Field(
        5e-3,
        ge=0,
        lt=1,
        description="Maps with a lower maximum are too_weak (the code for Qwen; that for LLaVA has"
        " no such rule: 0).",
    )
    margin: int = Field(
        1,
        ge=0,
        le=8,
        description="Cells by which the box is wider than the foreground on each side (the code"
        " for Qwen finds it after a 3 x 3 blur: 1; that for LLaVA does not: 0).",
    )
    padding: bool = Field(
        True,
        description="Cells that hold padding alone are background (the code for Qwen; that for"
        " LLaVA treats them as all others: false).",
    )
    boxes: float = Field(
        -0.2,
        gt=-1,
        lt=1,
        description="Boxes are drawn around what is above this after a blur; negative: a share of"
        " the maximum. The code has 0.05 to 0.15 for maps that a trained network predicts; for raw"
        " attention it is not given in the source; our own default, the foreground's share.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> "LabelParams":
        if self.background > self.foreground:
            raise ValueError("background is above foreground; a cell can't be both")
        return self

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.foreground, self.background, self.largest, self.weakest)


class Labelled(NamedTuple):
    """Samples with labels, boxes and maps, and those whose map says nothing."""

    samples: Table
    drops: Table


COLUMNS: dict[str, Any] = {
    "map_id": pl.String,
    "status": pl.String,
    "value": pl.Int64,
    "grid_height": pl.Int64,
    "grid_width": pl.Int64,
    "steps": pl.Int64,
    "heads": pl.String,
    "grounding": pl.List(pl.Int32),
    "sink": pl.List(pl.Int32),
    "sink_rule": pl.String,
    "sink_threshold": pl.Int64,
    "cleaned": pl.List(pl.Int32),
    "labels": pl.List(pl.Int8),
    "foreground": pl.Int64,
    "background": pl.Int64,
    "ignored": pl.Int64,
    "box": pl.List(pl.Int64),
    "boxes": pl.List(pl.Int64),
}


@stage(
    version=2,
    reads={
        "given": tables.ALL,
        "maps": tables.ALL,
        "images": ("image_id", "width", "height"),
    },
)
def label_regions_of_interest(
    build: Build, given: Table, maps: Table, images: Table, params: LabelParams
) -> Labelled:
    """Pseudo-labels of cells (1, 0, -1), their box and boxes of regions in the picture's pixels.

    A map is labelled without its sinks. Maps are read shard by shard and samples written in shards
    of ROWS, so that as many labels are in memory, however many there are. `box` is the one around
    the foreground, `boxes` those of connected regions one after the other, the strongest first;
    both are left, top, right, bottom, whole pixels, cut to the picture. A sample is dropped as
    too_weak (value: the maximum), too_large (value: the share of the grid; both in millionths), or
    in_padding.
    """
    sizes = tables.frame(build.store, images).select("image_id", "width", "height")
    squares = {name: Square(width, height) for name, width, height in sizes.iter_rows()}
    rows = tables.frame(build.store, given)
    said = f"{params.foreground:g} {params.background:g} {params.largest:g} {params.weakest:g}"
    gone: list[dict[str, Any]] = []
    shards: list[Shard] = []
    for judged in _in_parts(_judged(build, rows, maps, squares, params)):
        lost = judged.filter(pl.col("status") != "ok").select("sample_id", "status", "value")
        gone += [{"id": name, "rule": rule, "value": value} for name, rule, value in lost.rows()]
        kept = judged.filter(pl.col("status") == "ok").drop("value")
        part = samples.write(build.store, kept.with_columns(pl.lit(said).alias("thresholds")))
        shards += part.shards if part.rows or not shards else ()
    return Labelled(
        Table("samples", tuple(shards)),
        samples.write_drops(build.store, samples.drops(gone, "label_regions_of_interest")),
    )


def _judged(
    build: Build,
    rows: pl.DataFrame,
    maps: Table,
    squares: Mapping[str, Square],
    params: LabelParams,
) -> Iterator[pl.DataFrame]:
    """Samples beside what their maps say, one shard of maps after the other."""
    wanted = set(rows["map_id"])
    yield rows.clear().join(pl.DataFrame([], COLUMNS), on="map_id", how="inner").drop("map_id")
    for part in tables.shards(build.store, maps):
        used = part.filter(pa.array([name in wanted for name in part["map_id"].to_pylist()]))
        labelled = [_labelled(row, squares[row["image_id"]], params) for row in used.to_pylist()]
        found = pl.DataFrame(labelled, COLUMNS, orient="row")
        yield rows.join(found, on="map_id", how="inner").drop("map_id")


def _in_parts(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Frames joined until they have ROWS rows; the last one has fewer, perhaps none."""
    held = [next(frames)]
    for frame in frames:
        held.append(frame)
        if sum(part.height for part in held) >= ROWS:
            yield pl.concat(held)
            held = [frame.clear()]
    yield pl.concat(held)


def _labelled(row: dict[str, Any], square: Square, params: LabelParams) -> dict[str, Any]:
    grid = row["height"], row["width"]
    cleaned = looked = restored(row["grounding"], grid)
    if row["sink"]:
        sink = np.reshape(row["sink"], grid)
        cleaned = without_sinks(looked, sink, row["sink_threshold"], row["sink_rule"])
    padding = padding_cells(grid, square) if params.padding else None
    labels = label_cells(cleaned, params.thresholds, padding, params.margin)
    counts = {name: int((labels.cells == value).sum()) for name, value in _LABELS.items()}
    box = _pixels(labels.box, grid, square) if labels.box else []
    status = labels.status if labels.status != "ok" or (counts["foreground"] and box) else _LOST
    boxes = [_pixels(cells, grid, square) for cells in find_boxes(cleaned, params.boxes)]
    return {
        "map_id": row["map_id"],
        "status": status,
        "value": _value(status, cleaned, labels.box),
        "grid_height": grid[0],
        "grid_width": grid[1],
        "steps": row["steps"],
        "heads": row["heads"],
        "grounding": row["grounding"],
        "sink": row["sink"],
        "sink_rule": row["sink_rule"],
        "sink_threshold": row["sink_threshold"],
        "cleaned": attention_maps.stored(cleaned),
        "labels": labels.cells.ravel().tolist(),
        **counts,
        "box": box,
        "boxes": [side for one in boxes for side in one],
    }


_LABELS = {"foreground": 1, "background": 0, "ignored": -1}
_LOST = "in_padding"


def _value(status: str, cleaned: np.ndarray, box: Cells | None) -> int | None:
    if status == "too_weak":
        return round(float(cleaned.max(initial=0.0)) * MILLION)
    if status == "too_large" and box:
        return round(box.area / cleaned.size * MILLION)
    return None


def _pixels(box: Cells, grid: tuple[int, int], square: Square) -> list[int]:
    """Whole pixels that a box of cells touches in the picture; none where it is all padding."""
    sides = to_pixels(box, grid, square)
    if sides is None:
        return []
    left, top, right, bottom = sides
    return [
        int(np.floor(left + 1e-9)), int(np.floor(top + 1e-9)),
        int(np.ceil(right - 1e-9)), int(np.ceil(bottom - 1e-9)),
    ]  # fmt: skip
