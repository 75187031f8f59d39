"""Mine pairs: targets of each query inside the bands of the spaces, hard negatives outside."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from infra import neighbours, pairing, tables
from infra.build import Build
from infra.ledger import stage
from infra.neighbours import Scorer
from infra.pairing import Judged, Margins, Space
from infra.schema import SCHEMAS
from infra.tables import Table

CHUNK = 10_000


class PairParams(BaseModel):
    """How many pairs a query gives, and what comes with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: int = Field(3, ge=1, le=100, description="Targets of a query at most.")
    negatives: int = Field(
        5, ge=1, le=100, description="Hard negatives of a pair at most; the query itself is first."
    )
    negatives_from: Literal["unrelated", "retrieved"] = Field(
        "unrelated",
        description="Where hard negatives come from after the query. `unrelated`: images of the"
        " query's lists that are in no band of it and below every band against the target."
        " `retrieved`: as MegaPairs, other images in the query's bands; none is compared with the"
        " target, so more of them fit the instruction as well.",
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
    """Pairs, the bands they were cut from, counts, and pairs that lost to their reverse.

    What the next mining starts from: `judged`, what is known of each pair by rows of `images`.
    """

    pairs: Table
    bands: Table
    facts: Table
    drops: Table
    images: Table
    judged: Table


@stage(
    version=3,
    reads={
        "eligible": ("image_id", "caption_id"),
        "members": ("image_id",),
        "lists": ("row", "neighbours", "scores"),
        "vectors": (),
        "texts": (),
    },
    # Canonical JSON sorts the spaces, but they take turns in the order of the config.
    meaning=lambda params: [params.model_dump(mode="json"), list(params.spaces)],
    starts_from=("eligible", "image_id"),
)
def mine_pairs(
    build: Build,
    eligible: Table,
    members: dict[str, Table],
    lists: dict[str, Table],
    vectors: dict[str, Table],
    texts: dict[str, Table],
    params: MiningParams,
    before: Mined | None = None,
) -> Mined:
    """Pairs as in MegaPairs (Zhou et al. 2024, arXiv 2412.14475, section 3.1), one band a space.

    Targets are taken in turn over the spaces, the best unused one in the band first; a pair carries
    its score in every space, and its rank where it is listed. Negatives: the query itself; then,
    `unrelated`, images of the query's lists, spaces in turn, that are in no band of it and score
    below every band's low end against the target, or, `retrieved`, those that would be its next
    targets. Raises PairmillError where a vector is missing.
    """
    images = tables.frame(build.store, eligible, ["image_id", "caption_id"]).sort("image_id")
    spaces, bands = [], []
    for name, rule in params.spaces.items():
        space, band = _load(build, images, members[name], lists[name], vectors, texts, rule)
        spaces.append(space)
        bands.append({"space": name, **band})
    past = _past(build, images, len(spaces), before)
    names, parts = images["image_id"].to_list(), []
    for at in range(0, max(images.height, 1), CHUNK):
        parts.append(_mined(build, spaces, slice(at, at + CHUNK), past, names, params))
        build.progress("mine_pairs", min(at + CHUNK, images.height), images.height)
    found = Found(*(np.concatenate(column) for column in zip(*(p[0] for p in parts), strict=True)))
    kept, drops = _one_way(found, params.direction)
    few = int(((found.negatives[kept] >= 0).sum(axis=1) < params.negatives - 1).sum())
    facts = {"pairs": len(kept), "pairs_with_too_few_negatives": few}
    return Mined(
        tables.write(build.store, "pairs", _pairs(found, kept, names, spaces, params)),
        tables.write(build.store, "bands", bands),
        tables.write(build.store, "facts", [{"name": n, "value": c} for n, c in facts.items()]),
        tables.write_frame(build.store, "drops", drops),
        tables.write_frame(build.store, "mined_images", images),
        tables.write(build.store, "judged", pa.concat_tables(part[1] for part in parts)),
    )


class Found(NamedTuple):
    """Pairs: ids (S64), rows of query and target [p], score and rank in each space [p, s], rows of
    negatives [p, negatives - 1], -1 where there are fewer."""

    pair_id: np.ndarray
    query: np.ndarray
    target: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    negatives: np.ndarray


class Past(NamedTuple):
    """What an earlier build knew of pairs, under the rows of today; keys ascend."""

    key: np.ndarray
    pair_id: np.ndarray
    score: np.ndarray
    cut: np.ndarray
    judged: Judged


def _load(
    build: Build,
    images: pl.DataFrame,
    members: Table,
    lists: Table,
    vectors: dict[str, Table],
    texts: dict[str, Table],
    rule: tuple[str, str, str, float, float],
) -> tuple[Space, dict[str, int]]:
    """A space over all images, and its band with how many cut lists end inside or above it."""
    model, of, unit, *ends = rule
    inside = tables.frame(build.store, members).join(images.with_row_index(), on="image_id")
    place = inside.sort("image_id")["index"].to_numpy().astype(np.int32)
    neighbour, score = tables.dense_lists(build.store, lists)
    low, high = band_bounds(score[neighbour >= 0], unit, *ends)
    k = max(1, neighbour.shape[1])
    wide, scores = np.full((images.height, k), -1, np.int32), np.zeros((images.height, k), np.int32)
    if neighbour.size:
        wide[place] = np.where(neighbour >= 0, place[neighbour], -1)
        scores[place] = score
    column, table = ("image_id", vectors) if of == "image" else ("caption_id", texts)
    ids, matrix = tables.gather(build.store, table[model], images[column].drop_nulls().to_list())
    row = _rows(images[column], ids)
    cut = (wide[:, -1] >= 0) & (scores[:, -1] >= low) & (k < len(place) - 1)
    last = scores[:, -1][cut]
    about = {
        "low": low,
        "high": high,
        "scores": int((wide >= 0).sum()),
        "truncated": int((last <= high).sum()),
        "crowded": int((last > high).sum()),
    }
    return Space(wide, scores, low, high, Scorer(matrix), row, cut), about


def _rows(wanted: pl.Series, ids: list[str]) -> np.ndarray:
    """The place of each wanted id among ids, -1 where there is none: int32[n]."""
    known = pl.DataFrame({"id": ids}, {"id": pl.String}).with_row_index("row")
    found = wanted.alias("id").to_frame().join(known, on="id", how="left", maintain_order="left")
    return found["row"].cast(pl.Int32).fill_null(-1).to_numpy()


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


def _past(build: Build, images: pl.DataFrame, spaces: int, before: Mined | None) -> Past:
    """What the build before knew of pairs of images that are there still, with their captions."""
    if before is None or not before.judged.rows:
        empty = np.zeros((0, spaces), np.int32)
        none, no_id = np.zeros(0, np.int64), np.zeros(0, "S64")
        return Past(none, no_id, empty, empty > 0, pairing.nothing_known(0, spaces))
    both = ["image_id", "caption_id"]
    old = tables.frame(build.store, before.images).with_row_index("old")
    stayed = images.with_row_index("now").join(old, on=both, nulls_equal=True)
    place = np.full(old.height + 1, -1, np.int64)  # the last stands for no row
    place[stayed["old"].to_numpy()] = stayed["now"].to_numpy()
    rows = tables.read(build.store, before.judged)
    query, target = (place[rows[name].to_numpy()] for name in ("query", "target"))
    here = np.flatnonzero((query >= 0) & (target >= 0))
    key = query[here] * images.height + target[here]
    here, key = here[np.argsort(key)], np.sort(key)
    candidate, good = (_ragged(rows[name])[here] for name in ("candidates", "good"))
    margins = Margins(*(_fixed(rows[name], spaces)[here] for name in Margins._fields))
    scores, cut = (_fixed(rows[name], spaces)[here] for name in ("scores", "cut"))
    known = Judged(place[candidate].astype(np.int32), good == 1, margins)
    pair_ids = _as_bytes(rows["pair_id"])[here]
    return Past(key, pair_ids, scores, cut == 1, known)


def _as_bytes(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.binary(64)).to_numpy().astype("S64")


def _ragged(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of small numbers as int32[n, longest], -1 beyond their ends."""
    array = column.combine_chunks()
    length = np.diff(array.offsets)
    out = np.full((len(array), int(length.max(initial=0))), -1, np.int32)
    out[np.arange(out.shape[1]) < length[:, None]] = array.flatten().to_numpy()
    return out


def _fixed(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)


def _mined(
    build: Build,
    spaces: list[Space],
    queries: slice,
    past: Past,
    names: list[str],
    params: MiningParams,
) -> tuple[Found, pa.Table]:
    """Pairs of some queries, and what is known of them; what was known is not asked again."""
    query, target = pairing.targets(spaces, queries, params.targets)
    key = query * len(spaces[0].row) + target
    at = np.searchsorted(past.key, key)
    met = np.flatnonzero(np.append(past.key, -1)[at] == key)
    at = at[met]
    ids = np.zeros(len(query), "S64")
    ids[met] = past.pair_id[at]
    for new in np.flatnonzero(ids == b"").tolist():
        ids[new] = pair_id(names[query[new]], names[target[new]])
    score, rank = _ties(build, spaces, query, target, met, past.score[at])
    cut = np.stack([space.cut for space in spaces], axis=1)[query]
    wanted = params.negatives - 1
    if params.negatives_from == "retrieved":
        judged = pairing.nothing_known(len(query), len(spaces))
        negatives = pairing.others_retrieved(spaces, queries, query, target, wanted)
    else:
        same = (past.cut[at] == cut[met]).all(axis=1)
        known = _recalled(spaces, len(query), met, pairing.take(past.judged, at), same)
        judged, computed = pairing.judge(spaces, query, target, known, wanted)
        build.work["similarities_computed"] += computed
        negatives = pairing.chosen(judged, wanted)
    found = Found(ids, query, target, score, rank, negatives)
    return found, _as_table(found, cut, judged)


def _recalled(
    spaces: list[Space], pairs: int, met: np.ndarray, known: Judged, same: np.ndarray
) -> Judged:
    """What is known of so many pairs: of those `met` before, what holds for the bands of today.

    `same` bool[m] says whose lists are cut where they were.
    """
    holds = np.flatnonzero(same & pairing.stands(known.margins, spaces))
    nothing = pairing.nothing_known(pairs, len(spaces))
    return pairing.put(nothing, met[holds], pairing.take(known, holds))


def _ties(
    build: Build,
    spaces: list[Space],
    query: np.ndarray,
    target: np.ndarray,
    met: np.ndarray,
    past: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Score and rank (from 1, 0 where not listed) of each pair in each space, int32[p, s].

    A pair that the list was cut before has a score all the same, and may be in the band.
    """
    score = np.full((len(query), len(spaces)), pairing.ABSENT, np.int32)
    rank = np.zeros_like(score)
    for number, space in enumerate(spaces):
        hit = space.neighbour[query] == target[:, None]
        listed = hit.any(axis=1)
        place = hit.argmax(axis=1)
        rank[listed, number] = place[listed] + 1
        score[listed, number] = space.score[query[listed], place[listed]]
        ask = ~listed
        score[met, number] = np.where(listed[met], score[met, number], past[:, number])
        ask[met] = False
        rest = np.flatnonzero(ask)
        score[rest, number] = pairing.scores(space, query[rest], target[rest])
        build.work["similarities_computed"] += int((score[rest, number] != pairing.ABSENT).sum())
    return score, rank


def pair_id(query: str, target: str) -> str:
    """SHA-256 of the two image ids, in order."""
    return hashlib.sha256(f"{query}>{target}".encode()).hexdigest()


def _one_way(found: Found, direction: str) -> tuple[np.ndarray, pl.DataFrame]:
    """Rows of the pairs that stay, in order of id; with `one`, of a pair and its reverse that of
    the lesser id stays, and the other is dropped and said so."""
    columns = [_as_strings(found.pair_id), pa.array(found.query), pa.array(found.target)]
    rows = pl.DataFrame(pa.table(columns, ["id", "query", "target"])).with_row_index()
    reverse = rows.select(detail="id", query="target", target="query")
    lost = rows.join(reverse, on=["query", "target"]).filter(pl.col("detail") < pl.col("id"))
    lost = lost.clear() if direction == "both" else lost
    kept = rows.join(lost, on="index", how="anti").sort("id")["index"].to_numpy()
    drops = lost.select(
        pl.lit("pair").alias("level"),
        "id",
        pl.lit("mine_pairs").alias("stage"),
        pl.lit("reverse_kept").alias("rule"),
        pl.lit(None, pl.Int64).alias("value"),
        "detail",
    )
    return kept, drops


def _pairs(
    found: Found,
    kept: np.ndarray,
    names: list[str],
    spaces: list[Space],
    params: MiningParams,
) -> pa.Table:
    """Rows of the table `pairs`."""
    images = pa.array(names, pa.string())
    score, rank = found.score[kept], found.rank[kept]
    tied = score != pairing.ABSENT
    low, high = (np.array([getattr(space, end) for space in spaces]) for end in ("low", "high"))
    number = np.broadcast_to(np.arange(len(spaces)), tied.shape)
    ties = [
        pa.array(list(params.spaces), pa.string()).take(pa.array(number[tied])),
        pa.array(score[tied]),
        pa.array(rank[tied], mask=rank[tied] == 0),
        pa.array(((score >= low) & (score <= high))[tied]),
    ]
    negatives = np.column_stack([found.query[kept], found.negatives[kept]])
    listed = negatives >= 0
    columns = {
        "pair_id": _as_strings(found.pair_id[kept]),
        "query": images.take(pa.array(found.query[kept])),
        "target": images.take(pa.array(found.target[kept])),
        "ties": pa.ListArray.from_arrays(
            _ends(tied), pa.StructArray.from_arrays(ties, ["space", "score", "rank", "in_band"])
        ),
        "negatives": pa.ListArray.from_arrays(
            _ends(listed), images.take(pa.array(negatives[listed]))
        ),
    }
    return pa.table(columns).cast(SCHEMAS["pairs"])


def _as_table(found: Found, cut: np.ndarray, judged: Judged) -> pa.Table:
    """What is known of each pair, for the next night."""
    known = judged.candidate >= 0
    margins = dict(zip(Margins._fields, map(_lists, judged.margins), strict=True))
    columns = {
        "pair_id": _as_strings(found.pair_id),
        "query": pa.array(found.query, pa.int32()),
        "target": pa.array(found.target, pa.int32()),
        "scores": _lists(found.score),
        "cut": _lists(cut.astype(np.int8)),
        "candidates": pa.ListArray.from_arrays(_ends(known), pa.array(judged.candidate[known])),
        "good": pa.ListArray.from_arrays(
            _ends(known), pa.array(judged.good[known].astype(np.int8))
        ),
    }
    return pa.table(columns | margins).cast(SCHEMAS["judged"])


def _as_strings(ids: np.ndarray) -> pa.Array:
    return pa.array(ids, pa.binary()).cast(pa.string())


def _ends(mask: np.ndarray) -> pa.Array:
    """Ends of the lists that the true entries of each line make."""
    return pa.array(np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32))


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(_ends(np.ones(rows.shape, bool)), pa.array(rows.ravel()))
