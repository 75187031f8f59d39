"""Reading a corpus: loose images, WebDataset tars by byte range, Parquet files with image bytes.

A `Source` says where bytes are; `read` turns sources into `Item`s. Names of objects and members
are data: nothing here ever makes a local path of one.
"""

import hashlib
import io
import posixpath
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import captions, images
from infra.captions import Columns, Text
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
SIDECAR_TYPES = (".txt", ".json")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "bytes", "image_bytes")
WINDOW = 8 << 20
MAX_TEXT = 1 << 20
MAX_NAME = 1_024
MAX_TAR_READ = 256 << 20
READ_AHEAD = 8
HEAD = 64
NOT_OURS = "not an image or a caption"
_TRUSTED = re.compile("sha256:[0-9a-f]{64}|[0-9a-f]{32};[0-9]+|[0-9a-f]+-[0-9a-f]+-[0-9a-f]+")
# What a name that a tar holds once more gets: `@` and the offset of its data.
REPEATED = re.compile(r"@\d+$")

T = TypeVar("T")
R = TypeVar("R")


class Bounds(NamedTuple):
    """How sources are read: no captions or image files above these sizes, captions from where."""

    max_chars: int = 4_096
    max_bytes: int = 256 << 20
    columns: Columns = captions.CUSTOMARY


class Source(NamedTuple):
    """Where bytes are. A tar or Parquet with `member` None stands for all its members.

    `kind` is loose, tar, parquet, or other: a tar's member that is neither image nor caption.
    """

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
    return posixpath.splitext(REPEATED.sub("", name))[1].lower()


def is_image_name(name: str) -> bool:
    return extension(name) in IMAGE_TYPES


def sample_stem(name: str) -> str:
    """WebDataset's sample key: the name up to the first dot of its last part.

    A hidden file, such as macOS's `._a.jpg`, belongs to no sample but its own.
    """
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0]) if base[:1] != "." else name


def looks_like_image(head: bytes) -> bool:
    """Whether the first bytes of a file without an extension are those of a picture."""
    return any(re.match(known, head, re.DOTALL) for known in images.SIGNATURES.values())


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


def object_id(key: str, member: str | None) -> str:
    """Name of an object in fates: its key, and its member after `::`."""
    return key if member is None else f"{key}::{member}"


def object_ids(objects: pl.DataFrame) -> pl.Series:
    """`object_id` of every row with `key` and `member`."""
    named = [object_id(*row) for row in objects.select("key", "member").iter_rows()]
    return pl.Series("id", named, pl.String)


def identity(stamp: str) -> str | None:
    """What of a stamp two files share only where their bytes are the same; None: nothing does.

    A digest; inode, size and time in a folder; size and the MD5 that is S3's ETag of an object
    written in one part. Of a stamp with sidecars, that of each.
    """
    parts = [part.rpartition(";")[0] or part for part in stamp.split("+")]
    return "+".join(parts) if all(map(_TRUSTED.fullmatch, parts)) else None


def digests(store: Store, keys: Iterable[str]) -> dict[str, str]:
    """A stamp of each file, from its bytes; of one that has gone, a stamp of its own."""

    def one(key: str) -> str:
        digest = hashlib.sha256()
        with suppress(NotFound):
            at = 0
            while part := store.get(key, at, WINDOW):
                digest.update(part)
                at += len(part)
        return f"sha256:{digest.hexdigest()}"

    keys = list(keys)
    return dict(zip(keys, ahead(one, keys, READ_AHEAD), strict=True))


def is_as_listed(store: Store, source: Source, data: bytes | None = None) -> bool:
    """Whether a file, just read whole as `data` or in parts, is still the one that was listed."""
    etag, _, _ = source.stamp.partition("+")[0].partition(";")
    if etag.startswith("sha256:"):
        digest = hashlib.sha256(data).hexdigest() if data is not None else ""
        return not digest or etag == f"sha256:{digest}"
    if data is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == etag:
        return True
    try:
        return store.head(source.key).etag == etag.partition("?")[0]
    except NotFound:
        return False


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
        item = next(_parquet_rows(store, [source]))
        if item.data is None:
            raise NotFound(f"row {source.member} of {source.key} has gone; run the build again")
        return item.data
    if source.member is not None:
        return store.get(source.key, source.offset or 0, source.size)
    return store.get(source.key)


def _single(store: Store, source: Source, bounds: Bounds) -> list[Item]:
    try:
        item = _member(store, source, bounds) if source.member else _loose(store, source, bounds)
    except NotFound:
        return [Item(source, source.key, rule="vanished")]
    return [item, *_sidecars(store, source, bounds)]


