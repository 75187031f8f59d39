"""Caption texts: from caption files (CSV, JSONL, Parquet) and from `.txt` and `.json` sidecars."""

import csv
import hashlib
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ConfigError, PairmillError

KEY_COLUMNS = ("file_name", "filename", "image", "image_path", "path", "file", "key")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
LICENCE_COLUMNS = ("licence", "license")
FILE_NAMES = ("captions", "metadata")
FILE_TYPES = (".csv", ".jsonl", ".parquet")
MAX_LINE = 1 << 20


class Text(NamedTuple):
    """What a sidecar or a row says of one picture; `refused` is a rule where it can't be used."""

    captions: tuple[str, ...] = ()
    licence: str | None = None
    refused: str | None = None


class Columns(NamedTuple):
    """Which columns of a caption file hold what."""

    key: str
    caption: str
    licence: str | None


CUSTOMARY = Columns("", "", None)


def caption_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def normalise(value: Any, max_chars: int) -> Text:
    """One caption in NFC without outer blanks; empty text is no caption, over-long is refused."""
    if isinstance(value, bytes):
        return Text(refused="caption_unreadable")
    if not isinstance(value, str):
        return Text()
    text = encodable(value).strip()
    # NFC shortens decomposed text; what is far too long is not worth its time.
    if len(text) <= 4 * max_chars:
        text = unicodedata.normalize("NFC", text)
    if len(text) > max_chars:
        return Text(refused="caption_too_long")
    return Text(captions=(text,)) if text else Text()


def encodable(text: str) -> str:
    """Text without lone surrogates, which JSON can hold and UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


def from_row(row: Mapping[str, Any], columns: Columns, max_chars: int) -> Text:
    """Captions and licence of one row; a list of captions gives several."""
    value = row.get(columns.caption)
    parts = [normalise(v, max_chars) for v in (value if isinstance(value, list) else [value])]
    licence = row.get(columns.licence) if columns.licence else None
    return Text(
        tuple(caption for part in parts for caption in part.captions),
        encodable(licence).strip()[:200] or None if isinstance(licence, str) else None,
        next((part.refused for part in parts if part.refused), None),
    )


def sidecar(name: str, data: bytes, max_chars: int, wanted: Columns = CUSTOMARY) -> Text:
    """Text of a `.txt` or `.json` sidecar; one that is not UTF-8 or not JSON is refused."""
    try:
        text = data.decode("utf-8-sig")
        if ".json" not in posixpath.splitext(name)[1].lower():
            return normalise(text, max_chars)
        row = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return Text(refused="caption_unreadable")
    if not isinstance(row, dict):
        return Text()
    columns = choose_columns(("", *row), wanted)
    return from_row(row, columns, max_chars) if columns else Text()


def choose_columns(names: tuple[str, ...], wanted: Columns) -> Columns | None:
    """Columns by configured name, or else by the customary ones; None where one is missing."""
    key = wanted.key or next((c for c in KEY_COLUMNS if c in names), "")
    caption = wanted.caption or next((c for c in CAPTION_COLUMNS if c in names), "")
    licence = wanted.licence or next((c for c in LICENCE_COLUMNS if c in names), None)
    if caption not in names or key not in names:
        return None
    return Columns(key, caption, licence)


def is_caption_file(key: str) -> bool:
    stem, extension = posixpath.splitext(posixpath.basename(key))
    return stem in FILE_NAMES and extension in FILE_TYPES


def read_rows(key: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a caption file. Raises PairmillError that names the line it can't read."""
    kind = posixpath.splitext(key)[1].lower()
    if kind not in READERS:
        raise ConfigError(
            f"corpus.captions: {key} is no caption file; name files ending in {', '.join(READERS)}"
        )
    yield from READERS[kind](key, data)


def _lines(key: str, data: bytes) -> io.TextIOWrapper:
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairmillError(
            f"caption file {key} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error
    return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")


def _csv(key: str, data: bytes) -> Iterator[dict[str, Any]]:
    # Without `strict`, an open quote takes the rest of the file for one field.
    reader = csv.DictReader(_lines(key, data), strict=True)
    line = 1
    try:
        if reader.fieldnames:
            line = reader.line_num + 1
        while (row := next(reader, None)) is not None:
            if any(row.pop(None, None) or ()):
                raise csv.Error("more fields than the header names (an unquoted comma?)")
            yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise PairmillError(
            f"caption file {key}, line {line}: {error}; mend the row that starts there"
        ) from error


def _jsonl(key: str, data: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(key, data), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise PairmillError(
                f"caption file {key}, line {number}, is not a JSON object of at most 1 MiB; "
                "mend or remove that line"
            )
        yield row


def _parquet(key: str, data: bytes) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        text = [f.name for f in file.schema_arrow if _is_text(f.type)]
        for batch in file.iter_batches(1000, columns=text):
            columns = [cells(column) for column in batch.columns]
            names = batch.schema.names
            yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise PairmillError(
            f"caption file {key} is not readable Parquet ({str(error).splitlines()[0][:80]}); "
            "write it again"
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def cells(column: pa.Array) -> list[Any]:
    """Python values of a column; text that is not UTF-8 stays bytes, and is refused later."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_cell(cell) for cell in column]


def _cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return b""


READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
