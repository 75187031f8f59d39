"""`pairmill diff`: what came, went and changed between two versions, and why."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from infra import changes
from infra.changes import Side
from infra.errors import ConfigError
from infra.store import Store
from infra.text import plain
from infra.versions import find_version

EXAMPLES = 3
WRITERS = {".parquet": "write_parquet", ".csv": "write_csv", ".jsonl": "write_ndjson"}


class Difference(NamedTuple):
    """Two versions and every row in which they differ."""

    old: Side
    new: Side
    rows: pl.DataFrame


def compare(store: Store, dataset: str, first: str, second: str) -> Difference:
    """Compare two versions, given by number, digest prefix or `latest`."""
    manifests = [find_version(store, dataset, name) for name in (first, second)]
    old, new = (changes.published(store, manifest) for manifest in manifests)
    return Difference(old, new, changes.between(old, new))


def as_json(found: Difference) -> dict[str, Any]:
    """Counts by reason with a few ids each, moved bands and settings."""
    old, new, rows = found
    said = changes.summary(old.manifest, new.manifest, rows)
    ids = _examples(rows)
    keys = ("version", "created", "digest", "config_digest")
    return {
        "dataset": new.manifest["dataset"],
        "old": {key: old.manifest.get(key) for key in keys},
        "new": {key: new.manifest.get(key) for key in keys},
        **{key: said[key] for key in ("config", "models", "bands", "cut")},
        "changes": [
            {"level": level, "change": change, "reason": reason, "count": count,
             "examples": [row["id"] for row in ids[level, change, reason]]}
            for level, change, reason, count in said["changes"]
        ],
    }  # fmt: skip


def write_rows(found: Difference, path: Path) -> None:
    """Every differing row as Parquet, CSV or JSON lines, by the file's ending."""
    if path.suffix not in WRITERS:
        raise ConfigError(f"-o {path}: name a file that ends in {', '.join(WRITERS)}")
    getattr(found.rows, WRITERS[path.suffix])(path)


def _examples(rows: pl.DataFrame) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The first rows of each (level, change, reason)."""
    first = rows.group_by("level", "change", "reason", maintain_order=True).head(EXAMPLES)
    parts = first.partition_by("level", "change", "reason", as_dict=True, maintain_order=True)
    return {key: part.to_dicts() for key, part in parts.items()}


def show(found: Difference, console: Console) -> None:
    """The difference as tables for people."""
    old, new, rows = found
    for line in _heading(found):
        console.print(Text(line), soft_wrap=True, highlight=False)
    if not rows.height:
        console.print(f"no {', '.join(new.levels[:-1])} or {new.levels[-1]} differs")
        return
    console.print(_totals(found))
    name, ids = _names(old, new), _examples(rows)
    table = RichTable(box=None, pad_edge=False, expand=True)
    for head, more in (
        ("", {}), ("why", {}), ("count", {"justify": "right"}),
        ("for example", {"ratio": 1, "overflow": "ellipsis"}),
    ):  # fmt: skip
        table.add_column(head, no_wrap=True, **more)
    last = ""
    for level, change, reason, count in changes.counts(rows):
        head = f"{level}s {change}"
        if last and head != last:
            table.add_row()
        example = _example(ids[level, change, reason][0], name)
        table.add_row(head if head != last else "", reason, f"{count:,}", Text(example))
        last = head
    console.print()
    console.print(table)


def _heading(found: Difference) -> Iterator[str]:
    old, new = found.old.manifest, found.new.manifest
    yield (
        f"{new['dataset']}: version {old['version']} of {_day(old)} ({old['digest'][:12]}) to "
        f"version {new['version']} of {_day(new)} ({new['digest'][:12]})"
    )
    if old["version"] == new["version"]:
        return
    said = changes.summary(old, new, found.rows)
    for key, before, after in said["config"]:
        yield f"  setting {plain(key, 100)}: {_setting(before)} to {_setting(after)}"
    for model in said["models"]:
        yield f"  model {model}: other weights, geometry, batch or device"
    for space, low, high, new_low, new_high in said["bands"]:
        if (low, high) != (new_low, new_high):
            yield f"  band of {space}: {_band(low, high)} to {_band(new_low, new_high)}"
    if said["cut"][0] != said["cut"][1]:
        before, after = (_cosine(cut) for cut in said["cut"])
        yield f"  cut of captions: {before} to {after}"


def _setting(value: Any) -> str:
    return "not set" if value is None else plain(str(value), 100)


def _band(low: int | None, high: int | None) -> str:
    return f"{_cosine(low)}..{_cosine(high)}"


def _cosine(value: int | None) -> str:
    return "none" if value is None else f"{value / 1e6:.4f}"


def _day(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("created", "?"))[:10]


def _totals(found: Difference) -> RichTable:
    table = RichTable("", "before", "after", "added", "removed", "changed", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    tally = dict(found.rows.group_by("level", "change").len().rows_by_key(["level", "change"]))
    for level in found.new.levels:
        sizes = [_size(side, level) for side in (found.old, found.new)]
        counts = [tally.get((level, c), [(0,)])[0][0] for c in ("added", "removed", "changed")]
        table.add_row(f"{level}s", *(f"{count:,}" for count in (*sizes, *counts)))
    return table


def _size(side: Side, level: str) -> int:
    if level == "record":
        return side.records.height
    return side.fates.filter(pl.col("level") == level).height


def _names(old: Side, new: Side) -> dict[str, str]:
    """image id -> the name of an object that holds it."""
    found: dict[str, str] = {}
    for side in (old, new):
        held = (pl.col("level") == "object") & pl.col("image_id").is_not_null()
        rows = side.fates.filter(held).sort("id", descending=True)
        found.update(rows.select("image_id", "id").iter_rows())
    return found


def _example(row: Mapping[str, Any], name: Mapping[str, str]) -> str:
    """An id as a reader knows it, with the image that the reason speaks of."""
    # Objects, and rows of files that became no sample, have names; all else has digests.
    is_digest = row["level"] != "object" and re.fullmatch("[0-9a-f]{64}", row["id"])
    shown = name.get(row["id"], row["id"][:12]) if is_digest else row["id"]
    other = row["other"]
    also = f"  ({plain(name.get(other, other[:12]), 80)})" if other and other != row["id"] else ""
    return plain(shown, 100) + also
