"""What a run says at its end: for the manifest, for `--json`, and as a table for people."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.config import BuildConfig
from infra import tables
from infra.build import Build
from tasks.describe import Described
from tasks.filter_captions import Filtered
from tasks.find_neighbours import Near
from tasks.fold_fates import OBJECT_FATES
from tasks.mine_pairs import Mined
from tasks.publish import Version
from tasks.snapshot import Snapshot

WORK = (
    "objects_listed",
    "images_decoded",
    "images_embedded",
    "similarities_computed",
    "labels_requested",
)


def described(
    build: Build,
    config: BuildConfig,
    listed: Snapshot,
    seen: Described,
    fitting: Filtered,
    near: Near,
    mined: Mined,
) -> dict[str, Any]:
    """What a manifest says beyond its files: config, calibrated values, and what it cost."""
    facts = tables.read(build.store, fitting.facts).to_pylist()
    mining = tables.read(build.store, mined.facts).to_pylist()
    return {
        "config": config.published(),
        "captions_unused": _captions_unused(build, listed, seen),
        "bands": tables.read(build.store, mined.bands).to_pylist(),
        "clip_score_cut": next((f["value"] for f in facts if f["name"] == "cut"), None),
        "mining": {fact["name"]: fact["value"] for fact in mining},
        "members": {name: table.rows for name, table in near.members.items()},
        "work": {name: build.work[name] for name in WORK},
        "seconds": {stage: round(spent, 3) for stage, spent in build.seconds.items()},
    }


def _captions_unused(build: Build, listed: Snapshot, seen: Described) -> dict[str, int]:
    """How many captions were not used, by reason: of caption files, and beside or with images."""
    unused = Counter[str]()
    for fact in tables.read(build.store, listed.facts).to_pylist():
        unused[fact["name"]] += fact["value"]
    objects = tables.read(build.store, seen.objects, ["image_id", "detail"]).to_pylist()
    unused.update(row["detail"] for row in objects if row["image_id"] and row["detail"])
    return {name: count for name, count in sorted(unused.items()) if count}


def summary(build: Build, version: Version) -> dict[str, Any]:
    """What `pairmill run --json` prints."""
    fates = version.counts["fates"].get("object", {})
    build.work["objects_listed"] = sum(fates.values())
    return {
        "version": version.number,
        "digest": version.digest,
        "fresh": version.fresh,
        "manifest": version.manifest,
        "report": version.report,
        "fates": {fate: fates.get(fate, 0) for fate in OBJECT_FATES},
        "pairs": version.counts["pairs"],
        "records": version.counts["records"],
        "work": {name: build.work[name] for name in WORK},
        "seconds": {stage: round(spent, 2) for stage, spent in build.seconds.items()},
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The short table at the end of a run."""
    grid = RichTable.grid(padding=(0, 4))
    grid.add_row(_fates(result), _seconds(result))
    console.print(grid)
    said = "published" if result["fresh"] else "nothing new: still"
    console.print(
        Text(
            f"{said} version {result['version']} ({result['digest'][:12]}), "
            f"{result['pairs']} pairs mined, {result['records']} records"
        )
    )
    if result["pairs"] and not result["records"]:
        console.print(
            "no pair has a label: the report says why; labels.labeller: mllm needs no captions"
        )
    console.print(Text(f"manifest  {result['manifest']}"), soft_wrap=True)
    console.print(Text(f"report    {result['report']}"), soft_wrap=True)


def _fates(result: Mapping[str, Any]) -> RichTable:
    table = RichTable("objects", "fate", box=None)
    table.columns[0].justify = "right"
    for fate, count in result["fates"].items():
        if count:
            table.add_row(f"{count:,}", fate)
    table.add_row(f"{sum(result['fates'].values()):,}", "in all")
    return table


def _seconds(result: Mapping[str, Any]) -> RichTable:
    table = RichTable("seconds", "stage", box=None)
    table.columns[0].justify = "right"
    for stage, seconds in result["seconds"].items():
        table.add_row(f"{seconds:.1f}", stage)
    table.add_row(f"{sum(result['seconds'].values()):.1f}", "in all")
    return table
