"""Import records that exist already: questions and answers, boxes, captions, in the usual files."""

import fnmatch
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from infra import corpus, record_formats, samples, tables, tombstones
from infra.build import Build
from infra.errors import ConfigError, PairmillError
from infra.ledger import stage
from infra.record_files import shown
from infra.record_formats import BOXES, FormatParams, Row, text
from infra.schema import SCHEMAS
from infra.tables import Table
from infra.tombstones import Tombstones

TEXT_LIMIT = 100_000  # characters of one text
DETAIL = 200
MAX_KEY = 4_096
FARTHEST = 1 << 24  # pixels
ROWS = 50_000  # that are held as objects before they become columns
INSIDE = "::"  # stands before the name that a picture has inside a container
NOT_CONTENT = ("image", "size", "crowd", "source", "flaw")


class ImportParams(FormatParams):
    """Files of the corpus that hold records about its images."""

    files: list[str] = Field(
        min_length=1,
        description="Keys of the files, `*` and `?` allowed: `.json`, `.jsonl`, `.parquet`.",
    )
    optional: list[str] = Field(
        [],
        description="Of `columns`, those that a record may leave out or empty; null there. Without"
        " any other one it is malformed.",
    )
    images: str = Field(
        "",
        description="Folder of the corpus in which the files name their pictures, or tars in which"
        " they do, `*` and `?` allowed; otherwise a name is a key, or the place beside the file.",
    )

    @model_validator(mode="after")
    def _optional_columns_are_columns(self) -> "ImportParams":
        if unknown := sorted({*self.optional} - {*record_formats.schema(self)}):
            raise ValueError(f"optional: {unknown[0]!r} is no column of these records")
        return self


class Imported(NamedTuple):
    """Samples, rows that could not be used, and the row, `<key>#<row>`, that each sample is."""

    samples: Table
    drops: Table
    origins: Table


def find_files(build: Build, params: ImportParams) -> Table:
    """The files as a table (key, stamp), so that a changed file is a changed input.

    Raises ConfigError for a pattern that no file of the corpus fits.
    """
    found: dict[str, str] = {}
    for pattern in [*params.files, *filter(None, [params.instances])]:
        stem = pattern.split("*")[0].split("?")[0]
        fitting = [s for s in build.corpus.list(stem) if fnmatch.fnmatchcase(s.key, pattern)]
        if not fitting:
            name = "instances" if pattern == params.instances else "files"
            raise ConfigError(f"records.{name}: no file of the corpus fits {pattern!r}")
        found |= {s.key: f"{s.etag};{s.size};{s.mtime}" for s in fitting}
    rows = [{"key": key, "stamp": found[key]} for key in sorted(found)]
    return tables.write(build.store, "files", rows)


def meaning(params: ImportParams) -> Any:
    return params.model_dump(exclude={"files"})


@stage(
    version=6,
    reads={"files": ("key", "stamp"), "objects": ("key", "member", "image_id"),
           "images": ("image_id", "width", "height")},
    meaning=meaning,
)  # fmt: skip
def import_records(
    build: Build, files: Table, objects: Table, images: Table, params: ImportParams
) -> Imported:
    """Samples of all files: (sample_id, image_id, source, and the columns of the format).

    Of equal ones the first stays. A row without a usable picture, with a picture of another size
    than it says, of a crowd, or of a shape that the format does not have, is a drop. Raises
    ConfigError for a file that can't be read, or none of whose rows has the shape.
    """
    known = _known(build, objects, images, params)
    listed = tables.read(build.store, files, ["key"])["key"].to_pylist()
    kept, lost = [_samples([], params)], [_drops([])]
    for key in listed:
        if key != params.instances:
            rows = _judged(key, record_formats.rows(build.corpus, key, params), known)
            while part := list(islice(rows, ROWS)):
                kept.append(_samples([row for row in part if "rule" not in row], params))
                lost.append(_drops([row for row in part if "rule" in row]))
                done = sum(map(len, kept)) + sum(map(len, lost))
                build.progress("import records", done, None, key)
    _check_unchanged(build, files)
    frame = pl.concat(kept)
    first = frame["sample_id"].is_first_distinct()
    again = [
        {"id": name, "rule": "same_record", "detail": sample}
        for name, sample in frame.filter(~first).select("name", "sample_id").iter_rows()
    ]
    drops = pl.concat([*lost, _drops(again)]).sort("level", "id")
    return Imported(
        samples.write(build.store, frame.filter(first).drop("name")),
        tables.write_frame(build.store, "drops", drops),
        samples.write(build.store, frame.filter(first).select("sample_id", "name"), "origins"),
    )


def _check_unchanged(build: Build, files: Table) -> None:
    """Files are read in parts: one that changed meanwhile may be half of each."""
    for row in tables.read(build.store, files).to_pylist():
        stat = build.corpus.head(row["key"])
        if row["stamp"] != f"{stat.etag};{stat.size};{stat.mtime}":
            raise PairmillError(f"{row['key']} changed while it was read; run again")


