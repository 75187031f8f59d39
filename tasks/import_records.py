"""Import records that exist already: questions and answers, boxes, captions, in the usual files.

Sources: LLaVA's conversation JSON (github.com/haotian-liu/LLaVA), COCO's instances JSON, which
Objects365 shares (cocodataset.org/#format-data), RefCOCO's references as JSON, and plain rows.
"""

import fnmatch
import json
import math
import posixpath
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import corpus, samples, tables, tombstones
from infra.build import Build
from infra.errors import ConfigError
from infra.ledger import stage
from infra.tables import Table

FILE_BYTES = 1 << 30
TEXT_LIMIT = 100_000  # characters of one text
DETAIL = 200
FARTHEST = 1 << 24  # pixels
BOXES = "boxes"  # the end of names of columns that hold several
NOT_CONTENT = ("image", "size", "crowd")
Format = Literal["conversations", "coco", "refcoco", "rows"]
Row = dict[str, Any]


class ImportParams(BaseModel):
    """Files of the corpus that hold records about its images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[str] = Field(
        min_length=1,
        description="Keys of the files, `*` and `?` allowed: JSON, or JSON lines named `.jsonl`.",
    )
    format: Format = Field(
        description="`conversations`: LLaVA's (image, conversations). `coco`: COCO's or"
        " Objects365's instances. `refcoco`: references with their sentences. `rows`: one object a"
        " record, its members named by `columns`.",
    )
    columns: dict[str, str] = Field(
        {},
        description="For `rows`: our column by the name of theirs; `image` names the picture, `box`"
        " its left, top, right and bottom in pixels; a name that ends in `boxes` has a list of such"
        " boxes.",
    )
    optional: list[str] = Field(
        [],
        description="Of `columns`, those that a record may leave out or empty; null there. Without"
        " any other one it is malformed.",
    )
    images: str = Field(
        "",
        description="Folder or container of the corpus in which the files name their pictures;"
        " otherwise a name is a key, or the place beside the file.",
    )


class Imported(NamedTuple):
    """Samples, rows that could not be used, and the keys of the files that were read."""

    samples: Table
    drops: Table


def find_files(build: Build, params: ImportParams) -> Table:
    """The files as a table (key, stamp), so that a changed file is a changed input.

    Raises ConfigError for a pattern that no file of the corpus fits.
    """
    found: dict[str, str] = {}
    for pattern in params.files:
        stem = pattern.split("*")[0].split("?")[0]
        fitting = [s for s in build.corpus.list(stem) if fnmatch.fnmatchcase(s.key, pattern)]
        if not fitting:
            raise ConfigError(f"records.files: no file of the corpus fits {pattern!r}")
        found |= {s.key: f"{s.etag};{s.size};{s.mtime}" for s in fitting}
    rows = [{"key": key, "stamp": found[key]} for key in sorted(found)]
    return tables.write(build.store, "files", rows)


def meaning(params: ImportParams) -> Any:
    return params.model_dump(include={"format", "columns", "images", "optional"})


@stage(
    version=2,
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
    ConfigError for a file that is no JSON, or none of whose rows has the shape.
    """
    by_name = _names(build, objects)
    rows = tables.read(build.store, images, ["image_id", "width", "height"]).to_pylist()
    sizes = {row["image_id"]: (row["width"], row["height"]) for row in rows}
    gone = tombstones.load(build.store)
    found: dict[str, Row] = {}
    drops: list[Row] = []
    for key in tables.read(build.store, files, ["key"])["key"].to_pylist():
        source = posixpath.splitext(posixpath.basename(key))[0]
        for number, row in enumerate(_rows(key, _load(build, key), params)):
            image_id = _image(by_name, key, row.get("image"), params.images)
            content = {k: v for k, v in row.items() if k not in NOT_CONTENT}
            needed = {k: v for k, v in content.items() if v or k not in params.optional}
            places = _places(key, row.get("image"), params.images)
            if image_id is None and any(map(gone.found, places)):
                # The file still has its name; nothing that we write may.
                drops.append({"id": f"{key}#{number}", "rule": "forgotten_image"})
                continue
            if flaw := _flaw(row, needed, image_id, sizes):
                drops.append({"id": f"{key}#{number}", "rule": flaw[0], "detail": flaw[1]})
                continue
            sample = samples.sample_id(str(image_id), content)
            if sample in found:
                drops.append({"id": f"{key}#{number}", "rule": "same_record", "detail": sample})
                continue
            found[sample] = {"sample_id": sample, "image_id": image_id, "source": source, **content}
    frame = pl.DataFrame(list(found.values()), _schema(params), orient="row")
    return Imported(
        samples.write(build.store, frame),
        samples.write_drops(build.store, samples.drops(drops, "import_records")),
    )


