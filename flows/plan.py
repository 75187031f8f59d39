"""What the next run would compute, ask and pay, and why, found by walking the flow without it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.config import BuildConfig, open_build
from flows.done_before import short
from flows.walk import Item, Seen, Walk, size_of
from infra import versions
from infra.asking import AskParams
from infra.budget import NANO, charged, month_of
from infra.build import Build
from infra.canonical import settings
from infra.changes import config_changes
from infra.errors import PairmillError
from infra.foreseeing import Calls, total
from infra.store import NotFound, Store
from infra.text import plain
from tasks.publish import Version


class Plan(NamedTuple):
    """What a run would do. `version` is the one that would be named where there is nothing."""

    dataset: str
    last: Mapping[str, Any] | None
    settings: list[tuple[str, Any, Any]]
    corpus: dict[str, int]
    items: list[Item]
    version: Version | None
    refused: Mapping[str, Any] | None
    currency: str | None
    budgets: list[str]

    @property
    def calls(self) -> Calls | None:
        """All calls together; None where no stage asks a model."""
        found = [item.calls for item in self.items if item.calls]
        return total(found) if found else None

    @property
    def seconds(self) -> float:
        """About how long, of the stages for which that is known."""
        return sum(item.seconds or 0 for item in self.items)


def plan(config: Any) -> Plan:
    """Walk the stages of any recipe. Lists the corpus and writes small tables; computes, asks and
    publishes nothing.
    """
    with open_build(config, planning=True) as build:
        last = _last(build.store, config.dataset)
        walk = Walk(build, config, last)
        with suppress(Seen):
            _walk_through(build, config, walk.step)
        refused = versions.refused(build.store, config.dataset)
        budgets = list(
            dict.fromkeys(line for m in walk.forecast.asked for line in _budget(build, m))
        )
    changed = list(config_changes(last["config"], settings(config.published()))) if last else []
    currency = next((model.currency for model in walk.forecast.asked if model.currency), None)
    return Plan(
        config.dataset, last, changed, walk.corpus, walk.items, walk.version, refused, currency,
        budgets,
    )  # fmt: skip


def _budget(build: Build, model: AskParams) -> Iterator[str]:
    """What bounds the spending on a model, and what of it is spent."""
    for limits, of in ((model.budget, "a build"), (model.budget.month, "a month")):
        spent = charged(build.store, month_of(time.time())) if of == "a month" else None
        for name in ("money", "tokens", "calls"):
            bound = getattr(limits, name)
            if bound is None:
                continue
            unit = model.currency if name == "money" else name
            used = getattr(spent, name, 0) / (NANO if name == "money" else 1)
            told = f", of which {used:,.2f} is spent" if spent else ""
            yield f"budget of {of}: {bound:,} {unit}{told}; beyond it questions wait"


def _walk_through(build: Build, config: Any, step: Any) -> None:
    from flows import build as pairs
    from flows import recipe as samples

    if isinstance(config, BuildConfig):
        pairs.stages(build, config, step=step)
    else:
        samples.build_recipe(build, samples.named(config.recipe), config, step=step)


def _last(store: Store, dataset: str) -> dict[str, Any] | None:
    """The manifest of the latest version; a damaged one is not there, and the run will say so."""
    try:
        entry, _ = versions.read_latest(store, dataset)
        return versions.read_manifest(store, dataset, entry["version"]) if entry else None
    except (PairmillError, NotFound):
        return None


def as_json(found: Plan) -> dict[str, Any]:
    """The plan for scripts; money in 10^-9 of the currency."""
    stages = [item._asdict() for item in found.items]
    for stage in stages:
        stage["calls"] = stage["calls"] and stage["calls"]._asdict()
    return {
        "dataset": found.dataset,
        "last": found.last["version"] if found.last else None,
        "settings": [list(row) for row in found.settings],
        "corpus": found.corpus,
        "stages": stages,
        "seconds": round(found.seconds, 1),
        "calls": found.calls._asdict() if found.calls else None,
        "currency": found.currency,
        "nothing_to_do": not found.items,
        "refused": found.refused,
    }


def show(found: Plan, console: Console) -> None:
    """The plan for people."""
    for line in _heading(found):
        console.print(Text(line), soft_wrap=True, highlight=False)
    if not found.items:
        return
    columns = ["stage", "why", "about"] + (["calls", "cost"] if found.calls else [])
    table = RichTable(*columns, box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for column in (table.columns[0], *table.columns[2:]):
        column.no_wrap = True
    table.columns[2].justify = "right"
    for item in found.items:
        asked = [counted(item.calls), priced(item.calls, found.currency)] if item.calls else []
        table.add_row(item.stage, Text(item.why), _time(item.seconds), *asked)
    console.print(table)
    for line in _totals(found):
        console.print(Text(line), soft_wrap=True, highlight=False)


def _totals(found: Plan) -> Iterator[str]:
    unknown = any(item.seconds is None for item in found.items)
    yield f"about {_time(found.seconds)}{', and what is not known' if unknown else ''}"
    calls = found.calls
    if calls is None:
        return
    stored = f"; {calls.stored:,} answers are stored and cost nothing" if calls.stored else ""
    yield f"calls: {counted(calls)}{stored}"
    if calls.most != 0:
        yield f"cost: {priced(calls, found.currency)}"
    yield from found.budgets
    if calls.kind != "counted":
        yield (
            "what a stage is given is known when those above it have run: until then its calls are "
            "bounded, or as before, and priced as those of the last version"
        )


def counted(calls: Calls) -> str:
    """How many calls in words: as many as questions, and more where answers must be repaired."""
    if calls.most is None:
        return "?"
    if not calls.most:
        return "none"
    if calls.kind == "expected":
        return f"about {calls.plain:,}"
    if calls.kind == "bounded":
        return f"at most {calls.plain:,}, {calls.most:,} with repairs"
    return f"{calls.plain:,}, at most {calls.most:,} with repairs"


def priced(calls: Calls, currency: str | None) -> str:
    """What calls cost in words."""
    if calls.most == 0:
        return "nothing"
    if currency is None:
        return "no prices are set"
    if calls.money is None:
        return "?"
    word = "at most" if calls.kind == "counted" else "about"
    return f"{word} {calls.money / NANO:,.2f} {currency}"


def _heading(found: Plan) -> Iterator[str]:
    if found.version:
        number, digest = found.version.number, found.version.digest[:12]
        yield f"nothing to do: version {number} ({digest}) is up to date"
        return
    against = f"since version {found.last['version']}" if found.last else "the first version"
    yield f"{found.dataset}: {against}"
    corpus = found.corpus
    if "gone" in corpus:
        yield (
            f"  corpus: {corpus['new']:,} new or changed and {corpus['gone']:,} gone, of "
            f"{corpus['files']:,} files"
        )
    elif corpus:
        yield f"  corpus: {corpus['files']:,} files, {size_of(corpus['bytes'])}"
    if found.refused:
        yield f"  the last build was refused by {versions.refused_by(found.refused)}"
    for key, old, new in found.settings:
        yield f"  setting {plain(key, 100)}: {short(old)} to {short(new)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 1:
        return "< 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"
