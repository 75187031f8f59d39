"""Draw regions: a picture of every record's labels and boxes, for a person to judge.

The pictures are made on the workers and kept, so that a new record is drawn alone.
"""

import base64
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from infra import corpus, images, receipts, tables
from infra.attention_maps import Square
from infra.attention_pictures import draw_labels
from infra.build import Build
from infra.canonical import digest
from infra.cluster import Crash, halves
from infra.corpus import Source
from infra.ledger import stage
from infra.schema import SCHEMAS
from infra.store import Store
from infra.tables import Shard, Table
from infra.text import plain

VERSION = 1  # of results, and of receipts
SHARD = 64  # pictures that a worker draws before it writes them down
PAGE = 100  # records on a page
TEMPLATES = Path(__file__).parent / "templates"
DRAWN = ("image_id", "grid_height", "grid_width", "labels", "box", "boxes")


class DrawParams(BaseModel):
    """How records are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    side: int = Field(
        320, ge=64, le=2_048, description="Long side of a drawn picture, in pixels; there are two."
    )
    quality: int = Field(75, ge=30, le=95, description="Quality of the JPEG.")


class Drawn(NamedTuple):
    """Pictures by the name of what they show; names whose picture ended its worker."""

    overlays: Table
    lost: Table


class Sketch(NamedTuple):
    """What is drawn over a picture."""

    name: str
    image_id: str
    source: Source
    square: Square
    grid: tuple[int, int]
    labels: tuple[int, ...]
    box: tuple[int, ...]
    boxes: tuple[int, ...]


class Job(NamedTuple):
    """What a worker needs to know."""

    corpus: Store
    store: Store
    params: DrawParams
    family: str


@stage(
    version=VERSION,
    reads={"given": ("sample_id", *DRAWN), "seen": ("image_id", "width", "height")},
    is_final=lambda outputs, build: not outputs.lost.rows,
    starts_from=("given", "sample_id"),
)
def draw_regions(
    build: Build,
    given: Table,
    objects: Table,
    seen: Table,
    params: DrawParams,
    before: Drawn | None = None,
) -> Drawn:
    """Draw the labels and boxes of every sample over its picture, as a JPEG.

    Samples are read shard by shard; what is drawn already, here or in a build that did not come to
    its end, is not drawn again.
    """
    job = Job(build.corpus, build.store, params, digest([VERSION, params.model_dump()])[:20])
    names = {name for part in _parts(build, given) for name in part}
    done = receipts.read(build.store, "draw_regions", job.family)
    known = [*(before.overlays.shards if before else ()), *done]
    kept, have = receipts.wanted(build.store, "overlays", "name", known, names)
    new: list[Shard] = []
    lost: list[dict[str, Any]] = []
    shards = _sketches(build, given, objects, seen, have)
    for part, result in build.pool.map(partial(draw, job), shards, split=halves):
        if isinstance(result, Crash):
            lost += [{"name": item.name, "image_id": item.image_id} for item in part]
        else:
            new.append(Shard(*result))
            build.work["regions_drawn"] += len(part)
        build.progress("draw_regions", build.work["regions_drawn"], len(names) - len(have))
    return Drawn(
        Table("overlays", (*kept, *sorted(new))), tables.write(build.store, "overlays", lost)
    )


def name_of(row: Mapping[str, Any]) -> str:
    """The name of what is drawn of a sample."""
    return digest([row[column] for column in DRAWN])


def _parts(build: Build, given: Table) -> Iterator[dict[str, dict[str, Any]]]:
    """Samples by the names of their pictures, one shard after the other."""
    for part in tables.shards(build.store, given, list(DRAWN)):
        yield {name_of(row): row for row in part.to_pylist()}


def _sketches(
    build: Build, given: Table, objects: Table, seen: Table, have: set[str]
) -> Iterator[tuple[Sketch, ...]]:
    """Shards of what is not drawn yet."""
    places = corpus.sources(tables.frame(build.store, objects))
    sizes = tables.frame(build.store, seen, ["image_id", "width", "height"])
    squares = {image: Square(width, height) for image, width, height in sizes.iter_rows()}
    drawn = set(have)
    for part in _parts(build, given):
        todo = [
            Sketch(
                name, row["image_id"], places[row["image_id"]], squares[row["image_id"]],
                (row["grid_height"], row["grid_width"]), tuple(row["labels"]),
                tuple(row["box"]), tuple(row["boxes"]),
            )
            for name, row in part.items()
            if name not in drawn
        ]  # fmt: skip
        drawn.update(item.name for item in todo)
        yield from (tuple(todo[at : at + SHARD]) for at in range(0, len(todo), SHARD))


# On a worker ---------------------------------------------------------------------------------


def draw(job: Job, part: Sequence[Sketch]) -> list[Any]:
    """Draw a shard, write it, and, last, its receipt; the shard."""
    rows = [
        {"name": item.name, "image_id": item.image_id, "jpeg": _drawn(job, item)} for item in part
    ]
    shard = tables.write_shard(
        job.store, pa.Table.from_pylist(rows, SCHEMAS["overlays"]), "overlays"
    )
    receipts.write(job.store, "draw_regions", job.family, shard)
    return list(shard)


def _drawn(job: Job, item: Sketch) -> bytes:
    data, side = corpus.fetch(job.corpus, item.source), job.params.side
    short = max(1, side * min(item.square[:2]) // item.square.side)
    picture = images.decode(data, short, images.MOST_PIXELS)
    labels = np.reshape(np.array(item.labels, np.int8), item.grid)
    boxes = [item.boxes[at : at + 4] for at in range(0, len(item.boxes), 4)]
    shown = draw_labels(picture, item.square, labels, item.box, boxes, side)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=job.params.quality)
    return buffer.getvalue()


# In a version --------------------------------------------------------------------------------


def pages(store: Store, overlays: Table, records: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    """Pages with the pictures of all records, PAGE on each: HTML with no script and nothing outside
    it. Pictures are read shard by shard, and records come in the order of these.
    """
    count = math.ceil(records.height / PAGE)
    shown = _shown(store, overlays, records)
    for number in range(count):
        yield f"pictures/{number:05d}.html", _page(list(islice(shown, PAGE)), number, count)


def _shown(store: Store, overlays: Table, records: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Records with their pictures, one shard of pictures after the other, then those without."""
    by_name: dict[str, list[int]] = {}
    for at, row in enumerate(records.select(DRAWN).iter_rows(named=True)):
        by_name.setdefault(name_of(row), []).append(at)
    for part in tables.shards(store, overlays):
        for row in part.to_pylist():
            for at in by_name.pop(row["name"], ()):
                yield {"jpeg": row["jpeg"], **records.row(at, named=True)}
    for at in chain.from_iterable(by_name.values()):
        yield {"jpeg": None, **records.row(at, named=True)}


def _page(rows: Sequence[Mapping[str, Any]], number: int, count: int) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"plain": plain, "base64": _data_uri}
    style = (TEMPLATES / "regions.css").read_text("utf-8")
    policy = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template("regions.html").render(
        rows=rows, number=number, count=count, style=Markup(style), policy=f"sha256-{policy}",
        file="{:05d}.html".format,
    )  # fmt: skip
    return page.encode()


def _data_uri(jpeg: bytes) -> Markup:
    return Markup("data:image/jpeg;base64," + base64.b64encode(jpeg).decode())
