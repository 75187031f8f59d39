"""The ledger: which work is done, under which key, with which result. Records are written last.

    ledger/<stage>/<family>/<key>.json      a finished stage: its tables and counts
    ledger/<stage>/<family>/receipts/...    a finished shard of a stage that was interrupted

A family is the stage's name, VERSION, the parameters that affect its result, and the names of
tables that say with what their rows were made; a key adds the digest of the columns it reads.
"""

import functools
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel

from infra import tables
from infra.canonical import canonical, digest, settings
from infra.errors import PairmillError
from infra.store import Conflict, NotFound, Store, listed
from infra.tables import Table

FORMAT = 1
MARK = "pairmill.json"
SKETCH = 256  # ids by which sets are told apart
NEAREST_OF = 8  # records that are looked at

Outputs = TypeVar("Outputs", bound=tuple)


@dataclass(frozen=True)
class Ledger:
    """Records of finished work in one store. `used` collects paths of those found or written."""

    store: Store
    used: set[str] | None = field(default=None, compare=False)

    def find(self, stage: str, family: str, key: str) -> dict[str, Any] | None:
        """The record under a key, or None. Raises PairmillError for a damaged or newer one."""
        path = f"ledger/{stage}/{family}/{key}.json"
        record = self._load(path)
        if record is not None and self.used is not None:
            self.used.add(path)
        return record

    def newest(self, stage: str, family: str) -> tuple[int, list[dict[str, Any]]]:
        """The records of a family whose key begins with the highest number, and that number.

        No clock has a say. Two writers that met have left two records of one number.
        """
        prefix = f"ledger/{stage}/{family}/"
        paths = [s.key for s in listed(self.store, prefix) if "/" not in s.key[len(prefix) :]]
        numbers = {path: generation(path[len(prefix) :]) for path in paths}
        last = max(numbers.values(), default=0)
        found = (self._load(path) for path in paths if numbers[path] == last)
        return last, [record for record in found if record is not None]

    def nearest(self, stage: str, family: str, sketch: Sequence[str]) -> dict[str, Any] | None:
        """Of the last records of a family the one that was made for the likest set, or None.

        Times of files only bound how many are read: whichever is taken, the rows are the same.
        """
        prefix = f"ledger/{stage}/{family}/"
        found = [s for s in listed(self.store, prefix) if "/" not in s.key[len(prefix) :]]
        last = sorted(found, key=lambda s: (s.mtime, s.key))[-NEAREST_OF:]
        records = [self._load(stat.key) for stat in reversed(last)]
        known = [record for record in records if record]
        return max(known, key=lambda r: _likeness(r.get("sketch", []), sketch), default=None)

    def write(
        self,
        stage: str,
        family: str,
        key: str,
        record: Mapping[str, Any],
        *,
        if_absent: bool = False,
    ) -> None:
        """Record finished work; what it names must be stored already. Raises as `Store.put`."""
        body = canonical({"format": FORMAT, **record})
        path = f"ledger/{stage}/{family}/{key}.json"
        self.store.put(path, body, if_absent=if_absent)
        if self.used is not None:
            self.used.add(path)

    def _load(self, path: str) -> dict[str, Any] | None:
        try:
            data = self.store.get(path)
        except NotFound:
            return None
        try:
            record = json.loads(data)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise PairmillError(
                f"the ledger record {path} in {self.store.uri} is damaged; "
                "`pairmill verify-store --repair` removes it, and its work is done again"
            )
        if record.get("format") != FORMAT:
            raise PairmillError(
                f"the ledger record {path} has format {record.get('format')}, this Pairmill reads "
                f"{FORMAT}; use the Pairmill that wrote the store, or an empty store"
            )
        return record


def check_format(store: Store, *, write: bool) -> None:
    """Refuse a store that a newer Pairmill made; a new store is marked, with `write`.

    Raises PairmillError.
    """
    try:
        data = store.get(MARK)
    except NotFound:
        if write:
            with suppress(Conflict):
                store.put(MARK, canonical({"format": FORMAT}), if_absent=True)
        return
    try:
        found = json.loads(data)["format"]
    except (ValueError, KeyError, TypeError):
        raise PairmillError(
            f"{MARK} in {store.uri} is damaged; delete it if no other program keeps files there"
        ) from None
    if found != FORMAT:
        raise PairmillError(
            f"{store.uri} was made by another Pairmill (format {found}, this one reads {FORMAT}); "
            "use that one, or an empty store"
        )


def generation(key: str) -> int:
    """The number that the key of a growing table's record begins with; 0 where there is none."""
    number = key.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def family(name: str, version: int, params: Any) -> str:
    """Digest of what a stage's result depends on besides its input rows."""
    return digest({"stage": name, "version": version, "params": settings(_plain(params))})[:20]


def unless_dropped_by(*rules: str) -> Callable[[Any, Any], bool]:
    """For `is_final`: whether no row of a stage's `drops` has one of these rules, which the next
    build may not meet.
    """

    def is_final(outputs: Any, build: Any) -> bool:
        found = tables.read(build.store, outputs.drops, ["rule"])["rule"].to_pylist()
        return not {*rules}.intersection(found)

    return is_final


