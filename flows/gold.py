"""The gold set: what of a version is to be judged by people, and the judge against them."""

import hashlib
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table as RichTable

from flows.checks import calibrated
from flows.config import BuildConfig, open_build
from flows.gold_page import Desk, Item
from infra import corpus, gold, versions
from infra.agreement import Share
from infra.build import Progress, silent
from infra.errors import ConfigError, PairmillError
from infra.store import Location, Store, open_store
from infra.tables import Table
from tasks.judge_labels import Agreement


def sample(labels: pl.DataFrame, pairs: pl.DataFrame, count: int) -> list[Item]:
    """A fair draw of labelled pairs, spaces in turn, with one instruction of each.

    A pair counts for one of the spaces in whose band it lies. All draws are by hash, so a longer
    sample goes on where a shorter one ended.
    """
    rows = labels.join(pairs, on="pair_id").select(
        "pair_id", "query", "target", "instructions", "ties"
    )
    turns: dict[str, list[tuple[str, Item]]] = {}
    for pair_id, query, target, texts, ties in rows.iter_rows():
        spaces = sorted(tie["space"] for tie in ties if tie["in_band"]) or [""]
        rank = hashlib.sha256(f"gold {pair_id}".encode()).hexdigest()
        space = spaces[int(rank[:8], 16) % len(spaces)]
        text = texts[int(rank[8:16], 16) % len(texts)]
        turns.setdefault(space, []).append((rank, Item(pair_id, query, target, text)))
    placed = [
        (turn, space, item)
        for space, items in sorted(turns.items())
        for turn, (_, item) in enumerate(sorted(items))
    ]
    return [item for _, _, item in sorted(placed)[:count]]


def gold_path(config: BuildConfig) -> Path:
    """The gold file of a config. Raises ConfigError where it names none."""
    if not config.checks.gold.path:
        raise ConfigError("name the file of the gold set: checks.gold.path, such as gold.jsonl")
    return Path(config.checks.gold.path)


def labelled(store: Store, dataset: str) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Labels, pairs and objects of the latest version, before any check had a say.

    Raises PairmillError where they are gone.
    """
    manifest = versions.find_version(store, dataset, "latest")
    wanted = (("label_pairs", "labels"), ("mine_pairs", "pairs"), ("describe", "objects"))
    found = [versions.table(store, manifest, stage, name) for stage, name in wanted]
    labels, pairs, objects = found
    if labels is None or pairs is None or objects is None:
        raise PairmillError(
            f"the tables of version {manifest['version']} are gone from {store.uri}; run a build"
        )
    if not labels.height:
        raise PairmillError(f"version {manifest['version']} has no labelled pair; label some first")
    return labels, pairs, objects


def open_desk(config: BuildConfig, count: int, who: str) -> Desk:
    """What of the latest version is to be judged. Raises PairmillError where there is nothing."""
    path = gold_path(config)
    gold.read(path)
    store = open_store(Location(**config.store.model_dump(exclude={"single_writer"})))
    bucket = open_store(Location(**{f: getattr(config.corpus, f) for f in Location.model_fields}))
    labels, pairs, objects = labelled(store, config.dataset)
    return Desk(sample(labels, pairs, count), path, who, bucket, corpus.sources(objects))


def agree(config: BuildConfig, progress: Progress = silent) -> Agreement:
    """Ask the judge about the gold set, where it was not asked before, and compare.

    Raises PairmillError where there is no gold set or no version of the dataset.
    """
    settled = gold.settled(gold.read(gold_path(config)))
    if not settled.verdicts:
        raise PairmillError("the gold set is empty; label some pairs with pairmill gold serve")
    loose = config.checks.judge.model_copy(update={"least_agreement": None})
    config = config.model_copy(update={"checks": config.checks.model_copy(update={"judge": loose})})
    with open_build(config, progress) as build:
        manifest = versions.find_version(build.store, config.dataset, "latest")
        described = manifest["tables"]["describe"]["objects"]
        return calibrated(build, config, Table.from_json(described), lambda stage: stage)[1]


def show(found: Agreement, config: BuildConfig, console: Console) -> None:
    """The agreement of judge and people, for people."""
    chosen = config.checks.judge
    for what in ("scale", "decision"):
        share = found.on(what)
        gate = ""
        if chosen.least_agreement and chosen.agree_on == what:
            passes = "passes" if share.low >= chosen.least_agreement else "does not pass"
            gate = f"; {passes} the gate at {chosen.least_agreement:g}"
        console.print(f"agreement on the {what}: {_told(share)}{gate}", highlight=False)
    kappa = "not defined" if found.kappa is None else f"{found.kappa:.3f}"
    console.print(f"Cohen's kappa on the scale: {kappa}", highlight=False)
    verdicts = (*gold.SCALE, "no verdict")
    table = RichTable("people \\ judge", *verdicts, box=None, pad_edge=False)
    for people in gold.SCALE:
        table.add_row(people, *(str(found.confusion[people, judge]) for judge in verdicts))
    console.print(table)
    for reason, share in found.reasons.items():
        name = "without a reason" if reason == "none" else reason.replace("_", " ")
        console.print(f"  {name}: {_told(share)}", highlight=False)
    for count, words in (
        (found.waiting, "wait for an answer of the judge"),
        (found.gone, "are left out: their pictures are not in the latest version"),
    ):
        if count:
            console.print(f"{count} items {words}", highlight=False)


def _told(share: Share) -> str:
    return f"{share.part} of {share.of}, {share.value:.3f} ({share.low:.3f} to {share.high:.3f})"
