"""Removing published versions: by a retention rule, or since they hold what was forgotten.

The manifest goes first, so that no reader finds half a version; what a dead process left over is
removed by the next one. The version that `latest` names is never touched.
"""

from collections.abc import Iterator
from typing import Any

from infra import traces
from infra.canonical import canonical
from infra.store import NotFound, Stat, Store, listed
from infra.tombstones import Tombstones
from infra.versions import complete_numbers, read_latest, read_manifest, version_folder

WITHDRAWN = "withdrawn.json"


def datasets(store: Store) -> list[str]:
    """Names of the datasets that were ever published."""
    parts = (stat.key.split("/") for stat in listed(store, "datasets/"))
    return sorted({part[1] for part in parts if part[2:] == ["latest.json"]})


def latest(store: Store, dataset: str) -> int:
    """The number that `latest` names; 0 before the first version."""
    entry, _ = read_latest(store, dataset)
    return int(entry["version"]) if entry else 0


def older(store: Store, dataset: str) -> dict[int, Stat]:
    """Complete versions before the one that `latest` names, as their manifests, newest first."""
    last = latest(store, dataset)
    found = {
        _number(stat.key): stat
        for stat in listed(store, f"datasets/{dataset}/v")
        if stat.key.endswith("/manifest.json") and _number(stat.key) < last
    }
    return dict(sorted(found.items(), reverse=True))


def retire(store: Store, dataset: str, keep: int, days: int, now: float) -> list[int]:
    """Delete versions beyond the newest `keep` and those older than `days`; 0 is no bound.

    `now` is the store's time, as are those of the manifests.
    """
    gone = [
        number
        for place, (number, manifest) in enumerate(older(store, dataset).items(), 2)
        if (keep and place > keep) or (days and now - manifest.mtime > days * 86_400)
    ]
    for number in gone:
        remove(store, dataset, number)
    return gone


def remove(store: Store, dataset: str, number: int, reason: str | None = None) -> None:
    """Delete a version; with a reason, a small file stays that tells number, digest and reason."""
    place = version_folder(dataset, number)
    if reason:
        manifest = read_manifest(store, dataset, number)
        told: dict[str, Any] = {"dataset": dataset, "version": number, "digest": manifest["digest"]}
        store.put(f"{place}/{WITHDRAWN}", canonical({**told, "reason": reason}))
    store.delete(f"{place}/manifest.json")
    for stat in listed(store, f"{place}/"):
        if not stat.key.endswith(f"/{WITHDRAWN}"):
            store.delete(stat.key)


def finish(store: Store, dataset: str) -> int:
    """Delete what dead processes left of versions before the latest; no build may be publishing."""
    last = latest(store, dataset)
    files: dict[int, list[str]] = {}
    for stat in listed(store, f"datasets/{dataset}/v"):
        files.setdefault(_number(stat.key), []).append(stat.key)
    count = 0
    for number, keys in files.items():
        if number < last and f"{version_folder(dataset, number)}/manifest.json" not in keys:
            left = [key for key in keys if not key.endswith(f"/{WITHDRAWN}")]
            for key in left:
                store.delete(key)
            count += bool(left)
    return count


def holds(
    store: Store, dataset: str, number: int, gone: Tombstones, wanted: frozenset[str]
) -> bool:
    """Whether a version names one of these keyed hashes among its fates."""
    try:
        data = store.get(f"{version_folder(dataset, number)}/fates.parquet")
    except NotFound:
        return False
    return any(gone.keyed(text) in wanted for text in traces.texts("fates.parquet", data))


def named_tables(store: Store, gone: Tombstones | None = None) -> Iterator[bytes]:
    """What the manifests of complete versions say of tables that stay as long as the version.

    With tombstones, only of versions that hold nothing of what was forgotten.
    """
    for dataset in datasets(store):
        for number in complete_numbers(store, dataset):
            clean = gone is None or not holds(store, dataset, number, gone, gone.all)
            if clean:
                tables = read_manifest(store, dataset, number).get("tables", {})
                yield canonical(tables)


def withdraw(store: Store, gone: Tombstones) -> Iterator[tuple[str, int, str | None]]:
    """Withdraw older versions that hold what was forgotten with `purge`.

    Yields (dataset, number, None) for each, and with the reason where the latest holds some too,
    so that nothing of its dataset is withdrawn yet.
    """
    for dataset in datasets(store) if gone.withdraw else ():
        last = latest(store, dataset)
        if holds(store, dataset, last, gone, gone.withdraw):
            yield dataset, last, "latest still holds forgotten images; run a build"
            continue
        for number in older(store, dataset):
            if holds(store, dataset, number, gone, gone.withdraw):
                remove(store, dataset, number, "it held images that were forgotten")
                yield dataset, number, None


def _number(key: str) -> int:
    name = key.split("/")[2].removeprefix("v")
    return int(name) if name.isdecimal() else 0
