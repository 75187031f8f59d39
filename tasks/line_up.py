"""Line-up: the judge sees the target among hard negatives, and says which of them fit.

MegaPairs takes it that its hard negatives are negative (their issue 26 asks); here it is measured.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import judging, mllm, tables
from infra.asking import Noted, ask_all, none_waits
from infra.build import Build
from infra.canonical import digest
from infra.judging import PENDING, Judge
from infra.ledger import stage
from infra.mllm import Flawed, Picture
from infra.pictures import Prepared
from infra.prompting import Prompts, enclosed
from infra.tables import Table

VERSION = 1
INSTRUCTION_LIMIT = 300  # characters; labels have no longer ones
MOST = 8
PROMPTS = Prompts(Path(__file__).parent / "prompts")
PROMPT_FILES = ("line_up", "line_up_sentences", "enclosed")
THIRDS = ("low", "middle", "high")

Scale = Literal["fits", "partly", "no"]


class LineUpParams(BaseModel):
    """Hard negatives checked, and the target found among them, by the judge in one call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the labelled pairs that are checked, drawn by the hash of the pair;"
        " the others pass. 0: no pair is checked.",
    )
    most: int = Field(
        4, ge=1, le=MOST, description="Hard negatives shown beside the target; the first ones."
    )
    false_negatives: Literal["drop", "positives"] = Field(
        "drop",
        description="What becomes of a hard negative that fits: it leaves the pair, or leaves it"
        " and becomes one of its further positives.",
    )
    unjudged: Literal["keep", "drop"] = Field(
        "drop", description="What becomes of a pair on which the judge gives no usable answer."
    )


