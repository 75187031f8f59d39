"""Labels: what a person who has the query would say to be shown the target, or why nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import instructions, mllm, tables
from infra.asking import AskParams, Noted, ask_all, none_waits
from infra.build import Build
from infra.canonical import settings
from infra.captions import caption_id
from infra.ledger import stage
from infra.pictures import Prepared
from infra.prompting import Prompts, enclosed
from infra.schema import SCHEMAS
from infra.tables import Table

VERSION = 4
PROMPTS = Prompts(Path(__file__).parent / "prompts")
PROMPT_FILES = {
    "two": ("describe", "pair", "enclosed", "instruct", "comparison"),
    "one": ("describe_and_instruct", "pair", "enclosed"),
}
CAPTION_LIMIT = 500  # characters of a caption that are shown to a model
INSTRUCTION_LIMIT = 300  # characters
DESCRIPTION_LIMIT = 1_000  # characters, each of three parts
MOST_INSTRUCTIONS = 8
BLOCK = 512  # pairs that a budget takes together

Rule = Literal[
    "no_caption",
    "captions_say_nothing",
    "refused",
    "truncated",
    "empty",
    "too_long",
    "wrong_schema",
    "too_few_distinct",
    "gives_away_target",
    "endpoint_error",
    "over_budget",
    "in_batch",
]
# What is said of these is a function of captions and answer.
OWN_WORDS = ("no_caption", "captions_say_nothing", "gives_away_target")


class LabelParams(AskParams):
    """Who writes the instructions, and how."""

    labeller: Literal["captions", "mllm"] = Field(
        "captions",
        description="`captions` writes English templates from the difference of two captions,"
        " offline; `mllm` asks a vision-language model behind an OpenAI-compatible endpoint.",
    )
    calls: Literal["two", "one"] = Field(
        "two",
        description="`two`: one call describes the pair with its pictures, a second writes the"
        " instructions from that text alone. `one`: both in a single call.",
    )
    instructions: int = Field(
        3, ge=3, le=MOST_INSTRUCTIONS, description="Distinct instructions a pair must get (mllm)."
    )
    show_captions: bool = Field(True, description="Show the model the captions of a pair (mllm).")
    max_pixels: int = Field(
        401_408,
        ge=784,
        description="Pixels per picture sent; 401408 is 512 patches of 28 x 28 (mllm).",
    )
    max_tokens: int = Field(1_024, ge=64, description="Tokens an answer may have (mllm).")
    temperature: float | None = Field(
        0.7, ge=0, le=2, description="Sampling temperature; null leaves it to the server (mllm)."
    )
    seed: int | None = Field(
        0, description="Sampling seed where the server takes one; null sends none (mllm)."
    )

    publish_partial: bool = Field(
        True,
        description="Publish a version, marked partial, while pairs wait for their label (the"
        " budget is spent, the endpoint failed, a batch is under way). `false`: nothing is"
        " published until every pair has its answer; what was paid for is kept either way.",
    )

    @model_validator(mode="after")
    def _has_endpoint(self) -> "LabelParams":
        if self.labeller == "mllm" and self.endpoint is None and self.local is None:
            raise ValueError(
                "the labeller mllm needs endpoint.url and endpoint.model, or local.name;"
                " set them, or use labeller: captions"
            )
        return self

    @property
    def resize(self) -> str:
        """The rule by which pictures are made smaller; part of what a request means."""
        return f"at most {self.max_pixels} px, JPEG"


class PairText(NamedTuple):
    """A pair as a labeller needs it; query and target are image_ids."""

    pair_id: str
    query: str
    target: str
    query_caption: str | None
    target_caption: str | None

    @property
    def about(self) -> tuple[str, ...]:
        """What is said of a pair is about these: its images and captions, by id."""
        texts = (self.query_caption, self.target_caption)
        return (self.query, self.target, *(caption_id(text) for text in texts if text))


class Label(NamedTuple):
    """The instructions of a pair and where they come from."""

    pair_id: str
    instructions: tuple[str, ...]
    description: str | None
    labeller: str
    model: str | None
    prompt: str | None


class LabelDrop(NamedTuple):
    """A pair without a label."""

    pair_id: str
    rule: Rule
    detail: str


class Labelled(NamedTuple):
    """What became of a pair, and the keys of the requests that were made about it."""

    outcome: Label | LabelDrop
    requests: tuple[str, ...] = ()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Unfit(NamedTuple):
    rule: Rule
    detail: str


class Differences(_Strict):
    query: str
    target: str


class Comparison(_Strict):
    common: str
    differences: Differences


class Instructions(_Strict):
    instructions: list[str]


class ComparisonAndInstructions(_Strict):
    common: str
    differences: Differences
    instructions: list[str]


def meaning(params: LabelParams) -> dict[str, Any]:
    """The parameters that decide what labels say, floats as text; not the endpoint or its pace."""
    if params.labeller == "captions":
        return {"labeller": "captions"}
    chosen = params.model_dump(exclude={*AskParams.model_fields, "publish_partial"})
    asked = {"model": params.model, "attempt": params.attempt}
    return settings({**chosen, **asked, "prompt": prompt_digest(params)})


def prompt_digest(params: LabelParams) -> str:
    """SHA-256 of the prompt files in use."""
    return PROMPTS.digest(PROMPT_FILES[params.calls])


class LabelTables(NamedTuple):
    """Labels of pairs, pairs without one, and with what each pair was asked about."""

    labels: Table
    drops: Table
    asked: Table


@stage(
    version=VERSION,
    reads={"pairs": ("pair_id",), "eligible": ("image_id", "caption_id"), "captions": ()},
    meaning=meaning,
    is_final=none_waits,
    starts_from=("pairs", "pair_id"),
)
def label_pairs(
    build: Build,
    pairs: Table,
    eligible: Table,
    captions: Table,
    objects: Table,
    params: LabelParams,
    before: LabelTables | None = None,
) -> LabelTables:
    """Label every pair or say why not. All calls are made here, in one asynchronous process.

    A pair that was asked about with the captions it has today is not asked about again. Raises
    infra.mllm.EndpointUnavailable where the endpoint of `mllm` has never answered.
    """
    every = _questions(build, pairs, eligible)
    old, new = _answered(build, every, before)
    if params.budget.is_bounded:
        new = by_value(new, tables.frame(build.store, pairs, ["pair_id", "ties"]))
    asked = _with_texts(build, new, captions)
    if params.labeller == "captions":
        found = [label_by_captions(pair) for pair in asked]
        build.work["labels_requested"] += len(found)
        build.progress("label_pairs", len(found), len(found))
    else:
        in_order = (image for pair in asked for image in (pair.query, pair.target))
        images = Prepared(build, in_order, objects, params.max_pixels)
        found = label_by_mllm(build, asked, images, params)
    labels, drops = _as_frames([row.outcome for row in found])
    requests = pl.Series("requests", [row.requests for row in found], pl.List(pl.String))
    new = new.select(every.columns).with_columns(requests)
    if before is not None:
        labels = pl.concat([_of(build, before.labels, "pair_id", old), labels])
        drops = pl.concat([_of(build, before.drops, "id", old), drops])
        new = pl.concat([_of(build, before.asked, "pair_id", old), new])
    return LabelTables(
        tables.write_frame(build.store, "labels", labels.sort("pair_id")),
        tables.write_frame(build.store, "drops", drops.sort("id")),
        tables.write_frame(build.store, "asked", new.sort("pair_id")),
    )


def by_value(asked: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """The order in which a budget buys labels: (pair_id, query, target, ...) rows.

    The best pair of every query comes before any second one. Among these, the spaces that tie a
    pair, and thirds of their scores, take turns; the pair's id, a hash, decides the rest. Blocks
    of pairs are sorted by query, so that calls with the same pictures are made together.
    """
    tie = pl.col("ties").list.eval(pl.element().filter(pl.element().struct["in_band"])).list.first()
    space, score = tie.struct["space"], tie.struct["score"]
    cells = pairs.select("pair_id", space.alias("space"), score.alias("score"))
    rows = asked.join(cells, on="pair_id", how="left", maintain_order="left").sort("pair_id")
    best_first = pl.col("score").rank("ordinal", descending=True)
    third = (3 * pl.col("score").rank("ordinal").over("space")) // (pl.len().over("space") + 1)
    rows = rows.with_columns(best_first.over("query").alias("turn"), third.alias("third"))
    cell = pl.int_range(pl.len()).over("turn", "space", "third")
    rows = rows.with_columns(cell.alias("at")).sort("turn", "at", "pair_id")
    block = pl.int_range(pl.len()) // BLOCK
    return rows.with_columns(block.alias("block")).sort("block", "query", "target", "pair_id")


def _questions(build: Build, pairs: Table, eligible: Table) -> pl.DataFrame:
    """Pairs in order of id, with the ids of the captions of query and target."""
    captioned = tables.frame(build.store, eligible, ["image_id", "caption_id"])
    rows = tables.frame(build.store, pairs, ["pair_id", "query", "target"])
    for side in ("query", "target"):
        about = captioned.rename({"image_id": side, "caption_id": f"{side}_caption_id"})
        rows = rows.join(about, on=side, how="left")
    return rows.sort("query", "target", "pair_id")


def _with_texts(build: Build, pairs: pl.DataFrame, captions: Table) -> list[PairText]:
    texts = tables.frame(build.store, captions)
    for side in ("query", "target"):
        about = texts.rename({"caption_id": f"{side}_caption_id", "text": f"{side}_caption"})
        pairs = pairs.join(about, on=f"{side}_caption_id", how="left", maintain_order="left")
    return [PairText(*row) for row in pairs.select(PairText._fields).iter_rows()]


def _answered(
    build: Build, every: pl.DataFrame, before: LabelTables | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs that have their answer from an earlier build, and the others."""
    if before is None:
        return every.clear(), every
    pending = tables.frame(build.store, before.drops).filter(pl.col("rule").is_in(mllm.PENDING))
    asked = tables.frame(build.store, before.asked).join(
        pending.select(pl.col("id").alias("pair_id")), on="pair_id", how="anti"
    )
    same = ["pair_id", "query_caption_id", "target_caption_id"]
    old = every.join(asked, on=same, how="semi", nulls_equal=True)
    return old, every.join(old, on="pair_id", how="anti")


