"""Make records: pairs with their labels, captions, sources, licences and split, in one table."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from infra import tables
from infra.build import Build
from infra.ledger import stage
from infra.licences import stricter
from infra.tables import Table

SHARD_ROWS = 100_000
# Images of a component that may be validation data. It must not depend on the size of the corpus:
# a component would change sides because others grew.
LARGEST = 8


class SplitParams(BaseModel):
    """How records are split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share aimed at for validation, of images in groups of at most 8 that pairs "
        "connect; larger groups are training data.",
    )


class Records(NamedTuple):
    """What a trainer reads, sorted by pair_id; scores are cosines * 10^6."""

    records: Table


@stage(
    version=4,
    reads={
        "pairs": ("pair_id", "ties", "negatives"),
        "labels": ("pair_id", "instructions", "description", "labeller", "model"),
        "eligible": ("image_id", "caption_id"),
        "captions": ("caption_id",),
        "images": ("image_id", "key", "member", "licence"),
        "survivors": ("image_id", "survivor_id"),
        "positives": ("pair_id", "image_id"),
    },
)
def make_records(
    build: Build,
    pairs: Table,
    labels: Table,
    eligible: Table,
    captions: Table,
    images: Table,
    survivors: Table,
    positives: Table,
    params: SplitParams,
) -> Records:
    """Join what a record says. The licence of a pair is the stricter one of its two images.

    `positives` are further images that the instructions of a pair lead to.
    """

    def frame(table: Table) -> pl.DataFrame:
        return tables.frame(build.store, table)

    rows = frame(pairs).join(frame(labels), on="pair_id", how="inner")
    further = frame(positives).sort("pair_id", "image_id").group_by("pair_id").agg("image_id")
    rows = rows.join(further.rename({"image_id": "positives"}), on="pair_id", how="left")
    rows = rows.with_columns(pl.col("positives").fill_null([]))
    texts = frame(eligible).join(frame(captions), on="caption_id", how="left")
    about = frame(images).join(texts.select("image_id", "text"), on="image_id", how="left")
    about = about.select("image_id", "key", "member", "licence", pl.col("text").alias("caption"))
    for side in ("query", "target"):
        sided = about.rename({c: f"{side}_{c}" for c in about.columns if c != "image_id"})
        rows = rows.join(sided.rename({"image_id": side}), on=side, how="left")
    survivor = dict(frame(survivors).select("image_id", "survivor_id").iter_rows())
    more = rows.select("query", "positives").explode("positives").drop_nulls()
    edges = [*rows.select("query", "target").iter_rows(), *more.iter_rows()]
    split = splits(edges, survivor, params.validation)
    licences = [
        stricter(a, b) for a, b in rows.select("query_licence", "target_licence").iter_rows()
    ]
    rows = rows.with_columns(
        pl.Series("licence", licences, pl.String),
        pl.col("query").replace_strict(split, return_dtype=pl.String).alias("split"),
    )
    return Records(_write(build, rows.sort("pair_id")))


def _write(build: Build, rows: pl.DataFrame) -> Table:
    ordered = [
        "pair_id", "query", "target", "instructions", "description", "positives", "negatives",
        "ties",
        "query_caption", "target_caption", "query_key", "query_member", "target_key",
        "target_member", "query_licence", "target_licence", "licence", "labeller", "model", "split",
    ]  # fmt: skip
    return tables.write_published(
        build.store, "records", rows.select(ordered).to_arrow(), SHARD_ROWS
    )


def splits(
    edges: Iterable[tuple[str, str]], survivor: Mapping[str, str], validation: float
) -> dict[str, str]:
    """Split of every image that is in a pair: what is connected by pairs stays on one side.

    A component is named by the image of least hash among its images and their near-duplicates, and
    the name decides. So it keeps its side when a duplicate takes the place of its survivor, and as
    it grows, unless a newcomer has the least hash or it merges with another. Components of more
    than LARGEST images are training data: to hold one out would overshoot the share aimed at.
    """
    edges = sorted(set(edges))
    ids = sorted({image for edge in edges for image in edge})
    if not ids:
        return {}
    row = {image: at for at, image in enumerate(ids)}
    heads, tails = [row[a] for a, _ in edges], [row[b] for _, b in edges]
    graph = coo_array(([1] * len(edges), (heads, tails)), shape=(len(ids), len(ids)))
    _, labels = connected_components(graph, directed=False)
    size = Counter(labels.tolist())
    draw: dict[int, str] = {}
    for image in {*ids, *survivor}:
        at = row.get(survivor.get(image, image))
        if at is not None:
            name = hashlib.sha256(f"split {image}".encode()).hexdigest()
            draw[labels[at]] = min(name, draw.get(labels[at], name))
    held_out = {
        label
        for label, name in draw.items()
        if size[label] <= LARGEST and int(name[-8:], 16) < validation * 2**32
    }
    return {
        image: "validation" if label in held_out else "train"
        for image, label in zip(ids, labels.tolist(), strict=True)
    }
