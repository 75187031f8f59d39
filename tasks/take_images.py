"""Take images: every usable image is a sample, with the caption that it came with, if any."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Taken(NamedTuple):
    """Samples (sample_id, image_id, caption), sorted by id."""

    samples: Table


@stage(
    version=1,
    reads={
        "images": ("image_id",),
        "image_captions": ("image_id", "caption_id"),
        "captions": ("caption_id",),
    },
)
def take_images(
    build: Build, images: Table, image_captions: Table, captions: Table, params: None = None
) -> Taken:
    """Of several captions an image keeps that of least id, so that it is a function of the set."""
    texts = tables.frame(build.store, captions).rename({"text": "caption"})
    named = tables.frame(build.store, image_captions).join(texts, on="caption_id", how="left")
    first = named.sort("image_id", "caption_id").unique("image_id", keep="first")
    rows = tables.frame(build.store, images, ["image_id"]).join(
        first.select("image_id", "caption"), on="image_id", how="left"
    )
    return Taken(
        samples.write(
            build.store,
            rows.select(pl.col("image_id").alias("sample_id"), "image_id", "caption"),
        )
    )
