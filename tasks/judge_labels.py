"""Second opinion: a judge sees a pair and its instructions, and says of each whether it fits.

What the judge is worth is measured on a gold set, by the same questions: `calibrate_judge`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import agreement, judging, mllm, tables
from infra.agreement import Share
from infra.asking import Noted, ask_all, none_waits
from infra.build import Build
from infra.canonical import digest
from infra.errors import PairmillError, Refused
from infra.gold import Reason, Scale
from infra.judging import PENDING, Judge, JudgeModel
from infra.ledger import stage
from infra.mllm import Flawed, Picture
from infra.pictures import Prepared
from infra.prompting import Prompts, enclosed
from infra.tables import Table

VERSION = 1
INSTRUCTION_LIMIT = 300  # characters; labels have no longer ones
PROMPTS = Prompts(Path(__file__).parent / "prompts")
PROMPT_FILES = ("judge", "judge_sentences", "enclosed")


class JudgeParams(JudgeModel):
    """A second opinion on labels."""

    share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the labelled pairs that are judged, drawn by the hash of the pair;"
        " the others pass. 0: no pair is judged.",
    )
    partly: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of instructions that are judged to fit partly."
    )
    unjudged: Literal["keep", "drop"] = Field(
        "drop",
        description="What becomes of a pair on which the judge gives no usable answer: it refused,"
        " or said something else than a verdict.",
    )
    least_agreement: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Agreement with the gold set below which the judge is refused, and the build"
        " with it: the lower bound of the 95 % interval must reach it.",
    )
    agree_on: Literal["scale", "decision"] = Field(
        "scale",
        description="What agreement means: the same of three verdicts, or the same decision to"
        " keep or drop the instruction.",
    )


class Judging(BaseModel):
    """What the stages need: the judge, and what its verdicts decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: Judge
    share: float
    partly: Literal["keep", "drop"]
    unjudged: Literal["keep", "drop"]
    needed: int

    @property
    def dropped(self) -> tuple[str, ...]:
        """Verdicts that end an instruction."""
        return ("wrong",) if self.partly == "keep" else ("wrong", "partly")


class Judged(NamedTuple):
    """Labels that stay, pairs without one, all verdicts, and how many pairs were drawn."""

    labels: Table
    drops: Table
    verdicts: Table
    facts: Table


class Question(NamedTuple):
    """A pair and instructions to judge. `captions` are ids of what they may have been made from,
    `asked` tells whether it is the same question."""

    pair_id: str
    query: str
    target: str
    instructions: tuple[str, ...]
    captions: tuple[str, ...]
    asked: str


