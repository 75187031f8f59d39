"""Find neighbours: for every image and space, the k nearest others by exact integer score."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import neighbours, tables
from infra.build import Build
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.tables import Table

SHARD_ROWS = 50_000


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


class Near(NamedTuple):
    """Per space: the images in it, in order of id, and their lists over rows of those."""

    members: dict[str, Table]
    lists: dict[str, Table]


@stage(version=1, reads={"eligible": ("image_id", "caption_id"), "vectors": (), "texts": ()})
def find_neighbours(
    build: Build,
    eligible: Table,
    vectors: dict[str, Table],
    texts: dict[str, Table],
    params: "SearchParams",
) -> Near:
    """Exact k nearest neighbours in every space, ties by id; an image is not its own neighbour.

    Search runs over distinct vectors, and each expands to its images: a caption that a thousand
    pictures share is searched once.
    """
    rows = tables.frame(build.store, eligible).sort("image_id")
    members, lists = {}, {}
    for name, space in params.spaces.items():
        if space.of == "image":
            ids, matrix = tables.gather(
                build.store, vectors[space.model], rows["image_id"].to_list()
            )
        else:
            ids, matrix = _caption_vectors(build, rows, texts[space.model])
        found = _search(build, name, matrix, params)
        members[name] = tables.write(build.store, "members", [{"image_id": i} for i in ids])
        lists[name] = _write(build, found)
    return Near(members, lists)


class SearchParams(NeighbourParams):
    """What the lists depend on: k and, of each space, what is embedded."""

    spaces: Mapping[str, Space]


def search_params(params: NeighbourParams, spaces: Mapping[str, Space]) -> SearchParams:
    """Bands play no part in the search, so a moved band must not move its key."""
    bare = {name: space.model_copy(update={"band": Band()}) for name, space in spaces.items()}
    return SearchParams(**params.model_dump(), spaces=bare)


def _caption_vectors(
    build: Build, rows: pl.DataFrame, texts: Table
) -> tuple[list[str], np.ndarray]:
    """Ids of captioned images in order, and the vector of each one's caption."""
    captioned = rows.filter(pl.col("caption_id").is_not_null())
    ids, matrix = tables.gather(build.store, texts, captioned["caption_id"].unique().to_list())
    if not ids:
        return [], np.zeros((0, 1), np.float16)
    at = np.searchsorted(np.array(ids), captioned["caption_id"].to_numpy())
    return captioned["image_id"].to_list(), matrix[at]


def _search(
    build: Build, name: str, matrix: np.ndarray, params: NeighbourParams
) -> neighbours.Lists:
    groups = neighbours.distinct(matrix)
    found = neighbours.search(
        matrix[groups.first],
        matrix[groups.first],
        params.k,
        same=True,
        device=params.device,
        progress=lambda done, total: build.progress(f"find_neighbours {name}", done, total),
    )
    build.work["similarities_computed"] += found.computed
    return neighbours.expand(found, groups, params.k)


def _write(build: Build, found: neighbours.Lists) -> Table:
    """Lists as a table; rows with fewer than k neighbours are shorter."""
    shards = []
    for at in range(0, len(found.neighbour), SHARD_ROWS):
        neighbour, score = found.neighbour[at : at + SHARD_ROWS], found.score[at : at + SHARD_ROWS]
        kept = neighbour >= 0
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
        columns = [
            pa.array(np.arange(at, at + len(neighbour), dtype=np.int32)),
            pa.ListArray.from_arrays(ends, neighbour[kept].astype(np.int32)),
            pa.ListArray.from_arrays(ends, score[kept].astype(np.int32)),
        ]
        rows = pa.table(columns, schema=SCHEMAS["lists"])
        shards.append(tables.write_shard(build.store, rows))
    return Table("lists", tuple(shards))
