"""Deduplicate: tie every near-duplicate directly to the image that survives for it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import hamming, likeness, neighbours, tables
from infra.build import Build
from infra.ledger import stage
from infra.simhash import simhash
from infra.tables import Table


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


class Unique(NamedTuple):
    """Each image's survivor (itself where it survives), and the drops."""

    survivors: Table
    drops: Table


@stage(
    version=2,
    reads={
        "images": ("image_id", "width", "height", "bytes"),
        "looks": (),
        "aligned": ("image_id", "caption_id"),
        "captions": (),
        "vectors": (),
    },
)
def deduplicate(
    build: Build,
    images: Table,
    looks: Table,
    aligned: Table,
    captions: Table,
    vectors: dict[str, Table],
    params: DedupParams,
) -> Unique:
    """Drop near-duplicates. An image's survivor is the first surviving image before it in the order
    that it is related to; if there is none, it survives.

    The order puts captioned images first, then more pixels, then more bytes, then the lesser id.
    Duplicates are tied to their survivor and never chained through one another.
    """
    rows = _in_order(build, images, looks, aligned, captions)
    confirm = _caption_check(rows, params)
    if params.near == "hash":
        survivor = _by_hash(rows, confirm, params.radius)
    elif params.near == "cosine":
        survivor = _by_cosine(build, rows, vectors[params.model], confirm, params)
    else:
        survivor = np.arange(rows.height)
    return _written(build, rows, survivor)


def _in_order(
    build: Build, images: Table, looks: Table, aligned: Table, captions: Table
) -> pl.DataFrame:
    """Images with what the relation looks at, in the order in which they survive."""
    frame = tables.frame(build.store, images, ["image_id", "bytes", "width", "height"])
    columns = ["image_id", "phash", "thumbnail"]
    facts = tables.frame(build.store, looks, columns).unique("image_id")
    texts = tables.frame(build.store, captions)
    pairs = tables.frame(build.store, aligned, ["image_id", "caption_id"])
    pairs = pairs.join(texts, on="caption_id", how="left").select("image_id", "text")
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


def _by_hash(rows: pl.DataFrame, confirm: Confirm, radius: int) -> np.ndarray:
    """Close hashes, equal shape, like thumbnails. Flat pictures are like no other: their hashes,
    which are noise, would collide by the million."""
    thumbnails = _thumbnails(rows)
    searched = np.flatnonzero(~likeness.flat(thumbnails))
    hashes = likeness.hashes(rows["phash"].to_numpy(), thumbnails)
    width, height = (rows[side].to_numpy().astype(np.int64) for side in ("width", "height"))

    def related(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        i, j = searched[i], searched[j]
        wide, narrow = width[i] * height[j], width[j] * height[i]
        shaped = 10 * np.abs(wide - narrow) <= np.maximum(wide, narrow)
        agreed = shaped & confirm(i, j)
        agreed[agreed] = likeness.alike(thumbnails, i[agreed], j[agreed])
        return agreed

    survivor = np.arange(rows.height)
    survivor[searched] = searched[hamming.survivors(hashes[searched], related, radius)]
    return survivor


def _by_cosine(
    build: Build, rows: pl.DataFrame, vectors: Table, confirm: Confirm, params: DedupParams
) -> np.ndarray:
    """SemDeDup's role (Abbas et al. 2023, arXiv 2303.09540), by exact search, without clusters."""
    ids, matrix = tables.gather(build.store, vectors, rows["image_id"].to_list())
    matrix = matrix[np.searchsorted(np.array(ids), rows["image_id"].to_numpy())]
    least = round(params.cosine * 1e6)
    survivor = np.arange(len(matrix))
    wide = matrix.astype(np.float32)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    margin = neighbours.bound(matrix.shape[1]) if len(matrix) else 0.0
    alive = np.zeros(len(matrix), bool)
    for row in range(len(matrix)):
        before = np.flatnonzero(alive[:row])
        near = before[wide[before] @ wide[row] >= params.cosine - margin - 1e-6]
        build.work["similarities_computed"] += len(before) + len(near)
        here = np.full(len(near), row)
        close = neighbours.scores(matrix[near], matrix[here]) >= least if len(near) else near > 0
        related = near[close & confirm(near, here)]
        survivor[row] = related[0] if len(related) else row
        alive[row] = not len(related)
        build.progress("deduplicate", row + 1, len(matrix))
    return survivor


def _written(build: Build, rows: pl.DataFrame, survivor: np.ndarray) -> Unique:
    ids = rows["image_id"].to_numpy()
    hashes = rows["phash"].to_numpy()
    lost = survivor != np.arange(len(ids))
    distance = np.bitwise_count(hashes ^ hashes[survivor]).astype(np.int32)
    thumbnails = _thumbnails(rows)
    like = np.full(len(ids), 1_000_000, np.int32)
    if lost.any():
        pair = (likeness.prepare(thumbnails[part]) for part in (lost, survivor[lost]))
        like[lost] = likeness.likeness(*pair)
    columns = {
        "image_id": ids,
        "survivor_id": ids[survivor],
        "distance": distance,
        "likeness": like,
    }
    frame = pl.DataFrame(columns).sort("image_id")
    drops = [
        {
            "level": "image",
            "id": str(ids[row]),
            "stage": "deduplicate",
            "rule": "near_duplicate",
            "value": int(distance[row]),
            "detail": str(ids[survivor[row]]),
        }
        for row in np.flatnonzero(lost).tolist()
    ]
    return Unique(
        tables.write_frame(build.store, "survivors", frame),
        tables.write(build.store, "drops", drops),
    )


def _thumbnails(rows: pl.DataFrame) -> np.ndarray:
    """uint8[n, 16, 16, 3]."""
    joined = b"".join(rows["thumbnail"].to_list())
    return np.frombuffer(joined, np.uint8).reshape(-1, 16, 16, 3)
