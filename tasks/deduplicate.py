"""Deduplicate: tie every near-duplicate directly to the image that survives for it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import hamming, likeness, neighbours, survival, tables
from infra.build import Build
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.simhash import simhash
from infra.tables import Table

BLOCK = 512  # images that `cosine` settles at a time
# Where more than this share of the images is new, all are settled from nothing: it costs no more.
MOST_NEW = 1 / 4


class DedupParams(BaseModel):
    """What makes two images near-duplicates. Images of equal bytes always are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near: Literal["hash", "cosine", "off"] = Field(
        "hash",
        description="hash: close perceptual hashes, confirmed by stored thumbnails; cosine: by the "
        "vectors of `model` alone, as SemDeDup does; off: exact copies only.",
    )
    radius: int = Field(
        likeness.RADIUS,
        ge=0,
        le=16,
        description="Hamming distance of the hashes that are compared.",
    )
    model: str = Field("dino", description="Model whose image vectors `cosine` compares.")
    cosine: float = Field(0.95, gt=0, le=1, description="Least cosine of near-duplicates.")
    captions: Literal["ignore", "must_match"] = Field(
        "ignore",
        description="must_match: near-duplicates only where the SimHash of the captions collides "
        "as well, as in HoneyPipe.",
    )
    caption_radius: int = Field(0, ge=0, le=16, description="Hamming distance of such SimHashes.")

    def uses(self, model: str) -> bool:
        """Whether the vectors of a model have a say."""
        return self.near == "cosine" and self.model == model


class Unique(NamedTuple):
    """Each image's survivor (itself where it survives), the drops, and the hashes compared."""

    survivors: Table
    drops: Table
    hashes: Table


class Relation(NamedTuple):
    """Which images can have near-duplicates, as rows in the order of images, and how to find them.

    `settle()` gives the survivor of each of `among` as a position in it; `related(positions)`
    their related pairs.
    """

    among: np.ndarray
    settle: Callable[[], np.ndarray]
    related: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@stage(
    version=3,
    reads={
        "images": ("image_id", "width", "height", "bytes"),
        "looks": (),
        "aligned": ("image_id", "caption_id"),
        "captions": (),
        "vectors": (),
    },
    starts_from=("images", "image_id"),
)
def deduplicate(
    build: Build,
    images: Table,
    looks: Table,
    aligned: Table,
    captions: Table,
    vectors: dict[str, Table],
    params: DedupParams,
    before: Unique | None = None,
) -> Unique:
    """Drop near-duplicates. An image's survivor is the first surviving image before it in the order
    that it is related to; if there is none, it survives.

    The order puts captioned images first, then more pixels, then more bytes, then the lesser id.
    Duplicates are tied to their survivor and never chained through one another.
    """
    rows = _in_order(build, images, looks, aligned, captions)
    by_hash = params.near == "hash"
    hashed = (
        _hashed(build, rows, before) if by_hash else pl.DataFrame(SCHEMAS["hashes"].empty_table())
    )
    survivor = np.arange(rows.height)
    if params.near != "off":
        confirm = _caption_check(rows, params)
        if params.near == "hash":
            hashed = _hashed(build, rows, before)
            relation = _by_hash(rows, hashed, confirm, params.radius)
        else:
            relation = _by_cosine(build, rows, vectors[params.model], confirm, params)
        known = _known(build, rows, before, params)[relation.among]
        survivor[relation.among] = relation.among[_settled(relation, known, rows.height)]
    return _written(build, rows, survivor, hashed)


def _settled(relation: Relation, known: np.ndarray, count: int) -> np.ndarray:
    """Survivors as positions in `among`, from those known before where most are known."""
    if (known < 0).sum() > MOST_NEW * len(known):
        return relation.settle()
    place = np.full(count, -1)
    place[relation.among] = np.arange(len(relation.among))
    return survival.update(np.where(known < 0, -1, place[known]), relation.related)


