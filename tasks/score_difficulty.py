"""Score difficulty: how much question, picture and first answer help models in process to answers.

Hybrid-Instruct of LLaVAR-2 (arXiv 2412.16364); the formulas are in infra.difficulty.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import difficulty, samples, tables
from infra.build import Build
from infra.canonical import digest
from infra.cluster import Crash
from infra.difficulty import MILLION, Given, Reader, product
from infra.errors import PairmillError
from infra.ledger import Ledger, pinned, stage
from infra.local_mllm import LocalModel, Shown
from infra.local_probes import Likelihood, TooLong, log_probs
from infra.pictures import Prepared
from infra.store import Store
from infra.tables import Table

VERSION = 3  # of results, and of receipts
SHARD = 128  # answers to a worker, and to a receipt


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
    """Samples with their scores, those that are too long for a model, and every likelihood.

    `ifd_e`, `ifd_s`, `vfd_e`, `vfd_s`, `ffd` are ratios in millionths, and with `_nll` their
    [numerator, denominator] in millionths of a nat; `mifd_e`, `mifd_s` are IFD * VFD, and `mifd`
    the larger of the two. Null where an answer has no token to score. `likelihoods` go by the
    content of what was scored: a mean in millionths of a nat, or the tokens that were too many.
    """

    samples: Table
    drops: Table
    likelihoods: Table


class Mean(NamedTuple):
    """Mean NLL in millionths of a nat, null without a token; or the tokens that were too many."""

    nll: int | None
    too_long: int | None


def meaning(params: Scoring) -> dict[str, Any]:
    """The shape of a pass is part of a likelihood, by its last bits; `batch_size` bounds it."""
    models = params.models
    sizes = {f"{reader}_batch": getattr(models, reader).batch_size for reader in READERS}
    return {**models.published(), **sizes, "turns": list(params.turns)}


@stage(
    version=VERSION,
    reads={"given": tables.ALL},
    meaning=meaning,
    starts_from=("given", "sample_id"),
)
def score_difficulty(
    build: Build, given: Table, objects: Table, params: Scoring, before: Scored | None = None
) -> Scored:
    """Score each pair of turns about a picture. What was scored before is not scored again.

    A sample with more tokens than a model takes is dropped as `over_context`, with their number.
    Raises PairmillError where a model ends its worker.
    """
    rows = tables.frame(build.store, given)
    wanted = _wanted(rows, params.turns)
    known = {} if before is None else _known(build, before.likelihoods)
    missing = {key: what for key, what in wanted.items() if key not in known}
    found = known | _computed(build, missing, objects, params.models)
    scored, drops = [], []
    for row in rows.select("sample_id", "image_id", *params.turns).iter_rows():
        nats = {n: [found[key] for key in pair] for n, pair in _keys(*row[1:]).items()}
        scored.append(scores({n: [mean.nll for mean in pair] for n, pair in nats.items()}))
        if gone := _too_long(nats):
            drops.append({"id": row[0], "rule": "over_context", **gone})
    kept = rows.hstack(pl.DataFrame(scored, _SCORES, orient="row"))
    kept = kept.filter(~pl.col("sample_id").is_in([drop["id"] for drop in drops]))
    means = [(key, *found[key]) for key in wanted]
    return Scored(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(drops, "score_difficulty")),
        samples.write(build.store, pl.DataFrame(means, _MEANS, orient="row"), "likelihoods"),
    )


READERS: tuple[Reader, ...] = get_args(Reader)
_NLL = ("ifd_e", "ifd_s", "vfd_e", "vfd_s", "ffd")
_LISTS: dict[str, Any] = {f"{name}_nll": pl.List(pl.Int64) for name in _NLL}
_SCORES = {**_LISTS, **dict.fromkeys((*_NLL, "mifd_e", "mifd_s", "mifd"), pl.Int64)}
_MEANS: dict[str, Any] = {"sample_id": pl.String, "nll": pl.Int64, "too_long": pl.Int64}


def scores(nll: Mapping[str, Sequence[int | None]]) -> dict[str, Any]:
    """All scores of a sample, from [numerator, denominator] by name: exact, rounded once."""
    pairs = {name: (above, below) for name, (above, below) in nll.items()}
    stored = {f"{name}_nll": list(pair) for name, pair in pairs.items()}
    single = {name: product(pair) for name, pair in pairs.items()}
    both = {side: product(pairs[f"ifd_{side}"], pairs[f"vfd_{side}"]) for side in ("e", "s")}
    larger = None if None in both.values() else max(v for v in both.values() if v is not None)
    return {**stored, **single, "mifd_e": both["e"], "mifd_s": both["s"], "mifd": larger}


def _too_long(nats: Mapping[str, Sequence[Mean]]) -> dict[str, Any] | None:
    """The most tokens that were too many, and in which score."""
    over = [(mean.too_long, name) for name, pair in nats.items() for mean in pair if mean.too_long]
    return dict(zip(("value", "detail"), max(over), strict=True)) if over else None


class _Asked(NamedTuple):
    """An answer after what is given, and the picture that it is about."""

    given: Given
    image_id: str


def _keys(image_id: str, *turns: str) -> dict[str, tuple[str, str]]:
    """Digests of what the numerator and the denominator of each score hang on."""
    found = difficulty.ratios(*turns)
    return {
        n: (_key(image_id, r.numerator), _key(image_id, r.denominator)) for n, r in found.items()
    }


def _key(image_id: str, given: Given) -> str:
    return digest([image_id if given.sees else None, *given])[:32]


def _wanted(rows: pl.DataFrame, turns: Turns) -> dict[str, _Asked]:
    """What is to be scored, each once: VFD's numerator is also FFD's denominator."""
    found = {}
    for image_id, *texts in rows.select("image_id", *turns).iter_rows():
        for ratio in difficulty.ratios(*texts).values():
            for given in ratio:
                found[_key(image_id, given)] = _Asked(given, image_id)
    return found


def _known(build: Build, table: Table) -> dict[str, Mean]:
    rows = tables.frame(build.store, table, list(_MEANS)).iter_rows()
    return {key: Mean(*mean) for key, *mean in rows}


# On workers ----------------------------------------------------------------------------------


class Item(NamedTuple):
    """An answer as a worker takes it."""

    key: str
    given: Given
    picture: Shown | None


def _computed(
    build: Build, missing: Mapping[str, _Asked], objects: Table, models: DifficultyParams
) -> dict[str, Mean]:
    """The likelihood of each by its key: first all of one model, then all of the other."""
    order = sorted(missing, key=lambda key: _place(key, missing[key]))
    seen = (missing[key].image_id for key in order if missing[key].given.sees)
    pictures = Prepared(build, seen, objects, models.max_pixels)
    found: dict[str, Mean] = {}
    for reader in READERS:
        local: LocalModel = getattr(models, reader)
        keys = [key for key in order if missing[key].given.reader == reader]
        work = partial(_with_receipt, build.store, local, models.max_pixels)
        shards = _shards(keys, missing, pictures)
        for shard, result in build.pool.map(work, shards, resources=local.resources):
            if isinstance(result, Crash):
                raise PairmillError(
                    f"scoring by {local.name!r} ended its worker: {result.reason}; run again"
                )
            found |= {key: Mean(*mean) for key, mean in result["rows"].items()}
            build.work["answers_scored"] += len(shard) if result["fresh"] else 0
            build.progress("score_difficulty", len(found), len(missing))
    return found


def _place(key: str, asked: _Asked) -> tuple[Any, ...]:
    """Where an answer is scored: by its picture, or beside others of its length."""
    length = len(asked.given.answer) + sum(map(len, asked.given.turns))
    return asked.given.sees, asked.image_id if asked.given.sees else length, key


def _shards(
    keys: Sequence[str], missing: Mapping[str, _Asked], pictures: Prepared
) -> Iterator[tuple[Item, ...]]:
    def shown(asked: _Asked) -> Shown | None:
        return Shown("", pictures.lying(asked.image_id)) if asked.given.sees else None

    for start in range(0, len(keys), SHARD):
        part = keys[start : start + SHARD]
        yield tuple(Item(key, missing[key].given, shown(missing[key])) for key in part)


def _with_receipt(
    store: Store, local: LocalModel, max_pixels: int, shard: Sequence[Item]
) -> dict[str, Any]:
    """Score a shard, or find what was scored by a build that did not come to its end."""
    ledger = Ledger(store)
    key = digest([VERSION, max_pixels, local.batch_size, [item.key for item in shard]])
    folder = f"{local.numerics}/receipts"
    record = ledger.find("score_difficulty", folder, key)
    if record is not None:
        return {**record, "fresh": False}
    rows = likelihoods(local, shard)
    ledger.write("score_difficulty", folder, key, {"rows": rows})
    return {"rows": rows, "fresh": True}


def likelihoods(local: LocalModel, shard: Sequence[Item]) -> dict[str, Mean]:
    """The mean likelihood of each answer by its key."""
    asked = [difficulty.supplied(item.given, item.picture) for item in shard]
    found = log_probs(local, asked)
    return {item.key: mean_of(likelihood) for item, likelihood in zip(shard, found, strict=True)}


def mean_of(found: Likelihood | TooLong) -> Mean:
    """A likelihood as it is stored."""
    if isinstance(found, TooLong):
        return Mean(None, found.tokens)
    return Mean(round(MILLION * found.mean) if len(found.nll) else None, None)
