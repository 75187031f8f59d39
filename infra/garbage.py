"""Garbage collection: what no record names and no running build can want goes, in two passes.

    gc/marks.json           pass one: what was garbage then; every build notes the number it saw
    gc/sweeping/<id>.json   pass two, while it deletes: the few keys it is at
    builds/<dataset>/<number>.json     which ledger records a finished build used

A shard is garbage where no record in the ledger and no manifest of a version names it; a record,
where none of the builds that are kept used it. Pass two deletes what is garbage still and was not
written again, once the list is older than a pin lives and every running build began after it was
made. So a build never loses what it found, and what it writes is no garbage: its own shards can be
on no list made before it began, and `pins.put` writes again what a sweep is just at.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

from infra import pins, retention
from infra.canonical import canonical
from infra.ledger import generation
from infra.store import NotFound, Stat, Store, listed

BUILDS = "builds/"
BATCH, BATCH_SECONDS = 500, 20.0
READERS = 16
_SHA = re.compile(rb"[0-9a-f]{64}")
_PICTURES = re.compile(rb"pictures/[0-9a-f]{64}\.jpegs")


class Report(NamedTuple):
    """What a collection found and did. `waits` says why nothing was deleted, where that is so."""

    garbage: int
    bytes: int
    deleted: int
    waits: str | None


class Survey(NamedTuple):
    """Everything in a store that can be garbage, and the content of its records."""

    shards: dict[str, Stat]
    pictures: dict[str, Stat]
    records: dict[str, Stat]
    bodies: dict[str, bytes]

    def garbage(
        self, is_kept: Callable[[str, bytes], bool], roots: Iterable[bytes], *, at_once: bool
    ) -> list[Stat]:
        """Records that are not kept; shards and prepared pictures that no record or root names.

        `at_once` also what only those records name; else it goes a collection after them, since
        a build may have found such a record a moment ago.
        """
        lost = {key for key in self.records if not is_kept(key, self.bodies[key])}
        naming = (body for key, body in self.bodies.items() if not at_once or key not in lost)
        named = {key for body in chain(naming, roots) for key in names(body)}
        rest = [s for key, s in (self.shards | self.pictures).items() if key not in named]
        return [self.records[key] for key in sorted(lost)] + rest


def names(body: bytes) -> Iterator[str]:
    """Keys of the shards and prepared pictures that a record may name: any SHA-256 in it."""
    for sha in _SHA.findall(body):
        text = sha.decode()
        yield f"data/{text[:2]}/{text}.parquet"
    yield from (found.decode() for found in _PICTURES.findall(body))


def survey(store: Store) -> Survey:
    """List what can be garbage and read every record."""
    shards, pictures, records = (
        {stat.key: stat for stat in listed(store, prefix)}
        for prefix in ("data/", "pictures/", "ledger/")
    )
    with ThreadPoolExecutor(READERS) as threads:
        bodies = dict(zip(records, threads.map(lambda key: _get(store, key), records), strict=True))
    return Survey(shards, pictures, records, bodies)


def keeper(store: Store, kept: int, free_of: str | None = None) -> Callable[[str, bytes], bool]:
    """Which ledger records are kept: (path, body) -> bool.

    Of a growing table, the newest; of finished stages, what the last `kept` builds of each dataset
    used, or all where a dataset was published before builds were noted; receipts of shards and of
    prepared pictures, none; anything else, always. With `free_of`, only builds that applied
    exactly these tombstones count.
    """
    used, unknown = _used(store, kept, free_of)
    newest: dict[str, int] = {}
    for stat in listed(store, "ledger/describe/"):
        folder, _, name = stat.key.rpartition("/")
        newest[folder] = max(newest.get(folder, 0), generation(name))

    def is_kept(path: str, body: bytes) -> bool:
        folder, _, name = path.rpartition("/")
        if folder.endswith("/receipts") or path.startswith("ledger/pictures/"):
            return False
        if folder.startswith("ledger/describe/"):
            return generation(name) >= newest.get(folder, 0)
        return b'"tables"' not in body or unknown or path in used

    return is_kept


def _used(store: Store, kept: int, free_of: str | None) -> tuple[set[str], bool]:
    used: set[str] = set()
    found = builds(store)
    for entries in found.values():
        for entry in entries[-kept:]:
            if free_of is None or entry["tombstones"] == free_of:
                used.update(entry["records"])
    datasets = {
        s.key.split("/")[1] for s in listed(store, "datasets/") if s.key.endswith("latest.json")
    }
    unknown = free_of is None and not datasets <= found.keys()
    return used, unknown


def builds(store: Store) -> dict[str, list[dict[str, Any]]]:
    """What is noted of finished builds, by dataset, the oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for stat in listed(store, BUILDS):
        try:
            entry = json.loads(_get(store, stat.key))
            found.setdefault(stat.key.split("/")[1], []).append(
                {"records": list(entry["records"]), "tombstones": str(entry["tombstones"])}
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found


def note_build(store: Store, dataset: str, entry: Mapping[str, Any], kept: int) -> None:
    """Note a finished build, under the next number; only the last `kept` stay."""
    folder = f"{BUILDS}{dataset}/"
    keys = [stat.key for stat in listed(store, folder)]
    number = max((generation(key[len(folder) :]) for key in keys), default=0) + 1
    store.put(f"{folder}{number:08d}-{uuid4().hex[:8]}.json", canonical(dict(entry)))
    for key in keys[: max(0, len(keys) + 1 - kept)]:
        store.delete(key)


def collect(
    store: Store, kept: int, life: float, own: str | None = None, *, dry_run: bool = False
) -> Report:
    """One collection: pass two of the last list where its time has come, then pass one anew."""
    number, age, marked = _marks(store)
    alive = pins.held(store, own)  # before the survey: who has ended since has its records in it
    garbage = _garbage(store, kept)
    size = sum(stat.size for stat in garbage.values())
    gap = max([life, *(pin.life for pin in alive)])
    waits = None
    if marked and age < gap:
        waits = f"the list of garbage is {age:.0f} s old, and a pin lives {gap:.0f} s"
    elif marked and any(pin.saw < number for pin in alive):
        waits = "a build runs that began before the list of garbage was made"
    if dry_run:
        return Report(len(garbage), size, 0, waits or "this was a dry run")
    if waits:
        return Report(len(garbage), size, 0, waits)
    doomed = {k: s for k, s in garbage.items() if marked.get(k) == [s.etag, int(s.mtime * 1000)]}
    deleted = _sweep(store, doomed)
    # Shards of the records that went are garbage now, and no build that may know them began since.
    again = any(key.startswith("ledger/") for key in deleted)
    rest = _garbage(store, kept) if again else garbage
    _mark(store, number + 1, {k: s for k, s in rest.items() if k not in deleted})
    return Report(
        len(garbage), size, len(deleted), None if deleted else "pass one: it is listed now"
    )


def _garbage(store: Store, kept: int) -> dict[str, Stat]:
    named = retention.named_tables(store)
    found = survey(store).garbage(keeper(store, kept), named, at_once=False)
    return {stat.key: stat for stat in found}


def _marks(store: Store) -> tuple[int, float, dict[str, list[Any]]]:
    """Number, age in seconds and content of the newest list of garbage."""
    try:
        body = json.loads(store.get(pins.MARKS))
        made = store.head(pins.MARKS).mtime
        return int(body["generation"]), pins.clock(store) - made, dict(body["garbage"])
    except NotFound:
        return 0, 0.0, {}
    except (ValueError, KeyError, TypeError):
        # A list that can't be read is made anew, under a number that no build has seen.
        return int(pins.clock(store)), 0.0, {}


def _mark(store: Store, number: int, garbage: Mapping[str, Stat]) -> None:
    # Where times have whole seconds, a second write within the second would not show.
    young = pins.clock(store) - 2
    listed = {
        key: [stat.etag, int(stat.mtime * 1000)]
        for key, stat in garbage.items()
        if not (stat.mtime.is_integer() and stat.mtime > young)
    }
    store.put(pins.MARKS, canonical({"generation": number, "garbage": listed}))


def _sweep(store: Store, doomed: Mapping[str, Stat]) -> set[str]:
    """Delete what is doomed, unless it was written again; returns what went, records first."""
    deleted: set[str] = set()
    keys = sorted(doomed, key=lambda key: (not key.startswith("ledger/"), key))
    for at in range(0, len(keys), BATCH):
        batch = keys[at : at + BATCH]
        with _sweeping(store, batch):
            # Seen from here on: whoever writes one of these from now on writes it once more.
            for key in _in_time(batch):
                if _unchanged(store, doomed[key]):
                    store.delete(key)
                    deleted.add(key)
    return deleted


def _in_time(batch: Collection[str]) -> Iterator[str]:
    until = time.monotonic() + BATCH_SECONDS
    for key in batch:
        if time.monotonic() > until:
            return  # writers wait no longer; the next collection goes on
        yield key


@contextmanager
def _sweeping(store: Store, keys: Collection[str]) -> Iterator[None]:
    sign = f"{pins.SWEEPING}{uuid4().hex}.json"
    store.put(sign, canonical({"keys": list(keys)}))
    try:
        yield
    finally:
        store.delete(sign)


def _unchanged(store: Store, stat: Stat) -> bool:
    try:
        now = store.head(stat.key)
    except NotFound:
        return False
    return (now.etag, now.mtime) == (stat.etag, stat.mtime)


def purge(
    store: Store,
    is_kept: Callable[[str, bytes], bool],
    roots: Iterable[bytes],
    is_alone: Callable[[], bool],
) -> int | None:
    """Delete at once all that is garbage, by a process that is alone; None where it is no more.

    Records go first: a process that dies in the middle leaves shards that nothing names.
    """
    doomed = survey(store).garbage(is_kept, roots, at_once=True)
    for stat in sorted(doomed, key=lambda s: (not s.key.startswith("ledger/"), s.key)):
        if not is_alone():
            return None
        store.delete(stat.key)
    return len(doomed)


def _get(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except NotFound:
        return b""
