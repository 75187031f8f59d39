"""Mine pairs: targets of each query inside the bands of the spaces, hard negatives outside."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import neighbours, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

CHUNK = 10_000
SCORED_AT_ONCE = 100_000
# Candidates for negatives that are checked at a time, for each one wanted.
CANDIDATES = 6


class PairParams(BaseModel):
    """How many pairs a query gives, and what comes with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: int = Field(3, ge=1, le=100, description="Targets of a query at most.")
    negatives: int = Field(
        5, ge=1, le=100, description="Hard negatives of a pair at most; the query itself is first."
    )
    direction: Literal["both", "one"] = Field(
        "both", description="one: of a pair and its reverse, only that of the lesser id stays."
    )


class MiningParams(PairParams):
    """Pair parameters and, by space, (model, of, unit, low, high)."""

    spaces: Mapping[str, tuple[str, str, str, float, float]]


def mining_params(params: PairParams, spaces: Mapping[str, Any]) -> MiningParams:
    """Put together what pairs depend on."""
    rows = {
        name: (s.model, s.of, s.band.unit, s.band.low, s.band.high) for name, s in spaces.items()
    }
    return MiningParams(**params.model_dump(), spaces=rows)


class Mined(NamedTuple):
    """Pairs, the bands they were cut from, counts, and pairs that lost to their reverse."""

    pairs: Table
    bands: Table
    facts: Table
    drops: Table


class Space(NamedTuple):
    """One space in memory: lists over all images [n, k], -1 where there is none, and its band."""

    members: int
    neighbour: np.ndarray
    score: np.ndarray
    low: int
    high: int
    vectors: np.ndarray
    row: np.ndarray


@stage(
    version=2,
    reads={
        "eligible": ("image_id", "caption_id"),
        "members": ("image_id",),
        "lists": ("row", "neighbours", "scores"),
        "vectors": (),
        "texts": (),
    },
    # Canonical JSON sorts the spaces, but they take turns in the order of the config.
    meaning=lambda params: [params.model_dump(mode="json"), list(params.spaces)],
)
def mine_pairs(
    build: Build,
    eligible: Table,
    members: dict[str, Table],
    lists: dict[str, Table],
    vectors: dict[str, Table],
    texts: dict[str, Table],
    params: MiningParams,
) -> Mined:
    """Pairs as in MegaPairs (Zhou et al. 2024, arXiv 2412.14475, section 3.1), one band a space.

    Targets are taken in turn over the spaces, the best unused one in the band first; a pair carries
    its score in every space, and its rank where it is listed. Negatives: the query itself; then
    images of the query's lists, spaces in turn, that are in no band of it and score below every
    band's low end against the target.
    """
    frame = tables.frame(build.store, eligible).sort("image_id")
    ids = frame["image_id"].to_list()
    spaces = {
        name: _load(build, frame, members[name], lists[name], vectors, texts, rule)
        for name, rule in params.spaces.items()
    }
    written = []
    for at in range(0, len(ids), CHUNK):
        pairs = list(_targets(range(at, min(at + CHUNK, len(ids))), spaces, params.targets))
        written += _rows(build, pairs, ids, spaces, params.negatives)
        build.progress("mine_pairs", min(at + CHUNK, len(ids)), len(ids))
    kept, drops = _one_way(written) if params.direction == "one" else (written, [])
    short = sum(len(row["negatives"]) < params.negatives for row in kept)
    counts = {"pairs": len(kept), "pairs_with_too_few_negatives": short}
    return Mined(
        tables.write(build.store, "pairs", sorted(kept, key=lambda row: row["pair_id"])),
        tables.write(build.store, "bands", [_band(n, s) for n, s in spaces.items()]),
        tables.write(build.store, "facts", [{"name": n, "value": c} for n, c in counts.items()]),
        tables.write(build.store, "drops", drops),
    )


def _load(
    build: Build,
    frame: pl.DataFrame,
    members: Table,
    lists: Table,
    vectors: dict[str, Table],
    texts: dict[str, Table],
    rule: tuple[str, str, str, float, float],
) -> Space:
    model, of, unit, low, high = rule
    ids = np.array(frame["image_id"].to_list(), dtype="S64")
    inside = np.array(tables.read(build.store, members)["image_id"].to_pylist(), dtype="S64")
    place = np.searchsorted(ids, inside).astype(np.int32)
    neighbour, score = _dense(build, lists, len(inside))
    wide = np.full((len(ids), neighbour.shape[1]), -1, np.int32)
    wide[place] = np.where(neighbour >= 0, place[neighbour] if len(place) else -1, -1)
    scores = np.zeros_like(wide)
    scores[place] = score
    column, table = ("image_id", vectors) if of == "image" else ("caption_id", texts)
    names, matrix = tables.gather(build.store, table[model], frame[column].drop_nulls().to_list())
    wanted = np.array(frame[column].fill_null("").to_list(), dtype="S64")
    known = np.array([*names, "~"], dtype="S64")
    row = np.searchsorted(known[:-1], wanted).astype(np.int32)
    row[known[row] != wanted] = -1
    bounds = band_bounds(score[neighbour >= 0], unit, low, high)
    return Space(len(inside), wide, scores, *bounds, matrix, row)


