"""What entries of the usual files say: rows, each a picture and what is said of it.

Sources: LLaVA's conversation JSON (github.com/haotian-liu/LLaVA), the messages of ShareGPT and of
chat endpoints, COCO's instances and captions (cocodataset.org/#format-data), which Objects365
shares, and REFER's references (github.com/lichengunc/refer) as JSON.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import record_files
from infra.errors import ConfigError
from infra.store import Store

BOXES = "boxes"  # the end of names of columns that hold several
PLACE = "<image>"
SIDES = {
    "human": "asks", "user": "asks",
    "gpt": "answers", "assistant": "answers", "chatgpt": "answers", "model": "answers",
    "system": "rules",
}  # fmt: skip
# What an entry that is not of its format raises; those of one are not those of the next.
WRONG = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError
)  # fmt: skip
Format = Literal["conversations", "coco", "coco_captions", "refcoco", "rows"]
Row = dict[str, Any]
Reader = Callable[[Any], Iterator[Row]]


class FormatParams(BaseModel):
    """How entries are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format = Field(
        description="`conversations`: LLaVA's (image, conversations), or messages. `coco`: COCO's"
        " or Objects365's instances. `coco_captions`: COCO's captions. `refcoco`: references with"
        " their sentences. `rows`: one object a record, its members named by `columns`.",
    )
    columns: dict[str, str] = Field(
        {},
        description="For `rows`: our column by the name of theirs; `image` names the picture, `box`"
        " its place in pixels; a name that ends in `boxes` has a list of such boxes.",
    )
    boxes: Literal["corners", "sides"] = Field(
        "corners",
        description="What the boxes of `rows` are: left, top, right and bottom, or left, top, width"
        " and height. COCO's forms have the latter.",
    )
    turns: Literal["all", "first"] = Field(
        "all",
        description="Of a dialogue: each question with its answer is a sample, or only the first"
        " and the others are drops.",
    )
    source: str = Field(
        "source",
        description="Member of a conversation or row that names its source; without it, the"
        " file's name is the source.",
    )
    instances: str = Field(
        "",
        description="For `refcoco`: key of the file in COCO's form that has the boxes, where the"
        " references have none.",
    )
    only: dict[str, list[str]] = Field(
        {},
        description="Of entries, those whose members have one of these values: `split: [train]` of"
        " references, `isfake: ['0']` of Objects365's regions. The others are drops.",
    )


def rows(store: Store, key: str, params: FormatParams) -> Iterator[tuple[str, Row]]:
    """(name, row) of a file: `key#3` is its fourth entry, `key#3.2` the second row of that.

    A row has `image`, perhaps `size`, `crowd`, `source`, and the columns of the format. One that
    can't be used has `flaw`, a rule and what decided. Raises ConfigError where the file as a whole
    is not of the format.
    """
    first, good = None, 0
    try:
        found, read = _opened(store, key, params)
        for number, entry in enumerate(found):
            said, error = _said(entry, read, params)
            first, good = first or error, good + (error is None)
            for part, row in enumerate(said, 1):
                yield f"{key}#{number}" + (f".{part}" if part > 1 else ""), row
    except WRONG as error:
        raise _not_of(key, params, error) from None
    if first and not good:
        raise _not_of(key, params, first)


def _said(entry: Any, read: Reader, params: FormatParams) -> tuple[Sequence[Row], Exception | None]:
    """The rows of an entry, and what is wrong with one that is not of the format."""
    try:
        return [*_unwanted(entry, params.only)] or list(read(entry)), None
    except WRONG as error:
        return [{"flaw": ("malformed_record", _of(error))}], error


def _of(error: Exception) -> str:
    """What was wrong with an entry: a member or id that is missing by its name, or the error."""
    return f"lacks {error}" if type(error) is KeyError else f"{type(error).__name__}: {error}"


def _not_of(key: str, params: FormatParams, error: Exception) -> ConfigError:
    said = record_files.shown(_of(error))
    return ConfigError(f"{key} is not of the format {params.format} ({said}); see records.format")


