"""Import records that exist already: questions and answers, boxes, captions, in the usual files.

Sources: LLaVA's conversation JSON (github.com/haotian-liu/LLaVA), COCO's instances JSON, which
Objects365 shares (cocodataset.org/#format-data), RefCOCO's references as JSON, and plain rows.
"""

import fnmatch
import json
import math
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import corpus, samples, tables
from infra.build import Build
from infra.errors import ConfigError
from infra.ledger import stage
from infra.tables import Table

FILE_BYTES = 1 << 30
TEXT_LIMIT = 100_000  # characters of one text
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
        description="For `rows`: our column by the name of theirs; `image` names the picture.",
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
    return params.model_dump(include={"format", "columns"})


@stage(
    version=1,
    reads={"files": ("key", "stamp"), "objects": ("key", "member", "image_id"),
           "images": ("image_id",)},
    meaning=meaning,
)  # fmt: skip
def import_records(
    build: Build, files: Table, objects: Table, images: Table, params: ImportParams
) -> Imported:
    """Samples of all files: (sample_id, image_id, source, and the columns of the format).

    Of equal ones the first stays. A row without a usable picture, or of a shape that the format
    does not have, is a drop. Raises ConfigError for a file that is no JSON.
    """
    by_name = _names(build, objects)
    usable = set(tables.read(build.store, images, ["image_id"])["image_id"].to_pylist())
    found: dict[str, Row] = {}
    drops: list[Row] = []
    for key in tables.read(build.store, files, ["key"])["key"].to_pylist():
        for number, row in enumerate(_rows(key, _load(build, key), params)):
            name = f"{key}#{number}"
            image_id = _image(by_name, key, row.get("image"))
            if image_id is None or image_id not in usable:
                rule = "no_such_image" if image_id is None else "image_unusable"
                drops.append({"id": name, "rule": rule, "detail": str(row.get("image"))[:200]})
                continue
            content = {k: v for k, v in row.items() if k != "image"}
            if flaw := next((k for k, v in content.items() if _is_unfit(v)), None):
                drops.append({"id": name, "rule": "malformed_record", "detail": flaw})
                continue
            sample = samples.sample_id(image_id, content)
            if sample in found:
                drops.append({"id": name, "rule": "same_record", "detail": sample})
                continue
            source = posixpath.splitext(posixpath.basename(key))[0]
            found[sample] = {"sample_id": sample, "image_id": image_id, "source": source, **content}
    frame = pl.DataFrame(list(found.values()), _schema(params), orient="row")
    return Imported(
        samples.write(build.store, frame),
        samples.write_drops(build.store, samples.drops(drops, "import_records")),
    )


def _is_unfit(value: Any) -> bool:
    """A text that is none, or too long; a box that has no area."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return len(value) != 4 or value[2] <= value[0] or value[3] <= value[1]
    return value is None or (isinstance(value, str) and len(value) > TEXT_LIMIT)


def _names(build: Build, objects: Table) -> dict[str, str]:
    rows = tables.frame(build.store, objects, ["key", "member", "image_id"])
    rows = rows.filter(pl.col("image_id").is_not_null()).sort("key", "member")
    ids = corpus.object_ids(rows).to_list()
    return dict(zip(ids, rows["image_id"].to_list(), strict=True))


def _image(by_name: Mapping[str, str], key: str, name: Any) -> str | None:
    """The image that a file's row names: by its key, or by its place beside the file."""
    if not isinstance(name, str):
        return None
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(key), name))
    return by_name.get(name) or by_name.get(beside)


def _load(build: Build, key: str) -> Any:
    stat = build.corpus.head(key)
    if stat.size > FILE_BYTES:
        raise ConfigError(f"{key} has {stat.size >> 20} MiB; split it into files below 1 GiB")
    text = build.corpus.get(key).decode("utf-8-sig", "replace")
    try:
        if key.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key} is not JSON ({error}); mend it, or leave it out") from None


def _rows(key: str, data: Any, params: ImportParams) -> Iterator[Row]:
    try:
        yield from _FORMATS[params.format](data, params)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{key} is not of the format {params.format} ({type(error).__name__}: {error}); see "
            "records.format"
        ) from None


def _conversations(data: Any, params: ImportParams) -> Iterator[Row]:
    for entry in data:
        turns = entry["conversations"]
        said = {side: [t["value"] for t in turns if t["from"] == side] for side in ("human", "gpt")}
        yield {
            "image": entry.get("image"),
            "instruction": _text(said["human"][0].replace("<image>", ""))
            if said["human"]
            else None,
            "response": _text(said["gpt"][0]) if said["gpt"] else None,
        }


def _coco(data: Any, params: ImportParams) -> Iterator[Row]:
    pictures = {image["id"]: image["file_name"] for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    for region in data["annotations"]:
        yield {
            "image": pictures.get(region["image_id"]),
            "box": _corners(region["bbox"]),
            "class_name": _text(names[region["category_id"]]),
        }


def _refcoco(data: Any, params: ImportParams) -> Iterator[Row]:
    for entry in data:
        sentences = [s["sent"] if isinstance(s, dict) else s for s in entry["sentences"]]
        yield {
            "image": entry["file_name"],
            "box": _corners(entry["bbox"]),
            "class_name": _text(entry.get("category") or sentences[0]),
        }


def _plain_rows(data: Any, params: ImportParams) -> Iterator[Row]:
    for entry in data:
        yield {ours: _value(entry.get(theirs)) for ours, theirs in params.columns.items()}


_FORMATS: Mapping[str, Callable[[Any, ImportParams], Iterator[Row]]] = {
    "conversations": _conversations,
    "coco": _coco,
    "refcoco": _refcoco,
    "rows": _plain_rows,
}
_TEXTS: Mapping[str, dict[str, Any]] = {
    "conversations": {"instruction": pl.String, "response": pl.String},
    "coco": {"box": pl.List(pl.Int64), "class_name": pl.String},
    "refcoco": {"box": pl.List(pl.Int64), "class_name": pl.String},
}


def _schema(params: ImportParams) -> dict[str, Any]:
    own: dict[str, Any] = {
        name: pl.String for name in params.columns if name not in ("image", "box")
    }
    if "box" in params.columns:
        own["box"] = pl.List(pl.Int64)
    return {**samples.BASE, "source": pl.String, **_TEXTS.get(params.format, own)}


def _corners(box: Any) -> list[int]:
    """x, y, width, height to the whole pixels that they touch: left, top, right, bottom."""
    left, top, width, height = (float(side) for side in box)
    return [math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)]


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [math.floor(side) for side in value[:2]] + [math.ceil(side) for side in value[2:]]
    return None if value is None else _text(str(value))


def _text(text: str) -> str:
    return text.strip().encode("utf-8", "replace").decode()
