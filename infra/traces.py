"""Traces: every text that a stored object holds, so that what was forgotten can be looked for."""

import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ID = re.compile(r"[0-9a-f]{64}")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def texts(key: str, data: bytes) -> set[str]:
    """Distinct texts of an object by the type its key ends in; of pictures in tars, their SHA-256.

    Raises ValueError, pyarrow.ArrowException or tarfile.TarError for bytes of another type.
    """
    read = READERS.get(posixpath.splitext(key)[1])
    return set(read(data)) if read else set()


def of_key(key: str) -> set[str]:
    """What a key of the store itself may say: its parts, with and without their endings."""
    parts = key.split("/")
    return {key, *parts, *(part.split(".", 1)[0] for part in parts)}


def _parquet(data: bytes) -> Iterator[str]:
    file = pq.ParquetFile(io.BytesIO(data))
    columns = [field.name for field in file.schema_arrow if _has_text(field.type)]
    for batch in file.iter_batches(columns=columns):
        for column in batch.columns:
            yield from _leaves(column)


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return True
    return any(_has_text(kind.field(at).type) for at in range(kind.num_fields))


def _leaves(column: pa.Array) -> Iterator[str]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        yield from _leaves(column.dictionary)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield from (text for text in column.unique().to_pylist() if text is not None)
    elif pa.types.is_struct(kind):
        for at in range(kind.num_fields):
            yield from _leaves(column.field(at))
    elif kind.num_fields:
        yield from _leaves(column.flatten())


def walk(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of members included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)


def _json(data: bytes) -> Iterator[str]:
    yield from walk(json.loads(data))


def _json_lines(data: bytes) -> Iterator[str]:
    for line in data.splitlines():
        yield from walk(json.loads(line))


def _words(text: str) -> Iterator[str]:
    """A text, its lines, what stands between marks, and every id in it."""
    yield from ID.findall(text)
    yield text.strip()
    for line in text.splitlines():
        yield line.strip()
        yield from (cell.strip() for cell in re.split(r"[|`*]", line))
        yield from re.split(r"[\s,;|`'\"()]+", line)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_data(self, data: str) -> None:
        self.found.update(_words(data))
        for quoted in _QUOTED.findall(data):
            try:
                self.found.add(json.loads(quoted))
            except ValueError:
                self.found.add(quoted[1:-1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for _, value in attrs:
            if value and not value.startswith("data:"):
                self.found.update(_words(value))
                self.found.update(re.split(r"[/#?=&]", value))


def _html(data: bytes) -> Iterator[str]:
    page = _Page()
    page.feed(data.decode("utf-8", "replace"))
    page.close()
    yield from page.found


def _tar(data: bytes) -> Iterator[str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            body = file.read() if file else b""
            yield from of_key(member.name)
            yield hashlib.sha256(body).hexdigest()
            if member.name.endswith(".json"):
                yield from _json(body)


READERS: dict[str, Callable[[bytes], Iterator[str]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _json_lines,
    ".html": _html,
    ".md": lambda data: _words(data.decode("utf-8", "replace")),
    ".tar": _tar,
}
