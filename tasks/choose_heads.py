"""Choose heads: those of a model that look at what a question is about, told by a few boxes.

SD-RPN (arXiv 2509.16944) lists heads for a few models and does not say how they were found.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra import corpus, receipts, tables
from infra.attention_heads import Mode
from infra.attention_maps import UNIT, Square, to_cells
from infra.attention_prompts import watched_prompt
from infra.build import Build
from infra.canonical import digest, settings
from infra.cluster import Crash, halves
from infra.corpus import Source
from infra.errors import ConfigError
from infra.ledger import stage
from infra.local_mllm import LocalModel
from infra.local_probes import Apart, heads_apart
from infra.schema import SCHEMAS
from infra.store import Store
from infra.tables import Shard, Table

BOXES = "annotated_boxes"
VERSION = 1  # of results, and of receipts
SHARD = 8  # samples that a worker measures before it writes them down


class ChooseParams(BaseModel):
    """How heads are chosen where a model's are not listed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(
        200,
        ge=1,
        le=10_000,
        description="Samples of a mode that are looked at, of those with boxes the ones with the"
        " smallest hashes. Not given in the source; our own default: enough that one more or less"
        " hardly moves a mean.",
    )
    heads: int = Field(
        4,
        ge=1,
        le=64,
        description="Heads that are chosen. Not given in the source; our own default: the code"
        " lists three to seven.",
    )
    layers: tuple[float, float] = Field(
        (0.3, 0.85),
        description="From and to which share of the depth they are sought. Not given in the"
        " source; our own default: all that the code lists are between.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        first, last = self.layers
        if not 0 <= first <= last <= 1:
            raise ValueError("layers: two shares of the depth between 0 and 1, the lower one first")
        return self


class Choosing(ChooseParams):
    """The model, how it is watched, and the modes whose heads are chosen."""

    local: LocalModel
    max_tokens: int
    square_pixels: int | None
    modes: list[Mode]


class ChosenHeads(NamedTuple):
    """Heads by mode, in a table that is named by them; what each sample says of each head; samples
    that ended their worker, which are tried again.
    """

    heads: Table
    masses: Table
    lost: Table


class Boxed(NamedTuple):
    """A question whose answer lies in boxes: (left, top, right, bottom), pixels of the picture."""

    name: str
    mode: Mode
    source: Source
    square: Square
    prompt: str
    boxes: tuple[tuple[int, int, int, int], ...]


class Job(NamedTuple):
    """What a worker needs to know."""

    corpus: Store
    store: Store
    params: Choosing
    family: str


def meaning(params: Choosing) -> Any:
    about = params.model_dump(mode="json", include={"samples", "heads", "layers", "modes"})
    return settings({**about, **_measuring(params)})


def _measuring(params: Choosing) -> dict[str, Any]:
    """What decides how a sample is measured."""
    shown = {"max_tokens": params.max_tokens, "square_pixels": params.square_pixels}
    return {**shown, "model": params.local.model}


@stage(
    version=VERSION,
    reads={
        "given": ("sample_id", "image_id", "mode", "prompt", BOXES),
        "images": ("image_id", "width", "height"),
    },
    meaning=meaning,
    is_final=lambda outputs, build: not outputs.lost.rows,
    starts_from=("given", "sample_id"),
)
def choose_heads(
    build: Build,
    given: Table,
    objects: Table,
    images: Table,
    params: Choosing,
    before: ChosenHeads | None = None,
) -> ChosenHeads:
    """The heads of each mode that look most into `annotated_boxes` while the model answers.

    A head's mass is what its attention, the mean over generated tokens, has in the boxes beyond
    what an even look would have there. Its sum decides over the samples with the smallest hashes,
    which are few and mostly the same in the next build. Raises ConfigError for a mode of which no
    sample can be measured, or no head looks into the boxes.
    """
    samples = _smallest(build, given, objects, images, params)
    job = Job(build.corpus, build.store, params, digest([VERSION, _measuring(params)])[:20])
    done = receipts.read(build.store, "choose_heads", job.family)
    known = [*(before.masses.shards if before else ()), *done]
    names = {sample.name for sample in samples}
    kept, have = receipts.wanted(build.store, "masses", "name", known, names)
    todo = [sample for sample in samples if sample.name not in have]
    new, lost = _measured(build, job, todo)
    masses = Table("masses", (*kept, *new))
    rows = tables.read(build.store, masses).to_pylist()
    there = set(tables.frame(build.store, given, ["mode"])["mode"])
    chosen = [row for mode in params.modes if mode in there for row in _best(rows, mode, params)]
    named = digest([[row["mode"], row["layer"], row["head"]] for row in chosen])[:20]
    found = pa.Table.from_pylist(chosen, SCHEMAS["heads"])
    return ChosenHeads(
        tables.write(build.store, f"heads-{named}", found),
        masses,
        tables.write(build.store, "masses", lost),
    )


def _smallest(
    build: Build, given: Table, objects: Table, images: Table, params: Choosing
) -> list[Boxed]:
    """Of each mode the samples with boxes that have the smallest names."""
    places = corpus.sources(tables.frame(build.store, objects))
    sizes = tables.frame(build.store, images, ["image_id", "width", "height"])
    squares = {name: Square(width, height) for name, width, height in sizes.iter_rows()}
    rows = tables.frame(build.store, given, ["image_id", "mode", "prompt", BOXES])
    found: list[Boxed] = []
    for mode in params.modes:
        part = rows.filter((pl.col("mode") == mode) & (pl.col(BOXES).list.len() > 0))
        named = {digest([image, mode, *more]): (image, *more) for image, _, *more in part.rows()}
        for name in sorted(named)[: params.samples]:
            image, prompt, flat = named[name]
            boxes = tuple(tuple(flat[at : at + 4]) for at in range(0, len(flat), 4))
            found.append(Boxed(name, mode, places[image], squares[image], prompt, boxes))
    return found


def _measured(
    build: Build, job: Job, todo: Sequence[Boxed]
) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Shards of new masses, and rows of the samples that ended their worker."""
    found: list[Shard] = []
    crashed: list[dict[str, Any]] = []
    shards = [tuple(todo[at : at + SHARD]) for at in range(0, len(todo), SHARD)]
    done, local = 0, job.params.local
    for part, result in build.pool.map(
        partial(measure, job), shards, split=halves, resources=local.resources
    ):
        done += len(part)
        build.progress("choose_heads", done, len(todo))
        if isinstance(result, Crash):
            crashed += [{"name": s.name, "mode": s.mode, "status": "crashed"} for s in part]
        else:
            found.append(Shard(*result))
            build.work["heads_measured"] += len(part)
    return sorted(found), crashed


def _best(rows: Sequence[dict[str, Any]], mode: Mode, params: Choosing) -> list[dict[str, Any]]:
    """The heads of a mode with the largest masses, as rows of the table `heads`."""
    used = [row for row in rows if row["mode"] == mode and row["status"] == "ok"]
    if not used:
        raise ConfigError(
            f"choose_heads: no sample of mode {mode} with {BOXES} could be measured; name its"
            f" heads in attention.heads.{mode}, or leave choose_heads out"
        )
    shape = used[0]["layers"], used[0]["heads"]
    total = np.sum([row["masses"] for row in used], axis=0, dtype=np.int64).reshape(shape)
    first, last = (share * shape[0] for share in params.layers)
    ranked = sorted(
        (-int(mass), layer, head)
        for (layer, head), mass in np.ndenumerate(total)
        if first <= layer <= last and mass > 0
    )
    if not ranked:
        raise ConfigError(
            f"choose_heads: between these layers no head looks into the boxes of mode {mode};"
            " widen choose_heads.layers, or look whether the boxes are those of the answers"
        )
    best = sorted((layer, head, -mass) for mass, layer, head in ranked[: params.heads])
    about = {"mode": mode, "samples": len(used)}
    return [
        {**about, "layer": layer, "head": head, "mass": mass // len(used)}
        for layer, head, mass in best
    ]


# On a worker ---------------------------------------------------------------------------------


def measure(job: Job, part: Sequence[Boxed]) -> list[Any]:
    """Write what samples say of heads, and, last, the receipt; the shard."""
    params = job.params
    prompts = [
        watched_prompt(
            sample.name, corpus.fetch(job.corpus, sample.source), sample.prompt,
            params.square_pixels, params.max_tokens,
        )
        for sample in part
    ]  # fmt: skip
    rows = [_row(*pair) for pair in zip(part, heads_apart(params.local, prompts), strict=True)]
    shard = tables.write_shard(job.store, pa.Table.from_pylist(rows, SCHEMAS["masses"]), "masses")
    receipts.write(job.store, "choose_heads", job.family, shard)
    return list(shard)


def _row(sample: Boxed, apart: Apart) -> dict[str, Any]:
    row = {"name": sample.name, "mode": sample.mode, "status": "no_answer"}
    if apart.rows is None:
        return row
    inside = boxed_cells(sample, apart.grids[0]).ravel()
    if not inside.any():
        return {**row, "status": "outside"}
    looked = apart.rows.astype(np.float64)
    mass = looked[..., inside].sum(-1) - inside.mean() * looked.sum(-1)
    layers, heads = mass.shape
    values = np.rint(mass * UNIT).astype(np.int64).ravel().tolist()
    return {**row, "status": "ok", "layers": layers, "heads": heads, "masses": values}


def boxed_cells(sample: Boxed, grid: tuple[int, int]) -> np.ndarray:
    """Cells that the boxes of a sample touch, bool[height, width]."""
    inside = np.zeros(grid, bool)
    for box in sample.boxes:
        cells = to_cells(box, grid, sample.square)
        inside[max(0, cells.top) : cells.bottom, max(0, cells.left) : cells.right] = True
    return inside
