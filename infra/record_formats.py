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


class Shape(NamedTuple):
    """What a config says of a format: columns of plain rows, whether all turns of a dialogue are
    wanted, the member that names a source, the file with the boxes of references, and the values
    of members of entries that are wanted.
    """

    format: Format
    columns: Mapping[str, str]
    all_turns: bool
    source: str
    instances: str
    only: Mapping[str, Sequence[str]]


def rows(store: Store, key: str, shape: Shape) -> Iterator[tuple[str, Row]]:
    """(name, row) of a file: `key#3` is its fourth entry, `key#3.2` the second row of that.

    A row has `image`, perhaps `size`, `crowd`, `source`, and the columns of the format. One that
    can't be used has `flaw`, a rule and what decided. Raises ConfigError where the file as a whole
    is not of the format.
    """
    first: Exception | None = None
    good = 0
    try:
        found, read = _opened(store, key, shape)
        for number, entry in enumerate(found):
            try:
                said = [*_unwanted(entry, shape.only)] or list(read(entry))
            except WRONG as error:
                first = first or error
                said = [{"flaw": ("malformed_record", f"{type(error).__name__}: {error}")}]
            else:
                good += 1
            for part, row in enumerate(said, 1):
                yield f"{key}#{number}" + (f".{part}" if part > 1 else ""), row
    except WRONG as error:
        first, good = error, 0
    if first and not good:
        said_of = f"{type(first).__name__}: {record_files.shown(str(first))}"
        raise ConfigError(
            f"{key} is not of the format {shape.format} ({said_of}); see records.format"
        ) from None


def _unwanted(entry: Mapping[str, Any], only: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """The drop of an entry, such as a region or a reference, by the value of one of its members."""
    for name, wanted in only.items():
        if str(entry.get(name)) not in wanted:
            yield {"flaw": ("not_wanted", f"{name}: {entry.get(name)}")}
            return


def schema(shape: Shape) -> dict[str, Any]:
    """Types of the columns of a format, beside those that all samples have."""
    if shape.format in COLUMNS:
        return COLUMNS[shape.format]
    return {
        name: pl.List(pl.Int64) if name == "box" or name.endswith(BOXES) else pl.String
        for name in shape.columns
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


def _opened(store: Store, key: str, shape: Shape) -> tuple[Iterator[Any], Reader]:
    """The entries of a file, and how one is read."""
    every = partial(record_files.entries, store)
    if shape.format == "conversations":
        return every(key), partial(_dialogue, shape)
    if shape.format == "rows":
        return every(key), partial(_plain_row, shape)
    if shape.format == "coco_captions":
        return every(key, "annotations"), partial(_caption, _pictures(every(key, "images")))
    if shape.format == "coco":
        pictures, names = _pictures(every(key, "images")), _classes(every(key, "categories"))
        return every(key, "annotations"), partial(_region, pictures, names)
    has_boxes = record_files.is_list(store, key)
    beside = shape.instances or ("" if has_boxes else key)
    boxes = Instances({}, {}, {})
    if beside:
        boxes = Instances(
            _pictures(every(beside, "images")),
            _classes(every(beside, "categories")),
            {row["id"]: row["bbox"] for row in every(beside, "annotations")},
        )
    return every(key, None if has_boxes else "refs"), partial(_reference, boxes)


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
        "box": _corners(entry["bbox"]),
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
        "box": _corners(box),
        "class_name": text(called),
        "expression": said[0],
        "expressions": said,
    }


def _corners(box: Any) -> list[int]:
    """x, y, width, height to the whole pixels that they touch: left, top, right, bottom."""
    left, top, width, height = (float(side) for side in box)
    return [math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)]


def _dialogue(shape: Shape, entry: Any) -> Iterator[Row]:
    """A row a question, with the answer that follows it. Rules of a system are no question."""
    turns = _turns(entry["conversations"] if "conversations" in entry else entry["messages"])
    said = [(SIDES[side], *_content(content)) for side, content in turns]
    named = _named(entry) or [name for _, _, names in said for name in names]
    row = {"image": named[0] if named else None, "source": entry.get(shape.source)}
    if len(set(named)) > 1:
        yield {"flaw": ("several_images", f"{len(set(named))} pictures")}
        return
    for at, (question, answer) in enumerate(_pairs(said)):
        if at and not shape.all_turns:
            yield {"flaw": ("later_turn", f"turn {at + 1} of a dialogue")}
        else:
            yield {**row, "instruction": question, "response": answer}
    if not any(side != "rules" for side, _, _ in said):
        raise ValueError("no question")


def _turns(turns: Any) -> list[tuple[Any, Any]]:
    """(side, content) of each; `datasets` may store a list of objects as an object of lists."""
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


def _plain_row(shape: Shape, entry: Any) -> Iterator[Row]:
    """Members by the names of the config; what is empty is absent."""
    yield {
        **({} if "source" in shape.columns else {"source": entry.get(shape.source)}),
        **{ours: _value(ours, entry.get(theirs)) or None for ours, theirs in shape.columns.items()},
    }


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
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
