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

# exp() terms, 1 at most, are summed as integers of 2^-36, so that the sum of up to 2^17 of them
# has one value in any order.
UNIT = float(1 << 36)


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
        return self


class Filtered(NamedTuple):
    """Images that go on, with their caption or none; the cut; and those dropped."""

    eligible: Table
    facts: Table
    drops: Table


@stage(
    version=2,
    reads={
        "aligned": ("image_id", "caption_id", "clip_score"),
        "survivors": ("image_id", "survivor_id"),
        "vectors": (),
        "texts": (),
    },
)
def filter_captions(
    build: Build,
    aligned: Table,
    survivors: Table,
    vectors: Table,
    texts: Table,
    params: ClipScoreParams,
) -> Filtered:
    """Keep survivors whose caption fits. Images without one pass: nothing can be said of them.

    negCLIPLoss (Wang et al. 2024, arXiv 2405.19547): the cosine less tau/2 times log-sum-exps of
    the image against reference captions and of the caption against reference images, so a caption
    that fits everything, or is shared by hundreds of pictures, does not win. Ranks are those of
    `rint(value * 10^6)`; ties at the cut are kept.
    """
    alive = tables.frame(build.store, survivors).filter(pl.col("image_id") == pl.col("survivor_id"))
    rows = tables.frame(build.store, aligned).join(alive, on="image_id", how="semi")
    captioned = rows.filter(pl.col("caption_id").is_not_null()).sort("image_id")
    values = _values(build, captioned, vectors, texts, params)
    cut = _cut(values, params)
    low = captioned.with_columns(pl.Series("value", values)).filter(pl.col("value") < cut)
    eligible = rows.join(low, on="image_id", how="anti").sort("image_id")
    drops = [
        {
            "level": "image",
            "id": image_id,
            "stage": "filter_captions",
            "rule": "low_clip_score",
            "value": value,
            "detail": params.keep,
        }
        for image_id, value in low.select("image_id", "value").iter_rows()
    ]
    facts = [{"name": "cut", "value": cut}] + [
        {"name": "value", "value": int(value)} for value in values
    ]
    return Filtered(
        tables.write_frame(build.store, "eligible", eligible),
        tables.write(build.store, "facts", facts),
        tables.write(build.store, "drops", drops),
    )


def _values(
    build: Build, rows: pl.DataFrame, vectors: Table, texts: Table, params: ClipScoreParams
) -> np.ndarray:
    """What is ranked, int64[n] in units of 10^-6."""
    scores = rows["clip_score"].to_numpy().astype(np.int64)
    if params.keep != "neg_clip_loss" or not len(rows):
        return scores
    image_ids, images = tables.gather(build.store, vectors, rows["image_id"].to_list())
    caption_ids, captions = tables.gather(build.store, texts, rows["caption_id"].to_list())
    image_row = np.searchsorted(np.array(image_ids), rows["image_id"].to_numpy())
    caption_row = np.searchsorted(np.array(caption_ids), rows["caption_id"].to_numpy())
    # Ids are SHA-256: the least ones are a fair draw that a few new images hardly change. Captions
    # are drawn with their images, so that one shared by hundreds is met as often as it occurs.
    drawn = np.argsort(image_row, kind="stable")[: params.references]
    per_image = _log_sums(images, captions[caption_row[drawn]], params.temperature)
    per_caption = _log_sums(captions, images[image_row[drawn]], params.temperature)
    build.work["similarities_computed"] += (len(images) + len(captions)) * len(drawn)
    half = params.temperature / 2
    loss = half * (per_image[image_row] + per_caption[caption_row])
    return np.rint(scores - loss * 1e6).astype(np.int64)


def _log_sums(rows: np.ndarray, references: np.ndarray, temperature: float) -> np.ndarray:
    """log(mean(exp(cos / tau))) of each row over the references, float64[n]."""
    wide_references, lengths = _wide(references)
    sums = np.empty(len(rows))
    for at in range(0, len(rows), 4096):
        wide, own = _wide(rows[at : at + 4096])
        # Sums of products of float16 are exact in float64, see `neighbours.scores`.
        cosines = np.rint(wide @ wide_references.T / np.outer(own, lengths) * 1e6) / 1e6
        # Cosines of image and caption may all be far below 1: only the largest is a safe shift.
        largest = cosines.max(axis=1)
        terms = np.rint(np.exp((cosines - largest[:, None]) / temperature) * UNIT)
        mean = terms.sum(axis=1) / UNIT / len(references)
        sums[at : at + 4096] = np.log(mean) + largest / temperature
    return sums


def _wide(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in float64 and their lengths, 1 for the zero vector: its cosine is 0."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return wide, np.where(lengths > 0, lengths, 1)


def _cut(values: np.ndarray, params: ClipScoreParams) -> int:
    """Least value that is kept."""
    if params.keep == "absolute":
        assert params.threshold is not None
        return math.ceil(round(params.threshold * 1e6, 3))
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
