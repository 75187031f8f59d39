"""One walk through a flow that does no work: what would be done, why, and what would be asked.

Where a stage has work to do, its last result stands in, so that the walk goes on: of every later
stage it is known whether its parameters or its code changed, and what of its input will.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from pydantic import BaseModel

from flows.step import tables_in
from flows.trail import SAMPLES
from infra import garbage, tables, versions
from infra.asking import AskParams
from infra.build import Build, WouldRun
from infra.canonical import settings
from infra.changes import config_changes
from infra.foreseeing import TRIES, Calls, WouldAsk
from infra.ledger import pinned
from infra.store import NotFound, Store
from infra.tables import Table
from infra.text import plain
from tasks.describe import Described
from tasks.publish import Version

RECORDS = 128  # records of a stage that are looked at, the newest
READERS = 16
SHOWN_SETTINGS = 3
SHOWN_SOURCES = 3
# Stages that make more samples of those that they are given.
GROWING = ("split_answers", "ladder_views", "crop_views")
RENAMING = ("branch_samples",)  # gives every sample another name
START = 5.0  # seconds until workers have imported PyTorch and loaded models, where no run tells


class Item(NamedTuple):
    """A stage with work to do: why, how long it may take in seconds, None where unknown, and where
    it asks a model, its calls.
    """

    stage: str
    why: str
    seconds: float | None
    calls: Calls | None = None


class Size(NamedTuple):
    """How many rows a table that stands in can have: by the tables whose rows, fewer or more of
    them, can be in it. `sure` where these are bounds; None where nobody knows.
    """

    roots: Mapping[int, int] | None
    sure: bool

    @property
    def rows(self) -> int | None:
        return None if self.roots is None else sum(self.roots.values())


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
        self.sizes: dict[int, Size] = {}  # of tables that stand in, by id
        self.asked: list[AskParams] = []  # models that would be asked
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
            means = settings(_plain(stage.meaning(inputs["params"])))
            same = (means, stage.version)
            kin = [r for r in every if (r.get("params"), r.get("version")) == same]
            record, why, whole = self._cause(stage, inputs, means, kin, every, moved)
        seconds = self._estimate(kin or every, whole)
        before = _outputs(stage, record)
        calls = self._calls(stage, bound, before if kin else None, moved)
        name = called or _name(stage, inputs["params"])
        self.items.append(Item(name, why, seconds, calls))
        return self._stand_in(name, before, self._size(stage, inputs, before, bool(record)))

    def _called(self, stage: Any) -> str | None:
        """What the last version calls a stage that makes samples, while they come in its order."""
        if not {*SAMPLES, "views"} & set(_fields(stage)):
            return None
        name, expected = self.stops.pop(0) if self.stops else (None, None)
        if expected != stage.stage:
            self.stops.clear()
            return None
        return name

    def _records(self, stage: str) -> list[dict[str, Any]]:
        if stage not in self._read:
            self._read[stage] = _records(self.build.store, stage, self.used)
        return self._read[stage]

    @cached_property
    def _read(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _calls(
        self, stage: Any, bound: inspect.BoundArguments, before: Any, moved: Mapping[str, set[str]]
    ) -> Calls | None:
        """What a stage would ask: counted where its input is known, else by how many rows it has
        at most.
        """
        inputs = bound.arguments
        model = asks(inputs["params"])
        if model is None:
            return None
        self.asked.append(model)
        if not moved:
            if "before" in inputs:
                inputs["before"] = before
            try:
                inspect.unwrap(stage)(*bound.args, **bound.kwargs)
            except WouldAsk as would:
                return would.calls
            return Calls()
        given = self._given(inputs)
        if given.rows is None:
            return Calls(0, None, None, None, "unknown")
        plain = given.rows * questions(inputs["params"])
        most = TRIES * (model.attempt + 1) * plain
        each = self._price(stage, inputs["params"])
        money = None if each is None else round(each * plain)
        return Calls(0, plain, most, money, "bounded" if given.sure else "expected")

    def _price(self, stage: Any, params: Any) -> float | None:
        """What a call of a stage cost in the last version, in 10^-9 of the currency."""
        name = params.question.name if hasattr(params, "question") else stage.stage
        bill = (self.last or {}).get("cost", {}).get(name, {})
        return bill.get("money", 0) / bill["calls"] if bill.get("calls") else None

    def _given(self, inputs: Mapping[str, Any]) -> Size:
        """Rows of what a stage is given, the first of its arguments. Of several tables no row is
        in two: those that come from one are together no more than it has.
        """
        first = next(value for arg, value in inputs.items() if arg != "build")
        found = [self.sizes.get(id(t), Size({id(t): t.rows}, True)) for _, t in tables_in((first,))]
        if any(size.roots is None for size in found):
            return Size(None, False)
        roots = {root: rows for size in found for root, rows in (size.roots or {}).items()}
        return Size(roots, all(size.sure for size in found))

    def _size(self, stage: Any, inputs: Mapping[str, Any], result: Any, known: bool) -> Size:
        """How many samples a stage gives: no more than it was given, where it makes none; else as
        many as before.
        """
        given = self._given(inputs)
        if "given" in inputs and stage.stage not in (*GROWING, *RENAMING):
            return given
        if stage.stage in RENAMING and given.rows is not None:
            return Size({id(result): given.rows}, given.sure)
        rows = max((table.rows for _, table in tables_in(result)), default=0)
        return Size({id(result): rows} if known else None, False)

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
        record = min(reversed(every), key=lambda r: _distance(r, means))
        causes = []
        if record.get("version", stage.version) != stage.version:
            causes.append(f"changed code: version {record['version']} to {stage.version}")
        differ = list(_differences(record, means))
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
        for field, table in tables_in(result):
            self.pending[id(table)] = stage
            as_before = Size({id(table): table.rows}, False)
            self.sizes[id(table)] = size if size and field in SAMPLES else as_before
        return result

    def _sources(self, value: Any) -> set[str]:
        """The stages with work to do whose results stand in for a value."""
        return {self.pending[id(t)] for _, t in tables_in((value,)) if id(t) in self.pending}


def _new_model(would: WouldRun) -> str:
    model = plain(str(would.inputs["model"]), 80)
    return f"changed model: {model} is new to this store, or its files are"


def asks(params: Any) -> AskParams | None:
    """The model that a stage with these parameters asks, wherever in them it stands."""
    if isinstance(params, AskParams):
        by_captions = getattr(params, "labeller", "mllm") == "captions"
        return None if by_captions or not (params.endpoint or params.local) else params
    fields = type(params).model_fields if isinstance(params, BaseModel) else ()
    values = params if isinstance(params, tuple) else [getattr(params, field) for field in fields]
    return next((found for value in values if (found := asks(value))), None)


def questions(params: Any) -> int:
    """How many questions a stage has about each row, one after the other."""
    question = getattr(params, "question", None)
    return question.calls if question else 2 if getattr(params, "calls", "one") == "two" else 1


def _distance(record: Mapping[str, Any], means: Any) -> int:
    """In how many settings a record differs."""
    return len(list(_differences(record, means)))


def _differences(record: Mapping[str, Any], means: Any) -> Iterator[tuple[str, Any, Any]]:
    """(setting, before, now) of parameters that differ."""
    for key, old, new in config_changes(_by_name(record.get("params")), _by_name(means)):
        yield re.sub(r"\.\d+$", "", key), old, new


def _by_name(value: Any) -> Any:
    """Parameters in which a list of rows that begin with a name is a mapping, and so each row."""
    if isinstance(value, Mapping):
        return {name: _by_name(item) for name, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    if not all(isinstance(row, list) and row and isinstance(row[0], str) for row in value):
        return value
    return {row[0]: dict(enumerate(map(str, row[1:]))) for row in value}


def _plain(params: Any) -> Any:
    return params.model_dump(mode="json") if hasattr(params, "model_dump") else params


def _records(store: Store, stage: str, used: set[str]) -> list[dict[str, Any]]:
    """The last records of a stage in order, of all families, and if any are named only those;
    damaged ones are passed over.
    """
    prefix = f"ledger/{stage}/"
    try:
        found = [s for s in store.list(prefix) if s.key[len(prefix) :].count("/") == 1]
    except NotFound:
        return []
    found = [stat for stat in found if stat.key in used] if used else found
    last = sorted(found, key=lambda s: (s.mtime, s.key))[-RECORDS:]
    with ThreadPoolExecutor(READERS) as threads:
        records = list(threads.map(lambda stat: versions.parsed(store.get(stat.key)), last))
    return [record for record in records if record and "tables" in record]


def _outputs(stage: Any, record: Mapping[str, Any] | None) -> Any:
    """The results of a stage as a record names them; without one, empty tables."""
    known = record["tables"] if record else {}
    kind = get_type_hints(inspect.unwrap(stage))["return"]
    return kind(**{field: _table(known.get(field), field) for field in _fields(stage)})


def _fields(stage: Any) -> tuple[str, ...]:
    """The names of a stage's tables."""
    fields: tuple[str, ...] = get_type_hints(inspect.unwrap(stage))["return"]._fields
    return fields


def _table(data: Any, name: str) -> Any:
    if not data:
        return Table(name)
    if "shards" in data:
        return Table.from_json(data)
    return {part: _table(item, name) for part, item in data.items()}


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


def short(value: Any) -> str:
    """A setting in a few characters; of a digest its beginning."""
    said = "not set" if value is None else str(value)
    return said[:12] if re.fullmatch("[0-9a-f]{64}", said) else plain(said, 60)


def size_of(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
