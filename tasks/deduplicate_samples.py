"""Deduplicate samples: near-equal text about a near-equal picture, both at once.

Source: Bee's HoneyPipe (arXiv 2510.13795): perceptual hash of the image and SimHash of the
instruction must both match.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import hamming, samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.simhash import simhash
from infra.tables import Table


class SampleDedupParams(BaseModel):
    """How close the picture and the text of two samples must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_radius: int = Field(
        0,
        ge=0,
        le=16,
        description="Hamming distance of the 64-bit pHashes. Both hashes must match; the radius is"
        " not given in the source: 0 is the literal reading. Up to 3 is for re-encoded pictures.",
    )
    text_radius: int = Field(
        0,
        ge=0,
        le=16,
        description="Hamming distance of the 64-bit SimHashes over word 3-grams. Not given in the"
        " source either; 0 is the literal reading.",
    )
    column: str = Field("instruction", description="The column whose texts are compared.")


class SamplesUnique(NamedTuple):
    """Samples that survive with `phash` and `simhash` (16 hex digits), and their duplicates."""

    samples: Table
    drops: Table


@stage(
    version=1,
    reads={"given": tables.ALL, "images": ("image_id", "width", "height"), "looks": ()},
)
def deduplicate_samples(
    build: Build, given: Table, images: Table, looks: Table, params: SampleDedupParams
) -> SamplesUnique:
    """Drop each sample that is near the first surviving one before it: in order of pixels, most
    first, then of id. Its fate names the survivor and the distance of the pHashes.

    Bits of an uninformative pHash are noise: such a picture is only near itself.
    """
    rows = _in_order(build, given, images, looks)
    pictures = np.array(
        [
            phash if informative else int(image_id[:16], 16)
            for phash, informative, image_id in rows.select(
                "_phash", "_informative", "image_id"
            ).iter_rows()
        ],
        np.uint64,
    )
    texts = np.array([simhash(text or "") for text in rows[params.column]], np.uint64)

    def near(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.bitwise_count(texts[one] ^ texts[other]) <= params.text_radius

    owner = hamming.survivors(pictures, near, params.image_radius)
    survives = owner == np.arange(len(owner))
    names = rows["sample_id"].to_list()
    apart = np.bitwise_count(pictures ^ pictures[owner])
    gone = [
        {"id": names[at], "rule": "duplicate_pair", "value": int(apart[at]),
         "detail": names[owner[at]]}
        for at in np.flatnonzero(~survives)
    ]  # fmt: skip
    hashed = rows.with_columns(
        pl.Series("phash", [f"{phash:016x}" for phash in rows["_phash"]], pl.String),
        pl.Series("simhash", [f"{int(text):016x}" for text in texts], pl.String),
    ).select(pl.exclude("^_.*$"))
    return SamplesUnique(
        samples.write(build.store, hashed.filter(pl.Series(survives, dtype=pl.Boolean))),
        samples.write_drops(build.store, samples.drops(gone, "deduplicate_samples")),
    )


def _in_order(build: Build, given: Table, images: Table, looks: Table) -> pl.DataFrame:
    sizes = tables.frame(build.store, images, ["image_id", "width", "height"]).select(
        "image_id", (pl.col("width").cast(pl.Int64) * pl.col("height")).alias("_pixels")
    )
    hashes = tables.frame(build.store, looks, ["image_id", "phash", "informative"]).select(
        "image_id", pl.col("phash").alias("_phash"), pl.col("informative").alias("_informative")
    )
    rows = tables.frame(build.store, given).drop("phash", "simhash", strict=False)
    rows = rows.join(sizes.unique("image_id"), on="image_id", how="left")
    rows = rows.join(hashes.unique("image_id"), on="image_id", how="left")
    return rows.sort("_pixels", "sample_id", descending=[True, False])
