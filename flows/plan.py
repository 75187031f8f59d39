"""What the next run would compute and why, found by walking the flow without doing its work.

Where a stage has work to do, its last result stands in, so that the walk goes on: of every later
stage it is known whether its parameters or its code changed, and what of its input will.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.config import BuildConfig, open_build
from flows.step import tables_in
from infra import tables, versions
from infra.build import Build, WouldRun
from infra.canonical import settings
from infra.changes import config_changes
from infra.errors import PairmillError
from infra.store import NotFound, Store
from infra.tables import Table
from infra.text import plain
from tasks.describe import Described
from tasks.publish import Version

RECORDS = 24  # records of a stage that are looked at, the newest
SHOWN_SETTINGS = 3
START = 5.0  # seconds until workers have imported PyTorch and loaded models, where no run tells


class Item(NamedTuple):
    """A stage with work to do: why, and how long it may take in seconds, None where unknown."""

    stage: str
    why: str
    seconds: float | None


class Plan(NamedTuple):
    """What a run would do. `version` is the one that would be named where there is nothing."""

    dataset: str
    last: Mapping[str, Any] | None
    settings: list[tuple[str, Any, Any]]
    corpus: dict[str, int]
    items: list[Item]
    version: Version | None
    refused: Mapping[str, Any] | None

    @property
    def seconds(self) -> float:
        """About how long, of the stages for which that is known."""
        return sum(item.seconds or 0 for item in self.items)


def plan(config: BuildConfig) -> Plan:
    """Walk the stages. Lists the corpus and writes small tables; computes and publishes nothing."""
    from flows.build import stages

    with open_build(config, planning=True) as build:
        last = _last(build.store, config.dataset)
        walk = _Walk(build, config, last)
        with suppress(_Seen):
            stages(build, config, step=walk.step)
        refused = versions.refused(build.store, config.dataset)
    changed = list(config_changes(last["config"], settings(config.published()))) if last else []
    return Plan(config.dataset, last, changed, walk.corpus, walk.items, walk.version, refused)


def _last(store: Store, dataset: str) -> dict[str, Any] | None:
    """The manifest of the latest version; a damaged one is not there, and the run will say so."""
    try:
        entry, _ = versions.read_latest(store, dataset)
        return versions.read_manifest(store, dataset, entry["version"]) if entry else None
    except (PairmillError, NotFound):
        return None


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


class _Seen(Exception):
    """Raised where nothing more is to be seen: what follows would publish and tidy up."""


class _Walk:
    """One walk through the flow: what would be done so far, and which tables stand in."""

    def __init__(self, build: Build, config: BuildConfig, last: Mapping[str, Any] | None):
        self.build, self.config, self.last = build, config, last
        self.items: list[Item] = []
        self.corpus: dict[str, int] = {}
        self.share: float | None = None  # of the corpus that came or went, where that is all
        self.pending: dict[int, str] = {}  # id of a table that stands in -> stage it comes from
        self.other_model = False
        self.version: Version | None = None
        self.kept: list[Any] = []  # what `pending` speaks of must not be freed

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
            model = plain(str(inputs["model"]), 80)
            why = f"changed model: {model} is new to this store, or its files are"
            return Item("describe", why, self._seconds_of(1.0))
        if "captions" in inputs:
            return Item("describe", f"{inputs['captions']:,} new captions to embed", None)
        if "forgotten" in inputs:
            rows = inputs["forgotten"]
            return Item("describe", f"forgotten: {rows:,} rows leave the feature tables", None)
        new, again, size = inputs["new"], inputs["again"], inputs["bytes"]
        share = size / max(1, self.corpus["bytes"])
        self.corpus["new"] = new
        self.share = None if self.share is None or again else min(1.0, self.share + share)
        files = f"{new:,} new or changed {'file' if new == 1 else 'files'} ({_size(size)})"
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
        means = settings(_plain(stage.meaning(inputs["params"])))
        every = _records(self.build.store, stage.stage)
        kin = [r for r in every if (r.get("params"), r.get("version")) == (means, stage.version)]
        record, why, whole = self._cause(stage, inputs, means, kin, every, moved)
        seconds = self._estimate(kin or every, whole)
        self.items.append(Item(_name(stage, inputs["params"]), why, seconds))
        return self._stand_in(stage.stage, _outputs(stage, record))

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
            return None, "never done in this store", True
        record = max(reversed(every), key=lambda r: r.get("created", 0))
        causes = []
        if record.get("version", stage.version) != stage.version:
            causes.append(f"changed code: version {record['version']} to {stage.version}")
        differ = list(config_changes(record.get("params"), means))
        causes += [
            f"changed parameter{f' {key}' if key else ''}: {_short(old)} to {_short(new)}"
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
            raise _Seen
        if name == "tidy":
            raise _Seen
        try:
            self.version = stage(*given, **named)
        except WouldRun as would:
            why = f"{would.inputs['records']:,} records to publish as a new version"
            self.items.append(Item(name, why, self._last_seconds(name)))
            raise _Seen from None
        return self.version

    def _last_seconds(self, stage: str) -> float | None:
        seconds = (self.last or {}).get("seconds", {}).get(stage)
        return None if seconds is None else float(seconds)

    def _stand_in(self, stage: str, result: Any) -> Any:
        self.kept.append(result)
        for _, table in tables_in(result):
            self.pending[id(table)] = stage
        return result

    def _sources(self, value: Any) -> set[str]:
        """The stages with work to do whose results stand in for a value."""
        return {self.pending[id(t)] for _, t in tables_in((value,)) if id(t) in self.pending}


def _plain(params: Any) -> Any:
    return params.model_dump(mode="json") if hasattr(params, "model_dump") else params


def _records(store: Store, stage: str) -> list[dict[str, Any]]:
    """The last records of a stage in order, of all families; damaged ones are passed over."""
    prefix = f"ledger/{stage}/"
    try:
        found = [s for s in store.list(prefix) if s.key[len(prefix) :].count("/") == 1]
    except NotFound:
        return []
    last = sorted(found, key=lambda s: (s.mtime, s.key))[-RECORDS:]
    records = (versions.parsed(store.get(stat.key)) for stat in last)
    return [record for record in records if record and "tables" in record]


def _outputs(stage: Any, record: Mapping[str, Any] | None) -> Any:
    """The results of a stage as a record names them; without one, empty tables."""
    kind = get_type_hints(inspect.unwrap(stage))["return"]
    known = record["tables"] if record else {}
    return kind(**{field: _table(known.get(field), field) for field in kind._fields})


def _table(data: Any, name: str) -> Any:
    if not data:
        return Table(name)
    if "shards" in data:
        return Table.from_json(data)
    return {part: _table(item, name) for part, item in data.items()}


def _name(stage: Any, params: Any) -> str:
    """The stage, with the space where it is done space by space."""
    space = getattr(params, "space", None)
    return f"{stage.stage} {space}" if isinstance(space, str) else str(stage.stage)


def _because(changed: list[str], moved: Mapping[str, set[str]]) -> str:
    """Input that differs, and stages with work to do whose result may differ."""
    own = [arg.replace("_", " ") for arg in changed if arg not in moved]
    sources = list(dict.fromkeys(s for names in moved.values() for s in sorted(names)))
    told = [f"changed input: {', '.join(own)}"] if own else []
    told += [f"follows {', '.join(sources)}"] if sources else []
    return "; ".join(told) or "changed input"


def _short(value: Any) -> str:
    return "not set" if value is None else plain(str(value), 60)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def as_json(found: Plan) -> dict[str, Any]:
    """The plan for scripts."""
    return {
        "dataset": found.dataset,
        "last": found.last["version"] if found.last else None,
        "settings": [list(row) for row in found.settings],
        "corpus": found.corpus,
        "stages": [item._asdict() for item in found.items],
        "seconds": round(found.seconds, 1),
        "nothing_to_do": not found.items,
        "refused": found.refused,
    }


def show(found: Plan, console: Console) -> None:
    """The plan for people."""
    for line in _heading(found):
        console.print(Text(line), soft_wrap=True, highlight=False)
    if not found.items:
        return
    table = RichTable("stage", "why", "about", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    table.columns[2].justify = "right"
    for item in found.items:
        table.add_row(item.stage, Text(item.why), _time(item.seconds))
    console.print(table)
    unknown = any(item.seconds is None for item in found.items)
    more = ", and what is not known" if unknown else ""
    console.print(f"about {_time(found.seconds)}{more}", highlight=False)


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
        yield f"  corpus: {corpus['files']:,} files, {_size(corpus['bytes'])}"
    if found.refused:
        yield f"  the last build was refused by {versions.refused_by(found.refused)}"
    for key, old, new in found.settings:
        yield f"  setting {plain(key, 100)}: {_short(old)} to {_short(new)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 1:
        return "< 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"
