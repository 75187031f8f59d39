"""`pairmill versions` and `pairmill verify`: which versions there are, and whether one is whole."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from infra import changes, versions
from infra.errors import PairmillError
from infra.store import NotFound, Store
from infra.tables import shard_key
from infra.text import plain
from tasks.publish import content_digest

CHUNK = 32 << 20
OURS = ("claim", "manifest.json", "withdrawn.json")


class Listed(NamedTuple):
    """A version as the list shows it; numbers are None where it is withdrawn or damaged."""

    number: int
    created: str | None
    digest: str
    records: int | None
    images: int | None
    bytes: int | None
    change: str
    state: str
    waiting: int = 0  # pairs or samples without an answer: above 0 the version is partial


def listed(store: Store, dataset: str) -> list[Listed]:
    """All versions, the oldest first, complete, withdrawn or damaged."""
    latest = _latest_number(store, dataset)
    gone = versions.withdrawn(store, dataset)
    rows, before = [], None
    for number in sorted({*versions.complete_numbers(store, dataset), *gone}):
        if number in gone:
            said = gone[number]
            reason = plain(str(said.get("reason") or ""), 200)
            digest = str(said.get("digest") or "")
            rows.append(Listed(number, None, digest, None, None, None, reason, "withdrawn"))
            continue
        try:
            manifest = versions.read_manifest(store, dataset, number)
        except PairmillError:
            rows.append(Listed(number, None, "", None, None, None, "", "damaged manifest"))
            continue
        rows.append(_row(manifest, before, "latest" if number == latest else ""))
        before = manifest
    if not rows:
        raise PairmillError(
            f"{store.uri} has no published version of {dataset!r}; run a build first"
        )
    return rows


def _latest_number(store: Store, dataset: str) -> int | None:
    try:
        entry, _ = versions.read_latest(store, dataset)
    except PairmillError:
        return None
    return entry["version"] if entry else None


def _row(manifest: Mapping[str, Any], before: Mapping[str, Any] | None, state: str) -> Listed:
    counts = manifest["counts"]
    return Listed(
        manifest["version"],
        manifest.get("created"),
        manifest["digest"],
        counts["records"],
        counts["eligible"],
        sum(file["bytes"] for file in manifest["files"]),
        _in_a_word(manifest, before),
        state,
        sum((manifest.get("partial") or {}).values()),
    )


def _in_a_word(manifest: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """What changed since the version before: settings, images that came and went."""
    since = manifest.get("since")
    if before is None and not since:
        return "first"
    words = [row[0] for row in since["config"]] if since else []
    if before and not since:
        words = [row[0] for row in changes.config_changes(before["config"], manifest["config"])]
    if len(words) > 2:
        words = [f"{len(words)} settings"]
    if since:
        words += [f"model {name}" for name in since["models"]]
        for change, sign in (("added", "+"), ("removed", "\N{MINUS SIGN}")):
            count = sum(n for level, c, _, n in since["changes"] if (level, c) == ("image", change))
            words += [f"{sign}{count:,} {'image' if count == 1 else 'images'}"] if count else []
    elif before:
        count = manifest["counts"]["images"] - before["counts"]["images"]
        words += [f"{count:+,} images"] if count else []
    return ", ".join(words) or "labels or names only"


def show(rows: list[Listed], refused: Mapping[str, Any] | None, console: Console) -> None:
    """The versions as a table, and what refused the last build, where it was."""
    heads = ("version", "date", "digest", "records", "images", "size", "what changed")
    table = RichTable(*heads, box=None, pad_edge=False)
    for column in table.columns[:6]:
        column.no_wrap = True
    for at in (0, 3, 4, 5):
        table.columns[at].justify = "right"
    for row in rows:
        size = "" if row.bytes is None else _size(row.bytes)
        withheld = row.state in ("withdrawn", "damaged manifest")
        table.add_row(
            str(row.number),
            (row.created or "")[:16].replace("T", " "),
            row.digest[:12],
            *("" if n is None else f"{n:,}" for n in (row.records, row.images)),
            size,
            Text(f"{row.state}: {row.change}".removesuffix(": ") if withheld else _told(row)),
        )
    console.print(table)
    latest = [row.number for row in rows if row.state == "latest"]
    console.print(f"latest is version {latest[0]}" if latest else "latest names none of these")
    if refused:
        day = plain(str(refused.get("created", "?")), 40)[:16].replace("T", " ")
        by = versions.refused_by(refused)
        console.print(Text(f"the build of {day} was refused by {by}"), soft_wrap=True)


def _told(row: Listed) -> str:
    return f"partial, {row.waiting:,} wait; {row.change}" if row.waiting else row.change


def _size(count: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:,.1f} {unit}"
    return f"{count} B"


def verify(store: Store, dataset: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """Read and hash everything a version names; its manifest, and one line for each problem."""
    manifest = versions.find_version(store, dataset, name)
    problems = [
        *_pointer(store, manifest),
        *_files(store, manifest),
        *_shards(store, manifest),
        *_content(store, manifest),
    ]
    return manifest, problems


def _pointer(store: Store, manifest: Mapping[str, Any]) -> Iterator[str]:
    entry, _ = versions.read_latest(store, manifest["dataset"])
    if not entry or entry["version"] != manifest["version"]:
        return
    for key in ("dataset", "digest", "config_digest"):
        if entry.get(key) != manifest[key]:
            yield f"latest.json: {key} is {entry.get(key)}, the manifest has {manifest[key]}"


def _files(store: Store, manifest: Mapping[str, Any]) -> Iterator[str]:
    folder = versions.version_folder(manifest["dataset"], manifest["version"])
    named = {file["name"]: file for file in manifest["files"]}
    for file, said in named.items():
        try:
            size, sha256 = _hashed(store, f"{folder}/{file}")
        except NotFound:
            yield f"{file}: gone"
            continue
        if size != said["bytes"]:
            yield f"{file}: {size:,} bytes, the manifest has {said['bytes']:,}"
        elif sha256 != said["sha256"]:
            yield f"{file}: SHA-256 is {sha256[:12]}, the manifest has {said['sha256'][:12]}"
    for stat in store.list(f"{folder}/"):
        file = stat.key[len(folder) + 1 :]
        if file not in named and file not in OURS:
            yield f"{plain(file, 200)}: not named by the manifest"


def _hashed(store: Store, key: str) -> tuple[int, str]:
    """Size and SHA-256 of an object, read in parts."""
    size, total = store.head(key).size, hashlib.sha256()
    for at in range(0, size, CHUNK):
        total.update(store.get(key, at, min(CHUNK, size - at)))
    return size, total.hexdigest()


def _shards(store: Store, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the build, by which `why` answers more than the version's files say."""
    for table, shards in sorted(_tables(manifest.get("tables", {}))):
        for sha256 in shards:
            try:
                _, found = _hashed(store, shard_key(sha256))
            except NotFound:
                yield f"shard {sha256[:12]} of table {table}: gone"
                continue
            if found != sha256:
                yield f"shard {sha256[:12]} of table {table}: its SHA-256 is {found[:12]}"


def _tables(data: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if "shards" in data:
        yield data["name"], tuple(shard[0] for shard in data["shards"])
        return
    for item in data.values():
        yield from _tables(item)


def _content(store: Store, manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        rows, fates = versions.records(store, manifest), versions.fates(store, manifest)
    except PairmillError:
        return  # said already, file by file
    found = content_digest(rows, fates)
    if found != manifest["digest"]:
        yield (
            f"records and fates have the digest {found[:12]}, the manifest has "
            f"{manifest['digest'][:12]}"
        )
    if len(rows) != manifest["counts"]["records"]:
        yield f"{len(rows)} records, the manifest counts {manifest['counts']['records']}"
