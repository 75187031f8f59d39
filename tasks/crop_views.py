"""Crop views: every sample with boxes twice, with the crop of its smallest box and with noise."""

from typing import NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.pictures import View
from infra.tables import Table

KINDS = ("crop", "noise")


class Crops(BaseModel):
    """How large a crop is shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(
        1024,
        ge=1,
        description="Tokens of a crop, which is cut from the original. Not given in the source; our"
        " own default, the smaller of the paper's two budgets at evaluation.",
    )
    patch: int = Field(28, ge=1, description="Side of a token's square in pixels, as Qwen2.5-VL.")


class Cropped(NamedTuple):
    """Rows (sample, kind, part_view, and the columns of the sample), ids `<sample_id>@<kind>`."""

    views: Table


@stage(version=1, reads={"given": tables.ALL})
def crop_views(build: Build, given: Table, params: Crops) -> Cropped:
    """Views of what has `boxes` and a `global_view`; noise has the size that the crop would have.

    Source: LFPC's test by replacement (arXiv 2603.27494).
    """
    rows = tables.frame(build.store, given)
    rows = rows.filter((pl.col("boxes").list.len() > 0) & pl.col("global_view").is_not_null())
    pixels = params.tokens * params.patch**2
    found = []
    for kind in KINDS:
        names = [
            View(image, tuple(flat[:4]), pixels, kind == "noise").name
            for image, flat in rows.select("image_id", "boxes").iter_rows()
        ]
        found.append(
            rows.with_columns(
                pl.col("sample_id").alias("sample"),
                pl.lit(kind).alias("kind"),
                pl.Series("part_view", names, pl.String),
                pl.format("{}@{}", "sample_id", pl.lit(kind)).alias("sample_id"),
            )
        )
    return Cropped(samples.write(build.store, pl.concat(found), "crop_views"))
