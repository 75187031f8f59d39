"""Measure images: the size and shape of each sample's picture as columns that rules can bound."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class ImagesMeasured(NamedTuple):
    """Samples with width, height and short_side in pixels, and aspect: long / short, per mille."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL, "images": ("image_id", "width", "height")})
def measure_images(
    build: Build, given: Table, images: Table, params: None = None
) -> ImagesMeasured:
    """Add what is known of the picture. The aspect is rounded up: 5001 is more than 5 : 1."""
    sizes = tables.frame(build.store, images, ["image_id", "width", "height"])
    short, long = pl.min_horizontal("width", "height"), pl.max_horizontal("width", "height")
    facts = sizes.unique("image_id").with_columns(
        short.alias("short_side"),
        (-(-1_000 * long.cast(pl.Int64) // short)).alias("aspect"),
    )
    rows = tables.frame(build.store, given)
    rows = rows.drop("width", "height", "short_side", "aspect", strict=False)
    return ImagesMeasured(samples.write(build.store, rows.join(facts, on="image_id", how="left")))