def _unwanted(entry: Mapping[str, Any], only: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """The drop of an entry, such as a region or a reference, by the value of one of its members."""
    for name, wanted in only.items():
        if str(entry.get(name)) not in wanted:
            yield {"flaw": ("not_wanted", f"{name}: {entry.get(name)}")}
            return


def schema(params: FormatParams) -> dict[str, Any]:
    """Types of the columns of a format, beside those that all samples have."""
    if params.format in COLUMNS:
        return COLUMNS[params.format]
    return {
        name: pl.List(pl.Int64) if name == "box" or name.endswith(BOXES) else pl.String
        for name in params.columns
        if name not in ("image", "source")
    }


COLUMNS: Mapping[str, dict[str, Any]] = {
    "conversations": {"instruction": pl.String, "response": pl.String},
    "coco": {"box": pl.List(pl.Int64), "class_name": pl.String},
    "coco_captions": {"caption": pl.String},
    "refcoco": {
        "box": pl.List(pl.Int64), "class_name": pl.String, "expression": pl.String,
        "expressions": pl.List(pl.String),
    },
}  # fmt: skip


def text(value: str) -> str:
    """A text without outer blanks and lone surrogates, which JSON can hold and UTF-8 can't."""
    return value.strip().encode("utf-8", "replace").decode()


def _opened(store: Store, key: str, params: FormatParams) -> tuple[Iterator[Any], Reader]:
    """The entries of a file, and how one is read."""
    every = partial(record_files.entries, store)
    if params.format == "conversations":
        return every(key), partial(_dialogue, params)
    if params.format == "rows":
        return every(key), partial(_plain_row, params)
    if params.format == "coco_captions":
        return every(key, "annotations"), partial(_caption, _pictures(every(key, "images")))
    if params.format == "coco":
        pictures, names = _pictures(every(key, "images")), _classes(every(key, "categories"))
        return every(key, "annotations"), partial(_region, pictures, names)
    alone = record_files.is_list(store, key)
    beside = params.instances or ("" if alone else key)
    boxes = Instances({}, {}, {})
    if beside:
        boxes = Instances(
            _pictures(every(beside, "images")),
            _classes(every(beside, "categories")),
            {row["id"]: row["bbox"] for row in every(beside, "annotations")},
        )
    return every(key, None if alone else "refs"), partial(_reference, boxes)


class Instances(NamedTuple):
    """Pictures, names of classes and boxes of a file of COCO's form, by their ids."""

    pictures: Mapping[Any, Row]
    classes: Mapping[Any, Any]
    boxes: Mapping[Any, Any]


def _pictures(entries: Iterator[Any]) -> dict[Any, Row]:
    """What COCO says of pictures by their ids: the name, and the size in which boxes are meant.

    Raises ValueError where an id stands for two: boxes would lie on the wrong one.
    """
    found: dict[Any, Row] = {}
    for row in entries:
        size = (row.get("width"), row.get("height"))
        picture = {"image": row.get("file_name"), "size": size if all(size) else None}
        if found.setdefault(row["id"], picture) != picture:
            raise ValueError(f"two pictures have the id {row['id']}")
    return found


def _classes(entries: Iterator[Any]) -> dict[Any, Any]:
    return {row["id"]: row.get("name") for row in entries}


def _region(pictures: Mapping[Any, Row], names: Mapping[Any, Any], entry: Any) -> Iterator[Row]:
    yield {
        **pictures.get(entry["image_id"], {}),
        "crowd": bool(entry.get("iscrowd")),
        "box": _pixels(entry["bbox"]),
        "class_name": text(names[entry["category_id"]]),
    }


def _caption(pictures: Mapping[Any, Row], entry: Any) -> Iterator[Row]:
    picture = pictures.get(entry["image_id"], {})
    # A caption is of the picture in any size.
    yield {"image": picture.get("image"), "caption": text(entry["caption"])}


def _reference(known: Instances, entry: Any) -> Iterator[Row]:
    """A reference of REFER's form; its box may stand with it, or in COCO's instances."""
    said = [text(s["sent"] if isinstance(s, dict) else s) for s in entry["sentences"]]
    box = entry["bbox"] if "bbox" in entry else known.boxes[entry["ann_id"]]
    # REFER names pictures `<name>_<ann_id>.jpg`, which no file is called.
    own = {"image": entry.get("file_name")}
    called = entry.get("category") or known.classes.get(entry.get("category_id")) or said[0]
    yield {
        **known.pictures.get(entry.get("image_id"), own),
        "box": _pixels(box),
        "class_name": text(called),
        "expression": said[0],
        "expressions": said,
    }


def _pixels(box: Any, corners: bool = False) -> list[int]:
    """The whole pixels that a box touches: left, top, right, bottom. Given as these, or as left,
    top, width, height, which is COCO's way. Raises ValueError for shares of the picture.
    """
    left, top, right, bottom = (float(side) for side in box)
    if not corners:
        right, bottom = left + right, top + bottom
    sides = (left, top, right, bottom)
    if all(0 <= side <= 1 for side in sides) and not all(side.is_integer() for side in sides):
        raise ValueError("a box from 0 to 1; pixels are wanted")
    return [math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)]


