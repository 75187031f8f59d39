"""Map attention: a model's own answer to a question about a picture, and where it looked meanwhile.

SD-RPN, arXiv 2509.16944, and its released code. Nothing is computed twice for the same picture,
question and model: the next build starts from these maps, and an interrupted one from its receipts.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import corpus, receipts, samples, tables
from infra.attention_heads import Chosen, Mode, heads_of, sink_dims
from infra.attention_maps import STRENGTH, UNIT, mean_map, stored, stored_strengths
from infra.attention_prompts import watched_prompt
from infra.build import Build
from infra.canonical import digest, settings
from infra.cluster import Crash, halves
from infra.corpus import Source
from infra.errors import ConfigError
from infra.ledger import stage, unless_dropped_by
from infra.local_mllm import LocalModel, Prompt, load
from infra.local_probes import Hidden, Looks, attention
from infra.schema import SCHEMAS
from infra.store import Store
from infra.tables import Shard, Table

VERSION = 5  # of results, and of receipts
SHARD = 64  # maps that a worker makes before it writes them down
LISTED = Table("heads")  # no choice was made
NO_SINKS = 1.0  # what no attention reaches
CODE_TAU = 20.0  # of `dims`, as SD-RPN's code


class HeadsParams(BaseModel):
    """Heads of a model, by layer; both count from 0, and an empty list is all heads of a layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grounding: dict[int, list[int]] = Field(
        min_length=1, description="Heads that look at what the answer is about."
    )
    sink: dict[int, list[int]] = Field({}, description="Heads that show sinks; none: no sinks.")
    sink_threshold: float = Field(
        1e-2,
        gt=0,
        le=1,
        description="Mean attention from which a cell is a sink: as the code for Qwen; that for"
        " LLaVA has 1e-3.",
    )


class SinkParams(BaseModel):
    """Sinks by the hidden states of visual tokens, in place of heads that show them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["norm", "dims"] = Field(
        description="`norm`: the L2 norm is above `above` (the paper's rule). `dims`: the largest"
        " magnitude in `dims`, after RMS normalisation, is (shipped with the code)."
    )
    above: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="`dims`: null is 20 (the code). `norm`: required, since no number is given in"
        " the source and norms differ from model to model; with one that is too high the column"
        " `sink` shows all norms, in thousandths.",
    )
    dims: list[int] = Field(
        [],
        description="Dimensions; empty: those that the code lists, 2533 and 1415 for LLaVA-1.5-7B,"
        " 2100 and 4743 for 13B, both on Llama 2.",
    )
    layer: int | None = Field(
        None,
        ge=0,
        description="Text layer, from 0, whose input is looked at. Which one is not given in the"
        " source; null is the first one with grounding heads, our own default: what they read.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.by == "norm" and self.above is None:
            raise ValueError("above is required by norm: the source gives no number")
        if self.by == "norm" and self.dims:
            raise ValueError("dims are not used by norm; leave them out")
        return self

    @property
    def threshold(self) -> float:
        return self.above or CODE_TAU


class AttentionParams(BaseModel):
    """How a model is watched while it answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    square_pixels: int | None = Field(
        451_584,
        ge=784,
        description="Pixels of the grey square that a picture is padded to; 451584 is 24 x 24"
        " tokens of 28 x 28, as the code for Qwen2.5-VL (589824 for Qwen3-VL). null: the square"
        " keeps the picture's size, as the code for LLaVA, whose processor makes it 336 x 336.",
    )
    heads: dict[Mode, HeadsParams] = Field(
        {},
        description="Heads by mode, in place of those that `choose_heads` chooses or the code lists"
        " for the model; where it does not list it, all heads of the layer at 0.45 of the depth:"
        " the paper's general form is one middle layer, which one is not given in the source; our"
        " own default.",
    )
    sinks: dict[Mode, SinkParams] = Field(
        {}, description="Sinks by hidden states, by mode, in place of heads that show sinks."
    )


class MapParams(AttentionParams):
    """The model that is watched, and how."""

    local: LocalModel
    max_tokens: int = 128


class Mapped(NamedTuple):
    """Samples with `map_id` and `answer`; the maps; samples without an answer."""

    samples: Table
    maps: Table
    drops: Table


class Look(NamedTuple):
    """One question about one picture."""

    map_id: str
    image_id: str
    source: Source
    mode: Mode
    prompt: str


