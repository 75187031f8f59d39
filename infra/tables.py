"""Tables: immutable Parquet shards in the store, named by the SHA-256 of their bytes."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import pins
from infra.canonical import canonical
from infra.errors import PairmillError
from infra.schema import SCHEMAS
from infra.store import NotFound, Store

# These are read several times in a build; shards are immutable, so a copy stays true.
CACHED = ("vectors", "texts", "lists")
CACHE_BYTES = 512 << 20
ALL = ("*",)  # columns of a table that carries its own schema
# Rows a group, for tables whose rows are looked up one by one.
GROUPS = {"responses": 2048}
_cache: dict[tuple[str, str], pa.Table] = {}


class Damaged(PairmillError):
    """A shard is not there, or not what its name says."""

    def __init__(self, message: str, sha256: str):
        super().__init__(message)
        self.sha256 = sha256


REPAIR = "`pairmill verify-store --repair` removes what names it, and the next run makes it anew"
PAID = (
    "restore it from a backup, or let `pairmill verify-store --repair` give up the answers in it, "
    "which are then paid for again"
)


class Shard(NamedTuple):
    """One Parquet file of a table."""

    sha256: str
    rows: int
    bytes: int


class Table(NamedTuple):
    """A named list of shards; the rows live in the store.

    The name is that of a schema; a dash and the digest of what the rows were made with may follow.
    """

    name: str
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shards": [list(shard) for shard in self.shards]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Table":
        return cls(data["name"], tuple(Shard(*shard) for shard in data["shards"]))


def shard_key(sha256: str) -> str:
    return f"data/{sha256[:2]}/{sha256}.parquet"


def encode(rows: pa.Table, name: str = "") -> bytes:
    """Parquet bytes of rows; equal rows and equal library versions give equal bytes.

    Tables named in GROUPS are written so that a few rows can be read, and vouched for, alone.
    """
    buffer, group = io.BytesIO(), GROUPS.get(name.partition("-")[0])
    vectors = [f.name for f in rows.schema if pa.types.is_fixed_size_binary(f.type)]
    plain = [name for name in rows.column_names if name not in vectors]
    pq.write_table(
        rows.replace_schema_metadata(None),
        buffer,
        compression=dict.fromkeys(plain, "zstd") | dict.fromkeys(vectors, "none"),
        use_dictionary=plain,
        write_statistics=plain,
        row_group_size=group,
        write_page_checksum=group is not None,
    )
    return buffer.getvalue()


def write_shard(store: Store, rows: pa.Table, name: str = "") -> Shard:
    """Write one content-addressed shard of a table; writing it twice is harmless."""
    data = encode(rows, name)
    sha256 = hashlib.sha256(data).hexdigest()
    pins.put(store, shard_key(sha256), data)
    return Shard(sha256, rows.num_rows, len(data))


def write(
    store: Store, name: str, rows: pa.Table | Sequence[dict[str, Any]], shard_rows: int = 250_000
) -> Table:
    """Write rows as a table, in shards of at most `shard_rows` rows; dicts by the named schema."""
    if not isinstance(rows, pa.Table):
        rows = pa.Table.from_pylist(list(rows), schema=SCHEMAS[name])
    slices = (rows.slice(at, shard_rows) for at in range(0, rows.num_rows, shard_rows))
    return Table(name, tuple(write_shard(store, part, name) for part in slices))


def write_frame(store: Store, name: str, frame: pl.DataFrame) -> Table:
    """Write a polars frame as a table of the named schema."""
    schema = SCHEMAS[name]
    return write(store, name, frame.select(schema.names).to_arrow().cast(schema))


def write_published(store: Store, name: str, rows: pa.Table, shard_rows: int) -> Table:
    """Write rows that readers of Parquet are given: in types that all of them know, and with their
    columns also where there are no rows.
    """
    rows = rows.cast(pa.schema([pa.field(f.name, _plain(f.type)) for f in rows.schema]))
    if not rows.num_rows:
        return Table(name, (write_shard(store, rows),))
    return write(store, name, rows, shard_rows)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Types as every Parquet reader knows them, without 64-bit offsets and string views."""
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type)) for f in kind])
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def shards(store: Store, table: Table, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the table shard by shard. Raises PairmillError for a missing or damaged shard."""
    for shard in table.shards:
        yield _read_shard(store, table.name, shard, columns)


def read(store: Store, table: Table, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole table in memory; an empty one has the columns of its schema."""
    parts = list(shards(store, table, columns))
    if parts:
        return pa.concat_tables(parts)
    empty = SCHEMAS[table.name.partition("-")[0]].empty_table()
    return empty.select(columns) if columns else empty


def frame(store: Store, table: Table, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The whole table as a polars frame."""
    return pl.DataFrame(read(store, table, columns))


def _read_shard(store: Store, name: str, shard: Shard, columns: Sequence[str] | None) -> pa.Table:
    if columns is None and name.partition("-")[0] in CACHED:
        key = (store.uri, shard.sha256)
        if key not in _cache:
            while _cache and sum(t.nbytes for t in _cache.values()) + shard.bytes > CACHE_BYTES:
                _cache.pop(next(iter(_cache)))
            _cache[key] = _decoded(store, name, shard, None)
        return _cache[key]
    return _decoded(store, name, shard, columns)


def damaged(store: Store, name: str, shard: Shard, gone: bool = False) -> Damaged:
    """The error that says which shard of which table is not what it should be."""
    said = f"gone from {store.uri}" if gone else f"damaged in {store.uri}"
    remedy = PAID if name.startswith("responses") else REPAIR
    text = f"shard {shard.sha256[:12]} of table {name} is {said}; {remedy}"
    return Damaged(text, shard.sha256)


def _decoded(store: Store, name: str, shard: Shard, columns: Sequence[str] | None) -> pa.Table:
    try:
        data = store.get(shard_key(shard.sha256))
    except NotFound as error:
        raise damaged(store, name, shard, gone=True) from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise damaged(store, name, shard)
    rows = pq.read_table(pa.BufferReader(data), columns=list(columns) if columns else None)
    return _with_bytes(rows)


def _with_bytes(rows: pa.Table) -> pa.Table:
    """Vectors as they are written now, where a shard still has them as lists of numbers."""
    for at, field in enumerate(rows.schema):
        if pa.types.is_fixed_size_list(field.type):
            array = rows.column(at).combine_chunks()
            flat = np.ascontiguousarray(array.flatten().to_numpy(), dtype="<f2")
            kind = pa.binary(2 * field.type.list_size)
            buffers = [None, pa.py_buffer(flat)]
            column = pa.FixedSizeBinaryArray.from_buffers(kind, len(array), buffers)
            rows = rows.set_column(at, field.name, column)
    return rows


def digest(store: Store, table: Table, columns: Sequence[str]) -> str:
    """SHA-256 of the named columns as canonical rows, whatever their order or sharding.

    With no columns it is the table's name: for tables whose rows follow from their ids and it;
    ALL are the columns that it has.
    Neighbour lists are in order by definition and are hashed in it.
    """
    if not columns:
        return table.name
    if table.name == "lists":
        return digest_columns(read(store, table).select(columns), ordered=True)
    return digest_columns(read(store, table, None if columns == ALL else columns))


def digest_columns(rows: pa.Table, ordered: bool = False) -> str:
    """SHA-256 of a table's columns in canonical form, its rows sorted unless they are `ordered`.

    A column is hashed as its name and values: integers as 64 bits, strings as lengths and UTF-8,
    lists as lengths and items, structs by field, and where nulls stand. Sorted by the columns that
    are neither lists nor structs, which must tell rows apart. Raises TypeError for floats.
    """
    plain = [field.name for field in rows.schema if not pa.types.is_nested(field.type)]
    if plain and not ordered:
        order = pl.DataFrame(rows.select(plain)).select(pl.arg_sort_by(plain)).to_series()
        rows = rows.take(order.to_arrow())
    total = hashlib.sha256()
    for name in sorted(rows.column_names):
        column = hashlib.sha256()
        for part in _values(rows[name].combine_chunks()):
            column.update(part)
        total.update(canonical([name, rows.num_rows, column.hexdigest()]))
    return total.hexdigest()


def _values(array: pa.Array) -> Iterator[Any]:
    """Buffers that hold an array's values in their canonical form, whatever its Arrow layout."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    # Where there are none, a constant, so that layouts without a null bitmap are no different.
    yield np.packbits(array.is_null().to_numpy(zero_copy_only=False)) if array.null_count else b"-"
    if pa.types.is_struct(kind):
        for name in sorted(field.name for field in kind):
            yield from _values(pc.struct_field(array, name))
    elif pa.types.is_nested(kind):
        yield pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype("<i8")
        yield from _values(array.flatten())
    elif pa.types.is_boolean(kind):
        yield from _values(array.cast(pa.int8()))
    elif pa.types.is_integer(kind):
        wide = "<u8" if pa.types.is_uint64(kind) else "<i8"
        yield pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(wide)
    elif pa.types.is_floating(kind):
        raise TypeError("a float has no canonical form; use an integer or text")
    else:
        yield from _bytes(array)


def _bytes(array: pa.Array) -> Iterator[Any]:
    """Lengths and joined bytes of an array of strings or binaries."""
    plain = pc.fill_null(array.cast(pa.large_binary()), b"")
    _, offsets, data = plain.buffers()
    ends = np.frombuffer(offsets, "<i8")[plain.offset : plain.offset + len(plain) + 1]
    yield np.diff(ends)
    if data is not None and len(ends):
        yield memoryview(data)[ends[0] : ends[-1]]


def dense_lists(store: Store, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Neighbour lists as int32[n, k]: rows (-1 where there are fewer) and scores (0 there)."""
    parts = list(shards(store, table))
    offsets = [part["neighbours"].combine_chunks().offsets.to_numpy() for part in parts]
    lengths = [np.diff(ends) for ends in offsets]
    k = max((int(length.max()) for length in lengths if len(length)), default=0)
    neighbour = np.full((table.rows, k), -1, np.int32)
    score = np.zeros((table.rows, k), np.int32)
    at = 0
    for part, length in zip(parts, lengths, strict=True):
        filled = np.arange(k) < length[:, None]
        span = slice(at, at + len(length))
        neighbour[span][filled] = part["neighbours"].combine_chunks().flatten().to_numpy()
        score[span][filled] = part["scores"].combine_chunks().flatten().to_numpy()
        at += len(length)
    return neighbour, score


def matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of vectors as float16[n, d], without a copy where it is one chunk."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    part = data[array.offset * width : (array.offset + len(array)) * width]
    return part.view(np.float16).reshape(len(array), width // 2)


def vector_rows(key: str, ids: Iterable[str], vectors: np.ndarray) -> pa.Table:
    """Arrow rows of (id, vector) from ids and a matrix [n, d], stored as float16.

    Bytes of a fixed length, since Parquet takes fifteen times as long over lists of numbers.
    """
    plain = np.ascontiguousarray(vectors, dtype="<f2")
    kind = pa.binary(2 * plain.shape[1])
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(plain), [None, pa.py_buffer(plain)])
    return pa.table({key: pa.array(list(ids), pa.string()), "vector": column})


def gather(store: Store, table: Table, ids: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Vectors of the given ids, in ascending order of id.

    Returns the distinct ids and their vectors, float16[n, d]; shape (0, 0) where there are none.
    Raises PairmillError where an id has no vector: another's must never stand for it.
    """
    wanted = pl.DataFrame({"id": ids}, {"id": pl.String}).unique()
    parts = list(shards(store, table)) if wanted.height else []
    found = [
        pl.DataFrame({"id": part.column(0)}).with_row_index("row").with_columns(part=pl.lit(at))
        for at, part in enumerate(parts)
    ]
    rows = pl.concat(found) if found else wanted.clear()
    rows = rows.join(wanted, on="id", how="semi").unique("id", keep="first").sort("id")
    if rows.height < wanted.height:
        raise PairmillError(
            f"{wanted.height - rows.height} of {wanted.height} ids have no vector in table "
            f"{table.name}; delete the store's ledger/describe folder to describe them again"
        )
    if not rows.height:
        return [], np.zeros((0, 0), np.float16)
    matrices = [matrix(part["vector"]) for part in parts]
    out = np.empty((rows.height, matrices[0].shape[1]), np.float16)
    row, of = rows["row"].to_numpy(), rows["part"].to_numpy()
    for at, vectors in enumerate(matrices):
        here = np.flatnonzero(of == at)
        out[here] = vectors[row[here]]
    return rows["id"].to_list(), out
