"""Reading a corpus: loose images, WebDataset tars by byte range, Parquet files with image bytes.

A `Source` says where bytes are; `read` turns sources into `Item`s. Names of objects and members
are data: nothing here ever makes a local path of one.
"""

import io
import posixpath
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import captions
from infra.captions import Text
from infra.store import NotFound, Store

# The last five are pictures that we can't read: they end as `unreadable`, not as `ignored`.
IMAGE_TYPES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".jxl",
        ".jp2",
        ".psd",
    )
)
IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
SIDECAR_TYPES = (".txt", ".json")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "bytes", "image_bytes")
WINDOW = 8 << 20
MAX_TEXT = 1 << 20
READ_AHEAD = 8

T = TypeVar("T")
R = TypeVar("R")


class Bounds(NamedTuple):
    """What is never read: captions and image files above these sizes."""

    max_chars: int = 4_096
    max_bytes: int = 256 << 20


class Source(NamedTuple):
    """Where bytes are. A tar or Parquet with `member` None stands for all its members."""

    key: str
    kind: str
    stamp: str
    size: int
    sidecars: tuple[str, ...] = ()
    member: str | None = None
    offset: int | None = None


class Item(NamedTuple):
    """One object as read: image bytes, or text that belongs to the picture of the same `stem`."""

    source: Source
    stem: str
    data: bytes | None = None
    text: Text = Text()
    rule: str | None = None
    detail: str | None = None


def extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    return extension(name) in IMAGE_TYPES


