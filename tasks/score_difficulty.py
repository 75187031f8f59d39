"""Score difficulty: how much question, picture and first answer help models in process to answers.

Hybrid-Instruct of LLaVAR-2 (arXiv 2412.16364); the formulas are in infra.difficulty.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import difficulty, samples, tables
from infra.build import Build
from infra.canonical import digest
from infra.cluster import Crash
from infra.difficulty import FollowUp, Question, Ratio
from infra.errors import PairmillError
from infra.ledger import Ledger, pinned, stage
from infra.local_mllm import LocalModel, Shown
from infra.pictures import Prepared
from infra.store import Store
from infra.tables import Table

SHARD = 32  # samples to a worker, and to a receipt
MILLION = 1_000_000
Nats = list[int | None]  # numerator and denominator in millionths of a nat, null for nan


class DifficultyParams(BaseModel):
    """The two models that score answers, by how likely they find each of their tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: LocalModel = Field(
        LocalModel(name="microsoft/Phi-3-mini-4k-instruct"),
        description="The model of text, for IFD. The default is that of the paper's code.",
    )
    vision: LocalModel = Field(
        LocalModel(name="Qwen/Qwen2.5-VL-3B-Instruct"),
        description="The model that sees, for VFD and FFD. Our own default: the code's"
        " Phi-3.5-vision-instruct loads only with code of its own, which never runs here.",
    )
    max_pixels: int = Field(
        1_003_520,
        ge=784,
        description="Pixels per picture shown. Not given in the source; our own default.",
    )

    def published(self) -> dict[str, Any]:
        """The settings without places."""
        names = {side: getattr(self, side).model for side in ("text", "vision")}
        return {**names, "max_pixels": self.max_pixels}


class Turns(NamedTuple):
    """Columns of a question, its answer, a question that follows, and the answer to that."""

    q_e: str = "q_e"
    a_e: str = "a_e"
    q_s: str = "q_s"
    a_s: str = "a_s"


class Scoring(NamedTuple):
    """The models, and the columns of the turns."""

    models: DifficultyParams
    turns: Turns = Turns()

    def pinned(self, build: Build) -> "Scoring":
        """With the numerics of both models: scores of other weights are other scores."""
        return self._replace(models=pinned(self.models, build))


class Scored(NamedTuple):
    """Samples with their scores, and what was computed, by the content of what was scored.

    `ifd_e`, `ifd_s`, `vfd_e`, `vfd_s`, `ffd` are ratios in millionths, and with `_nll` their
    [numerator, denominator] in millionths of a nat; `mifd_e`, `mifd_s` are IFD * VFD, and `mifd`
    the larger of the two. Null where an answer has no token to score.
    """

    samples: Table
    scores: Table


def meaning(params: Scoring) -> dict[str, Any]:
    return {**params.models.published(), "turns": list(params.turns)}


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning, starts_from=("given", "sample_id"))
def score_difficulty(
    build: Build, given: Table, objects: Table, params: Scoring, before: Scored | None = None
) -> Scored:
    """Score each pair of turns about a picture. What was scored before is not scored again.

    A sample's passes through a model form batches of their own, so that no score hangs on who
    else was there. Raises PairmillError where a model ends its worker.
    """
    rows = tables.frame(build.store, given)
    named = rows.with_columns(pl.Series("_key", _keys(rows, params.turns), pl.String))
    known = {} if before is None else _known(build, before.scores)
    wanted = named.filter(~pl.col("_key").is_in(list(known))).unique("_key", keep="first")
    found = known | _computed(build, wanted.sort("image_id", "_key"), objects, params)
    parts = [{"sample_id": key, **found[key]} for key in named["_key"].unique().sort()]
    scored = pl.DataFrame([scores(found[key]) for key in named["_key"]], _SCORES, orient="row")
    return Scored(
        samples.write(build.store, rows.hstack(scored)),
        samples.write(build.store, pl.DataFrame(parts, _PARTS, orient="row"), "scores"),
    )


_NLL = ("ifd_e", "ifd_s", "vfd_e", "vfd_s", "ffd")
_RATIOS = (*_NLL, "mifd_e", "mifd_s", "mifd")
_LISTS: dict[str, Any] = {f"{name}_nll": pl.List(pl.Int64) for name in _NLL}
_SCORES = {**_LISTS, **dict.fromkeys(_RATIOS, pl.Int64)}
_PARTS = {"sample_id": pl.String, **_LISTS}