def _of(build: Build, table: Table, key: str, pairs: pl.DataFrame) -> pl.DataFrame:
    """The rows of some pairs."""
    rows = tables.frame(build.store, table)
    return rows.join(pairs.select(pl.col("pair_id").alias(key)), on=key, how="semi")


def _as_frames(found: Sequence[Label | LabelDrop]) -> tuple[pl.DataFrame, pl.DataFrame]:
    labels = [
        {**row._asdict(), "instructions": list(row.instructions)}
        for row in found
        if isinstance(row, Label)
    ]
    # What a server said of a failure may differ from call to call, and fates are hashed.
    drops = [
        {
            "level": "pair",
            "id": row.pair_id,
            "stage": "label_pairs",
            "rule": row.rule,
            "detail": row.detail if row.rule in OWN_WORDS else None,
        }
        for row in found
        if isinstance(row, LabelDrop)
    ]
    rows = (("labels", labels), ("drops", drops))
    one, other = (pl.DataFrame(pa.Table.from_pylist(r, schema=SCHEMAS[n])) for n, r in rows)
    return one, other


def label_by_captions(pair: PairText) -> Labelled:
    """One to three English instructions from the difference of a pair's captions."""
    if not (pair.query_caption and pair.target_caption):
        side = "target" if pair.query_caption else "query"
        return Labelled(LabelDrop(pair.pair_id, "no_caption", side))
    written = instructions.from_captions(pair.pair_id, pair.query_caption, pair.target_caption)
    if isinstance(written, str):
        return Labelled(LabelDrop(pair.pair_id, "captions_say_nothing", written))
    return Labelled(Label(pair.pair_id, tuple(written), None, "captions", None, None))