def sample_stem(name: str) -> str:
    """WebDataset's sample key: the name up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def looks_like_image(head: bytes) -> bool:
    """Whether the first bytes of a file without an extension are those of a picture."""
    return head.startswith(
        (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    ) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def sources(objects: pl.DataFrame) -> dict[str, Source]:
    """Where the bytes of each image are: its first object by key."""
    rows = objects.filter(pl.col("image_id").is_not_null()).sort("key", "member", nulls_last=False)
    return {
        row["image_id"]: Source(
            row["key"],
            kind_of(row["key"], row["member"]),
            row["stamp"],
            row["size"],
            (),
            row["member"],
            row["offset"],
        )
        for row in rows.unique("image_id", keep="first", maintain_order=True).iter_rows(named=True)
    }


def kind_of(key: str, member: str | None) -> str:
    """The kind of source an object row came from."""
    if member is None:
        return "loose"
    return "parquet" if extension(key) == ".parquet" else "tar"


def read(store: Store, sources: Iterable[Source], bounds: Bounds) -> Iterator[Item]:
    """Yield the items of sources, reading loose objects and ranges a few ahead."""
    sources = list(sources)
    whole = [s for s in sources if s.kind != "loose" and s.member is None]
    rows = [s for s in sources if s.kind == "parquet" and s.member is not None]
    single = [s for s in sources if s.kind != "parquet" and s not in whole]
    for batch in ahead(lambda s: _single(store, s, bounds), single, READ_AHEAD):
        yield from batch
    for source in whole:
        yield from CONTAINERS[source.kind](store, source, bounds)
    yield from _parquet_rows(store, rows)


def ahead(fn: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Map in threads, in order, never more than `depth` results ahead of the reader."""
    with ThreadPoolExecutor(depth) as threads:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(threads.submit(fn, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fetch(store: Store, source: Source) -> bytes:
    """The bytes of one image. Raises NotFound where it has gone since."""
    if source.kind == "parquet":
        return next(_parquet_rows(store, [source])).data or b""
    if source.member is not None:
        return store.get(source.key, source.offset or 0, source.size)
    return store.get(source.key)


def _single(store: Store, source: Source, bounds: Bounds) -> list[Item]:
    name = source.key if source.member is None else source.member
    stem = source.key if source.member is None else sample_stem(source.member)
    if source.member is not None and not is_image_name(name):
        return [_member_text(store, source, stem, bounds)]
    if source.size > bounds.max_bytes:
        return [Item(source, stem, rule="too_large", detail=f"{source.size} bytes")]
    try:
        items = [Item(source, stem, fetch(store, source))]
    except NotFound:
        return [Item(source, stem, rule="vanished")]
    for key in source.sidecars:
        try:
            text = captions.sidecar(key, store.get(key, 0, MAX_TEXT), bounds.max_chars)
        except NotFound:
            continue
        items.append(Item(source._replace(key=key), stem, text=text, rule="sidecar"))
    return items


def _member_text(store: Store, source: Source, stem: str, bounds: Bounds) -> Item:
    """A tar member that is no image: a caption, or nothing of ours."""
    name = source.member or ""
    if extension(name) not in SIDECAR_TYPES:
        return Item(source, stem, rule="ignored", detail="not an image or a caption")
    if source.size > MAX_TEXT:
        return Item(source, stem, text=Text(refused="caption_too_long"), rule="sidecar")
    text = captions.sidecar(name, fetch(store, source), bounds.max_chars)
    return Item(source, stem, text=text, rule="sidecar")


class RangeFile(io.RawIOBase):
    """A read-only seekable file over ranged reads of one object, a window at a time."""

    def __init__(self, store: Store, key: str, size: int, window: int = WINDOW):
        self.store, self.key, self.size, self.window = store, key, size, window
        self.at, self.start, self.buffer = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = base + offset
        return self.at

    def readinto(self, target: Any) -> int:
        if self.at >= self.size:
            return 0
        inside = self.start <= self.at < self.start + len(self.buffer)
        if not inside:
            length = min(max(self.window, len(target)), self.size - self.at)
            self.start, self.buffer = self.at, self.store.get(self.key, self.at, length)
        begin = self.at - self.start
        part = self.buffer[begin : begin + len(target)]
        target[: len(part)] = part
        self.at += len(part)
        return len(part)


def _tar(store: Store, source: Source, bounds: Bounds) -> Iterator[Item]:
    seen: set[str] = set()
    try:
        with (
            io.BufferedReader(RangeFile(store, source.key, source.size), 1 << 16) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for info in tar:
                yield _tar_member(source, tar, info, seen, bounds)
    except NotFound:
        yield Item(source, source.key, rule="vanished")
    except (tarfile.TarError, EOFError) as error:
        yield Item(source, source.key, rule="unreadable", detail=f"tar: {error}"[:200])


def _tar_member(
    source: Source, tar: tarfile.TarFile, info: tarfile.TarInfo, seen: set[str], bounds: Bounds
) -> Item:
    name = info.name if info.name not in seen else f"{info.name}@{info.offset_data}"
    seen.add(name)
    member = source._replace(member=name, offset=info.offset_data, size=info.size)
    stem = sample_stem(info.name)
    is_image, is_text = is_image_name(info.name), extension(info.name) in SIDECAR_TYPES
    if not info.isreg() or not (is_image or is_text):
        return Item(member, stem, rule="ignored", detail="not an image or a caption")
    if is_image and info.size > bounds.max_bytes:
        return Item(member, stem, rule="too_large", detail=f"{info.size} bytes")
    if is_text and info.size > MAX_TEXT:
        return Item(member, stem, text=Text(refused="caption_too_long"), rule="sidecar")
    file = tar.extractfile(info)
    data = file.read() if file else b""
    if len(data) < info.size:
        raise tarfile.ReadError(f"member {name} is cut off")
    if is_image:
        return Item(member, stem, data)
    return Item(member, stem, text=captions.sidecar(name, data, bounds.max_chars), rule="sidecar")


def index_tar(store: Store, source: Source) -> list[Source]:
    """Its members as sources, from the headers alone. Raises tarfile.TarError."""
    with (
        io.BufferedReader(RangeFile(store, source.key, source.size, 1 << 16), 1024) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        return [
            source._replace(member=info.name, offset=info.offset_data, size=info.size)
            for info in tar
        ]


def image_column(schema: pa.Schema) -> tuple[str, bool] | None:
    """The column with image bytes, and whether it is a struct with `bytes` as datasets writes."""
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name, True
    for name in IMAGE_COLUMNS:
        at = schema.get_field_index(name)
        if at >= 0 and (
            pa.types.is_binary(schema.field(at).type)
            or pa.types.is_large_binary(schema.field(at).type)
        ):
            return name, False
    return None


def open_parquet(store: Store, key: str, size: int) -> pq.ParquetFile:
    """Raises pyarrow.ArrowException where it is not Parquet."""
    return pq.ParquetFile(pa.PythonFile(RangeFile(store, key, size, 1 << 20), mode="r"))


def _image_bytes(value: Any, nested: bool) -> bytes:
    return (value.get("bytes") if nested and value else value) or b""


def _parquet(store: Store, source: Source, bounds: Bounds) -> Iterator[Item]:
    try:
        file = open_parquet(store, source.key, source.size)
        found = image_column(file.schema_arrow)
        if found is None:
            yield Item(source, source.key, rule="ignored", detail="no column with image bytes")
            return
        columns = captions.choose_columns(
            ("", *file.schema_arrow.names), captions.Columns("", "", None)
        )
        row = 0
        for batch in file.iter_batches(64):
            for values in batch.to_pylist():
                yield _parquet_item(source, row, values, found, columns, bounds.max_chars)
                row += 1
    except NotFound:
        yield Item(source, source.key, rule="vanished")
    except pa.ArrowException as error:
        detail = f"parquet: {str(error).splitlines()[0]}"[:200]
        yield Item(source, source.key, rule="unreadable", detail=detail)


def _parquet_item(
    source: Source,
    row: int,
    values: dict[str, Any],
    found: tuple[str, bool],
    columns: captions.Columns | None,
    max_chars: int,
) -> Item:
    data = _image_bytes(values[found[0]], found[1])
    member = source._replace(member=f"{row:08d}", offset=row, size=len(data), sidecars=())
    text = captions.from_row(values, columns, max_chars) if columns else Text()
    return Item(member, f"{row:08d}", data, text)


def _parquet_rows(store: Store, sources: list[Source]) -> Iterator[Item]:
    """Single rows, each row group read once for all its rows that are wanted."""
    by_file: dict[str, list[Source]] = {}
    for source in sources:
        by_file.setdefault(source.key, []).append(source)
    for key, wanted in by_file.items():
        try:
            file = open_parquet(store, key, store.head(key).size)
        except NotFound:
            yield from (Item(s, s.member or "", rule="vanished") for s in wanted)
            continue
        name, nested = image_column(file.schema_arrow) or ("", False)
        rows = {s.offset or 0: s for s in wanted}
        start = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            hits = [row for row in rows if start <= row < start + count]
            if hits:
                column = file.read_row_group(group, columns=[name])[name]
                for row in sorted(hits):
                    data = _image_bytes(column[row - start].as_py(), nested)
                    yield Item(rows[row], rows[row].member or "", data)
            start += count


CONTAINERS: dict[str, Callable[[Store, Source, Bounds], Iterator[Item]]] = {
    "tar": _tar,
    "parquet": _parquet,
}