def _loose(store: Store, source: Source, bounds: Bounds) -> Item:
    large = source.size > bounds.max_bytes
    data = store.get(source.key, 0, HEAD if large else None)
    if not extension(source.key) and not looks_like_image(data[:HEAD]):
        return Item(source, source.key, rule="ignored", detail="no extension, and not an image")
    if large:
        return Item(source, source.key, rule="too_large", detail=f"{source.size} bytes")
    if not is_as_listed(store, source, data):
        return Item(source, source.key, rule="vanished", detail="changed after it was listed")
    return Item(source, source.key, data)


def _sidecars(store: Store, source: Source, bounds: Bounds) -> Iterator[Item]:
    for key in source.sidecars:
        with suppress(NotFound):
            text = _text(key, store.get(key, 0, MAX_TEXT + 1), bounds)
            yield Item(source._replace(key=key), source.key, text=text, rule="sidecar")


def _text(name: str, data: bytes, bounds: Bounds) -> Text:
    if len(data) > MAX_TEXT:
        return Text(refused="caption_too_long")
    return captions.sidecar(name, data, bounds.max_chars, bounds.columns)


def _member(store: Store, source: Source, bounds: Bounds, tar: "RangeFile | None" = None) -> Item:
    """A member of a tar that is being read through, or by its range alone."""
    name = source.member or ""
    stem, is_image = sample_stem(name), is_image_name(name)
    if source.kind == "other":
        return Item(source, stem, rule="ignored", detail=NOT_OURS)
    if is_image and source.size > bounds.max_bytes:
        return Item(source, stem, rule="too_large", detail=f"{source.size} bytes")
    if not is_image and source.size > MAX_TEXT:
        return Item(source, stem, text=Text(refused="caption_too_long"), rule="sidecar")
    data = _read_member(tar, source) if tar else fetch(store, source)
    if is_image:
        return Item(source, stem, data)
    return Item(source, stem, text=_text(name, data, bounds), rule="sidecar")


def _read_member(file: "RangeFile", source: Source) -> bytes:
    file.seek(source.offset or 0)
    data = file.read(source.size)
    if len(data) < source.size:
        raise tarfile.ReadError(f"member {source.member} is cut off")
    return data