def _samples(rows: list[Row], params: ImportParams) -> pl.DataFrame:
    columns = {**samples.BASE, "source": pl.String, **record_formats.schema(params)}
    return pl.DataFrame(rows, {"name": pl.String, **columns}, orient="row")


def _drops(rows: list[Row]) -> pl.DataFrame:
    schema = SCHEMAS["drops"]
    made = samples.drops(rows, "import_records")
    return pl.DataFrame(pa.Table.from_pylist(made, schema=schema))


class _Known(NamedTuple):
    """What rows are held against: images by all their names, their sizes, what is forgotten."""

    names: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]]
    gone: Tombstones
    params: ImportParams


def _known(build: Build, objects: Table, images: Table, params: ImportParams) -> _Known:
    rows = tables.frame(build.store, objects, ["key", "member", "image_id"])
    rows = rows.filter(pl.col("image_id").is_not_null()).sort("key", "member")
    ids = corpus.object_ids(rows).to_list()
    names: dict[str, str] = {}
    for key, member, image_id in rows.iter_rows():
        if member is not None and fnmatch.fnmatchcase(key, params.images):
            names.setdefault(INSIDE + posixpath.normpath(member), image_id)
    names |= dict(zip(ids, rows["image_id"].to_list(), strict=True))
    sized = tables.read(build.store, images, ["image_id", "width", "height"]).to_pylist()
    sizes = {row["image_id"]: (row["width"], row["height"]) for row in sized}
    return _Known(names, sizes, tombstones.load(build.store), params)


def _judged(key: str, rows: Iterable[tuple[str, Row]], known: _Known) -> Iterator[Row]:
    """What becomes of the rows of a file: a sample, or an id with the rule that dropped it."""
    source = posixpath.splitext(posixpath.basename(key))[0]
    for name, row in rows:
        places = list(_places(key, row.get("image"), known.params.images))
        image_id = next((known.names[place] for place in places if place in known.names), None)
        if image_id is None and known.gone and any(map(known.gone.found, places)):
            # The file still has its name; nothing that we write may.
            yield {"id": name, "rule": "forgotten_image"}
            continue
        content = {k: v for k, v in row.items() if k not in NOT_CONTENT}
        needed = {k: v for k, v in content.items() if v or k not in known.params.optional}
        if flaw := row.get("flaw") or _flaw(row, needed, image_id, known.sizes):
            yield {"id": name, "rule": flaw[0], "detail": shown(flaw[1])}
            continue
        own = row.get("source")
        said = text(own)[:DETAIL] if isinstance(own, str) else ""
        yield {
            "name": name, "sample_id": samples.sample_id(str(image_id), content),
            "image_id": image_id, "source": said or source, **content,
        }  # fmt: skip


def _flaw(
    row: Row, content: Row, image_id: str | None, sizes: Mapping[str, tuple[int, int]]
) -> tuple[str, str] | None:
    """The rule by which a row can't be used, and what decided."""
    if image_id is None or image_id not in sizes:
        name = row.get("image")
        rule = "no_such_image" if image_id is None else "image_unusable"
        return rule, name if isinstance(name, str) else "none is named"
    # A box in pixels of a picture that was resized since lies elsewhere.
    size, here = row.get("size"), sizes[image_id]
    if size and size != here:
        return "other_size", "{}x{}, here {}x{}".format(*size, *here)
    if row.get("crowd"):
        return "crowd", str(content.get("class_name"))
    unfit = next((name for name, value in content.items() if _is_unfit(name, value)), None)
    return ("malformed_record", unfit) if unfit else None


def _is_unfit(name: str, value: Any) -> bool:
    """A text that is empty or too long; a box that has no area, or is out of all bounds."""
    if name == "box":
        return not _is_box(value)
    if name.endswith(BOXES):
        boxes = [value[at : at + 4] for at in range(0, len(value or ()), 4)]
        return not boxes or not all(map(_is_box, boxes))
    texts = value if isinstance(value, list) else [value]
    return not texts or not all(one and len(one) <= TEXT_LIMIT for one in texts)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and max(map(abs, value)) <= FARTHEST
        and value[0] < value[2]
        and value[1] < value[3]
    )


def _places(key: str, name: Any, folder: str) -> Iterator[str]:
    """Where an image of this name may lie: by its key, in the folder or container, beside the file;
    then by its last two parts, as of Objects365's `images/v1/patch8/...` in `train/patch8/...`.
    """
    if not isinstance(name, str) or len(name) > MAX_KEY:
        return
    yield name
    parts = name.split("/")
    for tail in [name, *(["/".join(parts[-2:])] if len(parts) > 2 else [])]:
        for place in [folder] if folder else ["", posixpath.dirname(key)]:
            yield posixpath.normpath(posixpath.join(place, tail))
        yield INSIDE + posixpath.normpath(tail)
