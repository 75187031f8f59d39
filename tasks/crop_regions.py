"""Crop regions: boxes that are worth asking about become views, alone and with what is around."""

import hashlib
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.pictures import View
from infra.tables import Table

PARTS = 1_000_000

Box = tuple[int, int, int, int]


class CropParams(BaseModel):
    """Which boxes are regions, and how much around them is shown.

    RegionGPT (arXiv 2403.02330) states none of these numbers. That it scores 71.0 with dilated
    masks, 70.4 with boxes and 68.2 with eroded masks (notes on the paper) says: rather more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(
        32,
        ge=1,
        description="Least side of a box in pixels. Not given in the source; our own default,"
        " because a smaller crop shows a captioner next to nothing.",
    )
    min_area: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Least share of the picture's area. Not given in the source; our own default.",
    )
    max_area: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Largest share of the picture's area. Not given in the source; our own default,"
        " because a larger box is the picture.",
    )
    most: int = Field(
        8,
        ge=1,
        description="Regions an image, drawn by hash. Not given in the source; our own default,"
        " near V3Det's mean of 7.",
    )
    pad: float = Field(
        0.1,
        ge=0,
        le=2,
        description="Added at each end of a crop, as a share of that side. Our own default, after"
        " the paper's gain by dilation.",
    )
    context: float = Field(
        0.6,
        ge=0,
        le=5,
        description="The same for the region with what is around it. Not given in the source; our"
        " own default.",
    )
    seed: int = Field(0, description="Of the draw of regions.")


class Cropped(NamedTuple):
    """Samples with `width` and `height` of the image and views `region` and `around`; the rest."""

    samples: Table
    drops: Table


@stage(
    version=1,
    reads={"given": tables.ALL, "images": ("image_id", "width", "height")},
)
def crop_regions(build: Build, given: Table, images: Table, params: CropParams) -> Cropped:
    """Give every sample with a usable `box` (left, top, right, bottom in pixels) its views.

    Boxes are clipped to the picture; what lies outside is a drop. Both views are clipped too.
    """
    sizes = tables.frame(build.store, images).select("image_id", "width", "height")
    rows = tables.frame(build.store, given).join(sizes, on="image_id", how="left")
    drops: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for row in rows.iter_rows(named=True):
        box = clipped(row["box"], row["width"], row["height"])
        if flaw := _flaw(box, row["width"], row["height"], params):
            drops.append({"id": row["sample_id"], "rule": flaw[0], "value": flaw[1]})
        elif box:
            found.append({**row, "box": list(box), **_views(box, row, params)})
    taken = _drawn(found, params)
    kept = {row["sample_id"] for row in taken}
    drops += [
        {"id": row["sample_id"], "rule": "too_many_regions", "value": params.most}
        for row in found
        if row["sample_id"] not in kept
    ]
    schema: dict[str, Any] = {**rows.schema, "region": pl.String, "around": pl.String}
    return Cropped(
        samples.write(build.store, pl.DataFrame(taken, schema, orient="row")),
        samples.write_drops(build.store, samples.drops(drops, "crop_regions")),
    )


def clipped(box: Any, width: int, height: int) -> Box | None:
    """A box within its picture, or None where nothing of it is."""
    left, top, right, bottom = box
    inside = (max(0, left), max(0, top), min(width, right), min(height, bottom))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def padded(box: Box, share: float, width: int, height: int) -> Box:
    """A box with a share of its own sides added at each end, clipped to the picture."""
    across, down = (round(share * (box[at + 2] - box[at])) for at in (0, 1))
    wide = (box[0] - across, box[1] - down, box[2] + across, box[3] + down)
    return clipped(wide, width, height) or box


def _flaw(
    box: Box | None, width: int, height: int, params: CropParams
) -> tuple[str, int | None] | None:
    """The rule by which a box is no region, and the value that decided."""
    if box is None:
        return "outside_picture", None
    sides = (box[2] - box[0], box[3] - box[1])
    if min(sides) < params.min_side:
        return "small_region", min(sides)
    area, whole = sides[0] * sides[1], width * height
    # Compared as integers, so that a box at the bound is judged alike everywhere.
    if area * PARTS < round(params.min_area * PARTS) * whole:
        return "small_share", area * PARTS // whole
    if area * PARTS > round(params.max_area * PARTS) * whole:
        return "large_share", area * PARTS // whole
    return None


def _views(box: Box, row: dict[str, Any], params: CropParams) -> dict[str, str]:
    size = (row["width"], row["height"])
    return {
        name: View(row["image_id"], padded(box, share, *size)).name
        for name, share in (("region", params.pad), ("around", params.context))
    }


def _drawn(found: list[dict[str, Any]], params: CropParams) -> list[dict[str, Any]]:
    """At most so many regions of each image, those of least hash: it depends on nothing else."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        by_image.setdefault(row["image_id"], []).append(row)
    return [
        row
        for rows in by_image.values()
        for row in sorted(rows, key=lambda row: _draw(row["sample_id"], params.seed))[: params.most]
    ]


def _draw(name: str, seed: int) -> str:
    return hashlib.sha256(f"region {seed} {name}".encode()).hexdigest()
