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

from flows import attack
from flows.step import link
from infra import tables
from infra.build import Build
from infra.errors import Refused
from infra.tables import Table
from infra.text import markdown
from infra.versions import read_latest, version_folder
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
    "label_pairs": ("labels", "drops", "asked"),
    "calibrate_judge": ("verdicts",),
    "judge_labels": ("verdicts", "facts"),
    "line_up": ("line_ups", "facts"),
    "round_trip": ("preferences", "facts"),
}
CHECKS = ("judge_labels", "line_up", "round_trip")
PENDING = {
    "over_budget": "the budget",
    "endpoint_error": "an endpoint that answers",
    "in_batch": "a batch of the provider",
}
PASSING = {"find_neighbours": ("members", "lists")}


def measured(
    build: Build,
    dataset: str,
    ran: Mapping[str, Any],
    pending: Mapping[str, int],
    currency: str | None = None,
) -> dict[str, Any]:
    """What a manifest says beyond its files and config: calibrated values, tables, what it cost.

    `ran` holds the results of the stages by their names, `pending` what waits.
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
        "tables": told(ran, NAMED),
        "passing_tables": told(ran, PASSING),
        "numerics": numerics(seen),
        "work": {name: build.work[name] for name in WORK},
        "seconds": {stage: round(spent, 3) for stage, spent in build.seconds.items()},
        "cost": costs(build),
        "currency": currency,
        "partial": dict(pending),
        "checks": _checks(build, ran),
        "agreement": ran["checks"].agreement,
        "attacks": attack.read(build.store, dataset),
    }


def numerics(seen: Described) -> dict[str, Any]:
    """With what pictures and texts were described: names of tables, without their shards, which
    hold more than one corpus and may be forgotten.
    """
    found: dict[str, Any] = {
        kind: {model: table.name for model, table in getattr(seen, kind).items()}
        for kind in ("vectors", "texts")
    }
    return found | {"looks": seen.looks.name}


def _checks(build: Build, ran: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What the checks counted, by stage."""
    counted = {s: tables.read(build.store, ran[s].facts).to_pylist() for s in CHECKS if s in ran}
    return {s: {fact["name"]: fact["value"] for fact in facts} for s, facts in counted.items()}


def costs(build: Build) -> dict[str, dict[str, int]]:
    """What models were paid, by stage: calls, tokens, money in 10^-9 of the currency."""
    return {stage: dict(sorted(bill.items())) for stage, bill in build.bill.stages.items() if bill}


def waiting(build: Build, ran: Mapping[str, Any]) -> dict[str, int]:
    """How many pairs wait for an answer that a later build will ask for, by what they wait for."""
    found = Counter[str]()
    for stage in ran.values():
        drops = getattr(stage, "drops", None)
        if isinstance(drops, Table) and stage is not ran.get("fold_fates"):
            rules = tables.frame(build.store, drops, ["level", "rule"])
            pairs = rules.filter(
                pl.col("level").is_in(["pair", "sample"]), pl.col("rule").is_in([*PENDING])
            )
            found.update(pairs["rule"].to_list())
    return dict(sorted(found.items()))


def told(ran: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Tables of stages as JSON, by stage and name."""

    def as_json(value: Any) -> Any:
        if isinstance(value, Table):
            return value.to_json()
        return {name: as_json(item) for name, item in value.items()}

    return {
        stage: {name: as_json(getattr(ran[stage], name)) for name in names}
        for stage, names in wanted.items()
        if stage in ran
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
        "fates": {fate: fates.get(fate, 0) for fate in dict.fromkeys((*OBJECT_FATES, *fates))},
        "pairs": version.counts["pairs"],
        "records": version.counts["records"],
        "work": {name: build.work[name] for name in WORK},
        "cost": costs(build),
        "seconds": {stage: round(spent, 2) for stage, spent in build.seconds.items()},
    }


def unpublished(build: Build, dataset: str, pending: Mapping[str, int]) -> dict[str, Any]:
    """What `pairmill run --json` prints where pairs wait and nothing is published for now."""
    latest, _ = read_latest(build.store, dataset)
    place = f"{build.store.uri}/{version_folder(dataset, latest['version'])}" if latest else None
    return {
        "version": latest["version"] if latest else None,
        "digest": latest["digest"] if latest else None,
        "fresh": False,
        "waiting": dict(pending),
        "manifest": f"{place}/manifest.json" if place else None,
        "report": f"{place}/report.html" if place else None,
        "fates": {},
        "pairs": None,
        "records": None,
        "work": {name: build.work[name] for name in WORK},
        "cost": costs(build),
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
    if refused.report:
        link("refused", refused.report)


def outcome(result: Mapping[str, Any]) -> str:
    """What a run came to, in one line."""
    pending = result.get("waiting") or {}
    what = "samples" if "samples" in result else "pairs"
    waits = ", ".join(
        f"{count:,} {what} wait for {PENDING[rule]}" for rule, count in pending.items()
    )
    if result["records"] is None:
        named = f"version {result['version']}" if result["version"] else "no version yet"
        return f"nothing published, latest is {named}: {waits}; the next build goes on"
    said = "published" if result["fresh"] else "nothing new: still"
    of = f"{result['samples']} samples" if what == "samples" else f"{result['pairs']} pairs mined"
    return (
        f"{said} {'partial ' if pending else ''}version {result['version']} "
        f"({result['digest'][:12]}), {of}, {result['records']} records"
        f"{f'; {waits}' if waits else ''}"
    )


def show(result: Mapping[str, Any], console: Console) -> None:
    """The short table at the end of a run."""
    grid = RichTable.grid(padding=(0, 4))
    grid.add_row(_fates(result), _seconds(result))
    console.print(grid)
    console.print(Text(outcome(result)), soft_wrap=True)
    if result["pairs"] and not result["records"]:
        console.print(
            "no pair has a label: the report says why; labels.labeller: mllm needs no captions"
        )
    for reason in result.get("tidied", {}).get("waits", ()):
        console.print(Text(reason), soft_wrap=True)
    for place in ("manifest", "report"):
        if result[place]:
            console.print(Text(f"{place:<9} {result[place]}"), soft_wrap=True)


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
