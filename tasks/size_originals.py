"""Size originals: samples with the size of their picture, those with too little to lose dropped."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Sizes(NamedTuple):
    """Visual tokens that an original has at least, and the side of a token's square in pixels."""

    min_tokens: int
    patch: int


class Sized(NamedTuple):
    """Samples with `width` and `height` in pixels; those that are too small, with their tokens."""

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL, "images": ("image_id", "width", "height")})
def size_originals(build: Build, given: Table, images: Table, params: Sizes) -> Sized:
    """Drop what has fewer tokens than the least as `small_original`."""
    sizes = tables.frame(build.store, images, ["image_id", "width", "height"])
    rows = tables.frame(build.store, given).join(sizes, on="image_id", how="left")
    rows = rows.with_columns(pl.col("width", "height").cast(pl.Int64))
    tokens = pl.col("width") * pl.col("height") // params.patch**2
    gone = rows.filter(tokens < params.min_tokens).select("sample_id", tokens.alias("value"))
    drops = [{"id": n, "rule": "small_original", "value": v} for n, v in gone.iter_rows()]
    return Sized(
        samples.write(build.store, rows.filter(tokens >= params.min_tokens)),
        samples.write_drops(build.store, samples.drops(drops, "size_originals")),
    )
