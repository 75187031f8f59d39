"""Tidy: the last step of a build. Old versions go, growing tables are compacted, what was forgotten
is removed from the store, and garbage is collected.
"""

import json
from typing import NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import batches, garbage, growing, pins, responses, retention, tables, tombstones, traces
from infra.build import Build
from infra.canonical import canonical
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.schema import SCHEMAS
from infra.store import NotFound, Store
from infra.tables import Table
from infra.tombstones import Tombstones

FREE_OF = "gc/free_of.json"


class TidyParams(BaseModel):
    """What of earlier builds stays in the store. Published versions have rules of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_builds: int = Field(
        7,
        ge=1,
        description="Builds of each dataset whose results stay in the ledger, as states from "
        "which the next build can start; older ones are garbage.",
    )
    pin_minutes: float = Field(
        30.0,
        gt=0,
        description="For how long a build that gives no sign of life keeps garbage from being "
        "deleted; garbage is deleted that long after it was listed, at the earliest.",
    )
    superseded: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of rows of files that are no more above which a table is rewritten.",
    )
    small_shards: int = Field(
        64, ge=1, description="Shards below 8 MB in a table above which they are joined."
    )


class Tidied(NamedTuple):
    """What was removed. `waits` says what could not be done yet, and why."""

    retired: int
    withdrawn: int
    deleted: int
    waits: tuple[str, ...]


def check_forgotten(build: Build) -> None:
    """Raises PairmillError where something was forgotten after this build began to describe."""
    if tombstones.load(build.store).digest != build.footprint.tombstones:
        raise PairmillError(
            "images were forgotten while this build ran, and it may hold them; nothing was "
            "published, run it again"
        )


def tidy(
    build: Build,
    dataset: str,
    objects: Table,
    fresh: bool,
    keep: tuple[int, int],
    params: TidyParams,
) -> Tidied:
    """Leave the store in order after a build that published, or found nothing new (not `fresh`).

    `objects` are the rows of this build's corpus; `keep` bounds the older versions by number and
    by days. What another build at work might read is left for later.
    """
    if build.planning:
        return Tidied(0, 0, 0, ())
    store, own = build.store, build.pin.key if build.pin else None
    note = {
        "records": sorted(build.footprint.records),
        "tombstones": build.footprint.tombstones,
    }
    garbage.note_build(store, dataset, note, params.keep_builds)
    retired = retention.retire(store, dataset, *keep, now=pins.clock(store)) if any(keep) else []
    gone, waits = tombstones.load(store), []
    deleted = 0
    if fresh:
        compact(build, objects, params)
    if gone and free_of(store) != gone.state:
        count = remove_forgotten(store, gone, own)
        deleted += count or 0
        if count is None:
            waits.append("another build is at work, so what was forgotten is removed later")
    withdrawn = list(retention.withdraw(store, gone))
    waits += [f"{name}: {reason}" for name, _, reason in withdrawn if reason]
    if fresh or retired:
        life = 60 * params.pin_minutes
        deleted += garbage.collect(store, params.keep_builds, life, own).deleted
        if not pins.held(store, own):
            retention.finish(store, dataset)
    return Tidied(len(retired), sum(not reason for *_, reason in withdrawn), deleted, tuple(waits))


def free_of(store: Store) -> str | None:
    """State of the tombstones that nothing but older versions holds any more."""
    try:
        return str(json.loads(store.get(FREE_OF))["tombstones"])
    except (NotFound, ValueError, KeyError, TypeError):
        return None


def remove_forgotten(store: Store, gone: Tombstones, own: str | None = None) -> int | None:
    """Take what was forgotten out of everything but versions; returns how many objects went.

    Growing tables are rewritten; of finished stages only those stay that a build used which knew
    these tombstones; receipts and prepared pictures go, and every shard that nothing names then.
    Paid answers about other images stay, whichever dataset asked. None, and nothing deleted, while
    another build is at work: it may have begun before.
    """
    with pins.alone(store, own) as is_alone:
        if not is_alone():
            return None
        with responses.settled(store):
            _clean_growing(store, gone)
            batches.forget(store, lambda text: gone.found(text) is not None)
        used = garbage.keeper(store, 1 << 30, gone.digest)

        def is_kept(path: str, body: bytes) -> bool:
            return used(path, body) and not _names_forgotten(body, gone)

        roots = retention.named_tables(store, gone)
        count = garbage.purge(store, is_kept, roots, is_alone)
    if count is not None:
        store.put(FREE_OF, canonical({"tombstones": gone.state}))
    return count


def _clean_growing(store: Store, gone: Tombstones) -> None:
    """Rewrite every growing table of a store that holds what was forgotten."""
    ledger = Ledger(store)
    for kind, family in list(growing.families(store)):
        grown = growing.load(ledger, kind, family)
        if grown.free_of != gone.digest:
            table, removed = growing.clean(store, grown, gone)
            _note(ledger, family, removed, gone)
            growing.save(ledger, grown, table, gone.digest)


def _names_forgotten(body: bytes, gone: Tombstones) -> bool:
    try:
        return any(gone.found(text) for text in traces.texts("record.json", body))
    except ValueError:
        return False


def _note(
    ledger: Ledger, family: str, removed: list[dict[str, str | None]], gone: Tombstones
) -> None:
    """Keep hashes of removed objects: loose ones as tombstones, members beside their table."""
    if not removed:
        return
    rows = pl.DataFrame(removed, dict.fromkeys(SCHEMAS["forgotten"].names, pl.String))
    loose = rows.filter(pl.col("key").is_null())
    names = rows["id"].to_list()
    tombstones.add(
        ledger.store, gone, objects=dict(loose.select("place", "image").iter_rows()), names=names
    )
    members = rows.filter(pl.col("key").is_not_null())
    if members.height:
        new = tables.write_frame(ledger.store, "forgotten", members).shards
        growing.append(ledger, growing.load(ledger, "forgotten", family), new, gone.digest)


def compact(build: Build, objects: Table, params: TidyParams) -> None:
    """Rewrite the growing tables of this build that hold many superseded rows or small shards."""
    here = tables.frame(build.store, objects, ["key", "member", "stamp"])
    for name in ("objects", "forgotten"):
        live = here if name == "objects" else None
        _compact(build, name, live, params)
    ids = growing.objects(build.store).select("image_id").drop_nulls().unique()
    for name in build.footprint.families.keys() - {"objects", "forgotten"}:
        _compact(build, name, None if name.startswith("texts") else ids, params)


def _compact(build: Build, name: str, live: pl.DataFrame | None, params: TidyParams) -> None:
    family = build.footprint.families.get(name)
    if family is None:
        return
    grown = growing.load(build.ledger, name.partition("/")[0], family)
    table = growing.compact(build.store, grown, live, params.superseded, params.small_shards)
    if table != grown.table:
        growing.save(build.ledger, grown, table, grown.free_of)


def collect(
    store: Store, params: TidyParams, *, dry_run: bool
) -> tuple[int | None, garbage.Report]:
    """What `pairmill gc` does: finish removing what was forgotten, then one pass of collection."""
    gone = tombstones.load(store)
    removed: int | None = 0
    if gone and free_of(store) != gone.state and not dry_run:
        removed = remove_forgotten(store, gone)
    report = garbage.collect(store, params.keep_builds, 60 * params.pin_minutes, dry_run=dry_run)
    return removed, report
