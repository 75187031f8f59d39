"""`pairmill verify-store`: re-hash all that the ledger names, and repair what is damaged.

A repair removes the records that name a damaged shard, so that the next build does their work
again and no other. Growing tables are recorded anew without the shard. Of paid answers all that can
be read stays, also where the record of their table is lost.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import polars as pl

from infra import growing, pins, responses, tables, tombstones
from infra.errors import PairmillError
from infra.growing import Grown
from infra.lease import LIFE, hold
from infra.ledger import FORMAT, Ledger, check_format
from infra.store import NotFound, Store
from infra.tables import Table

READERS = 8
OF_FILES = ("objects", "forgotten")
_SHA = re.compile(r"[0-9a-f]{64}")
_PICTURES = re.compile(r"pictures/[0-9a-f]{64}\.jpegs")


class Damaged(PairmillError):
    """The store holds less than its ledger says."""


class Found(NamedTuple):
    """What is wrong: records that can't be read, objects by key with their state, and segments of
    paid answers with what is lost of them.
    """

    records: list[str]
    objects: dict[str, str]
    segments: dict[str, str]
    named_by: Mapping[str, set[str]]
    checked: int

    def __bool__(self) -> bool:
        return bool(self.records or self.objects or self.segments)

    @property
    def naming(self) -> list[str]:
        """Records that name a damaged object."""
        return sorted({record for key in self.objects for record in self.named_by[key]})


def verify_store(store: Store, repair: bool = False) -> Iterator[str]:
    """Say what is damaged, line by line; with `repair`, remove it and the records that name it.

    Raises Damaged where something was found and left, PairmillError where a build is at work that
    a repair could disturb, or a newer Pairmill wrote the store.
    """
    check_format(store, write=False)
    found = survey(store)
    yield from told(found)
    if not found:
        return
    if not repair:
        raise Damaged(
            f"{store.uri} is damaged; `pairmill verify-store --repair` removes the damaged part, "
            "and the next build makes it anew"
        )
    with pins.alone(store) as alone:
        if not alone():
            raise PairmillError("a build is at work in this store; repair it when that has ended")
        with hold(store, responses.LEASE, wait_s=2 * LIFE):
            yield from mend(store, found)


def survey(store: Store) -> Found:
    """Read every record of the ledger, and re-hash every shard and picture file they name."""
    records: list[str] = []
    named_by: dict[str, set[str]] = defaultdict(set)
    for path, record in _records(store):
        if record is None:
            records.append(path)
        else:
            for key in named(record):
                named_by[key].add(path)
    with ThreadPoolExecutor(READERS) as threads:
        states = threads.map(lambda key: _state(store, key), named_by)
        objects = {key: state for key, state in zip(named_by, states, strict=True) if state}
    segments, damaged = responses.damaged(store)
    return Found(records, objects, damaged, named_by, len(named_by) + segments)


def told(found: Found) -> Iterator[str]:
    """What was found, one line each."""
    for path in found.records:
        yield f"damaged record   {path}"
    for key, state in sorted(found.objects.items()):
        stages = sorted({path.split("/")[1] for path in found.named_by[key]})
        yield f"{state + ' object':<16} {key}, named by {', '.join(stages)}"
    for key, said in sorted(found.segments.items()):
        yield f"damaged answers  {key}: {said}"
    broken = len(found.records) + len(found.objects) + len(found.segments)
    yield f"{found.checked} objects checked, {broken or 'nothing'} damaged or missing"


def named(value: Any) -> Iterator[str]:
    """Keys of the shards and picture files that a record names."""
    if isinstance(value, dict):
        for item in value.values():
            yield from named(item)
    elif isinstance(value, list):
        if _is_shard(value):
            yield tables.shard_key(value[0])
        else:
            for item in value:
                yield from named(item)
    elif isinstance(value, str) and _PICTURES.fullmatch(value):
        yield value


def _is_shard(value: list[Any]) -> bool:
    return (
        len(value) == 3
        and isinstance(value[0], str)
        and _SHA.fullmatch(value[0]) is not None
        and all(isinstance(number, int) for number in value[1:])
    )


def _records(store: Store) -> Iterator[tuple[str, dict[str, Any] | None]]:
    try:
        paths = [stat.key for stat in store.list("ledger/")]
    except NotFound:
        return
    for path in paths:
        try:
            record = json.loads(store.get(path))
        except NotFound:
            continue
        except ValueError:
            record = None
        if not isinstance(record, dict):
            yield path, None
            continue
        if record.get("format") != FORMAT:
            raise PairmillError(
                f"the ledger record {path} has format {record.get('format')}, this Pairmill reads "
                f"{FORMAT}; use the Pairmill that wrote the store"
            )
        yield path, record


def _state(store: Store, key: str) -> str | None:
    sha256 = key.rpartition("/")[2].partition(".")[0]
    try:
        data = store.get(key)
    except NotFound:
        return "missing"
    return None if hashlib.sha256(data).hexdigest() == sha256 else "damaged"


def mend(store: Store, found: Found) -> Iterator[str]:
    """Record growing tables without what is damaged, then remove the rest; says what it did."""
    ledger = Ledger(store)
    lost = {key.rpartition("/")[2].partition(".")[0] for key in found.objects}
    # First what can't be read: the state before it is the newest then.
    for path in found.records:
        store.delete(path)
    yield from _mend_answers(store, found)
    families = list(growing.families(store))
    states = {(kind, family): growing.load(ledger, kind, family) for kind, family in families}
    for (kind, _), grown in states.items():
        if kind not in OF_FILES:
            good = tuple(shard for shard in grown.table.shards if shard.sha256 not in lost)
            yield from _save(ledger, grown, Table(grown.table.name, good))
    headers = [
        tables.frame(store, growing.load(ledger, kind, family).table, ["image_id"])
        for kind, family in families
        if kind == "headers"
    ]
    for family in {family for kind, family in families if kind in OF_FILES}:
        both = [grown for (k, f), grown in states.items() if k in OF_FILES and f == family]
        yield from _mend_files(ledger, both, lost, pl.concat(headers) if headers else None)
    for path in found.naming:
        store.delete(path)
    for key in found.objects:
        store.delete(key)
    yield (
        f"removed {len(found.records) + len(found.naming)} records and {len(found.objects)} "
        "objects; the next build does their work again"
    )


def _mend_answers(store: Store, found: Found) -> Iterator[str]:
    """Paid answers: what can be read of damaged segments, and shards that no record names now."""
    for key in found.segments:
        yield f"{key}: {responses.salvage(store, key)} answers are left"
    if any(path.startswith(responses.RECORDS) for path in found.records):
        yield f"{responses.rescue(store, tombstones.load(store))} paid answers are found again"


def _mend_files(
    ledger: Ledger, both: Sequence[Grown], lost: set[str], headers: pl.DataFrame | None
) -> Iterator[str]:
    """Objects, and those forgotten beside them: what is removed of a file is all of it.

    Files are read again where an image of theirs has no header any more; containers all, where
    some rows of members are lost.
    """
    torn = any(shard.sha256 in lost for grown in both for shard in grown.table.shards)
    for grown in both:
        name = grown.table.name
        if grown.kind == "forgotten":
            yield from _save(ledger, grown, Table(name) if torn else grown.table)
            continue
        good = tuple(shard for shard in grown.table.shards if shard.sha256 not in lost)
        rows = tables.frame(ledger.store, Table(name, good))
        kept = rows.filter(pl.col("member").is_null()) if torn else rows
        images = kept.drop_nulls("image_id")
        bare = images if headers is None else images.join(headers, on="image_id", how="anti")
        kept = kept.join(bare, on=["key", "stamp"], how="anti")
        if kept.height < rows.height:
            good = tables.write_frame(ledger.store, "objects", kept).shards
        yield from _save(ledger, grown, Table(name, good))


def _save(ledger: Ledger, grown: Grown, table: Table) -> Iterator[str]:
    if table != grown.table:
        growing.save(ledger, grown, table, grown.free_of)
        rows = grown.table.rows - table.rows
        if grown.kind == responses.KIND:
            yield f"{rows} paid answers are lost; what asks for them again pays again"
        else:
            yield f"{grown.kind} of {grown.family}: {rows} rows are found out again"
