"""Record samples: what a trainer reads, with where the picture is, its licence and its split."""

import hashlib
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

SPLIT_PARTS = 10_000


class RecordParams(NamedTuple):
    """Share of images for validation, in 1/10,000: an image's records are on one side."""

    validation: int


class Recorded(NamedTuple):
    """The records, sorted by sample_id."""

    records: Table


@stage(
    version=1,
    reads={"given": tables.ALL, "images": ("image_id", "key", "member", "licence")},
)
def record_samples(build: Build, given: Table, images: Table, params: RecordParams) -> Recorded:
    """Join what a record says beyond its sample: the object of its picture, licence, split."""
    about = tables.frame(build.store, images).select("image_id", "key", "member", "licence")
    rows = tables.frame(build.store, given).join(about, on="image_id", how="left")
    sides = [_side(image_id, params.validation) for image_id in rows["image_id"]]
    rows = rows.with_columns(pl.Series("split", sides, pl.String))
    return Recorded(samples.write(build.store, rows, "records"))


def _side(image_id: str, validation: int) -> str:
    """By the hash of the image: it stays where it is, whatever else comes and goes."""
    draw = int(hashlib.sha256(f"split {image_id}".encode()).hexdigest()[:8], 16) % SPLIT_PARTS
    return "validation" if draw < validation else "train"
