"""Account for samples: one fate for every object, image and sample, and the proof of it."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import corpus, tables
from infra.build import Build
from infra.errors import PairmillError
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.tables import Table

COLUMNS = SCHEMAS["fates"].names


class Accounted(NamedTuple):
    """The fates, sorted by level and id, and the images that nothing dropped."""

    fates: Table
    eligible: Table


@stage(
    version=2,
    reads={
        "objects": ("key", "member", "image_id"),
        "images": ("image_id",),
        "files": ("key",),
        "samples": ("sample_id", "image_id"),
        "records": ("sample_id", "image_id"),
        "drops": ("level", "id", "stage", "rule", "value", "detail"),
    },
)
def account_for_samples(
    build: Build,
    objects: Table,
    images: Table,
    files: Table,
    samples: Mapping[str, Table],
    records: Table,
    drops: Mapping[str, Table],
    params: None = None,
) -> Accounted:
    """Fold what was kept and what was dropped into fates. `files` are those of records; `samples`
    are all that any stage gave.

    Raises PairmillError where something has no fate, or two: a sample that several stages dropped,
    that one dropped and another recorded, or that was in a stage's hands and is nowhere now.
    """
    dropped = pl.concat([tables.frame(build.store, table) for table in drops.values()]).unique()
    read = set(tables.read(build.store, files, ["key"])["key"].to_pylist())
    is_read = (pl.col("level") == "object") & pl.col("id").is_in(list(read))
    dropped = dropped.with_columns(
        pl.when(is_read).then(pl.lit("metadata")).otherwise("rule").alias("rule")
    )
    rows = tables.frame(build.store, records, ["sample_id", "image_id"])
    seen = _seen(build, samples)
    images_of = seen.rename({"sample_id": "id"})
    lost = _lost(dropped, "sample").drop("image_id").join(images_of, on="id", how="left")
    kept = _kept(rows["sample_id"], "sample", "recorded", rows["image_id"])
    of_samples = pl.concat([lost.select(COLUMNS), kept])
    usable = tables.read(build.store, images, ["image_id"])["image_id"].to_pylist()
    used = set(rows["image_id"])
    lost = _lost(dropped, "image")
    gone = set(lost["id"])
    left = [image for image in usable if image not in gone]
    of_images = [lost]
    for fate, names in (
        ("recorded", [image for image in left if image in used]),
        ("without_record", [image for image in left if image not in used]),
    ):
        ids = pl.Series("id", names, pl.String)
        of_images.append(_kept(ids, "image", fate, ids))
    images_fates = pl.concat(of_images)
    of_objects = _objects(build, objects, dropped, images_fates)
    fates = pl.concat([of_objects, images_fates, of_samples]).sort("level", "id")
    _check(fates, seen["sample_id"])
    nothing = (pl.lit(None, pl.String).alias("caption_id"), pl.lit(None).alias("clip_score"))
    eligible = pl.DataFrame({"image_id": sorted(left)}, {"image_id": pl.String})
    return Accounted(
        tables.write_frame(build.store, "fates", fates),
        tables.write_frame(build.store, "eligible", eligible.with_columns(nothing)),
    )


def _seen(build: Build, samples: Mapping[str, Table]) -> pl.DataFrame:
    """Every sample of any stage, with its image. Views, `<sample_id>@...`, share its fate."""
    columns = ["sample_id", "image_id"]
    none = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
    parts = [tables.frame(build.store, table, columns) for table in samples.values()]
    rows = pl.concat([none, *parts]).unique()
    return rows.filter(~pl.col("sample_id").str.contains("@", literal=True))


def _lost(dropped: pl.DataFrame, level: str) -> pl.DataFrame:
    rows = dropped.filter(pl.col("level") == level)
    image = pl.col("id") if level == "image" else pl.lit(None, pl.String)
    return rows.with_columns(pl.col("rule").alias("fate"), image.alias("image_id")).select(COLUMNS)


def _kept(ids: pl.Series, level: str, fate: str, images: pl.Series) -> pl.DataFrame:
    return pl.DataFrame(
        {"level": level, "id": ids, "fate": fate, "stage": "publish", "image_id": images},
        {"level": pl.String, "id": pl.String, "fate": pl.String, "stage": pl.String,
         "image_id": pl.String},
    ).select(
        *COLUMNS[:4], pl.lit(None, pl.String).alias("rule"),
        pl.lit(None, pl.Int64).alias("value"), pl.lit(None, pl.String).alias("detail"), "image_id",
    )  # fmt: skip


def _objects(
    build: Build, objects: Table, dropped: pl.DataFrame, of_images: pl.DataFrame
) -> pl.DataFrame:
    """Objects that were dropped themselves; every other one shares the fate of its image."""
    own = _lost(dropped, "object")
    seen = tables.frame(build.store, objects, ["key", "member", "image_id"])
    rows = seen.with_columns(corpus.object_ids(seen)).filter(pl.col("image_id").is_not_null())
    rows = rows.join(own.select("id"), on="id", how="anti").select("id", "image_id")
    shared = rows.join(of_images.drop("id", "level"), on="image_id", how="left")
    return pl.concat([own, shared.with_columns(pl.lit("object").alias("level")).select(COLUMNS)])


def _check(fates: pl.DataFrame, seen: pl.Series) -> None:
    """Refuse to go on where an id has no fate, or two."""
    twice = fates.filter(pl.struct("level", "id").is_duplicated())["id"]
    known = fates.filter(pl.col("level") == "sample")["id"]
    none = pl.concat(
        [fates.filter(pl.col("fate").is_null())["id"], seen.filter(~seen.is_in(known.implode()))]
    )
    if len(twice) or len(none):
        shown = ", ".join([*twice.head(3), *none.head(3)])
        raise PairmillError(
            f"the fates don't balance: {len(none)} have none, {len(twice)} have several ({shown}); "
            "nothing is published, please report this"
        )
