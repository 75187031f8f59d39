"""What a run says at its end: for the manifest, for `--json`, and as a table for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx
import polars as pl
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.step import link
from infra import tables
from infra.build import Build
from infra.errors import Refused
from infra.tables import Table
from infra.text import markdown
from tasks.describe import Described
from tasks.fold_fates import OBJECT_FATES
from tasks.publish import Version
from tasks.snapshot import Snapshot

WORK = (
    "objects_listed",
    "images_decoded",
    "images_embedded",
    "similarities_computed",
    "labels_requested",
)


# Tables of a build that answer questions later. What a manifest names under `tables` is kept as
# long as the version; lists are many times larger, and go when the ledger has no use for them.
NAMED = {
    "snapshot": ("listing",),
    "describe": ("objects", "images", "captions", "image_captions"),
    "align_captions": ("aligned",),
    "deduplicate": ("survivors",),
    "score_captions": ("values",),
    "filter_captions": ("eligible", "facts"),
    "mine_pairs": ("pairs", "bands"),
    "label_pairs": ("labels", "drops"),
}
PASSING = {"find_neighbours": ("members", "lists")}


def measured(build: Build, ran: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says beyond its files and config: calibrated values, tables, what it cost.

    `ran` holds the results of the stages by their names.
    """
    listed, seen, fitting, near, mined = (
        ran[stage]
        for stage in ("snapshot", "describe", "filter_captions", "find_neighbours", "mine_pairs")
    )
    facts = tables.read(build.store, fitting.facts).to_pylist()
    mining = tables.read(build.store, mined.facts).to_pylist()
    bands = tables.read(build.store, mined.bands).to_pylist()
    return {
        "captions_unused": _captions_unused(build, listed, seen),
        "bands": bands,
        "clip_score_cut": next((f["value"] for f in facts if f["name"] == "cut"), None),
        "mining": {fact["name"]: fact["value"] for fact in mining},
        "members": {name: table.rows for name, table in near.members.items()},
        "occupied": {b["space"]: _occupied(build, near.lists[b["space"]], b) for b in bands},
        "tables": _named(ran, NAMED),
        "passing_tables": _named(ran, PASSING),
        # Named without their shards, which hold more than this corpus and may be forgotten.
        "numerics": {
            kind: {model: table.name for model, table in getattr(seen, kind).items()}
            for kind in ("vectors", "texts")
        }
        | {"looks": seen.looks.name},
        "work": {name: build.work[name] for name in WORK},
        "seconds": {stage: round(spent, 3) for stage, spent in build.seconds.items()},
    }


def _named(ran: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Tables of stages as JSON, by stage and name."""

    def as_json(value: Any) -> Any:
        if isinstance(value, Table):
            return value.to_json()
        return {name: as_json(item) for name, item in value.items()}

    return {
        stage: {name: as_json(getattr(ran[stage], name)) for name in names}
        for stage, names in wanted.items()
    }


def _occupied(build: Build, lists: Table, band: Mapping[str, Any]) -> int:
    """How many images have at least one neighbour in the band of a space."""
    count = 0
    for part in tables.shards(build.store, lists, ["scores"]):
        inside = pl.Series(part["scores"].combine_chunks()).list.eval(
            pl.element().is_between(band["low"], band["high"])
        )
        count += int(inside.list.any().sum())
    return count


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


def tell_refused(refused: Refused) -> None:
    """In Prefect, the reasons of a refusal and a link to the report of the refused build."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None:
        return
    reasons = "\n".join(f"- {markdown(reason)}" for reason in refused.reasons)
    text = f"Nothing was published. Quality gates that this build does not pass:\n\n{reasons}\n"
    with suppress(httpx.HTTPError):
        create_markdown_artifact(text, "refused-reasons", "why nothing was published")
    link("refused", refused.report)


def outcome(result: Mapping[str, Any]) -> str:
    """What a run came to, in one line."""
    said = "published" if result["fresh"] else "nothing new: still"
    return (
        f"{said} version {result['version']} ({result['digest'][:12]}), "
        f"{result['pairs']} pairs mined, {result['records']} records"
    )


def show(result: Mapping[str, Any], console: Console) -> None:
    """The short table at the end of a run."""
    grid = RichTable.grid(padding=(0, 4))
    grid.add_row(_fates(result), _seconds(result))
    console.print(grid)
    console.print(Text(outcome(result)))
    if result["pairs"] and not result["records"]:
        console.print(
            "no pair has a label: the report says why; labels.labeller: mllm needs no captions"
        )
    for reason in result.get("tidied", {}).get("waits", ()):
        console.print(Text(reason), soft_wrap=True)
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
