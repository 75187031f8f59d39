"""Forget: find the images that are meant, and those like them, and record tombstones for all."""

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from infra import growing, hamming, likeness, retention, tables, tombstones
from infra.captions import caption_id
from infra.corpus import SIDECAR_TYPES, object_ids, sample_stem
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.store import Store
from infra.tables import Table
from infra.text import plain
from infra.tombstones import IMAGE_ID, Tombstones

SHORTEST = 8  # characters of an image id
MOST = 0.5  # share of the images that may be forgotten without a `yes`


class Wanted(NamedTuple):
    """What is to be forgotten: image ids, rows of objects, and image ids that nobody has seen."""

    images: set[str]
    rows: pl.DataFrame
    unseen: set[str]


class Options(NamedTuple):
    """How far forgetting goes: only these bytes, old versions too, more than half of everything."""

    exact: bool = False
    purge: bool = False
    yes: bool = False


def forget(
    store: Store,
    names: Sequence[str],
    prefix: str | None,
    options: Options,
    radius: int = likeness.RADIUS,
) -> Iterator[str]:
    """Record tombstones and say for what; nothing is recorded where a name is unknown.

    `radius` is that of the near-duplicate relation. Raises PairmillError for a name or prefix that
    means nothing, and for more than half of all images without `yes`.
    """
    if not names and prefix is None:
        raise PairmillError("nothing is named; give ids, keys, a file of them, or --prefix")
    objects = growing.objects(store)
    objects = objects.with_columns(object_ids(objects))
    gone = tombstones.open_for_writing(store)
    seen = {*objects["key"], *objects["id"], *objects["image_id"]}
    known = gone.names | gone.images
    before = {name for name in names if name not in seen and gone.keyed(name) in known}
    yield from (f"{plain(name, 200)}: was forgotten before" for name in sorted(before))
    wanted = _wanted(objects, [name for name in names if name not in before], prefix)
    kin = {} if options.exact else related(store, wanted.images, radius)
    images = wanted.images | kin.keys()
    _refuse_most(objects, images, options)
    rows = pl.concat([wanted.rows, objects.filter(pl.col("image_id").is_in(list(images)))])
    rows = rows.unique(["family", "id", "stamp", "image_id"])
    old = {gone.keyed(name) for name in before} if options.purge else set()
    new = _record(store, gone, objects, rows, images, options.purge, old)
    yield from _told(rows, wanted, kin)
    yield (
        f"images forgotten from the next build on: {len(images)}"
        if new
        else "all of this was forgotten before; nothing to record"
    )
    if options.purge:
        yield from _withdrawn(store)


