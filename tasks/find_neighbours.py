"""Find neighbours: for every image and space, the k nearest others by exact integer score."""

from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import kept_lists, neighbours, tables
from infra.build import Build
from infra.kept_lists import Kept
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.tables import Table

SHARD_ROWS = 50_000
# A list keeps half as many entries again as are asked for, this many at least: a third of a corpus
# can leave before most lists are searched again.
SLACK = 10


class Band(BaseModel):
    """The score window of a space in which a neighbour is a useful pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Literal["quantile", "cosine"] = Field(
        "quantile",
        description="quantile: of the scores in this space's own lists, identical vectors left "
        "out, so it suits any model; cosine: absolute, as MegaPairs' 0.8 to 0.96.",
    )
    low: float = Field(0.7, ge=-1, le=1, description="At or above: related.")
    high: float = Field(0.99, ge=-1, le=1, description="Above: nearly the same picture.")

    @model_validator(mode="after")
    def _ordered(self) -> "Band":
        if self.low >= self.high:
            raise ValueError(f"band.low {self.low} must be below band.high {self.high}")
        if self.unit == "quantile" and self.low < 0:
            raise ValueError(f"band.low {self.low} is a quantile: between 0 and 1")
        return self


class Space(BaseModel):
    """One embedding space in which neighbours are sought."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Name of one of the `models`.")
    of: Literal["image", "caption"] = Field("image", description="What is embedded.")
    band: Band = Field(Band(), description="Which scores make a pair.")


class NeighbourParams(BaseModel):
    """How many neighbours are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(50, ge=1, le=2_000, description="Neighbours an image has in each space.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where FAISS searches.")


class SearchParams(BaseModel):
    """What is sought in one space; of this `of` and `k` decide the lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: str
    of: Literal["image", "caption"]
    k: int
    device: Literal["auto", "cpu", "cuda"] = "auto"


def search_params(params: NeighbourParams, name: str, space: Space) -> SearchParams:
    """What the lists of a space depend on. A moved band must not move their key."""
    return SearchParams(space=name, of=space.of, k=params.k, device=params.device)


class Near(NamedTuple):
    """One space: its images in order of id, and their lists over rows of those.

    What the next search starts from: `kept`, longer lists over distinct vectors with their floors,
    and `items`, the vector that an image or a caption has.
    """

    members: Table
    lists: Table
    items: Table
    kept: Table


@stage(
    version=2,
    reads={"eligible": ("image_id", "caption_id"), "vectors": ()},
    meaning=lambda params: {"k": params.k, "of": params.of},
    starts_from=("eligible", "image_id"),
)
def find_neighbours(
    build: Build,
    eligible: Table,
    vectors: Table,
    params: SearchParams,
    before: Near | None = None,
) -> Near:
    """Exact k nearest neighbours in one space, ties by id; an image is not its own neighbour.

    Search runs over distinct vectors, and each expands to its images: a caption that a thousand
    pictures share is searched once. Raises PairmillError where a vector is missing.
    """
    column = f"{params.of}_id"
    rows = tables.frame(build.store, eligible).drop_nulls(column).sort("image_id")
    ids, matrix = tables.gather(build.store, vectors, rows[column].to_list())
    at = np.searchsorted(np.array(ids, "S64"), rows[column].to_numpy().astype("S64"))
    groups = neighbours.distinct(matrix[at])
    vector = np.zeros(len(ids), np.int64)
    vector[at] = groups.inverse
    kept, computed = _kept(build, ids, vector, matrix[at[groups.first]], params, before)
    build.work["similarities_computed"] += computed
    found = neighbours.expand(kept_lists.view(kept, params.k), groups, params.k)
    items = pl.DataFrame({"id": ids, "row": vector}, {"id": pl.String, "row": pl.Int32})
    return Near(
        tables.write_frame(build.store, "members", rows.select("image_id")),
        _write(build, "lists", found.neighbour, found.score),
        tables.write_frame(build.store, "items", items),
        _write(build, "kept_lists", *kept_lists.view(kept, kept.keys.shape[1])[:2], kept.floor),
    )


def _kept(
    build: Build,
    ids: list[str],
    vector: np.ndarray,
    distinct: np.ndarray,
    params: SearchParams,
    before: Near | None,
) -> tuple[Kept, int]:
    """Lists over distinct vectors, from those of the build before where there is one."""

    def progress(done: int, total: int) -> None:
        build.progress(f"find_neighbours {params.space}", done, total)

    width = params.k + max(SLACK, params.k // 2)
    if before is None or not len(distinct) or not before.kept.rows:
        return kept_lists.search(distinct, width, params.device, progress)
    items = tables.frame(build.store, before.items)
    now = pl.DataFrame({"id": ids, "now": vector}, {"id": pl.String, "now": pl.Int64})
    moved = items.join(now, on="id")
    place = np.full(before.kept.rows, -1)
    place[moved["row"].to_numpy()] = moved["now"].to_numpy()
    lists = _read(build, before.kept, width)
    return kept_lists.update(lists, place, distinct, params.k, params.device, progress)


def _read(build: Build, table: Table, width: int) -> Kept:
    """Lists of `width` entries with their floors from their table."""
    neighbour, score = tables.dense_lists(build.store, table)
    floor = tables.read(build.store, table, ["floor"])["floor"].to_numpy()
    keys = np.full((len(floor), width), neighbours.NONE)
    packed = neighbours.pack(score, np.maximum(neighbour, 0))
    keys[:, : neighbour.shape[1]] = np.where(neighbour < 0, neighbours.NONE, packed)
    return Kept(keys, floor)


def _write(
    build: Build, name: str, neighbour: np.ndarray, score: np.ndarray, *more: np.ndarray
) -> Table:
    """Lists as a table; rows with fewer neighbours than others are shorter."""
    shards = []
    for at in range(0, len(neighbour), SHARD_ROWS):
        part = slice(at, at + SHARD_ROWS)
        kept = neighbour[part] >= 0
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
        columns = [
            pa.array(np.arange(at, at + len(kept), dtype=np.int32)),
            pa.ListArray.from_arrays(ends, neighbour[part][kept].astype(np.int32)),
            pa.ListArray.from_arrays(ends, score[part][kept].astype(np.int32)),
            *(pa.array(column[part]) for column in more),
        ]
        rows = pa.table(columns, schema=SCHEMAS[name])
        shards.append(tables.write_shard(build.store, rows))
    return Table(name, tuple(shards))
