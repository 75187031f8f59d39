"""Growing tables: what any build in a store has found out of objects, images and captions.

    ledger/describe/<kind>/<family>/<number>-<digest>.json

The record of the highest number holds; of two with one number, their shards together. Where two
builds append at once and one is overtaken, its rows are found out again. Rows of `responses` were
paid for: of these each number is given once, and who is overtaken learns it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import tables
from infra.canonical import digest
from infra.corpus import RangeFile, object_id
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.schema import SCHEMAS
from infra.store import Conflict, NotFound, Store
from infra.tables import Shard, Table
from infra.tombstones import Tombstones

KINDS = ("objects", "forgotten", "headers", "looks", "vectors", "texts", "responses")
PLACE = ("key", "member", "stamp", "image_id")
SHARD_BYTES = 64 << 20  # of a shard that compaction writes
SMALL = 8 << 20


class Grown(NamedTuple):
    """A growing table as it stands: its number, and the tombstones it is known to be free of."""

    kind: str
    family: str
    number: int
    table: Table
    free_of: str


def load(ledger: Ledger, kind: str, family: str) -> Grown:
    """The newest state of a growing table; an empty one where there is none."""
    number, records = ledger.newest(f"describe/{kind}", family)
    found = [Table.from_json(record["tables"]["rows"]) for record in records]
    shards = dict.fromkeys(shard for table in found for shard in table.shards)
    free_of = {record.get("free_of", "") for record in records}
    name = found[0].name if found else f"{kind}-{family}"
    clean = free_of.pop() if len(free_of) == 1 else ""
    return Grown(kind, family, number, Table(name, tuple(shards)), clean)


def save(ledger: Ledger, grown: Grown, table: Table, free_of: str) -> Grown:
    """Record the next state of a growing table; its shards must be stored already.

    Of `responses`, raises PairmillError where another process has changed the table since.
    """
    after = grown._replace(number=grown.number + 1, table=table, free_of=free_of)
    record = {"tables": {"rows": table.to_json()}, "free_of": free_of}
    if grown.kind == "responses":
        _save_alone(ledger, after, record)
        return after
    key = f"{after.number:08d}-{digest([shard.sha256 for shard in table.shards])}"
    ledger.write(f"describe/{grown.kind}", grown.family, key, record)
    return after


def _save_alone(ledger: Ledger, after: Grown, record: dict[str, Any]) -> None:
    """The record of a number that nobody else can have, and that is the newest then."""
    stage, key = f"describe/{after.kind}", f"{after.number:08d}-only"
    try:
        ledger.write(stage, after.family, key, record, if_absent=True)
        # One may be absent since it is long overtaken, and collected as garbage.
        number, _ = ledger.newest(stage, after.family)
    except Conflict:
        number = after.number + 1
    if number != after.number:
        raise PairmillError(
            f"another process has changed the table of {after.kind} in {ledger.store.uri}; nothing "
            "is lost, run this again"
        )


def append(ledger: Ledger, grown: Grown, new: Sequence[Shard], free_of: str) -> Grown:
    """Add shards whose rows are free of these tombstones, as those before them must be."""
    merged = dict.fromkeys([*grown.table.shards, *new])
    return save(ledger, grown, Table(grown.table.name, tuple(merged)), free_of)


def families(store: Store) -> Iterator[tuple[str, str]]:
    """Kind and family of every growing table in a store."""
    for kind in KINDS:
        prefix = f"ledger/describe/{kind}/"
        try:
            keys = [stat.key[len(prefix) :] for stat in store.list(prefix)]
        except NotFound:
            return
        for family in sorted({key.partition("/")[0] for key in keys}):
            yield kind, family


def clean(store: Store, grown: Grown, gone: Tombstones) -> tuple[Table, list[dict[str, Any]]]:
    """The table without rows that tombstones name, and what went of `objects`, as `forgotten` rows.

    A shard without such rows stays as it is.
    """
    shards: list[Shard] = []
    removed: list[dict[str, Any]] = []
    for shard in grown.table.shards:
        names = _names(store, grown, shard)
        dead = [_is_dead(grown.kind, row, gone) for row in names]
        if not any(dead):
            shards.append(shard)
            continue
        rows = tables.read(store, Table(grown.table.name, (shard,)))
        if grown.kind == "objects":
            removed += [
                forgotten_row(row["key"], row["member"], row["stamp"], row["image_id"], gone)
                for row, is_dead in zip(names, dead, strict=True)
                if is_dead and not _is_dead("forgotten", row, gone)
            ]
        kept = rows.filter(pa.array([not is_dead for is_dead in dead]))
        if kept.num_rows:
            shards.append(tables.write_shard(store, kept, grown.kind))
    return Table(grown.table.name, tuple(dict.fromkeys(shards))), removed


def forgotten_row(
    key: str, member: str | None, stamp: str, image_id: str | None, gone: Tombstones
) -> dict[str, Any]:
    """What stands for a forgotten object: hashes, and of a container's member, which container."""
    return {
        "key": key if member is not None else None,
        "stamp": stamp if member is not None else None,
        "id": gone.keyed(object_id(key, member)),
        "image": gone.keyed(image_id) if image_id else None,
        "place": gone.place(key, member, stamp),
    }