def read_names(given: Sequence[str]) -> list[str]:
    """Names as given; one that is a local file stands for its lines.

    Raises PairmillError for a file that can't be read as lines of text.
    """
    found: list[str] = []
    for name in given:
        path = Path(name)
        try:
            is_file = path.is_file()
        except (OSError, ValueError):
            is_file = False
        if not is_file:
            found.append(name)
            continue
        try:
            found += [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise PairmillError(
                f"{name} can't be read as UTF-8 text with one id or key a line; mend it"
            ) from error
    return found


def _wanted(objects: pl.DataFrame, names: Sequence[str], prefix: str | None) -> Wanted:
    ids = np.array(sorted(set(objects["image_id"].drop_nulls())), dtype="U64")
    parts = [objects.clear()]
    images, unseen, unknown = set[str](), set[str](), list[str]()
    keyed = objects.filter(pl.col("key").is_in(list(names)) | pl.col("id").is_in(list(names)))
    known = {*keyed["key"], *keyed["id"]}
    for name in dict.fromkeys(names):
        if name in known:
            continue
        found = _image_ids(ids, name)
        images.update(found)
        if not found and IMAGE_ID.fullmatch(name):
            unseen.add(name)
        elif not found:
            unknown.append(name)
    if unknown:
        raise PairmillError(
            f"{len(unknown)} unknown, the first {plain(unknown[0], 80)!r}: no build has described "
            "an object of that key or an image of that id; run a build, or give the SHA-256 of "
            "the file; nothing was recorded"
        )
    parts.append(keyed)
    if prefix is not None:
        parts.append(objects.filter(pl.col("id").str.starts_with(prefix)))
        if not parts[-1].height:
            raise PairmillError(
                f"no object that a build described has a key that begins with "
                f"{plain(prefix, 80)!r}; nothing was recorded"
            )
    rows = pl.concat(parts)
    images |= {*rows["image_id"].drop_nulls(), *unseen}
    return Wanted(images, rows, unseen)


def _image_ids(ids: np.ndarray, name: str) -> list[str]:
    """The id that begins so. Raises PairmillError where several do."""
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", name):
        return []
    first = int(np.searchsorted(ids, name))
    found = [str(i) for i in ids[first : first + 2] if str(i).startswith(name)]
    if len(found) > 1:
        raise PairmillError(f"several image ids begin with {name}; give more of it")
    return found


def _refuse_most(objects: pl.DataFrame, images: set[str], options: Options) -> None:
    known = set(objects["image_id"].drop_nulls())
    share = len(known & images) / max(1, len(known))
    if share > MOST and not options.yes and len(known) > 1:
        raise PairmillError(
            f"this would forget {len(known & images)} of {len(known)} images; "
            "say --yes if that is meant, nothing was recorded"
        )


def related(store: Store, images: set[str], radius: int) -> dict[str, str]:
    """Near-duplicates of images, by id, each with the image that it is like.

    Those whose stored looks say so directly, and those that share a survivor in a deduplication
    that is on record.
    """
    found = _alike(store, images, radius) | _tied(store, images)
    return {image: like for image, like in sorted(found.items()) if image not in images}


def _tied(store: Store, images: set[str]) -> dict[str, str]:
    """Images of the survivor groups that hold one of these."""
    found: dict[str, str] = {}
    for table in _recorded(store, "survivors"):
        rows = tables.frame(store, table, ["image_id", "survivor_id"])
        hit = rows.filter(pl.col("image_id").is_in(list(images)))
        first = hit.group_by("survivor_id").agg(pl.col("image_id").min().alias("like"))
        group = rows.join(first, on="survivor_id", how="inner")
        found |= dict(group.select("image_id", "like").iter_rows())
    return found


def _alike(store: Store, images: set[str], radius: int) -> dict[str, str]:
    """Images whose hashes, shape and thumbnails are those of a copy of one of these."""
    rows = _looks(store)
    if not rows.height:
        return {}
    joined = b"".join(rows["thumbnail"].to_list())
    thumbnails = np.frombuffer(joined, np.uint8).reshape(-1, 16, 16, 3)
    hashes = likeness.hashes(rows["phash"].to_numpy(), thumbnails)
    flat = likeness.flat(thumbnails)
    ours = rows["image_id"].is_in(list(images)).to_numpy() & ~flat
    asked, others = np.flatnonzero(ours), np.flatnonzero(~flat)
    i, j = _near(hashes, asked, others, radius)
    wide, narrow = (rows[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    one, other = wide[i] * narrow[j], wide[j] * narrow[i]
    shaped = 10 * np.abs(one - other) <= np.maximum(one, other)
    i, j = i[shaped], j[shaped]
    like = likeness.alike(thumbnails, i, j) if len(i) else np.zeros(0, bool)
    ids = rows["image_id"].to_list()
    return {ids[b]: ids[a] for a, b in zip(i[like].tolist(), j[like].tolist(), strict=True)}


def _near(
    hashes: np.ndarray, asked: np.ndarray, others: np.ndarray, radius: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row pairs (asked, other) where column 0 of either is near some column of the other."""
    width = hashes.shape[1]
    parts = [np.zeros((2, 0), np.int64)]
    for i, j, _ in hamming.matches(hashes[asked, 0], hashes[others].reshape(-1), radius):
        parts.append(np.stack([asked[i], others[j // width]]))
    for j, i, _ in hamming.matches(hashes[others, 0], hashes[asked].reshape(-1), radius):
        parts.append(np.stack([asked[i // width], others[j]]))
    pairs = np.unique(np.concatenate(parts, axis=1), axis=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    return pairs[0], pairs[1]


def _looks(store: Store) -> pl.DataFrame:
    """Hashes, thumbnails and sizes of every image in a store."""
    ledger, parts = Ledger(store), {"looks": [], "headers": []}  # type: ignore[var-annotated]
    for kind, family in growing.families(store):
        if kind in parts:
            parts[kind].append(tables.frame(store, growing.load(ledger, kind, family).table))
    if not parts["looks"] or not parts["headers"]:
        return pl.DataFrame()
    looks = pl.concat(parts["looks"]).filter(pl.col("rule").is_null()).unique("image_id")
    headers = pl.concat(parts["headers"]).unique("image_id")
    return looks.select("image_id", "phash", "thumbnail").join(
        headers.select("image_id", "width", "height"), on="image_id", how="inner"
    )


def _recorded(store: Store, name: str) -> Iterator[Table]:
    """Every table of a name that a finished stage's record names, each once; none that is gone."""
    seen: set[Table] = set()
    for stat in store.list("ledger/"):
        body = store.get(stat.key)
        if b'"tables"' not in body or f'"{name}"'.encode() not in body:
            continue
        for table in tables_in(body):
            if table.name == name and table not in seen:
                seen.add(table)
                yield table


def tables_in(body: bytes) -> Iterator[Table]:
    """The tables that a ledger record names, wherever they stand in it."""
    waiting = [json.loads(body)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and {"name", "shards"} <= value.keys():
            yield Table.from_json(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _record(
    store: Store,
    gone: Tombstones,
    objects: pl.DataFrame,
    rows: pl.DataFrame,
    images: set[str],
    purge: bool,
    old: set[str],
) -> bool:
    """Write the tombstones; False where all of them stood there before."""
    rows = pl.concat([rows, _sidecars(objects, rows)])
    places = {
        gone.place(key, member, stamp): gone.keyed(image) if image else None
        for key, member, stamp, image in rows.select(
            "key", "member", "stamp", "image_id"
        ).iter_rows()
    }
    whole = _whole_containers(objects, rows)
    places |= {gone.place(key, None, stamp): None for key, stamp in whole}
    # A sketch of a set, as a record holds it, has the beginnings of ids.
    names = {
        *rows["id"],
        *(image[:16] for image in images),
        *_sidecar_names(objects, rows),
        *(key for key, _ in whole),
    }
    hashed = {gone.keyed(image) for image in images}
    nameless = {gone.keyed(row) for row in rows.filter(pl.col("image_id").is_null())["id"]}
    return tombstones.add(
        store,
        gone,
        images=hashed,
        names={gone.keyed(name) for name in names},
        captions={gone.keyed(c) for c in _own_captions(store, objects, rows)},
        pairs={gone.keyed(pair) for pair in _pairs(store, images)},
        objects=places,
        withdraw=(hashed | nameless if purge else set()) | old,
    )


def _sidecars(objects: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Caption members of the same samples in containers, where no other picture has the stem."""
    members = objects.filter(
        pl.col("member").is_not_null() & pl.col("key").is_in(rows["key"].unique().to_list())
    )
    dead = {(k, sample_stem(m)) for k, m in rows.select("key", "member").iter_rows() if m}
    ids = set(rows["id"])
    alive = {
        (row["key"], sample_stem(row["member"]))
        for row in members.iter_rows(named=True)
        if row["image_id"] and row["id"] not in ids
    }
    chosen = [
        row["rule"] == "metadata" and (row["key"], sample_stem(row["member"])) in dead - alive
        for row in members.iter_rows(named=True)
    ]
    return members.filter(pl.Series(chosen, dtype=pl.Boolean))


def _sidecar_names(objects: pl.DataFrame, rows: pl.DataFrame) -> Iterator[str]:
    """Keys that captions beside loose images may have, where no other picture has the stem."""
    ids = set(rows["id"])
    loose = objects.filter(pl.col("member").is_null() & pl.col("image_id").is_not_null())
    alive = {posixpath.splitext(i)[0] for i in loose["id"] if i not in ids}
    for key in rows.filter(pl.col("member").is_null())["key"]:
        stem = posixpath.splitext(key)[0]
        yield from (stem + ending for ending in SIDECAR_TYPES if stem not in alive)


def _whole_containers(objects: pl.DataFrame, rows: pl.DataFrame) -> set[tuple[str, str]]:
    """Containers of which nothing stays: their own names go as well."""
    place = ["key", "stamp"]
    members = objects.filter(pl.col("member").is_not_null())
    left = members.join(rows, on=["id", "stamp"], how="anti").select(place)
    whole = rows.filter(pl.col("member").is_not_null()).select(place).unique()
    return set(whole.join(left, on=place, how="anti").iter_rows())


def _own_captions(store: Store, objects: pl.DataFrame, rows: pl.DataFrame) -> set[str]:
    """Ids of captions that only the forgotten objects have."""
    ids = set(rows["id"])
    mine, others = set[str](), set[str]()
    for name, texts in objects.select("id", "captions").iter_rows():
        (mine if name in ids else others).update(texts or ())
    keys = {posixpath.basename(i): i for i in ids}
    for table in _recorded(store, "file_captions"):
        for key, text in tables.frame(store, table).select("key", "caption").iter_rows():
            near = keys.get(posixpath.basename(key), "")
            same = near == key or near.endswith(f"/{posixpath.normpath(key)}")
            (mine if same else others).add(text)
    return {caption_id(text) for text in mine - others if text}


def _pairs(store: Store, images: set[str]) -> set[str]:
    """Ids of pairs with a forgotten image, of all that are on record."""
    found: set[str] = set()
    for table in _recorded(store, "pairs"):
        rows = tables.frame(store, table, ["pair_id", "query", "target"])
        hit = pl.col("query").is_in(list(images)) | pl.col("target").is_in(list(images))
        found.update(rows.filter(hit)["pair_id"])
    return found


def _told(rows: pl.DataFrame, wanted: Wanted, kin: dict[str, str]) -> Iterator[str]:
    counts: dict[str, list[str]] = {}
    for name, image in rows.select("id", "image_id").iter_rows():
        counts.setdefault(image or "", []).append(name)
    for image in sorted(wanted.images - wanted.unseen):
        yield f"image {image}: {_listing(counts.get(image, []))}"
    for image, like in kin.items():
        yield f"image {image}: near-duplicate of {like[:12]}, {_listing(counts.get(image, []))}"
    for image in sorted(wanted.unseen):
        yield f"image {image}: not seen so far; it will not come in"
    for name in sorted(counts.get("", [])):
        yield f"object {plain(name, 200)}: no image, forgotten by its name and bytes"


def _listing(names: list[str]) -> str:
    shown = ", ".join(plain(name, 120) for name in sorted(set(names))[:3])
    more = len(set(names)) - 3
    return (shown or "no object holds it now") + (f" and {more} more objects" if more > 0 else "")


def _withdrawn(store: Store) -> Iterator[str]:
    for dataset, number, reason in retention.withdraw(store, tombstones.load(store)):
        yield f"{dataset}: {reason}" if reason else f"{dataset}: version {number} is withdrawn"
