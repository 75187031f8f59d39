"""Ladder views: every sample once for each resolution at which a model is to be asked about it.

Source: LFPC's offline resolution selection (arXiv 2603.27494), which does not state its ladder; the
levels are those named in Q-Zoom (github.com/YuHengsss/Q-Zoom).
"""

from typing import NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.pictures import View
from infra.tables import Table


class Ladder(BaseModel):
    """The resolutions, as budgets of visual tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budgets: list[int] = Field(
        [1024, 768, 576, 384, 256, 128, 64],
        min_length=1,
        description="Tokens of the levels below the original, falling. Not given in the source; our"
        " own default: Q-Zoom's range of 64 to 1024, whose code names 576, 768 and 1024.",
    )
    patch: int = Field(
        28, ge=1, description="Side of a token's square in pixels: 28, as Qwen2.5-VL has it."
    )
    min_tokens: int = Field(
        1024,
        ge=1,
        description="Smaller originals are dropped as `small_original`. Not given in the source;"
        " our own default, the first level.",
    )

    @field_validator("budgets")
    @classmethod
    def _falls(cls, budgets: list[int]) -> list[int]:
        if budgets != sorted({*budgets}, reverse=True) or budgets[-1] < 1:
            raise ValueError("budgets must fall from level to level, and be positive")
        return budgets


class Views(NamedTuple):
    """Rows (sample, tokens, view, and the columns of the sample), ids `<sample_id>@<tokens>`."""

    views: Table


@stage(version=2, reads={"given": tables.ALL})
def ladder_views(build: Build, given: Table, params: Ladder) -> Views:
    """The levels below the original of each sample; `given` has its `width` and `height`.

    A level that is not smaller than the original would be the original again: it is left out.
    """
    levels = _levels(tables.frame(build.store, given), params)
    return Views(samples.write(build.store, pl.concat(levels), "ladder_views"))


def _levels(rows: pl.DataFrame, params: Ladder) -> list[pl.DataFrame]:
    found = []
    for tokens in params.budgets:
        pixels = tokens * params.patch**2
        level = rows.filter(pl.col("width") * pl.col("height") > pixels)
        names = [View(image, pixels=pixels).name for image in level["image_id"]]
        found.append(
            level.drop("width", "height").with_columns(
                pl.col("sample_id").alias("sample"),
                pl.lit(tokens, pl.Int64).alias("tokens"),
                pl.Series("view", names, pl.String),
                pl.format("{}@{}", "sample_id", pl.lit(tokens)).alias("sample_id"),
            )
        )
    return found
