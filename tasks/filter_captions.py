"""Filter captions: drop images whose caption does not fit them."""

import math
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import tables
from infra.build import Build
from infra.errors import ConfigError
from infra.ledger import stage
from infra.tables import Table

# These decide values, which decide what is kept; by themselves they do not.
SCORING = {"model", "temperature", "references"}


class ClipScoreParams(BaseModel):
    """How well a caption must fit. The default ranks, so it suits any model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("clip", description="Name of the model whose towers are compared.")
    keep: Literal["neg_clip_loss", "top_fraction", "absolute", "all"] = Field(
        "neg_clip_loss",
        description="neg_clip_loss: best `fraction` by negCLIPLoss; top_fraction: best `fraction` "
        "by CLIPScore; absolute: CLIPScore of at least `threshold`; all: no filter.",
    )
    fraction: float = Field(0.9, gt=0, le=1, description="Share of captioned images kept.")
    cut: float | None = Field(
        None,
        ge=-3,
        le=3,
        description="Pins the least value that `neg_clip_loss` or `top_fraction` keeps, in place "
        "of `fraction`, so that it doesn't drift with the corpus; the report shows its value.",
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Least cosine for `absolute`. Values of one model don't carry over to another.",
    )
    temperature: float = Field(0.01, gt=0, le=1, description="tau of negCLIPLoss.")
    references: int = Field(
        2_048,
        ge=1,
        le=32_768,
        description="Images and captions of least id that stand for a batch.",
    )

    @model_validator(mode="after")
    def _threshold_given(self) -> "ClipScoreParams":
        if self.keep == "absolute" and self.threshold is None:
            raise ValueError("keep: absolute needs clip_score.threshold, for example 0.28")
        if self.cut is not None and self.keep in ("absolute", "all"):
            raise ValueError(f"keep: {self.keep} has no clip_score.cut; absolute has a threshold")
        return self


class Filtered(NamedTuple):
    """Images that go on, with their caption or none; the cut and all values; and those dropped."""

    eligible: Table
    facts: Table
    drops: Table


@stage(
    version=3,
    reads={
        "aligned": ("image_id", "caption_id", "clip_score"),
        "survivors": ("image_id", "survivor_id"),
        "values": ("image_id", "value"),
    },
    meaning=lambda params: params.model_dump(mode="json", exclude=SCORING),
)
def filter_captions(
    build: Build, aligned: Table, survivors: Table, values: Table, params: ClipScoreParams
) -> Filtered:
    """Keep survivors whose caption fits. Images without one pass: nothing can be said of them.

    Ties at the cut are kept.
    """
    alive = tables.frame(build.store, survivors).filter(pl.col("image_id") == pl.col("survivor_id"))
    rows = tables.frame(build.store, aligned).join(alive, on="image_id", how="semi")
    ranked = tables.frame(build.store, values).sort("image_id")
    cut = _cut(ranked["value"].to_numpy(), params)
    low = ranked.filter(pl.col("value") < cut)
    eligible = rows.join(low, on="image_id", how="anti").sort("image_id")
    drops = low.select(
        pl.lit("image").alias("level"),
        pl.col("image_id").alias("id"),
        pl.lit("filter_captions").alias("stage"),
        pl.lit("low_clip_score").alias("rule"),
        "value",
        pl.lit(params.keep).alias("detail"),
    )
    facts = pl.concat(
        [
            pl.DataFrame({"name": "cut", "value": cut}, {"name": pl.String, "value": pl.Int64}),
            ranked.select(pl.lit("value").alias("name"), "value"),
        ]
    )
    return Filtered(
        tables.write_frame(build.store, "eligible", eligible),
        tables.write_frame(build.store, "facts", facts),
        tables.write_frame(build.store, "drops", drops),
    )


def _cut(values: np.ndarray, params: ClipScoreParams) -> int:
    """Least value that is kept."""
    if params.keep == "absolute":
        assert params.threshold is not None
        return math.ceil(round(params.threshold * 1e6, 3))
    if params.cut is not None:
        return round(params.cut * 1e6)
    if params.keep == "all" or not len(values):
        return int(values.min()) if len(values) else 0
    # Rounded first: 0.07 of 100 is 7.000000000000001 in floats.
    kept = max(1, math.ceil(round(len(values) * params.fraction, 6)))
    return int(np.sort(values)[len(values) - kept])


def check_model(name: str, texts: dict[str, Table]) -> None:
    """Raises ConfigError where a model has no text tower."""
    if name not in texts:
        raise ConfigError(
            f"clip_score.model is {name!r}, which has no text tower; use one of {sorted(texts)}"
        )