def scores(nll: Mapping[str, Nats]) -> dict[str, Any]:
    """All scores of a sample, from what is stored of it: exact ratios, rounded once."""
    ratios = {name: ratio(nll[f"{name}_nll"]) for name in _NLL}
    both = {side: ratio(nll[f"ifd_{side}_nll"], nll[f"vfd_{side}_nll"]) for side in ("e", "s")}
    larger = None if None in both.values() else max(v for v in both.values() if v is not None)
    return {**nll, **ratios, "mifd_e": both["e"], "mifd_s": both["s"], "mifd": larger}


def ratio(*parts: Nats) -> int | None:
    """The product of numerators over denominators, in millionths; None where there is none."""
    above, below = 1, 1
    for numerator, denominator in parts:
        if numerator is None or not denominator:
            return None
        above, below = above * numerator, below * denominator
    return (2 * MILLION * above + below) // (2 * below)


def _keys(rows: pl.DataFrame, turns: Turns) -> list[str]:
    """Digests of what is scored, whatever else is known of a sample."""
    return [digest(list(row)) for row in rows.select("image_id", *turns).iter_rows()]


def _known(build: Build, table: Table) -> dict[str, dict[str, Nats]]:
    rows = tables.frame(build.store, table).iter_rows(named=True)
    return {row.pop("sample_id"): row for row in rows}


# On workers ----------------------------------------------------------------------------------


class Item(NamedTuple):
    """A pair of turns as a worker takes it."""

    key: str
    pair: FollowUp


def _computed(
    build: Build, rows: pl.DataFrame, objects: Table, params: Scoring
) -> dict[str, dict[str, Nats]]:
    """The likelihoods of each row by its key: first all of one model, then all of the other."""
    models = params.models
    pictures = Prepared(build, rows["image_id"], objects, models.max_pixels)
    found: dict[str, dict[str, Nats]] = {key: {} for key in rows["_key"]}
    passes = ((models.text, by_text, None), (models.vision, by_sight, pictures))
    for at, (local, score, shown) in enumerate(passes):
        work = partial(_with_receipt, build.store, local, models.max_pixels, score)
        done = 0
        shards = _shards(rows, params.turns, shown)
        for shard, result in build.pool.map(work, shards, resources=local.resources):
            if isinstance(result, Crash):
                raise PairmillError(
                    f"scoring by {local.name!r} ended its worker: {result.reason}; run again"
                )
            for key, nll in result["rows"].items():
                found[key] |= nll
            done += len(shard)
            build.work["answers_scored"] += len(shard) if at and result["fresh"] else 0
            build.progress("score_difficulty", at * rows.height + done, 2 * rows.height)
    return found


def _shards(rows: pl.DataFrame, turns: Turns, shown: Prepared | None) -> Iterator[tuple[Item, ...]]:
    for part in rows.iter_slices(SHARD):
        yield tuple(
            Item(
                row["_key"],
                FollowUp(
                    Question(
                        (Shown("", shown.lying(row["image_id"])),) if shown else (),
                        row[turns.q_e],
                        row[turns.a_e],
                    ),
                    row[turns.q_s],
                    row[turns.a_s],
                ),
            )
            for row in part.iter_rows(named=True)
        )


def _with_receipt(
    store: Store, local: LocalModel, max_pixels: int, score: Any, shard: Sequence[Item]
) -> dict[str, Any]:
    """Score a shard, or find what was scored by a build that did not come to its end."""
    ledger, key = Ledger(store), digest([max_pixels, [item.key for item in shard]])
    folder = f"{local.numerics}/receipts"
    record = ledger.find("score_difficulty", folder, f"{score.__name__}-{key}")
    if record is not None:
        return {**record, "fresh": False}
    rows = {item.key: score(local, item.pair) for item in shard}
    ledger.write("score_difficulty", folder, f"{score.__name__}-{key}", {"rows": rows})
    return {"rows": rows, "fresh": True}


def by_text(local: LocalModel, pair: FollowUp) -> dict[str, Nats]:
    """IFD of both answers."""
    first, second = difficulty.instruction_difficulty(local, _both(pair))
    return {"ifd_e_nll": nats(first), "ifd_s_nll": nats(second)}


def by_sight(local: LocalModel, pair: FollowUp) -> dict[str, Nats]:
    """VFD of both answers, and FFD of the second after the first."""
    first, second = difficulty.visual_difficulty(local, _both(pair))
    (follow,) = difficulty.follow_up_difficulty(local, [pair])
    return {"vfd_e_nll": nats(first), "vfd_s_nll": nats(second), "ffd_nll": nats(follow)}


def _both(pair: FollowUp) -> list[Question]:
    return [pair.first, Question(pair.first.pictures, pair.question, pair.answer)]


def nats(found: Ratio) -> Nats:
    """Likelihoods as they are stored."""
    sides = (found.numerator, found.denominator)
    return [round(side * MILLION) if isfinite(side) else None for side in sides]
