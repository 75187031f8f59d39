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
    """One row an image: its caption (or null) and their CLIPScore as a cosine * 10^6; and the
    scores of all candidates, from which the next alignment starts."""

    aligned: Table
    scores: Table


@stage(
    version=2,
    reads={
        "images": ("image_id",),
        "image_captions": ("image_id", "caption_id"),
        "vectors": (),
        "texts": (),
    },
    meaning=lambda params: {},  # vectors and texts are named by what made them
    starts_from=("images", "image_id"),
)
def align_captions(
    build: Build,
    images: Table,
    image_captions: Table,
    vectors: Table,
    texts: Table,
    params: AlignParams,
    before: Aligned | None = None,
) -> Aligned:
    """Of several captions an image uses that of the highest score, and among equals the least id.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor 2.5 and its floor at 0.
    Raises PairmillError where an image or a caption has no vector.
    """
    pairs = tables.frame(build.store, image_captions)
    old = tables.frame(build.store, before.scores if before else Table("aligned"))
    known = pairs.join(old, on=["image_id", "caption_id"])
    new = pairs.join(known, on=["image_id", "caption_id"], how="anti")
    scores = pl.concat([known, _scored(build, new, vectors, texts)])
    best = scores.sort(
        "image_id", "clip_score", "caption_id", descending=[False, True, False]
    ).unique("image_id", keep="first", maintain_order=True)
    every = tables.frame(build.store, images, ["image_id"])
    aligned = every.join(best, on="image_id", how="left").sort("image_id")
    return Aligned(
        tables.write_frame(build.store, "aligned", aligned),
        tables.write_frame(build.store, "aligned", scores.sort("image_id", "caption_id")),
    )


def _scored(build: Build, pairs: pl.DataFrame, vectors: Table, texts: Table) -> pl.DataFrame:
    """Pairs of an image and a caption with their scores."""
    sides = []
    for table, column in ((vectors, "image_id"), (texts, "caption_id")):
        ids, matrix = tables.gather(build.store, table, pairs[column].to_list())
        rows = pl.DataFrame({column: ids}, {column: pl.String}).with_row_index("row")
        found = pairs.join(rows, on=column, how="left", maintain_order="left")
        sides.append((matrix, found["row"].to_numpy()))
    (images, left), (captions, right) = sides
    scores = np.zeros(pairs.height, np.int32)
    for at in range(0, pairs.height, CHUNK):
        part = slice(at, at + CHUNK)
        scores[part] = neighbours.scores(images[left[part]], captions[right[part]])
        build.progress("align_captions", min(at + CHUNK, pairs.height), pairs.height)
    build.work["similarities_computed"] += pairs.height
    return pairs.with_columns(pl.Series("clip_score", scores))