def _flaw(
    row: Row, content: Row, image_id: str | None, sizes: Mapping[str, tuple[int, int]]
) -> tuple[str, str] | None:
    """The rule by which a row can't be used, and what decided."""
    if "malformed" in row:
        return "malformed_record", _text(row["malformed"])[:DETAIL]
    if image_id is None or image_id not in sizes:
        rule = "no_such_image" if image_id is None else "image_unusable"
        return rule, _text(str(row.get("image")))[:DETAIL]
    # A box in pixels of a picture that was resized since lies elsewhere.
    size, here = row.get("size"), sizes[image_id]
    if size and size != here:
        return "other_size", _text("{}x{}, here {}x{}".format(*size, *here))[:DETAIL]
    if row.get("crowd"):
        return "crowd", str(content.get("class_name"))[:DETAIL]
    unfit = next((name for name, value in content.items() if _is_unfit(name, value)), None)
    return ("malformed_record", unfit) if unfit else None


def _is_unfit(name: str, value: Any) -> bool:
    """A text that is empty or too long; a box that has no area, or is out of all bounds."""
    if name == "box":
        return not _is_box(value)
    if name.endswith(BOXES):
        boxes = [value[at : at + 4] for at in range(0, len(value or ()), 4)]
        return not boxes or not all(map(_is_box, boxes))
    return not value or (isinstance(value, str) and len(value) > TEXT_LIMIT)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and max(map(abs, value)) <= FARTHEST
        and value[0] < value[2]
        and value[1] < value[3]
    )


def _names(build: Build, objects: Table) -> dict[str, str]:
    rows = tables.frame(build.store, objects, ["key", "member", "image_id"])
    rows = rows.filter(pl.col("image_id").is_not_null()).sort("key", "member")
    ids = corpus.object_ids(rows).to_list()
    return dict(zip(ids, rows["image_id"].to_list(), strict=True))


def _image(by_name: Mapping[str, str], key: str, name: Any, folder: str) -> str | None:
    """The image that a file's row names."""
    places = _places(key, name, folder)
    return next((by_name[place] for place in places if place in by_name), None)


def _places(key: str, name: Any, folder: str) -> list[str]:
    """Where an image of this name may lie: in the folder, by its key, or beside the file."""
    if not isinstance(name, str):
        return []
    folders = [folder] if folder else ["", posixpath.dirname(key)]
    return [name, *(posixpath.normpath(posixpath.join(place, name)) for place in folders)]


def _load(build: Build, key: str) -> Any:
    stat = build.corpus.head(key)
    if stat.size > FILE_BYTES:
        raise ConfigError(f"{key} has {stat.size >> 20} MiB; split it into files below 1 GiB")
    data, at = build.corpus.get(key), 0
    try:
        text = data.decode("utf-8-sig")
        if not key.endswith(".jsonl"):
            return json.loads(text)
        rows = []
        # Not splitlines: it also breaks at characters that stand in texts.
        for line in text.split("\n"):
            at += 1
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (ValueError, RecursionError) as error:
        where = f", line {at}," if at else ""
        said = _text(str(error))[:DETAIL]
        raise ConfigError(f"{key}{where} is not JSON ({said}); mend it, or leave it out") from None


_WRONG = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError)


def _rows(key: str, data: Any, params: ImportParams) -> Iterator[Row]:
    """The rows of a file. One that is not of the format has only the member `malformed`.

    Raises ConfigError where the file as a whole is not of the format.
    """
    entries, read = data, _FORMATS[params.format]
    try:
        if params.format in ("coco", "refcoco") and not (
            params.format == "refcoco" and isinstance(data, list)
        ):
            entries, read = _indexed(data, params.format)
        if not isinstance(entries, list):
            raise TypeError(f"a list of records is wanted, this is {type(entries).__name__}")
    except _WRONG as error:
        raise _not_of(key, params, error) from None
    first: Exception | None = None
    good = 0
    for entry in entries:
        try:
            row = read(entry, params)
        except _WRONG as error:
            first = first or error
            row = {"malformed": f"{type(error).__name__}: {error}"}
        else:
            good += 1
        yield row
    if first and not good:
        raise _not_of(key, params, first)


