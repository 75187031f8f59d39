"""Published versions as a reader finds them: the pointer, numbers, manifests and their files.

datasets/<name>/latest.json                 {dataset, version, digest, config_digest}
datasets/<name>/v000001/manifest.json       written last; names every other file
datasets/<name>/v000001/withdrawn.json      a version whose files were deleted on request
datasets/<name>/refused/                    report and reasons of the last build refused
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from infra import tables
from infra.errors import PairmillError
from infra.store import NotFound, Store
from infra.tables import Table
from infra.text import plain


def version_folder(dataset: str, number: int) -> str:
    """Where the files of a version lie in the store."""
    return f"datasets/{dataset}/v{number:06d}"


def refused_folder(dataset: str) -> str:
    """Where the report and the reasons of the last refused build lie."""
    return f"datasets/{dataset}/refused"


def read_latest(store: Store, dataset: str) -> tuple[dict[str, Any] | None, str | None]:
    """What `latest` says, and its etag; (None, None) before the first version.

    Raises PairmillError where it is damaged.
    """
    key = f"datasets/{dataset}/latest.json"
    try:
        etag = store.head(key).etag
        entry = parsed(store.get(key))
    except NotFound:
        return None, None
    if entry is None or not isinstance(entry.get("version"), int):
        raise PairmillError(
            f"{key} in {store.uri} is damaged; delete it and run a build: it names the newest "
            "version with the same content again, or publishes one"
        )
    return entry, etag


def complete_numbers(store: Store, dataset: str) -> list[int]:
    """Numbers of the versions that have a manifest, ascending."""
    return _numbers_with(store, dataset, "manifest.json")


def withdrawn(store: Store, dataset: str) -> dict[int, dict[str, Any]]:
    """What is said of each withdrawn version: its digest and the reason; empty where damaged."""
    found = {}
    for number in _numbers_with(store, dataset, "withdrawn.json"):
        data = store.get(f"{version_folder(dataset, number)}/withdrawn.json")
        found[number] = parsed(data) or {}
    return found


def refused(store: Store, dataset: str) -> dict[str, Any] | None:
    """What reason.json says of the last build, where that one was refused."""
    try:
        return parsed(store.get(f"{refused_folder(dataset)}/reason.json"))
    except NotFound:
        return None


def refused_by(why: Mapping[str, Any]) -> str:
    """The gates that refused a build, by name."""
    gates = dict.fromkeys(f"publish.gates.{reason['gate']}" for reason in why.get("reasons", ()))
    return plain(", ".join(gates), 300)


def _numbers_with(store: Store, dataset: str, file: str) -> list[int]:
    prefix = f"datasets/{dataset}/v"
    names = (s.key[len(prefix) :].partition("/") for s in store.list(prefix))
    return sorted(int(number) for number, _, name in names if name == file and number.isdigit())


def read_manifest(store: Store, dataset: str, number: int) -> dict[str, Any]:
    """The manifest of a version. Raises PairmillError where it is damaged, NotFound where gone."""
    try:
        manifest = parsed(store.get(f"{version_folder(dataset, number)}/manifest.json"))
    except NotFound as error:
        raise NotFound(
            f"version {number} of {dataset!r} in {store.uri} has no manifest; where latest.json "
            "names it, restore the manifest, or delete latest.json and run a build"
        ) from error
    if manifest is None or manifest.get("version") != number or "digest" not in manifest:
        raise PairmillError(
            f"the manifest of version {number} of {dataset!r} in {store.uri} is damaged; restore "
            "it, or delete that version's folder and, where latest names it, latest.json"
        )
    return manifest


def parsed(data: bytes) -> dict[str, Any] | None:
    """A JSON object, or None where the bytes are none."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def find_version(store: Store, dataset: str, name: str) -> dict[str, Any]:
    """The manifest of a version by number, digest prefix or `latest`. Raises PairmillError.

    Less than eight digits are a number. Of versions with one digest it is the newest.
    """
    latest, _ = read_latest(store, dataset)
    if latest is None:
        raise PairmillError(
            f"{store.uri} has no published version of {dataset!r}; run a build first"
        )
    if name == "latest":
        name = str(latest["version"])
    numbers = complete_numbers(store, dataset)
    if name.isdecimal() and len(name) < 8:
        _refuse_withdrawn(store, dataset, int(name))
        found = [read_manifest(store, dataset, int(name))] if int(name) in numbers else []
    else:
        manifests = (read_manifest(store, dataset, n) for n in reversed(numbers) if name)
        found = [m for m in manifests if m["digest"].startswith(name)]
    if len({manifest["digest"] for manifest in found}) == 1:
        return found[0]
    raise PairmillError(
        f"{dataset!r} has {'several versions' if found else 'no version'} {name!r}; versions: "
        + (", ".join(map(str, numbers)) or "none")
    )


def _refuse_withdrawn(store: Store, dataset: str, number: int) -> None:
    said = withdrawn(store, dataset).get(number)
    if said is not None:
        reason = plain(str(said.get("reason") or "no reason given"), 200)
        raise PairmillError(
            f"version {number} of {dataset!r} was withdrawn: {reason}; `pairmill versions` lists "
            "those that are there"
        )


def file(store: Store, manifest: Mapping[str, Any], name: str) -> bytes:
    """One file of a version. Raises PairmillError where it is gone or damaged."""
    folder = version_folder(manifest["dataset"], manifest["version"])
    try:
        data = store.get(f"{folder}/{name}")
    except NotFound as error:
        raise PairmillError(
            f"{name} of version {manifest['version']} is gone from {store.uri}/{folder}; "
            f"`pairmill verify {manifest['version']}` says what else is"
        ) from error
    said = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    if hashlib.sha256(data).hexdigest() != said.get(name):
        raise _damaged(manifest, name)
    return data


def fates(store: Store, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """What became of every object, image and pair of a version."""
    return _parquet(file(store, manifest, "fates.parquet"), manifest, "fates.parquet")


def records(store: Store, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """The records of a version, all splits; a frame without columns where there are none."""
    names = [f["name"] for f in manifest["files"] if f["name"].startswith("records/")]
    parts = [_parquet(file(store, manifest, name), manifest, name) for name in sorted(names)]
    return pl.concat(parts) if parts else pl.DataFrame()


def _parquet(data: bytes, manifest: Mapping[str, Any], name: str) -> pl.DataFrame:
    try:
        return pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(manifest, name) from error


def _damaged(manifest: Mapping[str, Any], name: str) -> PairmillError:
    return PairmillError(
        f"{name} of version {manifest['version']} is damaged; "
        f"`pairmill verify {manifest['version']}` says what else is"
    )


def table(
    store: Store, manifest: Mapping[str, Any], stage: str, name: str, part: str | None = None
) -> pl.DataFrame | None:
    """A table that the build of a version left in the store, or None where it is gone.

    `part` names one of a mapping of tables, such as a space.
    """
    named = manifest.get("tables", {}).get(stage) or {}
    data = named.get(name) or (manifest.get("passing_tables", {}).get(stage) or {}).get(name)
    data = data.get(part) if data and part is not None else data
    try:
        return tables.frame(store, Table.from_json(data)) if data else None
    except PairmillError:
        return None