class LiningUp(BaseModel):
    """What the stage needs: the parameters and the judge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: Judge
    share: float
    most: int
    false_negatives: Literal["drop", "positives"]
    unjudged: Literal["keep", "drop"]


class LinedUp(NamedTuple):
    """Pairs with the negatives that stay, further positives, labels that stay, pairs without one,
    what was said of each candidate, and counts."""

    pairs: Table
    positives: Table
    labels: Table
    drops: Table
    line_ups: Table
    facts: Table


class Question(NamedTuple):
    """A pair, its instructions, and the candidates in the order in which they are shown.
    `captions` are ids of what the instructions may have been made from."""

    pair_id: str
    query: str
    target: str
    instructions: tuple[str, ...]
    candidates: tuple[str, ...]
    captions: tuple[str, ...]
    asked: str


def prompt_digest() -> str:
    """SHA-256 of the prompt files."""
    return PROMPTS.digest(PROMPT_FILES)


def meaning(params: LiningUp) -> Any:
    """What decides verdicts and what comes of them; not where the judge is served."""
    chosen = params.model_dump(exclude={"judge"}) | {"share": repr(params.share)}
    return {**chosen, "judge": params.judge.meaning, "prompt": prompt_digest()}


@stage(
    version=VERSION,
    reads={
        "pairs": ("pair_id", "ties", "negatives"),
        "labels": ("pair_id", "instructions"),
        "bands": ("space", "low", "high"),
    },
    meaning=meaning,
    is_final=none_waits,
    starts_from=("labels", "pair_id"),
)
def line_up(
    build: Build,
    pairs: Table,
    labels: Table,
    bands: Table,
    eligible: Table,
    objects: Table,
    params: LiningUp,
    before: LinedUp | None = None,
) -> LinedUp:
    """Show the judge the target among hard negatives, in an order drawn by hash.

    A negative that fits leaves the pair; a pair whose target is not the best is dropped. The query
    is a negative of every pair and no candidate. A pair without other negatives passes.
    """
    every = _questions(build, pairs, labels, eligible, params)
    found = judging.carried(build, "line_ups", before and before.line_ups, (q.asked for q in every))
    answered = set(found["pair_id"])
    new = [question for question in every if question.pair_id not in answered]
    in_order = [image for q in new for image in (q.query, *q.candidates)]
    images = Prepared(build, in_order, objects, params.judge.model.max_pixels)
    work = partial(ask_about, params=params.judge)
    rows = ask_all(build, "line_up", new, work, params.judge.asking, images)
    asked = pl.DataFrame([row for part in rows for row in part], found.schema)
    found = pl.concat([found, asked]).sort("pair_id", "place")
    mined = tables.frame(build.store, pairs)
    written = tables.frame(build.store, labels)
    false = false_negatives(mined, found)
    drops = decided(mined, found, params)
    lost = [drop["id"] for drop in drops]
    counted = facts(mined, tables.frame(build.store, bands), found)
    positives = false if params.false_negatives == "positives" else false.clear()
    return LinedUp(
        tables.write_frame(build.store, "pairs", without(mined, false)),
        tables.write_frame(build.store, "positives", positives),
        tables.write_frame(build.store, "labels", written.filter(~pl.col("pair_id").is_in(lost))),
        tables.write(build.store, "drops", drops),
        tables.write_frame(build.store, "line_ups", found),
        tables.write(build.store, "facts", counted),
    )


def _questions(
    build: Build, pairs: Table, labels: Table, eligible: Table, params: LiningUp
) -> list[Question]:
    """Drawn pairs that have a hard negative, those of a query next to each other."""
    rows = tables.frame(build.store, labels, ["pair_id", "instructions"]).join(
        tables.frame(build.store, pairs, ["pair_id", "query", "target", "negatives"]),
        on="pair_id",
        how="inner",
    )
    caption = judging.captions_of(build, eligible)
    found = []
    for row in rows.sort("query", "target").iter_rows(named=True):
        pair_id, query, target = row["pair_id"], row["query"], row["target"]
        others = [image for image in row["negatives"] if image not in (query, target)]
        if others and judging.drawn("line up", pair_id, params.share):
            candidates = in_hash_order(pair_id, [target, *others[: params.most]])
            captions = tuple(caption[image] for image in (query, target) if image in caption)
            texts = tuple(row["instructions"])
            asked = digest([pair_id, *texts, list(candidates)])
            found.append(Question(pair_id, query, target, texts, candidates, captions, asked))
    return found


def in_hash_order(pair_id: str, images: Sequence[str]) -> tuple[str, ...]:
    """Images in an order that says nothing of them, the same every time."""
    return tuple(sorted(images, key=lambda image: sha256(f"{pair_id} {image}".encode()).digest()))


async def ask_about(ask: mllm.Ask, question: Question, params: Judge) -> list[dict[str, Any]]:
    """What the judge says of each candidate: rows of the table `line_ups`."""
    noted = Noted(ask)
    answer = await mllm.ask_for(noted, request(question, params), answer_to(question))
    about = {
        "pair_id": question.pair_id,
        "asked": question.asked,
        "model": params.asking.model,
        "prompt": prompt_digest(),
        "requests": noted.keys,
    }
    if isinstance(answer, Flawed):
        nothing = {"place": 0, "image_id": None, "verdict": None, "best": None}
        return [{**about, **nothing, "reason": answer.rule}]
    said: Any = answer
    return [
        {
            **about,
            "place": place,
            "image_id": image,
            "verdict": getattr(said, letter),
            "best": said.best == letter,
            "reason": None,
        }
        for place, (letter, image) in enumerate(
            zip(ascii_uppercase, question.candidates, strict=False), 1
        )
    ]


def request(question: Question, params: Judge) -> mllm.Request:
    """The question as the judge is asked it: the source image, then candidates A, B, ..."""
    names = [(str(n), text) for n, text in enumerate(question.instructions, 1)]
    letters = ascii_uppercase[: len(question.candidates)]
    pictures = [
        Picture("Source image", question.query),
        *(
            Picture(f"Candidate {letter}", image)
            for letter, image in zip(letters, question.candidates, strict=True)
        ),
    ]
    shown = enclosed(names, INSTRUCTION_LIMIT)
    text = PROMPTS.render("line_up_sentences", letters=letters, **shown)
    return params.request(
        PROMPTS.render("line_up"), pictures, text, answer_to(question), question.captions
    )


def answer_to(question: Question) -> type[BaseModel]:
    """The model of its answer: a verdict for each letter, and the best of them."""
    return _answer(len(question.candidates))


@cache
def _answer(count: int) -> type[BaseModel]:
    letters = tuple(ascii_uppercase[:count])
    best = Literal[(*letters, "none")]  # type: ignore[valid-type]
    return judging.answer_model("LineUp", {**dict.fromkeys(letters, Scale), "best": best})


def false_negatives(pairs: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """Candidates that fit and are not the target, as (pair_id, image_id)."""
    fitting = found.filter(pl.col("verdict") == "fits").join(
        pairs.select("pair_id", "target"), on="pair_id"
    )
    others = fitting.filter(pl.col("image_id") != pl.col("target"))
    return others.select("pair_id", "image_id").sort("pair_id", "image_id")


def without(pairs: pl.DataFrame, false: pl.DataFrame) -> pl.DataFrame:
    """Pairs without their false negatives; the order of the others stays."""
    gone = dict(false.group_by("pair_id").agg("image_id").iter_rows())
    negatives = [
        [image for image in images if image not in gone.get(pair_id, ())]
        for pair_id, images in pairs.select("pair_id", "negatives").iter_rows()
    ]
    return pairs.with_columns(pl.Series("negatives", negatives, pairs.schema["negatives"]))


def decided(pairs: pl.DataFrame, found: pl.DataFrame, params: LiningUp) -> list[dict[str, Any]]:
    """Drops of pairs: without an answer, or with another best than the target."""
    return [
        {"level": "pair", "id": pair_id, "stage": "line_up", **drop}
        for pair_id, target, rows in _by_pair(pairs, found)
        if (drop := _decided(target, rows, params))
    ]


def _by_pair(
    pairs: pl.DataFrame, found: pl.DataFrame
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    target = dict(pairs.select("pair_id", "target").iter_rows())
    rows = found.sort("pair_id", "place").iter_rows(named=True)
    for pair_id, part in groupby(rows, itemgetter("pair_id")):
        yield pair_id, target[pair_id], list(part)


def _decided(target: str, rows: list[dict[str, Any]], params: LiningUp) -> dict[str, Any] | None:
    if rows[0]["reason"] in PENDING:
        return {"rule": rows[0]["reason"]}
    if rows[0]["place"] == 0:
        unjudged = {"rule": "unjudged", "detail": rows[0]["reason"]}
        return unjudged if params.unjudged == "drop" else None
    best = next((row["image_id"] for row in rows if row["best"]), None)
    if best == target:
        return None
    return {"rule": "target_not_preferred", "detail": "a negative" if best else "none"}


def facts(pairs: pl.DataFrame, bands: pl.DataFrame, found: pl.DataFrame) -> list[dict[str, Any]]:
    """Counts: pairs lined up and targets preferred; hard negatives checked, and those that fit, in
    all and by a space that the pair is in the band of and the third of the band it lies in; and by
    letter, how often the target stood there and how often the best was said to.
    """
    third = dict(_thirds(pairs, bands))
    counts = Counter[str]()
    for pair_id, target, rows in _by_pair(pairs, found):
        if rows[0]["place"] == 0:
            counts["unjudged"] += 1
            continue
        counts["pairs"] += 1
        for row in rows:
            letter = ascii_uppercase[row["place"] - 1]
            is_target = row["image_id"] == target
            counts["preferred"] += row["best"] and is_target
            counts[f"best {letter}"] += row["best"]
            counts[f"target {letter}"] += is_target
            counts[f"target said {row['verdict']}"] += is_target
            for where in () if is_target else ("all", *third.get(pair_id, ())):
                counts[f"checked {where}"] += 1
                counts[f"fits {where}"] += row["verdict"] == "fits"
                counts[f"partly {where}"] += row["verdict"] == "partly"
    return [{"name": name, "value": value} for name, value in sorted(counts.items())]


def _thirds(pairs: pl.DataFrame, bands: pl.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """Of each pair, `<space> <third>` for every space in whose band it lies."""
    ends = {space: (low, high) for space, low, high in bands.select("space", "low", "high").rows()}
    for pair_id, ties in pairs.select("pair_id", "ties").iter_rows():
        found = []
        for tie in ties or ():
            if tie["in_band"] and tie["space"] in ends:
                low, high = ends[tie["space"]]
                at = 3 * (tie["score"] - low) // max(1, high - low + 1)
                found.append(f"{tie['space']} {THIRDS[min(2, max(0, at))]}")
        yield pair_id, found
