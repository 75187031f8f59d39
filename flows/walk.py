"""One walk through a flow that does no work: what would be done, why, and what would be asked.

Where a stage has work to do, its last result stands in, so that the walk goes on: of every later
stage it is known whether its parameters or its code changed, and what of its input will.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from flows.done_before import as_json, differences, distance, fields, outputs, records, short
from flows.forecast import Forecast, Size
from flows.step import tables_in
from flows.trail import SAMPLES
from infra import garbage, tables, versions
from infra.build import Build, WouldRun
from infra.canonical import settings
from infra.foreseeing import Calls
from infra.ledger import pinned
from infra.tables import Table
from infra.text import plain
from tasks.describe import Described
from tasks.publish import Version

SHOWN_SETTINGS = 3
SHOWN_SOURCES = 3
START = 5.0  # seconds until workers have imported PyTorch and loaded models, where no run tells


class Item(NamedTuple):
    """A stage with work to do: why, how long it may take in seconds, None where unknown, and where
    it asks a model, its calls.
    """

    stage: str
    why: str
    seconds: float | None
    calls: Calls | None = None


def seconds_for(images: int, runs: list[tuple[int, float]]) -> float | None:
    """Seconds for some images from (images, seconds) of earlier runs: a start and a pace.

    The start, of workers that load their models, is told by the smallest run; from one run alone
    it is taken to be START.
    """
    if not runs:
        return None
    (few, short), (many, long) = min(runs), max(runs)
    pace = (long - short) / (many - few) if many >= 2 * few and long > short else None
    start = min(START, long) if pace is None else max(0.0, short - pace * few)
    pace = (long - start) / many if pace is None else pace
    return start + pace * images


class Seen(Exception):
    """Raised where nothing more is to be seen: what follows would publish and tidy up."""


class Walk:
    """One walk through the flow: what would be done so far, and which tables stand in."""

    def __init__(self, build: Build, config: Any, last: Mapping[str, Any] | None):
        self.build, self.config, self.last = build, config, last
        self.items: list[Item] = []
        self.corpus: dict[str, int] = {}
        self.share: float | None = None  # of the corpus that came or went, where that is all
        self.pending: dict[int, str] = {}  # id of a table that stands in -> stage it comes from
        self.other_model = False
        self.version: Version | None = None
        self.kept: list[Any] = []  # what `pending` speaks of must not be freed
        self.forecast = Forecast(last)
        # Ledger records that builds of this dataset used: those of others say nothing about it.
        builds = garbage.builds(build.store).get(config.dataset, [])
        self.used = {path for entry in builds for path in entry["records"]}
        self.stops: list[list[str]] = list((last or {}).get("stages", ()))

    def step(self, stage: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """In place of `flows.step.step`: a stage that is looked at and not run."""
        visit = {"snapshot": self._snapshot, "describe": self._describe}.get(stage.__name__)
        visit = visit or (self._recorded if hasattr(stage, "reads") else self._plain)

        def call(*given: Any, **named: Any) -> Any:
            return visit(stage, given, named)

        return call

    def _snapshot(self, stage: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        listed = stage(*given, **named)
        rows = tables.frame(self.build.store, listed.listing, ["key", "size"])
        self.corpus = {"files": rows.height, "bytes": int(rows["size"].sum()), "new": 0}
        before = versions.table(self.build.store, self.last or {}, "snapshot", "listing")
        if before is not None:
            gone = before.join(rows, on="key", how="anti")
            self.corpus["gone"] = gone.height
            self.share = int(gone["size"].sum()) / max(1, self.corpus["bytes"])
        return listed

    def _describe(self, stage: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            return stage(*given, **named)
        except WouldRun as would:
            self.other_model = would.stage == "load models" or bool(would.inputs.get("again"))
            self.items.append(self._reading(would))
            return self._stand_in("describe", self._described())

    def _reading(self, would: WouldRun) -> Item:
        """Work of describe: files to read, images that lack something, captions to embed."""
        inputs = would.inputs
        if would.stage == "load models":
            return Item("describe", _new_model(would), self._seconds_of(1.0))
        if "captions" in inputs:
            return Item("describe", f"{inputs['captions']:,} new captions to embed", None)
        if "forgotten" in inputs:
            rows = inputs["forgotten"]
            return Item("describe", f"forgotten: {rows:,} rows leave the feature tables", None)
        new, again, size = inputs["new"], inputs["again"], inputs["bytes"]
        share = size / max(1, self.corpus["bytes"])
        self.corpus["new"] = new
        self.share = None if self.share is None or again else min(1.0, self.share + share)
        files = f"{new:,} new or changed {'file' if new == 1 else 'files'} ({size_of(size)})"
        causes = [f"new bytes: {files}"] if new else []
        if again:
            causes.append(f"changed model: {again:,} images lack {', '.join(inputs['lacking'])}")
            share += again / max(1, self.last["counts"]["images"] if self.last else again)
        return Item("describe", "; ".join(causes), self._seconds_of(min(1.0, share)))

    def _seconds_of(self, share: float) -> float | None:
        """Time to describe a share of the pictures, by the runs of this dataset that did any."""
        if self.last is None:
            return None
        runs = [
            (int(count), float(run["seconds"].get("describe", 0)))
            for run in (*self.last.get("history", ()), self.last)
            if (count := run.get("work", {}).get("images_decoded", 0)) and run.get("seconds")
        ]
        return seconds_for(round(share * self.last["counts"]["images"]), runs)

    def _described(self) -> Described:
        """The last version's tables of describe, with the models of this config."""
        last: Mapping[str, Any] = self.last or {}
        before, names = last.get("tables", {}).get("describe", {}), last.get("numerics", {})
        texts = [n for n, m in self.config.models.items() if m.library == "open_clip"]
        models = {"vectors": [*self.config.models], "texts": texts}
        found: dict[str, Any] = {
            kind: {n: Table(names.get(kind, {}).get(n, f"{kind}-new")) for n in of}
            for kind, of in models.items()
        }
        for field in Described._fields:
            if field not in found:
                found[field] = Table.from_json(before[field]) if field in before else Table(field)
        found["looks"] = Table(names.get("looks", "looks"))
        return Described(**found)

    def _recorded(self, stage: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A stage of the ledger: done before, or to be done, and why."""
        called = self._called(stage)
        bound = inspect.signature(stage).bind(*given, **named)
        bound.apply_defaults()
        inputs = bound.arguments
        # Of an argument without columns only the name counts, which a changed model changes.
        counted = [arg for arg, columns in stage.reads.items() if columns or self.other_model]
        moved = {arg: self._sources(inputs[arg]) for arg in counted if arg in inputs}
        moved = {arg: sources for arg, sources in moved.items() if sources}
        if not moved:
            try:
                return stage(*given, **named)
            except WouldRun:
                pass
        every = self._records(stage.stage)
        try:
            inputs["params"] = pinned(inputs["params"], self.build)
        except WouldRun as would:
            kin, record, whole = list[dict[str, Any]](), every[-1] if every else None, True
            why = _new_model(would)
        else:
            means = settings(as_json(stage.meaning(inputs["params"])))
            same = (means, stage.version)
            kin = [r for r in every if (r.get("params"), r.get("version")) == same]
            record, why, whole = self._cause(stage, inputs, means, kin, every, moved)
        seconds = self._estimate(kin or every, whole)
        before = outputs(stage, record)
        calls = self.forecast.calls(stage, bound, before if kin else None, moved)
        name = called or _name(stage, inputs["params"])
        self.items.append(Item(name, why, seconds, calls))
        return self._stand_in(name, before, self.forecast.size(stage, inputs, before, bool(record)))

    def _called(self, stage: Any) -> str | None:
        """What the last version calls a stage that makes samples, while they come in its order."""
        if not {*SAMPLES, "views"} & set(fields(stage)):
            return None
        name, expected = self.stops.pop(0) if self.stops else (None, None)
        if expected != stage.stage:
            self.stops.clear()
            return None
        return name

    def _records(self, stage: str) -> list[dict[str, Any]]:
        if stage not in self._read:
            self._read[stage] = records(self.build.store, stage, self.used)
        return self._read[stage]

    @cached_property
    def _read(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _cause(
        self,
        stage: Any,
        inputs: Mapping[str, Any],
        means: Any,
        kin: list[dict[str, Any]],
        every: list[dict[str, Any]],
        moved: Mapping[str, set[str]],
    ) -> tuple[dict[str, Any] | None, str, bool]:
        """The record that comes nearest, what differs from it, and whether all is done anew."""
        if kin:
            equal = {id(r): self._equal(stage, inputs, r, moved) for r in kin}
            record = max(reversed(kin), key=lambda r: (len(equal[id(r)]), r.get("created", 0)))
            given = [arg for arg in stage.reads if arg in inputs]
            other = [arg for arg in given if arg not in equal[id(record)]]
            # Vectors and their like are named by what made them.
            models = [arg for arg in other if not stage.reads[arg]]
            if models and not moved:
                return record, f"changed model: other {', '.join(models)}", True
            return record, _because(other, moved), bool(models)
        if not every:
            said = f"in {self.config.dataset}" if self.used else "in this store"
            return None, f"never done {said}", True
        record = min(reversed(every), key=lambda r: distance(r, means))
        causes = []
        if record.get("version", stage.version) != stage.version:
            causes.append(f"changed code: version {record['version']} to {stage.version}")
        differ = list(differences(record, means))
        causes += [
            f"changed parameter{f' {key}' if key else ''}: {short(old)} to {short(new)}"
            for key, old, new in differ[:SHOWN_SETTINGS]
        ]
        causes += [f"{len(differ) - SHOWN_SETTINGS} more"] if len(differ) > SHOWN_SETTINGS else []
        return record, "; ".join(causes) or _because([], moved), True

    def _equal(
        self, stage: Any, inputs: Mapping[str, Any], record: Mapping[str, Any], moved: Any
    ) -> set[str]:
        """Arguments that are as they were for a record; those that stand in are not."""
        before, same = record.get("inputs", {}), set()
        for arg, columns in stage.reads.items():
            if arg in inputs and arg not in moved:
                now = self._digests(inputs[arg], tuple(columns))
                same |= {arg} if before.get(arg) == now else set()
        return same

    def _digests(self, value: Any, columns: tuple[str, ...]) -> Any:
        if isinstance(value, Table):
            return self._digest(value, columns)
        return {name: self._digest(table, columns) for name, table in value.items()}

    def _digest(self, table: Table, columns: tuple[str, ...]) -> str:
        key = (table, columns)
        if key not in self._known:
            self._known[key] = tables.digest(self.build.store, table, columns)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Table, tuple[str, ...]], str]:
        return {}

    def _estimate(self, records: list[dict[str, Any]], whole: bool) -> float | None:
        """Seconds from what the stage took before: all of the slowest run, or twice the share."""
        spent = [r["milliseconds"] / 1000 for r in records if "milliseconds" in r]
        if not spent:
            return None
        only_files = self.share is not None and not any(i.seconds is None for i in self.items)
        if whole or not only_files or not self.share:
            return max(spent)
        return max(min(spent), min(1.0, 2 * self.share) * max(spent))

    def _plain(self, stage: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Publishing: done anew where anything before it is. What follows it is not looked at."""
        name = stage.__name__
        if self.items:
            why = "a new version, unless the same comes out"
            self.items.append(Item("publish", why, self._last_seconds("publish")))
            raise Seen
        if name == "tidy":
            raise Seen
        try:
            self.version = stage(*given, **named)
        except WouldRun as would:
            why = f"{would.inputs['records']:,} records to publish as a new version"
            self.items.append(Item(name, why, self._last_seconds(name)))
            raise Seen from None
        return self.version

    def _last_seconds(self, stage: str) -> float | None:
        seconds = (self.last or {}).get("seconds", {}).get(stage)
        return None if seconds is None else float(seconds)

    def _stand_in(self, stage: str, result: Any, size: Size | None = None) -> Any:
        self.kept.append(result)
        self.forecast.note(result, size)
        for _, table in tables_in(result):
            self.pending[id(table)] = stage
        return result

    def _sources(self, value: Any) -> set[str]:
        """The stages with work to do whose results stand in for a value."""
        return {self.pending[id(t)] for _, t in tables_in((value,)) if id(t) in self.pending}


def _new_model(would: WouldRun) -> str:
    model = plain(str(would.inputs["model"]), 80)
    return f"changed model: {model} is new to this store, or its files are"


def _name(stage: Any, params: Any) -> str:
    """The stage, with the space where it is done space by space, and the question it asks."""
    question = getattr(params, "question", None)
    what = question.name if question else getattr(params, "space", None)
    return f"{stage.stage} {what}" if isinstance(what, str) else str(stage.stage)


def _because(changed: list[str], moved: Mapping[str, set[str]]) -> str:
    """Input that differs, and stages with work to do whose result may differ."""
    own = [arg.replace("_", " ") for arg in changed if arg not in moved]
    sources = list(dict.fromkeys(s for names in moved.values() for s in sorted(names)))
    told = [f"changed input: {', '.join(own)}"] if own else []
    more = f" and {len(sources) - SHOWN_SOURCES} more" if len(sources) > SHOWN_SOURCES else ""
    told += [f"follows {', '.join(sources[:SHOWN_SOURCES])}{more}"] if sources else []
    return "; ".join(told) or "changed input"


def size_of(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