def _known(
    build: Build, rows: pl.DataFrame, before: Unique | None, params: DedupParams
) -> np.ndarray:
    """The row of the survivor that each image had, -1 where it is new or its survivor left.

    An image that got or lost its caption has another place in the order: it left and came.
    """
    if before is None:
        return np.full(rows.height, -1)
    old = tables.frame(build.store, before.survivors)
    same = pl.col("caption_id").eq_missing(pl.col("caption_id_old"))
    if params.captions == "ignore":
        same = pl.col("caption_id").is_null() == pl.col("caption_id_old").is_null()
    ids = rows.select("image_id", "caption_id").with_row_index("row")
    stayed = ids.join(old, on="image_id", suffix="_old").filter(same)
    owners = stayed.select(pl.col("image_id").alias("survivor_id"), pl.col("row").alias("owner"))
    held = stayed.join(owners, on="survivor_id")
    known = np.full(rows.height, -1)
    known[held["row"].to_numpy()] = held["owner"].to_numpy()
    return known


def _in_order(
    build: Build, images: Table, looks: Table, aligned: Table, captions: Table
) -> pl.DataFrame:
    """Images with what the relation looks at, in the order in which they survive."""
    frame = tables.frame(build.store, images, ["image_id", "bytes", "width", "height"])
    columns = ["image_id", "phash", "thumbnail"]
    facts = tables.frame(build.store, looks, columns).unique("image_id")
    texts = tables.frame(build.store, captions)
    pairs = tables.frame(build.store, aligned, ["image_id", "caption_id"])
    pairs = pairs.join(texts, on="caption_id", how="left").select("image_id", "caption_id", "text")
    frame = frame.join(facts, on="image_id").join(pairs, on="image_id", how="left")
    pixels = pl.col("width").cast(pl.Int64) * pl.col("height")
    return frame.sort(
        pl.col("text").is_null(), -pixels, -pl.col("bytes"), "image_id", maintain_order=True
    )