def stage(
    version: int,
    reads: Mapping[str, Sequence[str]],
    meaning: Callable[[Any], Any] = lambda params: params,
    is_final: Callable[[Any, Any], bool] = lambda outputs, build: True,
    starts_from: tuple[str, str] | None = None,
) -> Callable[[Callable[..., Outputs]], Callable[..., Outputs]]:
    """Make `fn(build, *tables, params) -> NamedTuple of Tables` do its work once per key.

    `reads` names, for each table argument, the columns its key covers; an argument may also be a
    mapping of tables. `meaning` gives what of the parameters affects the result. With
    `starts_from`, an argument and its column of ids, the function is given `before`: the outputs
    of the finished work of its family whose ids differ least, or None. What it starts from may
    change the cost, never the rows. A result that is not `is_final` is not found again under its
    key, but others may start from it. What in `params` has a method `pinned(build)` is replaced by
    what that gives: what only the build can find out. The function gains `.stage`, `.version`,
    `.reads` and `.meaning`.
    """

    def wrap(fn: Callable[..., Outputs]) -> Callable[..., Outputs]:
        name = fn.__name__
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def run(build: Any, *args: Any, **kwargs: Any) -> Outputs:
            bound = signature.bind(build, *args, **kwargs)
            bound.apply_defaults()
            inputs, outputs = bound.arguments, get_type_hints(fn)["return"]
            inputs["params"] = pinned(inputs["params"], build)
            means = settings(_plain(meaning(inputs["params"])))
            digests = {arg: _digest(build.store, inputs[arg], reads[arg]) for arg in reads}
            numerics = {arg: digests[arg] for arg in reads if not reads[arg]}
            kin = family(name, version, [means, numerics])
            key = digest(digests)
            record = build.ledger.find(name, kin, key)
            if record is not None:
                return outputs(**_tables(record["tables"]))
            build.begin(name, inputs)
            start, work = time.perf_counter(), Counter(build.work)
            sketch = (
                _sketch(build.store, inputs[starts_from[0]], starts_from[1]) if starts_from else []
            )
            if starts_from:
                nearest = build.ledger.nearest(name, kin, sketch)
                inputs["before"] = outputs(**_tables(nearest["tables"])) if nearest else None
            result = _computed(fn, bound)
            about = {
                "tables": _json(_named(result)),
                "sketch": sketch,
                "inputs": digests,
                "params": means,
                "version": version,
                "milliseconds": round(1000 * (time.perf_counter() - start)),
                "work": dict(build.work - work),
                "created": int(time.time()),
            }
            build.ledger.write(name, kin, key if is_final(result, build) else f"{key}.part", about)
            return result

        run.stage, run.version, run.reads = name, version, dict(reads)  # type: ignore[attr-defined]
        run.meaning = meaning  # type: ignore[attr-defined]
        return run

    return wrap


def _computed(fn: Callable[..., Outputs], bound: inspect.BoundArguments) -> Outputs:
    """The stage's result; from nothing where what it starts from turns out to be damaged."""
    before = bound.arguments.get("before")
    try:
        return fn(*bound.args, **bound.kwargs)
    except tables.Damaged as error:
        if before is None or error.sha256 not in json.dumps(_json(_named(before))):
            raise
    bound.arguments["before"] = None
    return fn(*bound.args, **bound.kwargs)


def _sketch(store: Store, table: Table, column: str) -> list[str]:
    """The least ids of a table, shortened: a fair draw, since ids are hashes (Broder 1997)."""
    ids = tables.frame(store, table, [column])[column].unique().bottom_k(SKETCH)
    return sorted(name[:16] for name in ids.to_list())


def _likeness(one: Sequence[str], other: Sequence[str]) -> float:
    """Estimated share of the union of two sets that is in both, from their sketches."""
    least = sorted({*one, *other})[:SKETCH]
    return len({*one} & {*other}.intersection(least)) / max(1, len(least))


def _plain(params: Any) -> Any:
    return params.model_dump(mode="json") if isinstance(params, BaseModel) else params


def pinned(value: Any, build: Any) -> Any:
    """Parameters, with those in them that have a method `pinned` replaced by what it gives."""
    if hasattr(value, "pinned"):
        return value.pinned(build)
    if not isinstance(value, BaseModel):
        return value
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    found = {name: pinned(inner, build) for name, inner in fields.items()}
    changed = {name: inner for name, inner in found.items() if inner is not fields[name]}
    return value.model_copy(update=changed) if changed else value


def _named(result: Any) -> dict[str, Any]:
    return dict(zip(result._fields, result, strict=True))


def _digest(store: Store, value: Any, columns: Sequence[str]) -> Any:
    if isinstance(value, Table):
        return tables.digest(store, value, columns)
    return {name: tables.digest(store, table, columns) for name, table in value.items()}


def _json(value: Any) -> Any:
    if isinstance(value, Table):
        return value.to_json()
    return {name: _json(item) for name, item in value.items()}


def _tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Tables, or mappings of tables, back from their JSON."""
    return {
        name: Table.from_json(item) if "shards" in item else _tables(item)
        for name, item in data.items()
    }