class Job(NamedTuple):
    """What a worker needs to know."""

    corpus: Store
    store: Store
    params: MapParams
    chosen: Mapping[str, Mapping[int, Sequence[int]]]
    family: str


def meaning(params: MapParams) -> Any:
    """Weights and settings that decide answers and maps, and `batch_size`: it bounds the shape of a
    pass, which their last bits hang on.
    """
    about = params.model_dump(
        mode="json", include={"max_tokens", "square_pixels", "heads", "sinks"}
    )
    model = {"model": params.local.model, "batch_size": params.local.batch_size}
    return settings({**about, **model})


@stage(
    version=VERSION,
    reads={"given": tables.ALL, "heads": ()},
    meaning=meaning,
    is_final=unless_dropped_by("crashed_model"),
    starts_from=("given", "sample_id"),
)
def map_attention(
    build: Build,
    given: Table,
    objects: Table,
    params: MapParams,
    heads: Table = LISTED,
    before: Mapped | None = None,
) -> Mapped:
    """Ask about every sample (`mode`, `prompt`), greedily, and average where the model looked.

    Heads are those that the parameters give, else those of the table `heads`, which is named by
    them, else those that are listed for the model. The mean over generated tokens, then over heads;
    the prompt's own pass is no step. Shards of maps are read one at a time. Raises ConfigError for
    heads that the model does not have.
    """
    rows = tables.frame(build.store, given)
    names = [_map_id(*row) for row in rows.select("image_id", "mode", "prompt").iter_rows()]
    rows = rows.with_columns(pl.Series("map_id", names, pl.String))
    family = digest([VERSION, meaning(params), heads.name])[:20]
    job = Job(build.corpus, build.store, params, _chosen(build, heads), family)
    done = receipts.read(build.store, "map_attention", job.family)
    known = [*(before.maps.shards if before else ()), *done]
    kept, have = receipts.wanted(build.store, "maps", "map_id", known, set(names))
    todo = rows.filter(~pl.col("map_id").is_in(list(have))).unique("map_id")
    new, crashed = _run(build, job, _looks_of(build, todo, objects))
    maps = Table("maps", tuple(dict.fromkeys([*kept, *new])))
    said = _said(build.store, maps)
    answered = rows.join(said, on="map_id", how="left")
    unusable = pl.col("status").is_in(["empty", "refused"]) | pl.col("status").is_null()
    return Mapped(
        samples.write(build.store, answered.filter(~unusable).drop("status")),
        maps,
        samples.write_drops(
            build.store, samples.drops(_drops(answered.filter(unusable), crashed), "map_attention")
        ),
    )


def _chosen(build: Build, heads: Table) -> dict[str, dict[int, list[int]]]:
    """Heads by mode and layer."""
    found: dict[str, dict[int, list[int]]] = {}
    for row in tables.read(build.store, heads).to_pylist():
        found.setdefault(row["mode"], {}).setdefault(row["layer"], []).append(row["head"])
    return found


def _map_id(image_id: str, mode: str, prompt: str) -> str:
    return digest([image_id, mode, prompt])


def _looks_of(build: Build, todo: pl.DataFrame, objects: Table) -> list[tuple[Look, ...]]:
    """Shards of one mode each, since modes have heads of their own."""
    places = corpus.sources(tables.frame(build.store, objects))
    found = []
    for mode in todo["mode"].unique().sort().to_list():
        part = todo.filter(pl.col("mode") == mode).sort("map_id")
        columns = part.select("map_id", "image_id", "mode", "prompt").iter_rows()
        looks = [Look(name, image, places[image], *more) for name, image, *more in columns]
        found += [tuple(looks[at : at + SHARD]) for at in range(0, len(looks), SHARD)]
    return found


def _run(
    build: Build, job: Job, shards: Sequence[tuple[Look, ...]]
) -> tuple[list[Shard], dict[str, str]]:
    """Shards of new maps, in order of content, and what ended the worker, by map."""
    written: list[Shard] = []
    crashed: dict[str, str] = {}
    total, done = sum(map(len, shards)), 0
    work = partial(look, job)
    for part, result in build.pool.map(
        work, shards, split=halves, resources=job.params.local.resources
    ):
        done += len(part)
        build.progress("map_attention", done, total)
        if isinstance(result, Crash):
            crashed |= {item.map_id: result.reason for item in part}
        else:
            written.append(Shard(*result))
            build.work["maps_made"] += len(part)
    return sorted(written), crashed