class RangeFile(io.RawIOBase):
    """A read-only seekable file over ranged reads of one object, a window at a time.

    `read` gives all that is asked for, as Arrow expects; more than `most` bytes is a ValueError.
    """

    def __init__(
        self, store: Store, key: str, size: int, window: int = WINDOW, most: int | None = None
    ):
        self.store, self.key, self.size, self.window, self.most = store, key, size, window, most
        self.at, self.start, self.buffer = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"no byte {base + offset}")
        self.at = base + offset
        return self.at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.at)
        wanted = left if size is None or size < 0 else min(size, left)
        if self.most is not None and wanted > self.most:
            raise ValueError(f"a header asks for {wanted} bytes")
        parts = []
        while wanted and (part := self._part(wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def _part(self, wanted: int) -> bytes:
        if not self.start <= self.at < self.start + len(self.buffer):
            length = min(max(self.window, wanted), self.size - self.at)
            self.start, self.buffer = self.at, self.store.get(self.key, self.at, length)
        begin = self.at - self.start
        part = self.buffer[begin : begin + wanted]
        self.at += len(part)
        return part


def _tar(store: Store, source: Source, bounds: Bounds) -> Iterator[Item]:
    count = 0
    try:
        for file, member in _members(store, source, WINDOW):
            count += 1
            yield _member(store, member, bounds, file)
        if not count:
            yield Item(source, source.key, rule="ignored", detail="a tar without members")
    except NotFound:
        yield Item(source, source.key, rule="vanished")
    except tarfile.TarError as error:
        yield Item(source, source.key, rule="unreadable", detail=f"tar: {error}"[:200])


def _members(store: Store, source: Source, window: int) -> Iterator[tuple[RangeFile, Source]]:
    """Members of a tar as sources. Raises tarfile.TarError for damage, wherever it is."""
    seen: set[str] = set()
    file = RangeFile(store, source.key, source.size, window, MAX_TAR_READ)
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
        ) as tar:
            for info in tar:
                yield file, _member_source(source, info, seen)
                tar.members.clear()  # type: ignore[attr-defined]
            _check_end(file, tar.offset)
    except (ValueError, OverflowError, EOFError) as error:
        # What tarfile raises for some header fields that are no numbers, or absurd ones.
        raise tarfile.ReadError(str(error)) from error


def _member_source(source: Source, info: tarfile.TarInfo, seen: set[str]) -> Source:
    if info.size < 0:
        raise tarfile.ReadError(f"member at byte {info.offset} has a negative size")
    name = info.name[:MAX_NAME]
    if name in seen:
        name = f"{name}@{info.offset_data}"
    seen.add(name)
    plain = info.isreg() and not info.issparse()
    ours = plain and (is_image_name(name) or extension(name) in SIDECAR_TYPES)
    kind, size = "tar" if ours else "other", min(info.size, (1 << 63) - 1)
    return source._replace(kind=kind, member=name, offset=info.offset_data, size=size)


def _check_end(file: RangeFile, at: int) -> None:
    """tarfile takes a damaged header for the end, and what follows would be lost silently."""
    file.seek(at)
    tail = file.read(2 * tarfile.RECORDSIZE)
    if not tail or tail.strip(b"\0"):
        raise tarfile.ReadError(f"no end mark at byte {at}: damaged, cut off, or several joined")


def index_tar(store: Store, source: Source) -> list[Source]:
    """Its members as sources, from the headers alone. Raises NotFound and tarfile.TarError."""
    return [member for _, member in _members(store, source, 1 << 16)]


def image_column(schema: pa.Schema) -> tuple[str, bool] | None:
    """The column with image bytes, and whether it is a struct with `bytes` as datasets writes."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _has_bytes(f.type)]
    plain = [f.name for f in schema if f.name in IMAGE_COLUMNS and _is_binary(f.type)]
    if structs or plain:
        return min(structs or plain, key=_preference), bool(structs)
    return None


def _preference(name: str) -> int:
    return IMAGE_COLUMNS.index(name) if name in IMAGE_COLUMNS else len(IMAGE_COLUMNS)


def _has_bytes(kind: pa.StructType) -> bool:
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_binary(kind.field(at).type)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def open_parquet(store: Store, key: str, size: int) -> pq.ParquetFile:
    """Raises pyarrow.ArrowException or OSError where it is not Parquet."""
    return pq.ParquetFile(pa.PythonFile(RangeFile(store, key, size, 1 << 20), mode="r"))


def _images(batch: pa.RecordBatch, found: tuple[str, bool]) -> list[bytes]:
    name, nested = found
    column = pc.struct_field(batch[name], "bytes") if nested else batch[name]
    return [data or b"" for data in column.to_pylist()]


def _parquet(store: Store, source: Source, bounds: Bounds) -> Iterator[Item]:
    try:
        file = open_parquet(store, source.key, source.size)
        found = image_column(file.schema_arrow)
        if found is None or not file.metadata.num_rows:
            detail = "no rows" if found else "no column with image bytes"
            yield Item(source, source.key, rule="ignored", detail=detail)
            return
        yield from _parquet_items(source, file, found, bounds)
    except NotFound:
        yield Item(source, source.key, rule="vanished")
    except (pa.ArrowException, OSError) as error:
        detail = f"parquet: {str(error).splitlines()[0]}"[:200]
        yield Item(source, source.key, rule="unreadable", detail=detail)


def _parquet_items(
    source: Source, file: pq.ParquetFile, found: tuple[str, bool], bounds: Bounds
) -> Iterator[Item]:
    names = file.schema_arrow.names
    columns = captions.choose_columns(("", *names), bounds.columns)
    texts = [name for name in (columns.caption, columns.licence) if name] if columns else []
    row = 0
    for batch in file.iter_batches(64, columns=list({found[0]: 0, **dict.fromkeys(texts)})):
        cells = [captions.cells(batch[name]) for name in texts]
        for data, *values in zip(_images(batch, found), *cells, strict=True):
            name = f"{row:08d}"
            member = source._replace(member=name, offset=row, size=len(data), sidecars=())
            said = dict(zip(texts, values, strict=True))
            text = captions.from_row(said, columns, bounds.max_chars) if columns else Text()
            if len(data) > bounds.max_bytes:
                yield Item(member, name, rule="too_large", detail=f"{len(data)} bytes")
            else:
                yield Item(member, name, data, text)
            row += 1


def _parquet_rows(store: Store, sources: list[Source]) -> Iterator[Item]:
    """Single rows, in order, each row group read once for all its rows that are wanted."""
    by_file: dict[str, dict[int, Source]] = {}
    for source in sources:
        by_file.setdefault(source.key, {})[source.offset or 0] = source
    for key, wanted in by_file.items():
        # Where the file is another one by now, its old rows have gone like a deleted file.
        with suppress(NotFound, pa.ArrowException, OSError):
            for row, data in _chosen_rows(store, key, sorted(wanted)):
                source = wanted.pop(row)
                yield Item(source, source.member or "", data)
        yield from (Item(s, s.member or "", rule="vanished") for s in wanted.values())


def _chosen_rows(store: Store, key: str, rows: list[int]) -> Iterator[tuple[int, bytes]]:
    file = open_parquet(store, key, store.head(key).size)
    found = image_column(file.schema_arrow)
    if found is None:
        return
    start = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if any(start <= row < start + count for row in rows):
            at = start
            for batch in file.iter_batches(64, row_groups=[group], columns=[found[0]]):
                inside = [row for row in rows if at <= row < at + len(batch)]
                data = _images(batch, found) if inside else []
                yield from ((row, data[row - at]) for row in inside)
                at += len(batch)
        start += count


CONTAINERS: dict[str, Callable[[Store, Source, Bounds], Iterator[Item]]] = {
    "tar": _tar,
    "parquet": _parquet,
}