def label_by_mllm(
    build: Build,
    pairs: Sequence[PairText],
    images: Callable[[str], bytes],
    params: LabelParams,
) -> list[Labelled]:
    """At least `params.instructions` distinct instructions per pair, written by a model.

    Pairs are begun in their order; rows come in that order. `images` gives the JPEG of an
    image_id, within `params.max_pixels`. Raises infra.mllm.EndpointUnavailable where the endpoint
    has never answered.
    """

    async def work(ask: mllm.Ask, pair: PairText) -> Labelled:
        noted = Noted(ask)
        outcome = await label_pair(noted, pair, params)
        return Labelled(outcome, tuple(noted.keys))

    calls = 2 if params.calls == "two" else 1
    return ask_all(build, "label_pairs", pairs, work, params, images, calls)


async def label_pair(ask: mllm.Ask, pair: PairText, params: LabelParams) -> Label | LabelDrop:
    """The label of one pair by a model, or why it has none."""
    answer = await _compare_and_write(ask, pair, params)
    if isinstance(answer, mllm.Flawed):
        return LabelDrop(pair.pair_id, *answer)
    kept = _kept(answer.instructions, pair.target_caption, params.instructions)
    if isinstance(kept, _Unfit):
        return LabelDrop(pair.pair_id, *kept)
    return Label(
        pair.pair_id,
        kept,
        _description(answer),
        "mllm",
        params.model,
        prompt_digest(params),
    )


