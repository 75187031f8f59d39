"""Round trip: from query and instruction, is the target nearer than the hard negatives?"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import features, fusing, tables
from infra.build import Build
from infra.canonical import digest, settings
from infra.cluster import Crash
from infra.ledger import stage
from infra.models import ModelParams, choose_device
from infra.tables import Shard, Table

TEXTS_A_SHARD = 2_048
CHUNK = 2_000  # pairs whose vectors are in memory at once
SCHEMA = {
    "pair_id": pl.String, "number": pl.Int32, "target": pl.Int32, "negative": pl.Int32,
    "asked": pl.String,
}  # fmt: skip


class RoundTripParams(BaseModel):
    """Whether the target is looked for in an embedding space, and what comes of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["off", "report", "drop"] = Field(
        "off",
        description="`report`: measure how often the target is nearer to query and instruction"
        " than every hard negative. `drop`: instructions by which it is not go as well.",
    )
    model: str = Field("", description="Model whose space is used; empty: that of clip_score.")
    weight: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the query's vector, the rest is the instruction's. The default is"
        " ours: with much more, the query alone finds the target, whatever is said.",
    )


class RoundTripping(BaseModel):
    """What the stage needs: the parameters, the model they name, and where it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["report", "drop"]
    weight: float
    needed: int
    model: ModelParams
    device: str


class Returned(NamedTuple):
    """Labels that stay, pairs without one, scores by instruction, and counts."""

    labels: Table
    drops: Table
    preferences: Table
    facts: Table


@stage(
    version=1,
    reads={
        "pairs": ("pair_id", "negatives"),
        "labels": ("pair_id", "instructions"),
        "vectors": (),
        "texts": (),
    },
    meaning=lambda params: settings(params.model_dump(include={"mode", "weight", "needed"})),
    starts_from=("labels", "pair_id"),
)
def round_trip(
    build: Build,
    pairs: Table,
    labels: Table,
    vectors: Table,
    texts: Table,
    params: RoundTripping,
    before: Returned | None = None,
) -> Returned:
    """Compare target and hard negatives with query and instruction, put together in one space.

    The query itself is no candidate: next to it, half of the question is the query. A pair without
    other negatives passes. `texts` says only with what texts are embedded. Raises PairmillError
    where a vector is missing.
    """
    every = _questions(build, pairs, labels)
    found = _carried(build, every, before)
    new = every.join(found, on=["pair_id", "number", "asked"], how="anti")
    measured = list(_measured(build, new, vectors, params))
    found = pl.concat([found, *measured]).sort("pair_id", "number")
    kept, drops = judged(tables.frame(build.store, labels), found, params)
    return Returned(
        tables.write_frame(build.store, "labels", kept),
        tables.write(build.store, "drops", drops),
        tables.write_frame(build.store, "preferences", found),
        tables.write(build.store, "facts", _facts(every, found)),
    )


def _questions(build: Build, pairs: Table, labels: Table) -> pl.DataFrame:
    """One row an instruction of a pair with negatives, in order of pair and number."""
    rows = tables.frame(build.store, labels, ["pair_id", "instructions"]).join(
        tables.frame(build.store, pairs, ["pair_id", "query", "target", "negatives"]),
        on="pair_id",
        how="inner",
    )
    rows = rows.with_columns(
        pl.col("negatives").list.set_difference(pl.concat_list("query")).list.sort(),
        number=pl.int_ranges(1, pl.col("instructions").list.len() + 1, dtype=pl.Int32),
    ).explode("instructions", "number")
    rows = rows.rename({"instructions": "text"}).filter(pl.col("negatives").list.len() > 0)
    asked = [digest(list(row)) for row in rows.select("text", "negatives").iter_rows()]
    return rows.with_columns(pl.Series("asked", asked, pl.String)).sort("pair_id", "number")


def _carried(build: Build, every: pl.DataFrame, before: Returned | None) -> pl.DataFrame:
    """Scores from an earlier build, of those that are asked for today."""
    if before is None:
        return pl.DataFrame(schema=SCHEMA)
    old = tables.frame(build.store, before.preferences)
    return old.join(every, on=["pair_id", "number", "asked"], how="semi").select(*SCHEMA)


def _measured(
    build: Build, new: pl.DataFrame, vectors: Table, params: RoundTripping
) -> Iterator[pl.DataFrame]:
    """Scores of new rows, a part of the pairs at a time."""
    if not new.height:
        return
    pair_ids = new["pair_id"].unique().sort()
    spoken = _embedded(build, new["text"].unique().sort().to_list(), params)
    for at in range(0, len(pair_ids), CHUNK):
        part = new.filter(pl.col("pair_id").is_in(pair_ids[at : at + CHUNK].implode()))
        yield _scores(build, part, vectors, spoken, params.weight)
        build.progress("round_trip", min(at + CHUNK, len(pair_ids)), len(pair_ids))


def _scores(
    build: Build,
    rows: pl.DataFrame,
    vectors: Table,
    spoken: tuple[list[str], np.ndarray],
    weight: float,
) -> pl.DataFrame:
    negatives = rows["negatives"].explode()
    ids, matrix = tables.gather(build.store, vectors, [*rows["query"], *rows["target"], *negatives])
    texts, written = spoken
    query, target, other = (_at(ids, names) for names in (rows["query"], rows["target"], negatives))
    fused = fusing.fuse(matrix[query], written[_at(texts, rows["text"])], weight)
    sizes = rows["negatives"].list.len().cast(pl.Int64).to_numpy()
    mine, best = fusing.preferences(fused, matrix[target], matrix[other], sizes)
    return rows.with_columns(target=pl.Series(mine), negative=pl.Series(best)).select(
        pl.col(name).cast(kind) for name, kind in SCHEMA.items()
    )


def _at(ids: Sequence[str], wanted: pl.Series) -> np.ndarray:
    place = {name: at for at, name in enumerate(ids)}
    return np.array([place[name] for name in wanted], np.int64)


def _embedded(
    build: Build, texts: list[str], params: RoundTripping
) -> tuple[list[str], np.ndarray]:
    """Texts and their vectors, float16[n, d], from workers."""
    device = choose_device(params.device)
    facts = features.facts_of(build, params.model, device)
    shards = [tuple(texts[at : at + TEXTS_A_SHARD]) for at in range(0, len(texts), TEXTS_A_SHARD)]
    work = partial(features.embed_texts, (build.store, params.model, facts, device))
    parts: dict[Any, np.ndarray] = {}
    for shard, row in build.pool.map(work, shards, resources=features.resources(device)):
        if isinstance(row, Crash):
            raise RuntimeError(f"embedding instructions ended its worker: {row.reason}")
        table = tables.read(build.store, Table("texts", (Shard(*row),)))
        parts[shard] = tables.matrix(table["vector"])
    return texts, np.concatenate([parts[shard] for shard in shards])


def judged(
    labels: pl.DataFrame, found: pl.DataFrame, params: RoundTripping
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Labels that stay and drops: with `drop`, instructions by which the target is not nearest go.

    A pair needs as many instructions as before, or all where it had fewer.
    """
    if params.mode == "report":
        return labels.sort("pair_id"), []
    lost: dict[str, set[int]] = {}
    for pair_id, number in (
        found.filter(pl.col("target") <= pl.col("negative")).select("pair_id", "number").iter_rows()
    ):
        lost.setdefault(pair_id, set()).add(number)
    kept, drops = [], []
    for row in labels.sort("pair_id").iter_rows(named=True):
        gone = lost.get(row["pair_id"], set())
        stay = [text for at, text in enumerate(row["instructions"], 1) if at not in gone]
        if len(stay) >= min(params.needed, len(row["instructions"])):
            kept.append({**row, "instructions": stay})
        else:
            drops.append(
                {
                    "level": "pair", "id": row["pair_id"], "stage": "round_trip",
                    "rule": "target_not_preferred_in_space", "value": len(stay),
                    "detail": f"{len(stay)} of {len(row['instructions'])}",
                }
            )  # fmt: skip
    return pl.DataFrame(kept, labels.schema), drops


def _facts(every: pl.DataFrame, found: pl.DataFrame) -> list[dict[str, Any]]:
    """Counts; `margin` is the sum of (target - best negative) in 10^-6, `chance` that of the
    probabilities, in 10^-6 as well, that the target is the first of its line drawn at random.
    """
    chance = every.select((1_000_000 // (pl.col("negatives").list.len() + 1)).sum()).item()
    margin = found.select(pl.col("target").cast(pl.Int64) - pl.col("negative")).to_series()
    facts = {
        "pairs": every["pair_id"].n_unique(),
        "instructions": found.height,
        "preferred": int((margin > 0).sum()),
        "margin": int(margin.sum()),
        "chance": int(chance),
    }
    return [{"name": name, "value": value} for name, value in facts.items()]