class Verdict(BaseModel):
    """The reason comes first: a model that has given one is bound by it."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason
    verdict: Scale


def prompt_digest() -> str:
    """SHA-256 of the prompt files of the judge."""
    return PROMPTS.digest(PROMPT_FILES)


def meaning(params: Judging) -> Any:
    """What decides verdicts and what comes of them; not where the judge is served."""
    chosen = params.model_dump(exclude={"judge"}) | {"share": repr(params.share)}
    return {**chosen, "judge": params.judge.meaning, "prompt": prompt_digest()}


@stage(
    version=VERSION,
    reads={"pairs": ("pair_id",), "labels": ("pair_id", "instructions")},
    meaning=meaning,
    is_final=none_waits,
    starts_from=("labels", "pair_id"),
)
def judge_labels(
    build: Build,
    pairs: Table,
    labels: Table,
    eligible: Table,
    objects: Table,
    params: Judging,
    before: Judged | None = None,
) -> Judged:
    """Judge the instructions of a fair draw of pairs; those that are wrong go.

    A pair needs as many as before, or all where it had fewer. A pair whose instructions are what
    they were is not asked about again. Raises infra.mllm.EndpointUnavailable where the judge has
    never answered.
    """
    every = _questions(build, pairs, labels, eligible, params.share)
    verdicts = judging.carried(
        build, "verdicts", before and before.verdicts, (q.asked for q in every)
    )
    answered = set(verdicts["pair_id"])
    new = [question for question in every if question.pair_id not in answered]
    found = pl.DataFrame(_asked(build, "judge_labels", new, objects, params), verdicts.schema)
    verdicts = pl.concat([verdicts, found]).sort("pair_id", "number")
    kept, drops = decided(tables.frame(build.store, labels), verdicts, params)
    return Judged(
        tables.write_frame(build.store, "labels", kept),
        tables.write(build.store, "drops", drops),
        tables.write_frame(build.store, "verdicts", verdicts),
        tables.write(build.store, "facts", _facts(len(every), verdicts)),
    )


def _questions(
    build: Build, pairs: Table, labels: Table, eligible: Table, share: float
) -> list[Question]:
    """Drawn pairs, those of a query next to each other; ids are hashes, so it is a fair order."""
    rows = tables.frame(build.store, labels, ["pair_id", "instructions"]).join(
        tables.frame(build.store, pairs, ["pair_id", "query", "target"]), on="pair_id", how="inner"
    )
    caption = judging.captions_of(build, eligible)
    found = []
    for pair_id, texts, query, target in rows.sort("query", "target").iter_rows():
        if judging.drawn("judge", pair_id, share):
            captions = tuple(caption[image] for image in (query, target) if image in caption)
            asked = _asks(pair_id, texts)
            found.append(Question(pair_id, query, target, tuple(texts), captions, asked))
    return found


def _asks(pair_id: str, instructions: Sequence[str]) -> str:
    return digest([pair_id, *instructions])


def _asked(
    build: Build, name: str, questions: Sequence[Question], objects: Table, params: Judging
) -> list[dict[str, Any]]:
    """Verdicts on every question, a row an instruction or one that says why there is none."""
    in_order = [image for question in questions for image in (question.query, question.target)]
    images = Prepared(build, in_order, objects, params.judge.model.max_pixels)
    work = partial(judge, params=params.judge)
    rows = ask_all(build, name, questions, work, params.judge.asking, images)
    return [row for part in rows for row in part]


async def judge(ask: mllm.Ask, question: Question, params: Judge) -> list[dict[str, Any]]:
    """What the judge says of a pair: rows of the table `verdicts`."""
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
        return [{**about, "number": 0, "verdict": None, "reason": answer.rule}]
    said = [getattr(answer, name) for name in _names(question)]
    return [
        {
            **about,
            "number": number,
            "verdict": one.verdict,
            "reason": "none" if one.verdict == "fits" else one.reason,
        }
        for number, one in enumerate(said, 1)
    ]


def request(question: Question, params: Judge) -> mllm.Request:
    """The question as the judge is asked it."""
    shown = enclosed(
        list(zip(_names(question), question.instructions, strict=True)), INSTRUCTION_LIMIT
    )
    pictures = Picture("Source image", question.query), Picture("Target image", question.target)
    text = PROMPTS.render("judge_sentences", **shown)
    return params.request(
        PROMPTS.render("judge"), pictures, text, answer_to(question), question.captions
    )


def answer_to(question: Question) -> type[BaseModel]:
    """The model of its answer: a verdict for each instruction."""
    return _answer(len(question.instructions))


@cache
def _answer(count: int) -> type[BaseModel]:
    return judging.answer_model("Verdicts", {f"i{n}": Verdict for n in range(1, count + 1)})


def _names(question: Question) -> list[str]:
    return [f"i{number}" for number in range(1, len(question.instructions) + 1)]


def decided(
    labels: pl.DataFrame, verdicts: pl.DataFrame, params: Judging
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """What the verdicts make of the labels: those that stay, and drops of pairs."""
    against = (pl.col("number") == 0) | pl.col("verdict").is_in(params.dropped)
    said: dict[str, list[dict[str, Any]]] = {}
    for row in verdicts.filter(against).iter_rows(named=True):
        said.setdefault(row["pair_id"], []).append(row)
    kept, drops = [], []
    for label in labels.sort("pair_id").iter_rows(named=True):
        rows = said.get(label["pair_id"], [])
        stay, drop = _decided(label["instructions"], rows, params)
        if drop:
            drops.append({"level": "pair", "id": label["pair_id"], "stage": "judge_labels", **drop})
        else:
            kept.append({**label, "instructions": stay})
    return pl.DataFrame(kept, labels.schema), drops


def _decided(
    instructions: list[str], verdicts: list[dict[str, Any]], params: Judging
) -> tuple[list[str], dict[str, Any] | None]:
    """The instructions of a pair that stay after verdicts against them, or why it is dropped."""
    for row in verdicts:
        if row["number"] == 0 and row["reason"] in PENDING:
            return [], {"rule": row["reason"]}
        if row["number"] == 0:
            drop = {"rule": "unjudged", "detail": row["reason"]}
            return instructions, drop if params.unjudged == "drop" else None
    lost = {row["number"]: row["reason"] for row in verdicts}
    stay = [text for number, text in enumerate(instructions, 1) if number not in lost]
    if len(stay) >= min(params.needed, len(instructions)):
        return stay, None
    reasons = sorted(set(lost.values()))
    return [], {"rule": "judged_wrong", "value": len(stay), "detail": ", ".join(reasons)}


def _facts(drawn: int, verdicts: pl.DataFrame) -> list[dict[str, Any]]:
    """Counts: pairs drawn, and instructions by verdict and reason."""
    counts = Counter({"pairs": drawn, "unjudged": int((verdicts["number"] == 0).sum())})
    given = verdicts.filter(pl.col("number") > 0)
    for column in ("verdict", "reason"):
        counts.update({f"{column} {name}": n for name, n in _tally(given[column])})
    return [{"name": name, "value": value} for name, value in sorted(counts.items())]


def _tally(names: pl.Series) -> Iterable[tuple[str, int]]:
    return Counter(names.to_list()).items()


class Calibrated(NamedTuple):
    """The judge's verdicts on the gold set, and drops of items that wait for their answer."""

    verdicts: Table
    drops: Table