async def _compare_and_write(
    ask: mllm.Ask, pair: PairText, params: LabelParams
) -> ComparisonAndInstructions | mllm.Flawed:
    if params.calls == "one":
        request = _about_pictures(pair, params, ComparisonAndInstructions)
        answer = await mllm.ask_for(ask, request, ComparisonAndInstructions)
        return answer if isinstance(answer, mllm.Flawed) else _flaw(answer) or answer
    found = await mllm.ask_for(ask, _about_pictures(pair, params, Comparison), Comparison)
    if isinstance(found, mllm.Flawed):
        return found
    if flaw := _flaw(found):
        return flaw
    request = _about_comparison(found, pair, params)
    written = await mllm.ask_for(ask, request, Instructions)
    if isinstance(written, mllm.Flawed):
        return written
    return ComparisonAndInstructions(
        common=found.common, differences=found.differences, instructions=written.instructions
    )


def _about_pictures(pair: PairText, params: LabelParams, answer: type[BaseModel]) -> mllm.Request:
    shown = (("source", pair.query_caption), ("target", pair.target_caption))
    captions = [(name, text) for name, text in shown if text and params.show_captions]
    prompt = "describe" if params.calls == "two" else "describe_and_instruct"
    pictures = (
        mllm.Picture("Source image", pair.query),
        mllm.Picture("Target image", pair.target),
    )
    text = PROMPTS.render("pair", **enclosed(captions, CAPTION_LIMIT))
    return _request(params, pair, prompt, pictures, text, answer)


def _about_comparison(found: Comparison, pair: PairText, params: LabelParams) -> mllm.Request:
    parts = (
        ("Both", found.common),
        ("Source", found.differences.query),
        ("Target", found.differences.target),
    )
    text = PROMPTS.render("comparison", **enclosed(parts, DESCRIPTION_LIMIT))
    return _request(params, pair, "instruct", (), text, Instructions)


def _request(
    params: LabelParams,
    pair: PairText,
    prompt: str,
    pictures: tuple[mllm.Picture, ...],
    text: str,
    answer: type[BaseModel],
) -> mllm.Request:
    return mllm.Request(
        instructions=PROMPTS.render(prompt, count=params.instructions),
        pictures=pictures,
        text=text,
        answer=answer,
        resize=params.resize,
        model=params.model,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        about=pair.about,
    )


def _flaw(found: Comparison | ComparisonAndInstructions) -> mllm.Flawed | None:
    parts = {
        "common": found.common,
        "differences.query": found.differences.query,
        "differences.target": found.differences.target,
    }
    for name, text in parts.items():
        if len(text) > DESCRIPTION_LIMIT:
            return mllm.Flawed("too_long", f"{name}: {len(text)} characters")
    if not instructions.words(found.differences.target):
        return mllm.Flawed("empty", "differences.target")
    return None


def _kept(written: list[str], target_caption: str | None, needed: int) -> tuple[str, ...] | _Unfit:
    cleaned = [instructions.clean(text) for text in written]
    short = [text for text in cleaned if len(text) <= INSTRUCTION_LIMIT]
    differing = instructions.distinct(short)
    leaks = [instructions.leak(text, target_caption) for text in differing]
    kept = [text for text, leak in zip(differing, leaks, strict=True) if leak is None]
    if len(kept) >= needed:
        return tuple(kept[:MOST_INSTRUCTIONS])
    count = f"{len(kept)} of {needed}"
    if not any(map(instructions.words, cleaned)):
        return _Unfit("empty", "instructions")
    if len(differing) >= needed:
        return _Unfit("gives_away_target", ", ".join(sorted({leak for leak in leaks if leak})))
    if len(instructions.distinct(cleaned)) >= needed:
        return _Unfit("too_long", count)
    return _Unfit("too_few_distinct", count)


def _description(found: ComparisonAndInstructions) -> str:
    parts = (
        ("In common", found.common),
        ("Source", found.differences.query),
        ("Target", found.differences.target),
    )
    return " ".join(f"{name}: {instructions.clean(text)}" for name, text in parts)