def _said(store: Store, maps: Table) -> pl.DataFrame:
    parts = [pl.DataFrame(p) for p in tables.shards(store, maps, ["map_id", "status", "answer"])]
    empty = pl.DataFrame(SCHEMAS["maps"].empty_table()).select("map_id", "status", "answer")
    return pl.concat([empty, *parts])


def _drops(lost: pl.DataFrame, crashed: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for row in lost.iter_rows(named=True):
        detail = row["answer"] or crashed.get(row["map_id"], "")
        rule = row["status"] or "crashed_model"
        yield {"id": row["sample_id"], "rule": rule, "detail": detail[:200] or None}


# On a worker ---------------------------------------------------------------------------------


def look(job: Job, part: Sequence[Look]) -> list[Any]:
    """Make the maps of a shard of one mode, write them and, last, their receipt; the shard."""
    local = job.params.local
    chosen = _heads(job, part[0].mode)
    sinks = job.params.sinks.get(part[0].mode)
    hidden = _hidden(job.params, sinks, chosen) if sinks else None
    heads = {"grounding": chosen.grounding, "sink": {} if hidden else chosen.sink}
    used = {name: some for name, some in heads.items() if some}
    looks = attention(local, used, (_prompt(job, item) for item in part), hidden)
    about = _about_sinks(chosen, sinks, hidden)
    rows = [{**_row(*pair), **about} for pair in zip(part, looks, strict=True)]
    shard = tables.write_shard(job.store, pa.Table.from_pylist(rows, SCHEMAS["maps"]), "maps")
    receipts.write(job.store, "map_attention", job.family, shard)
    return list(shard)


def _heads(job: Job, mode: Mode) -> Chosen:
    params = job.params
    if own := params.heads.get(mode):
        return Chosen(own.grounding, own.sink, own.sink_threshold, False)
    if mode in job.chosen:
        return Chosen(job.chosen[mode], {}, NO_SINKS, False)
    depth = load(params.local).network.config.get_text_config().num_hidden_layers
    return heads_of(params.local.name, mode, depth)


def _hidden(params: MapParams, sinks: SinkParams, chosen: Chosen) -> Hidden:
    """The hidden states by which sinks are found."""
    layer = min(chosen.grounding) if sinks.layer is None else sinks.layer
    if sinks.by == "norm":
        return Hidden(layer)
    dims = tuple(sinks.dims) or sink_dims(params.local.name)
    if not dims:
        raise ConfigError(
            f"attention.sinks: no dimensions are listed for {params.local.name!r}; name them in"
            " dims, or use norm"
        )
    return Hidden(layer, dims)


def _prompt(job: Job, item: Look) -> Prompt:
    data, params = corpus.fetch(job.corpus, item.source), job.params
    return watched_prompt(item.map_id, data, item.prompt, params.square_pixels, params.max_tokens)


def _row(item: Look, looked: Looks) -> dict[str, Any]:
    answer = looked.response
    row = {
        "map_id": item.map_id,
        "image_id": item.image_id,
        "status": answer.status,
        "answer": answer.text.strip(),
    }
    if not looked.grids:
        return row
    (height, width), *_ = looked.grids
    rows = looked.rows["grounding"]
    maps = {name: stored(mean_map(some, (height, width))) for name, some in looked.rows.items()}
    if looked.strength is not None:
        maps["sink"] = stored_strengths(looked.strength)
    return {**row, "steps": len(rows), "height": height, "width": width, **maps}


def _about_sinks(chosen: Chosen, sinks: SinkParams | None, hidden: Hidden | None) -> dict[str, Any]:
    """The rule of a map's sinks, and its heads as text: `14:13,24,26`, after a bar those that show
    sinks, or the hidden states that do.
    """
    looking = _named(chosen.grounding)
    if sinks and hidden:
        where = f" in {','.join(map(str, hidden.dims))}" if hidden.dims else ""
        said = f"{sinks.by} of layer {hidden.layer}{where} > {sinks.threshold:g}"
        threshold = round(sinks.threshold * STRENGTH)
        return {"heads": f"{looking} | {said}", "sink_rule": sinks.by, "sink_threshold": threshold}
    return {
        "heads": " | ".join(filter(None, (looking, _named(chosen.sink)))),
        "sink_rule": "attention" if chosen.sink else None,
        "sink_threshold": round(chosen.threshold * UNIT),
    }


def _named(heads: Mapping[int, Sequence[int]]) -> str:
    layers = (f"{layer}:{','.join(map(str, some)) or 'all'}" for layer, some in heads.items())
    return " ".join(layers)
