"""Images that nobody drew: features of a pool of them, and what describe would say of some."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from flows.build import Across, across
from flows.config import BuildConfig
from infra import tables
from infra.build import Build
from infra.cluster import ClusterParams, ThreadPool
from infra.folder import FolderStore
from infra.schema import SCHEMAS
from infra.tables import Table
from tasks.describe import Described
from tasks.publish import content_digest
from tasks.snapshot import Snapshot

Rng = np.random.Generator


class World(NamedTuple):
    """A pool of images and captions with their features; `growing` as describe keeps it."""

    images: pl.DataFrame
    captions: pl.DataFrame
    growing: dict[str, pa.Table]

    @property
    def ids(self) -> list[str]:
        return self.images["image_id"].to_list()


def named(what: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{what} {i}".encode()).hexdigest() for i in range(count)]


def make_world(
    sizes: pl.DataFrame,
    looks: dict[str, Any],
    texts: list[str],
    vectors: dict[str, np.ndarray],
    text_vectors: dict[str, np.ndarray],
) -> World:
    """`sizes` has width, height, bytes; `looks` phash and thumbnail; one row an image each."""
    ids = named("image", sizes.height)
    caption_ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    growing = {"looks": pa.table({"image_id": ids, **looks})}
    for model, matrix in vectors.items():
        growing[f"vectors/{model}"] = tables.vector_rows("image_id", ids, matrix)
    for model, matrix in text_vectors.items():
        growing[f"texts/{model}"] = tables.vector_rows("caption_id", caption_ids, matrix)
    return World(
        sizes.with_columns(pl.Series("image_id", ids)),
        pl.DataFrame({"caption_id": caption_ids, "text": texts}),
        growing,
    )


def new_build(folder: Path) -> Build:
    """A build over `folder/corpus` and `folder/store` without workers."""
    for name in ("corpus", "store"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pool = ThreadPool(ClusterParams(kind="threads", workers=1), ExitStack())
    return Build(*(FolderStore(str(folder / name)) for name in ("corpus", "store")), pool)


def config_of(**sections: Any) -> BuildConfig:
    """A config of two models and three spaces; its places are never opened."""
    return BuildConfig(
        dataset="world",
        corpus={"uri": "corpus"},
        store={"uri": "store"},
        models={
            "clip": {"library": "open_clip", "name": "clip"},
            "dino": {"library": "timm", "name": "dino"},
        },
        **{
            "spaces": {
                "clip_image": {"model": "clip"},
                "dino": {"model": "dino"},
                "clip_text": {"model": "clip", "of": "caption"},
            },
            **sections,
        },
    )


def seen(build: Build, world: World, objects: pl.DataFrame, linked: pl.DataFrame) -> Described:
    """What describe says of `objects` (key, image_id) and captions `linked` (image, caption id)."""
    first = objects.sort("key").unique("image_id", keep="first", maintain_order=True)
    images = first.join(world.images, on="image_id").with_columns(
        format=pl.lit("PNG"), licence=pl.lit("CC0")
    )
    here = linked.join(first, on="image_id", how="semi")
    grown = {
        name: tables.write(build.store, f"{name.replace('/', '-')}", rows)
        for name, rows in world.growing.items()
    }
    return Described(
        listing=Table("listing"),
        objects=_write(build, "objects", objects),
        images=_write(build, "images", images.sort("image_id")),
        looks=grown["looks"],
        captions=_write(build, "captions", world.captions),
        image_captions=_write(build, "image_captions", here),
        vectors={name: grown[f"vectors/{name}"] for name in ("clip", "dino")},
        texts={"clip": grown["texts/clip"]},
        drops=Table("drops"),
    )


def _write(build: Build, name: str, frame: pl.DataFrame) -> Table:
    rows, schema = frame.to_arrow(), SCHEMAS[name]
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field.name, pa.nulls(rows.num_rows, field.type))
    return tables.write(build.store, name, rows.select(schema.names).cast(schema))


def run(build: Build, config: BuildConfig, described: Described) -> tuple[str, Across]:
    """The digest of records and fates, and what every stage across images gave."""
    listed = Snapshot(*(Table(name) for name in ("listing", "file_captions", "drops", "facts")))
    found = across(build, config, listed, described)
    records = tables.frame(build.store, found.make_records.records)
    return content_digest(records, tables.frame(build.store, found.fold_fates.fates)), found
