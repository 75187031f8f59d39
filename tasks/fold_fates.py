"""Fold fates: one fate for every object, image and pair, and the proof that nothing is missing."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import corpus, tables
from infra.build import Build
from infra.errors import PairmillError
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.tables import Table

OBJECT_FATES = (
    "metadata",
    "ignored",
    "unreadable",
    "too_small",
    "too_large",
    "extreme_aspect",
    "vanished",
    "crashed_decoder",
    "forgotten",
    "exact_duplicate",
    "near_duplicate",
    "low_clip_score",
    "unpaired",
    "paired",
)
COLUMNS = SCHEMAS["fates"].names


class Fates(NamedTuple):
    """The fates, sorted by level and id."""

    fates: Table


@stage(
    version=1,
    reads={
        "objects": ("key", "member", "image_id"),
        "images": ("image_id", "key", "member"),
        "pairs": ("pair_id", "query", "target"),
        "labels": ("pair_id",),
        "drops": ("level", "id", "stage", "rule", "value", "detail"),
    },
)
def fold_fates(
    build: Build,
    objects: Table,
    images: Table,
    pairs: Table,
    labels: Table,
    drops: Mapping[str, Table],
    params: None = None,
) -> Fates:
    """Fold what was kept and what was dropped into fates.

    Raises PairmillError where something listed has no fate, or two, or was dropped and published.
    """
    dropped = pl.concat([tables.frame(build.store, table) for table in drops.values()])
    # A forgotten image may have been met by the listing and in a container as well.
    gone = pl.col("stage") == "forget"
    dropped = pl.concat([dropped.filter(~gone), dropped.filter(gone).unique()])
    seen = tables.frame(build.store, objects)
    usable = tables.frame(build.store, images)
    mined = tables.frame(build.store, pairs, ["pair_id", "query", "target"])
    labelled = tables.frame(build.store, labels, ["pair_id"])
    records = mined.join(labelled, on="pair_id", how="semi")
    of_images = _image_fates(dropped, usable, records)
    of_objects = _object_fates(dropped, seen, usable, of_images)
    of_pairs = _pair_fates(dropped, records)
    known = seen["image_id"].drop_nulls().unique()
    _balance("image", of_images, pl.concat([known, _of_level(dropped, "image", "forget")["id"]]))
    _check_published(of_images, records)
    listed = [_of_level(dropped, "object", stage)["id"] for stage in ("snapshot", "forget")]
    _balance("object", of_objects, pl.concat([*listed, corpus.object_ids(seen)]))
    reversed_pairs = _of_level(dropped, "pair", "mine_pairs")["id"]
    _balance("pair", of_pairs, pl.concat([mined["pair_id"], reversed_pairs]))
    fates = pl.concat([of_objects, of_images, of_pairs]).sort("level", "id")
    return Fates(tables.write_frame(build.store, "fates", fates))


def _of_level(dropped: pl.DataFrame, level: str, stage: str | None = None) -> pl.DataFrame:
    rows = dropped.filter(pl.col("level") == level)
    return rows.filter(pl.col("stage") == stage) if stage else rows


def _image_fates(
    dropped: pl.DataFrame, usable: pl.DataFrame, records: pl.DataFrame
) -> pl.DataFrame:
    lost = _of_level(dropped, "image").with_columns(
        pl.col("rule").alias("fate"), pl.col("id").alias("image_id")
    )
    used = pl.concat([records["query"], records["target"]]).unique().alias("image_id").to_frame()
    kept = usable.select("image_id").join(lost, on="image_id", how="anti")
    paired = kept.join(used, on="image_id", how="semi")
    unpaired = kept.join(used, on="image_id", how="anti")
    return pl.concat([lost.select(COLUMNS), _kept(paired, "paired"), _kept(unpaired, "unpaired")])


def _kept(ids: pl.DataFrame, fate: str) -> pl.DataFrame:
    """Fate rows of images that no stage dropped."""
    return ids.select(
        pl.lit("image").alias("level"),
        pl.col("image_id").alias("id"),
        pl.lit(fate).alias("fate"),
        pl.lit("publish").alias("stage"),
        pl.lit(None, pl.String).alias("rule"),
        pl.lit(None, pl.Int64).alias("value"),
        pl.lit(None, pl.String).alias("detail"),
        "image_id",
    )


def _object_fates(
    dropped: pl.DataFrame, seen: pl.DataFrame, usable: pl.DataFrame, of_images: pl.DataFrame
) -> pl.DataFrame:
    own = _of_level(dropped, "object").with_columns(
        pl.col("rule").alias("fate"), pl.lit(None, pl.String).alias("image_id")
    )
    pictures = seen.with_columns(corpus.object_ids(seen)).filter(pl.col("image_id").is_not_null())
    first = usable.with_columns(corpus.object_ids(usable).alias("first")).select(
        "image_id", "first"
    )
    rows = pictures.select("id", "image_id").join(first, on="image_id", how="left")
    copies = rows.filter(pl.col("first").is_not_null() & (pl.col("id") != pl.col("first")))
    rest = rows.join(copies, on="id", how="anti").join(
        of_images.drop("id", "level"), on="image_id", how="left"
    )
    copied = copies.with_columns(
        pl.lit("object").alias("level"),
        pl.lit("exact_duplicate").alias("fate"),
        pl.lit("describe").alias("stage"),
        pl.lit("same_bytes").alias("rule"),
        pl.lit(None, pl.Int64).alias("value"),
        pl.col("first").alias("detail"),
    )
    inherited = rest.with_columns(pl.lit("object").alias("level"))
    return pl.concat([part.select(COLUMNS) for part in (own, copied, inherited)])


def _pair_fates(dropped: pl.DataFrame, records: pl.DataFrame) -> pl.DataFrame:
    lost = _of_level(dropped, "pair").with_columns(
        pl.col("rule").alias("fate"), pl.lit(None, pl.String).alias("image_id")
    )
    kept = _kept(records.select(pl.col("pair_id").alias("image_id")), "published").with_columns(
        pl.lit("pair").alias("level"), pl.lit(None, pl.String).alias("image_id")
    )
    return pl.concat([lost.select(COLUMNS), kept])


def _check_published(of_images: pl.DataFrame, records: pl.DataFrame) -> None:
    """Refuse to go on where a record has an image that some stage dropped."""
    paired = of_images.filter(pl.col("fate") == "paired")["id"].to_list()
    wrong = {*records["query"], *records["target"]}.difference(paired)
    if wrong:
        raise PairmillError(
            f"the fates of {len(of_images)} images don't balance: {len(wrong)} were dropped and "
            "are in records all the same; nothing is published, please report this"
        )


def _balance(level: str, fates: pl.DataFrame, listed: pl.Series) -> None:
    """Refuse to go on unless fates and listed ids are the same set, each once."""
    ids, names = fates.select("id"), listed.alias("id").to_frame()
    twice = ids.filter(pl.col("id").is_duplicated()).height
    lost = names.join(ids, on="id", how="anti").height
    strange = ids.join(names, on="id", how="anti").height
    odd = [f for f in fates["fate"].unique().to_list() if level != "pair" and f not in OBJECT_FATES]
    if twice or lost or strange or odd or fates["fate"].null_count():
        raise PairmillError(
            f"the fates of {len(names)} {level}s don't balance: {lost} have none, "
            f"{twice} have two, {strange} were never listed, unknown fates {odd}; "
            "nothing is published, please report this"
        )