@stage(
    version=VERSION,
    reads={"gold": ("pair_id", "query", "target", "instruction", "verdict", "reason")},
    meaning=lambda params: {"judge": params.judge.meaning, "prompt": prompt_digest()},
    is_final=none_waits,
)
def calibrate_judge(build: Build, gold: Table, objects: Table, params: Judging) -> Calibrated:
    """Ask the judge about the gold set, each instruction on its own; pictures from `objects`."""
    rows = tables.frame(build.store, gold)
    items = rows.select("pair_id", "query", "target", "instruction").sort("query", "target")
    questions = [
        Question(pair_id, query, target, (text,), (), _asks(pair_id, (text,)))
        for pair_id, query, target, text in items.iter_rows()
    ]
    verdicts = _asked(build, "calibrate_judge", questions, objects, params)
    drops = [
        {"level": "gold", "id": row["pair_id"], "stage": "calibrate_judge", "rule": row["reason"]}
        for row in verdicts
        if row["number"] == 0 and row["reason"] in PENDING
    ]
    return Calibrated(
        tables.write(build.store, "verdicts", verdicts), tables.write(build.store, "drops", drops)
    )


class Agreement(NamedTuple):
    """How a judge and people agree: (by people, by the judge) -> items, and what it comes to."""

    confusion: Counter[tuple[str, str]]
    scale: Share
    decision: Share
    kappa: float | None
    reasons: dict[str, Share]  # by the reason of people: how often the judge gave their verdict
    waiting: int  # items without an answer yet
    gone: int = 0  # items that were left out: their pictures are not in the corpus

    def on(self, what: str) -> Share:
        return self.scale if what == "scale" else self.decision


def agreement_of(gold: pl.DataFrame, verdicts: pl.DataFrame, params: Judging) -> Agreement:
    """Agreement of the judge's verdicts with the gold set they were asked for.

    An answer that is no verdict (a refusal, say) agrees with nobody; one that is awaited is not
    counted.
    """
    asked = [_asks(pair, (text,)) for pair, text in gold.select("pair_id", "instruction").rows()]
    people = gold.select("verdict", why="reason", asked=pl.Series(asked, dtype=pl.String))
    by_judge = verdicts.select("asked", "reason", judge="verdict")
    rows = people.join(by_judge, on="asked")
    waits = pl.col("judge").is_null() & pl.col("reason").is_in(PENDING)
    said = rows.filter(~waits).select("verdict", pl.col("judge").fill_null("no verdict"), "why")
    found = agreement.confusion((str(one), str(other)) for one, other, _ in said.iter_rows())
    same = said.group_by("why").agg((pl.col("verdict") == pl.col("judge")).sum(), n=pl.len())

    decisions = Counter[tuple[str, str]]()
    for (one, other), count in found.items():
        decisions[_decision(one, params), _decision(other, params)] += count
    return Agreement(
        found,
        agreement.agreed(found),
        agreement.agreed(decisions),
        agreement.kappa(found),
        {why: agreement.share(part, of) for why, part, of in same.sort("why").iter_rows()},
        rows.filter(waits).height,
    )


def _decision(verdict: str, params: Judging) -> str:
    return {"no verdict": verdict}.get(verdict, "drop" if verdict in params.dropped else "keep")


def check_gold(items: int, least: float | None) -> None:
    """Raises Refused where no judge could ever agree well enough with so few items."""
    needed = agreement.least_size(least) if least else 0
    if least and items < needed:
        best = agreement.share(items, items).low
        refuse(
            f"checks.judge.least_agreement is {least:g}, and the gold set has {items} items: a"
            f" judge that agreed on all of them would have a lower bound of {best:.3f}; label"
            f" {needed} at least, with pairmill gold serve"
        )


def check_judge(found: Agreement, least: float | None, agree_on: str) -> None:
    """Raises Refused for a judge that agrees too little, PairmillError for one not yet known."""
    if not least:
        return
    if found.waiting:
        raise PairmillError(
            f"the judge is not calibrated: {found.waiting} items of the gold set wait for an"
            " answer; run again when the endpoint answers and the budget allows it"
        )
    share = found.on(agree_on)
    check_gold(share.of, least)
    if share.low < least:
        refuse(
            f"checks.judge.least_agreement is {least:g}, and the judge agrees with people on"
            f" {share.part} of {share.of} ({agree_on}): the lower bound is {share.low:.3f}; take"
            " another model or prompt, or look at pairmill gold agree"
        )


def refuse(reason: str) -> NoReturn:
    raise Refused(f"{reason}; nothing was published", [reason])