def _dialogue(params: FormatParams, entry: Any) -> Iterator[Row]:
    """A row a question, with the answer that follows it. Rules of a system are no question."""
    turns = _turns(entry["conversations"] if "conversations" in entry else entry["messages"])
    said = [(SIDES[side], *_content(content)) for side, content in turns]
    named = _named(entry) or [name for _, _, names in said for name in names]
    row = {"image": named[0] if named else None, "source": entry.get(params.source)}
    if len(set(named)) > 1:
        yield {"flaw": ("several_images", f"{len(set(named))} pictures")}
        return
    for at, (question, answer) in enumerate(_pairs(said)):
        if at and params.turns == "first":
            yield {"flaw": ("later_turn", f"turn {at + 1} of a dialogue")}
        else:
            yield {**row, "instruction": question, "response": answer}
    if not any(side != "rules" for side, _, _ in said):
        raise ValueError("no question")


def _turns(turns: Any) -> list[tuple[Any, Any]]:
    """(side, content) of each. Parquet files may hold them as JSON, or, by `datasets`, as an object
    of lists.
    """
    turns = json.loads(turns) if isinstance(turns, str) else turns
    if isinstance(turns, dict):
        side, content = _members(turns)
        return list(zip(turns[side], turns[content], strict=True))
    return [(turn[side], turn[content]) for turn in turns for side, content in [_members(turn)]]


def _members(turn: Mapping[str, Any]) -> tuple[str, str]:
    return ("from", "value") if "from" in turn else ("role", "content")


def _content(content: Any) -> tuple[str, list[Any]]:
    """The text of a turn, and the pictures in it where it is a list of parts."""
    if isinstance(content, str):
        return text(content.replace(PLACE, "")), []
    said = [part["text"] for part in content if part["type"] == "text"]
    pictures = [part for part in content if part["type"] != "text"]
    return text("\n".join(said).replace(PLACE, "")), [_name(part) for part in pictures]


def _name(part: Any) -> Any:
    """The picture that a part of a message names."""
    named = part.get("image_url", part.get("image"))
    return named["url"] if isinstance(named, dict) else named


def _named(entry: Mapping[str, Any]) -> list[Any]:
    """The pictures that an entry names beside its turns, each once."""
    named = entry.get("image") or entry.get("images") or []
    named = named if isinstance(named, list) else [named]
    return [one.get("path") if isinstance(one, dict) else one for one in named]


def _pairs(said: Sequence[tuple[str, str, Any]]) -> Iterator[tuple[str | None, str | None]]:
    """Questions with the answers that follow them at once; None for what is missing."""
    question = None
    for side, words, _ in said:
        if side == "asks":
            if question is not None:
                yield question, None
            question = words
        elif side == "answers":
            yield question, words
            question = None
    if question is not None:
        yield question, None


def _plain_row(params: FormatParams, entry: Any) -> Iterator[Row]:
    """Members by the names of the config; what is empty is absent."""
    yield {
        **({} if "source" in params.columns else {"source": entry.get(params.source)}),
        **{
            ours: _value(ours, entry.get(theirs), params.boxes == "corners") or None
            for ours, theirs in params.columns.items()
        },
    }


def _value(name: str, value: Any, corners: bool) -> Any:
    """A member of a plain row: texts as they are, a box as whole pixels, the rest as JSON. NaN is
    what pandas writes for nothing.
    """
    if value in (None, [], {}) or value != value:
        return None
    if name == "image":
        return value
    if name == "box":
        return _pixels(value, corners)
    if name.endswith(BOXES):
        return [side for box in value for side in _pixels(box, corners)]
    return text(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    )
