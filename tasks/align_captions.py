"""Align captions: score every caption of an image against it, and keep the one that fits best."""

from typing import NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import neighbours, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

CHUNK = 100_000


class AlignParams(BaseModel):
    """Which model scores captions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("clip", description="Name of a model with a text tower.")


class Aligned(NamedTuple):
    """One row an image: its caption (or null) and their CLIPScore as a cosine * 10^6."""

    aligned: Table


@stage(
    version=1,
    reads={
        "images": ("image_id",),
        "image_captions": ("image_id", "caption_id"),
        "vectors": (),
        "texts": (),
    },
)
def align_captions(
    build: Build,
    images: Table,
    image_captions: Table,
    vectors: Table,
    texts: Table,
    params: AlignParams,
) -> Aligned:
    """Of several captions an image uses that of the highest score, and among equals the least id.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor 2.5 and its floor at 0.
    Raises PairmillError where an image or a caption has no vector.
    """
    pairs = tables.frame(build.store, image_captions)
    image_ids, image_vectors = tables.gather(build.store, vectors, pairs["image_id"].to_list())
    caption_ids, caption_vectors = tables.gather(build.store, texts, pairs["caption_id"].to_list())
    scores = np.zeros(pairs.height, np.int32)
    for at in range(0, pairs.height, CHUNK):
        part = pairs[at : at + CHUNK]
        left = np.searchsorted(np.array(image_ids), part["image_id"].to_numpy())
        right = np.searchsorted(np.array(caption_ids), part["caption_id"].to_numpy())
        scores[at : at + CHUNK] = neighbours.scores(image_vectors[left], caption_vectors[right])
        build.progress("align_captions", at + part.height, pairs.height)
    build.work["similarities_computed"] += pairs.height
    best = (
        pairs.with_columns(pl.Series("clip_score", scores))
        .sort("image_id", "clip_score", "caption_id", descending=[False, True, False])
        .unique("image_id", keep="first", maintain_order=True)
    )
    every = tables.frame(build.store, images, ["image_id"])
    aligned = every.join(best, on="image_id", how="left").sort("image_id")
    return Aligned(tables.write_frame(build.store, "aligned", aligned))