def _dense(build: Build, lists: Table, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists as int32[n, k] matrices of rows (-1 where none) and scores."""
    parts = [
        (np.diff(part["neighbours"].combine_chunks().offsets), part)
        for part in tables.shards(build.store, lists)
    ]
    k = max((int(lengths.max()) for lengths, _ in parts if len(lengths)), default=1) or 1
    neighbour, score = np.full((n, k), -1, np.int32), np.zeros((n, k), np.int32)
    at = 0
    for lengths, part in parts:
        filled = np.arange(k) < lengths[:, None]
        rows = slice(at, at + len(lengths))
        neighbour[rows][filled] = part["neighbours"].combine_chunks().flatten().to_numpy()
        score[rows][filled] = part["scores"].combine_chunks().flatten().to_numpy()
        at += len(lengths)
    return neighbour, score


def band_bounds(scores: np.ndarray, unit: str, low: float, high: float) -> tuple[int, int]:
    """The band as integer scores, both ends in it: quantiles of all list scores, or cosines.

    Scores of 1,000,000 are left out of the quantiles: one caption shared by hundreds would make
    the band of a text space identical captions only. Where no others are left, the band is empty:
    (1000000, 999999).
    """
    if unit == "cosine":
        return round(low * 1e6), round(high * 1e6)
    ordered = np.sort(scores[scores < neighbours.ONE])
    if not len(ordered):
        return neighbours.ONE, neighbours.ONE - 1
    return tuple(int(ordered[int(q * (len(ordered) - 1))]) for q in (low, high))  # type: ignore[return-value]


def _band(name: str, space: Space) -> dict[str, Any]:
    """Band, and how many cut lists end inside it (truncated) or lie wholly above it (crowded)."""
    last = space.score[:, -1][_cut_short(space)]
    return {
        "space": name,
        "low": space.low,
        "high": space.high,
        "scores": int((space.neighbour >= 0).sum()),
        "truncated": int((last <= space.high).sum()),
        "crowded": int((last > space.high).sum()),
    }


def _cut_short(space: Space) -> np.ndarray:
    """Images whose list ends before the band's low end does, so that it may lack some of the band.

    A list of all other members lacks none.
    """
    if space.neighbour.shape[1] >= space.members - 1:
        return np.zeros(len(space.neighbour), bool)
    return (space.neighbour[:, -1] >= 0) & (space.score[:, -1] >= space.low)


def _targets(queries: range, spaces: Mapping[str, Space], most: int) -> Iterator[tuple[int, int]]:
    """(query, target) rows: spaces in turn, each giving its best unused neighbour in the band."""
    lines = []
    for space in spaces.values():
        part = slice(queries.start, queries.stop)
        neighbour, score = space.neighbour[part], space.score[part]
        inside = (neighbour >= 0) & (score >= space.low) & (score <= space.high)
        lines.append([row[keep].tolist() for row, keep in zip(neighbour, inside, strict=True)])
    for query, *candidates in zip(queries, *lines, strict=True):
        for target in _in_turn(candidates, most):
            yield query, target


def _in_turn(lists: list[list[int]], most: int) -> list[int]:
    """Up to `most` distinct items, one from each list in turn, each list's first unused one."""
    used: dict[int, None] = {}
    waiting = [iter(items) for items in lists]
    while waiting and len(used) < most:
        for items in list(waiting):
            fresh = next((item for item in items if item not in used), None)
            if fresh is None:
                waiting.remove(items)
            elif len(used) < most:
                used[fresh] = None
    return list(used)


def _rows(
    build: Build,
    pairs: list[tuple[int, int]],
    ids: list[str],
    spaces: Mapping[str, Space],
    negatives: int,
) -> list[dict[str, Any]]:
    """Pair rows with ties and negatives."""
    queries, targets = np.array(pairs, np.int32).reshape(-1, 2).T
    ties = [_ties(build, name, space, queries, targets) for name, space in spaces.items()]
    chosen = _negatives(build, queries, targets, spaces, negatives - 1)
    rows = []
    for query, target, found, *scores in zip(
        *map(list, (queries, targets)), chosen, *ties, strict=True
    ):
        rows.append(
            {
                "pair_id": pair_id(ids[query], ids[target]),
                "query": ids[query],
                "target": ids[target],
                "ties": [tie for tie in scores if tie["score"] is not None],
                "negatives": [ids[query], *(ids[row] for row in found)],
            }
        )
    return rows


def pair_id(query: str, target: str) -> str:
    """SHA-256 of the two image ids, in order."""
    return hashlib.sha256(f"{query}>{target}".encode()).hexdigest()


def _ties(
    build: Build, name: str, space: Space, queries: np.ndarray, targets: np.ndarray
) -> list[dict[str, Any]]:
    """Score of each pair, its rank from 1 in the query's list or None, and whether it is in band.

    A pair that the list was cut before has a score all the same, and may be in the band.
    """
    hit = space.neighbour[queries] == targets[:, None]
    listed = hit.any(axis=1)
    rank = np.where(listed, hit.argmax(axis=1) + 1, 0)
    score = np.where(listed, space.score[queries, np.maximum(rank - 1, 0)], 0)
    both = (space.row[queries] >= 0) & (space.row[targets] >= 0)
    score[both & ~listed] = _scores(build, space, queries[both & ~listed], targets[both & ~listed])
    return [
        {
            "space": name,
            "score": int(s) if known else None,
            "rank": int(r) or None,
            "in_band": bool(known and space.low <= s <= space.high),
        }
        for s, r, known in zip(score, rank, both, strict=True)
    ]


def _scores(build: Build, space: Space, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scores int32[n] of rows a with rows b, all of which are in the space."""
    build.work["similarities_computed"] += len(a)
    found = np.zeros(len(a), np.int32)
    for at in range(0, len(a), SCORED_AT_ONCE):
        part = slice(at, at + SCORED_AT_ONCE)
        left, right = space.row[a[part]], space.row[b[part]]
        found[part] = neighbours.scores(space.vectors[left], space.vectors[right])
    return found


def _negatives(
    build: Build,
    queries: np.ndarray,
    targets: np.ndarray,
    spaces: Mapping[str, Space],
    wanted: int,
) -> list[list[int]]:
    """Rows of hard negatives for each pair, the query itself not among them.

    Most pairs have enough among the first candidates; only the others look further down.
    """
    outside = {query: _outside(query, spaces) for query in set(queries.tolist())}
    lines = [outside[query] for query in queries.tolist()]
    found: list[list[int]] = [[] for _ in lines]
    at, step = 0, wanted * CANDIDATES
    short = [pair for pair, line in enumerate(lines) if line] if wanted else []
    while short:
        flat = [(pair, item) for pair in short for item in lines[pair][at : at + step]]
        pair, candidate = np.array(flat, np.int32).T
        good = _unrelated(build, queries[pair], targets[pair], candidate, spaces)
        for place, row in zip(pair[good].tolist(), candidate[good].tolist(), strict=True):
            if len(found[place]) < wanted:
                found[place].append(row)
        at += step
        short = [p for p in short if len(found[p]) < wanted and len(lines[p]) > at]
    return found


def _unrelated(
    build: Build,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: np.ndarray,
    spaces: Mapping[str, Space],
) -> np.ndarray:
    """Whether candidates are below every band against the target and in no band of the query.

    In a list that was cut short a candidate may be in the query's band and not be listed.
    """
    good = np.ones(len(candidates), bool)
    for space in spaces.values():
        inside = space.row[candidates] >= 0
        known = good & inside & (space.row[targets] >= 0)
        good[known] = _scores(build, space, targets[known], candidates[known]) < space.low
        unseen = good & inside & _cut_short(space)[queries]
        score = _scores(build, space, queries[unseen], candidates[unseen])
        good[unseen] = (score < space.low) | (score > space.high)
    return good


def _outside(query: int, spaces: Mapping[str, Space]) -> list[int]:
    """Images of the query's lists that are in no band of it: spaces in turn, best first."""
    lists, related = [], {query}
    for space in spaces.values():
        row, score = space.neighbour[query], space.score[query]
        inside = (score >= space.low) & (score <= space.high)
        related.update(row[inside & (row >= 0)].tolist())
        lists.append(row[~inside & (row >= 0)].tolist())
    in_turn = (item for round_ in zip_longest(*lists) for item in round_ if item is not None)
    return list(dict.fromkeys(item for item in in_turn if item not in related))


def _one_way(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of a pair and its reverse keep the lesser id; the other is dropped and said so."""
    ids = {row["pair_id"] for row in rows}
    kept, drops = [], []
    for row in rows:
        reverse = pair_id(row["target"], row["query"])
        if reverse in ids and reverse < row["pair_id"]:
            drops.append(
                {
                    "level": "pair",
                    "id": row["pair_id"],
                    "stage": "mine_pairs",
                    "rule": "reverse_kept",
                    "detail": reverse,
                }
            )
        else:
            kept.append(row)
    return kept, drops