def _names(store: Store, grown: Grown, shard: Shard) -> list[dict[str, Any]]:
    """The columns of a shard that name things; vectors are left unread."""
    named = {
        "objects": PLACE,
        "forgotten": ("key", "stamp"),
        "texts": ("caption_id",),
        "responses": ("images", "captions"),
    }
    wanted = named.get(grown.kind, ("image_id",))
    if grown.kind in ("vectors", "texts", "responses"):
        rows = columns(store, grown.table.name, shard, wanted)
    else:
        rows = tables.read(store, Table(grown.table.name, (shard,)), wanted)
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def columns(store: Store, name: str, shard: Shard, wanted: Sequence[str]) -> pa.Table:
    """Some columns of a shard, and no byte of the others read; so its digest is not looked at.

    Raises Damaged for a shard that is gone or can't be read.
    """
    file = RangeFile(store, tables.shard_key(shard.sha256), shard.bytes, window=1 << 16)
    try:
        opened = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
        rows = opened.read(columns=list(wanted))
    except (NotFound, pa.ArrowException, OSError) as error:
        raise tables.damaged(store, name, shard, gone=isinstance(error, NotFound)) from error
    if rows.num_rows != shard.rows:
        raise tables.damaged(store, name, shard)
    return rows


def _is_dead(kind: str, row: dict[str, Any], gone: Tombstones) -> bool:
    if kind == "responses":
        return any(map(gone.has_image, row["images"])) or any(
            map(gone.has_caption, row["captions"])
        )
    if kind == "texts":
        return gone.has_caption(row["caption_id"])
    if kind == "forgotten":
        # A row of a container's member, where the container is forgotten whole.
        if row["key"] is None or row.get("member", "") is None:
            return False
        return gone.place(row["key"], None, row["stamp"]) in gone.objects
    if kind == "objects":
        if gone.place(row["key"], row["member"], row["stamp"]) in gone.objects:
            return True
        if row["member"] and gone.place(row["key"], None, row["stamp"]) in gone.objects:
            return True
    return gone.has_image(row["image_id"])


def compact(
    store: Store, grown: Grown, live: pl.DataFrame | None, share: float, small: int
) -> Table:
    """The table with superseded rows left out and small shards joined, or as it is.

    `live` has the rows that are wanted, by the table's first columns; without it all are, and
    shards that are not small stay. Rows are left out where they are more than `share` of all,
    shards joined where more than `small` of them are below SMALL bytes. Rows stay in their order.
    What was written before stays until garbage collection.
    """
    if len(grown.table.shards) == 0:
        return grown.table
    little = [s for s in grown.table.shards if s.bytes < SMALL]
    # At the least; to know exactly, all would have to be read.
    dead = grown.table.rows - live.height if live is not None else 0
    if dead <= share * grown.table.rows and len(little) <= small:
        return grown.table
    out: list[Shard] = []
    waiting: list[pa.Table] = []
    seen: set[Any] = set()

    def write(least: int) -> None:
        if waiting and sum(rows.nbytes for rows in waiting) >= least:
            out.append(tables.write_shard(store, pa.concat_tables(waiting), grown.kind))
            waiting.clear()

    for shard in grown.table.shards:
        if live is None and shard.bytes >= SMALL:
            write(0)
            out.append(shard)
            continue
        kept = _wanted(tables.read(store, Table(grown.table.name, (shard,))), live, seen)
        waiting += [kept] if kept.num_rows else []
        write(SHARD_BYTES)
    write(0)
    return Table(grown.table.name, tuple(out))


def _wanted(part: pa.Table, live: pl.DataFrame | None, seen: set[Any]) -> pa.Table:
    """Rows that are live, each once over all parts."""
    if live is None:
        return part
    names = pl.DataFrame(part.select(live.columns)).with_row_index("row")
    rows = names.join(live.unique(), on=live.columns, how="semi", nulls_equal=True)
    keep = []
    for row, *name in rows.sort("row").iter_rows():
        if tuple(name) not in seen:
            seen.add(tuple(name))
            keep.append(row)
    return part.take(pa.array(keep, pa.int64()))


def objects(store: Store) -> pl.DataFrame:
    """The object rows of every corpus in a store, with their family: all that can be forgotten."""
    ledger, parts = Ledger(store), []
    for kind, family in families(store):
        if kind == "objects":
            rows = tables.frame(store, load(ledger, kind, family).table)
            parts.append(rows.with_columns(pl.lit(family).alias("family")))
    if parts:
        return pl.concat(parts)
    return pl.DataFrame(SCHEMAS["objects"].empty_table()).with_columns(pl.lit("").alias("family"))