def _not_of(key: str, params: ImportParams, error: Exception) -> ConfigError:
    said = f"{type(error).__name__}: {_text(str(error))[:DETAIL]}"
    return ConfigError(f"{key} is not of the format {params.format} ({said}); see records.format")


Reader = Callable[[Any, ImportParams], Row]


def _conversations(entry: Any, params: ImportParams) -> Row:
    turns = entry["conversations"]
    said = {side: [t["value"] for t in turns if t["from"] == side] for side in ("human", "gpt")}
    return {
        "image": entry.get("image"),
        "instruction": _text(said["human"][0].replace("<image>", "")),
        "response": _text(said["gpt"][0]),
    }


def _indexed(data: Any, kind: str) -> tuple[Any, Reader]:
    """Entries of a file of COCO's form, and how one is read: by the ids of the others."""
    pictures = _by_id(data["images"])
    names = {number: row.get("name") for number, row in _by_id(data["categories"]).items()}
    regions = data["annotations"]
    if kind == "coco":
        return regions, partial(_coco, pictures, names)
    return data["refs"], partial(_refcoco, pictures, names, _by_id(regions))


def _by_id(rows: Any) -> dict[Any, Row]:
    return {row["id"]: row for row in rows}


def _coco(
    pictures: Mapping[Any, Row], names: Mapping[Any, Any], region: Any, params: ImportParams
) -> Row:
    return {
        **_picture(pictures.get(region["image_id"], {})),
        "crowd": bool(region.get("iscrowd")),
        "box": _corners(region["bbox"]),
        "class_name": _text(names[region["category_id"]]),
    }


def _picture(row: Row) -> Row:
    """What COCO says of a picture: its name, and the size in which boxes are meant."""
    size = (row.get("width"), row.get("height"))
    return {"image": row.get("file_name"), "size": size if all(size) else None}


def _refcoco(
    pictures: Mapping[Any, Row],
    names: Mapping[Any, Any],
    regions: Mapping[Any, Row],
    entry: Any,
    params: ImportParams,
) -> Row:
    """A reference of REFER's form; its box may stand with it, or in COCO's instances."""
    sentences = [s["sent"] if isinstance(s, dict) else s for s in entry["sentences"]]
    region = entry if "bbox" in entry else regions[entry["ann_id"]]
    # REFER names pictures `<name>_<ann_id>.jpg`, which no file is called.
    picture = pictures.get(entry.get("image_id"), {"file_name": entry.get("file_name")})
    called = entry.get("category") or names.get(entry.get("category_id")) or sentences[0]
    return {
        **_picture(picture),
        "box": _corners(region["bbox"]),
        "class_name": _text(called),
        "expression": _text(sentences[0]),
    }


def _plain_row(entry: Any, params: ImportParams) -> Row:
    return {
        ours: _value(ours, entry.get(theirs)) or None for ours, theirs in params.columns.items()
    }


_FORMATS: Mapping[str, Reader] = {
    "conversations": _conversations,
    "coco": partial(_coco, {}, {}),
    "refcoco": partial(_refcoco, {}, {}, {}),
    "rows": _plain_row,
}
_TEXTS: Mapping[str, dict[str, Any]] = {
    "conversations": {"instruction": pl.String, "response": pl.String},
    "coco": {"box": pl.List(pl.Int64), "class_name": pl.String},
    "refcoco": {"box": pl.List(pl.Int64), "class_name": pl.String, "expression": pl.String},
}


def _schema(params: ImportParams) -> dict[str, Any]:
    own: dict[str, Any] = {
        name: pl.List(pl.Int64) if name == "box" or name.endswith(BOXES) else pl.String
        for name in params.columns
        if name != "image"
    }
    return {**samples.BASE, "source": pl.String, **_TEXTS.get(params.format, own)}


def _corners(box: Any) -> list[int]:
    """x, y, width, height to the whole pixels that they touch: left, top, right, bottom."""
    left, top, width, height = (float(side) for side in box)
    return [math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)]


def _value(name: str, value: Any) -> Any:
    """A member of a plain row: texts as they are, a box as whole pixels, the rest as JSON."""
    if name.endswith(BOXES):
        boxes = [_value("box", box) for box in value or ()]
        if any(len(box) != 4 for box in boxes):
            raise ValueError(f"{name}: a box has four sides")
        return [side for box in boxes for side in box]
    if name == "image" or value is None:
        return value
    if name == "box":
        return [math.floor(side) for side in value[:2]] + [math.ceil(side) for side in value[2:]]
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _text(text: str) -> str:
    return text.strip().encode("utf-8", "replace").decode()