Confirm = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _caption_check(rows: pl.DataFrame, params: DedupParams) -> Confirm:
    """A symmetric check of captions over row pairs; captions may differ unless they must match."""
    if params.captions == "ignore":
        return lambda i, j: np.ones(len(i), bool)
    hashes = np.array([simhash(text or "") for text in rows["text"].to_list()], np.uint64)

    def same(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.bitwise_count(hashes[i] ^ hashes[j]) <= params.caption_radius

    return same


def _hashed(build: Build, rows: pl.DataFrame, before: Unique | None) -> pl.DataFrame:
    """The hashes of every image and whether it is flat, those of new images computed."""
    old = tables.frame(build.store, before.hashes) if before else None
    known = rows.select("image_id").join(old, on="image_id") if old is not None else None
    new = rows.join(known, on="image_id", how="anti") if known is not None else rows
    thumbnails = _thumbnails(new)
    hashes = likeness.hashes(new["phash"].to_numpy(), thumbnails)
    fresh = new.select(
        "image_id",
        pl.Series("flat", likeness.flat(thumbnails), pl.Boolean),
        pl.Series("hashes", hashes.tolist(), pl.List(pl.UInt64)),
    )
    every = pl.concat([known, fresh]) if known is not None else fresh
    return rows.select("image_id").join(every, on="image_id", how="left", maintain_order="left")


def _by_hash(rows: pl.DataFrame, hashed: pl.DataFrame, confirm: Confirm, radius: int) -> Relation:
    """Close hashes, equal shape, like thumbnails. Flat pictures are like no other: their hashes,
    which are noise, would collide by the million."""
    thumbnails = _thumbnails(rows)
    among = np.flatnonzero(~hashed["flat"].to_numpy())
    flat = hashed["hashes"].explode().to_numpy() if rows.height else np.zeros(0)
    per_image = flat.size // max(1, rows.height)
    hashes = flat.astype(np.uint64).reshape(rows.height, per_image)[among]
    width, height = (rows[side].to_numpy().astype(np.int64) for side in ("width", "height"))

    def like(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        i, j = among[i], among[j]
        wide, narrow = width[i] * height[j], width[j] * height[i]
        shaped = 10 * np.abs(wide - narrow) <= np.maximum(wide, narrow)
        agreed = shaped & confirm(i, j)
        agreed[agreed] = likeness.alike(thumbnails, i[agreed], j[agreed])
        return agreed

    return Relation(
        among,
        lambda: hamming.survivors(hashes, like, radius),
        lambda rows: hamming.related(hashes, rows, like, radius),
    )


def _by_cosine(
    build: Build, rows: pl.DataFrame, vectors: Table, confirm: Confirm, params: DedupParams
) -> Relation:
    """SemDeDup's role (Abbas et al. 2023, arXiv 2303.09540), by exact search, without clusters."""
    ids, matrix = tables.gather(build.store, vectors, rows["image_id"].to_list())
    scorer = neighbours.Scorer(matrix[np.searchsorted(np.array(ids), rows["image_id"].to_numpy())])
    every, least = np.arange(rows.height), round(params.cosine * 1e6)

    def close(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        build.work["similarities_computed"] += len(one) * len(other)
        i, j = scorer.at_least(one, other, least)
        kept = (i != j) & confirm(i, j)
        return i[kept], j[kept]

    def settle() -> np.ndarray:
        owner = every.copy()
        for at in range(0, len(every), BLOCK):
            block, earlier = every[at : at + BLOCK], np.flatnonzero(owner[:at] == every[:at])
            i, j = close(block, earlier)
            first = np.full(len(every), len(every))
            np.minimum.at(first, i, j)
            owned = block[first[block] < len(every)]
            owner[owned] = first[owned]
            open_ = np.setdiff1d(block, owned)
            i, j = close(open_, open_)
            for late, early in sorted(zip(i[j < i].tolist(), j[j < i].tolist(), strict=True)):
                if owner[late] == late and owner[early] == early:
                    owner[late] = early
            build.progress("deduplicate", int(block[-1]) + 1, len(every))
        return owner

    return Relation(every, settle, lambda rows: close(rows, every))


def _written(
    build: Build, rows: pl.DataFrame, survivor: np.ndarray, hashed: pl.DataFrame
) -> Unique:
    ids = rows["image_id"].to_numpy()
    hashes = rows["phash"].to_numpy()
    lost = survivor != np.arange(len(ids))
    distance = np.bitwise_count(hashes ^ hashes[survivor]).astype(np.int32)
    like = np.full(len(ids), 1_000_000, np.int32)
    if lost.any():
        parts = (rows[np.flatnonzero(lost)], rows[survivor[lost]])
        like[lost] = likeness.likeness(*(likeness.prepare(_thumbnails(part)) for part in parts))
    frame = rows.select(
        "image_id",
        pl.Series("survivor_id", ids[survivor], pl.String),
        pl.Series("distance", distance),
        pl.Series("likeness", like),
        "caption_id",
    ).sort("image_id")
    drops = frame.filter(pl.col("image_id") != pl.col("survivor_id")).select(
        pl.lit("image").alias("level"),
        pl.col("image_id").alias("id"),
        pl.lit("deduplicate").alias("stage"),
        pl.lit("near_duplicate").alias("rule"),
        pl.col("distance").cast(pl.Int64).alias("value"),
        pl.col("survivor_id").alias("detail"),
    )
    return Unique(
        tables.write_frame(build.store, "survivors", frame),
        tables.write_frame(build.store, "drops", drops),
        tables.write_frame(build.store, "hashes", hashed.sort("image_id")),
    )


def _thumbnails(rows: pl.DataFrame) -> np.ndarray:
    """uint8[n, 16, 16, 3]."""
    joined = b"".join(rows["thumbnail"].to_list())
    return np.frombuffer(joined, np.uint8).reshape(-1, 16, 16, 3)
