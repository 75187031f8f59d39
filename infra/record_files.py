"""Files of records, an entry at a time: JSON of any size, JSON lines, Parquet.

What must fit into memory is an entry, not a file: COCO's instances are 450 MB in one object,
Objects365's several GB. The standard library decodes them over a window: unlike ijson it reads all
that Python writes, NaN as well, and an entry has a bound.
"""

import io
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.corpus import RangeFile, image_column, object_id
from infra.errors import ConfigError
from infra.store import Store

WINDOW = 4 << 20
ENTRY = 64 << 20  # characters of one entry, or of a line
PARQUET_ROWS = 16  # a file of 2 KB may hold as many texts of 50 MB, by a dictionary
DETAIL = 200
BLANKS = re.compile(r"[ \t\n\r]*")
# Where text ends in a token, the decoder complains this near to the end, or of an open string.
TOKEN = 16
REMEDIES = {
    ".p": "a pickle runs whatever code is in it; write what it holds as JSON",
    ".pkl": "a pickle runs whatever code is in it; write what it holds as JSON",
    ".gz": "unpack it",
    ".zip": "unpack it",
    ".csv": "write its rows as JSON lines or Parquet",
    ".tsv": "write its rows as JSON lines or Parquet",
}
UNENDED = ("", ".", "e", "E")
_JSON = json.JSONDecoder()


class NotJson(ValueError):
    """A text that is not JSON, with what is wrong and where."""


def entries(store: Store, key: str, member: str | None = None) -> Iterator[Any]:
    """The entries of a file, or of the list that is this member of the object in a JSON file.

    Raises ConfigError for a file that is of no kind read here, or not what its name says, KeyError
    without such a member, TypeError where there is no list.
    """
    kind = posixpath.splitext(key)[1].lower()
    if kind not in READERS:
        remedy = REMEDIES.get(kind, "rename or convert it")
        raise ConfigError(
            f"{key}: records are read from files ending in {', '.join(READERS)}; {remedy}"
        )
    file = RangeFile(store, key, store.head(key).size)
    try:
        yield from READERS[kind](key, file, member)
    except (NotJson, UnicodeDecodeError, pa.ArrowException, OSError) as error:
        name, said = "Parquet" if kind == ".parquet" else "JSON", shown(str(error))
        raise ConfigError(f"{key} is not {name} ({said}); mend it, or leave it out") from None


def is_list(store: Store, key: str) -> bool:
    """Whether a file holds a list of entries, and not an object of such lists."""
    if posixpath.splitext(key)[1].lower() != ".json":
        return True
    try:
        return Window(RangeFile(store, key, store.head(key).size, WINDOW)).peek() == "["
    except UnicodeDecodeError:
        return True  # and reading it will tell


def shown(text: str) -> str:
    """What a file or a library says, on one line of bounded length."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:DETAIL]


class Window:
    """The text of a JSON file, as much of it at a time as one value needs."""

    def __init__(self, file: RangeFile):
        self._file = io.TextIOWrapper(file, "utf-8-sig", newline="")  # type: ignore[type-var]
        self._text, self._at, self._before = "", 0, 0

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self._at = BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skips(self, character: str) -> bool:
        """Whether this is the next character; then it is behind us."""
        found = self.peek() == character
        self._at += found
        return found

    def wants(self, character: str) -> None:
        if not self.skips(character):
            raise NotJson(f"{character!r} is wanted: character {self._before + self._at}")

    def value(self) -> Any:
        """The next value. Raises NotJson, also for one of more than ENTRY characters."""
        self.peek()
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                # A number may go on where the text ends, and `1.` is read as a 1.
                if end - self._at <= ENTRY and self._text[end : end + 1] not in UNENDED:
                    self._at = end
                    return value
                flaw = NotJson(f"cut off: character {self._before + end}")
            except json.JSONDecodeError as error:
                flaw = NotJson(f"{error.msg}: character {self._before + error.pos}")
                if not self._is_cut(error):
                    raise flaw from None
            except (RecursionError, ValueError) as error:
                at = self._before + self._at
                raise NotJson(f"{error}: the value from character {at}") from None
            if len(self._text) - self._at > ENTRY:
                at = self._before + self._at
                raise NotJson(f"over {ENTRY >> 20} MiB: the value from character {at}")
            if not self._more():
                raise flaw

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        is_open = error.msg.startswith("Unterminated string")
        return is_open or error.pos >= len(self._text) - TOKEN

    def _more(self) -> bool:
        """Read on: twice as much as is at hand, so that a long value is not decoded often."""
        left = self._text[self._at :]
        part = self._file.read(max(WINDOW, len(left)))
        if part:
            self._before += self._at
            self._text, self._at = left + part, 0
        return bool(part)


def _json(key: str, file: RangeFile, member: str | None) -> Iterator[Any]:
    text = Window(file)
    if member is None:
        yield from _list(text)
        if text.peek():
            raise NotJson("text after its end; files of JSON lines are to end in .jsonl")
        return
    if not text.skips("{"):
        raise TypeError("an object of lists is wanted")
    for name in _members(text):
        if name == member:
            yield from _list(text)
            return
        if text.peek() == "[":
            for _ in _list(text):
                pass
        else:
            text.value()
    raise KeyError(member)


def _members(text: Window) -> Iterator[str]:
    """Names of an object's members; the value of each is behind us when the next is asked for."""
    if text.skips("}"):
        return
    while True:
        name = text.value()
        text.wants(":")
        yield name
        if text.skips("}"):
            return
        text.wants(",")


def _list(text: Window) -> Iterator[Any]:
    if not text.skips("["):
        raise TypeError("a list of records is wanted")
    if text.skips("]"):
        return
    while True:
        yield text.value()
        if text.skips("]"):
            return
        text.wants(",")


def _lines(key: str, file: RangeFile, member: str | None) -> Iterator[Any]:
    # Only "\n" ends a line: other separators stand in texts.
    text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")  # type: ignore[type-var]
    number = 0
    while line := text.readline(ENTRY + 1):
        number += 1
        if len(line) > ENTRY:
            raise NotJson(f"over {ENTRY >> 20} MiB: line {number}")
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NotJson(f"line {number}: {error}") from None


def _parquet(key: str, file: RangeFile, member: str | None) -> Iterator[Mapping[str, Any]]:
    """Rows without bytes. The picture of a row that has its bytes is the row itself."""
    parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
    columns = map(parquet.schema.column, range(len(parquet.schema)))
    names = [column.path for column in columns if not _is_bytes(column)]
    picture = image_column(parquet.schema_arrow)
    number = 0
    for batch in parquet.iter_batches(PARQUET_ROWS, columns=names):
        for row in batch.to_pylist():
            own = object_id(key, f"{number:08d}")
            yield {**row, picture[0]: own, "image": own} if picture else row
            number += 1


def _is_bytes(column: pq.ColumnSchema) -> bool:
    return bool(column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE")


READERS: Mapping[str, Callable[[str, RangeFile, str | None], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".parquet": _parquet,
}
