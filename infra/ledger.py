"""The ledger: which work is done, under which key, with which result. Records are written last.

    ledger/<stage>/<family>/<key>.json      a finished stage: its tables and counts
    ledger/<stage>/<family>/receipts/...    a finished shard of a stage that was interrupted

A family is the stage's name, VERSION and the parameters that affect its result; a key adds the
digest of the columns it reads.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel

from infra import tables
from infra.canonical import canonical, digest, settings
from infra.errors import PairmillError
from infra.store import NotFound, Store
from infra.tables import Table

FORMAT = 1

Outputs = TypeVar("Outputs", bound=tuple)


@dataclass(frozen=True)
class Ledger:
    """Records of finished work in one store."""

    store: Store

    def find(self, stage: str, family: str, key: str) -> dict[str, Any] | None:
        """The record under a key, or None. Raises PairmillError for a damaged or newer one."""
        return self._load(f"ledger/{stage}/{family}/{key}.json")

    def newest(self, stage: str, family: str) -> dict[str, Any] | None:
        """The record of a family that was written last, or None."""
        prefix = f"ledger/{stage}/{family}/"
        try:
            records = [s for s in self.store.list(prefix) if "/" not in s.key[len(prefix) :]]
        except NotFound:
            return None
        if not records:
            return None
        return self._load(max(records, key=lambda s: (s.mtime, s.key)).key)

    def write(self, stage: str, family: str, key: str, record: Mapping[str, Any]) -> None:
        """Record finished work; what it names must be stored already."""
        body = canonical({"format": FORMAT, **record})
        self.store.put(f"ledger/{stage}/{family}/{key}.json", body)

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
                "delete it and the work it stood for is done again"
            )
        if record.get("format") != FORMAT:
            raise PairmillError(
                f"the ledger record {path} has format {record.get('format')}, this Pairmill reads "
                f"{FORMAT}; use the Pairmill that wrote the store, or an empty store"
            )
        return record


def family(name: str, version: int, params: Any) -> str:
    """Digest of what a stage's result depends on besides its input rows."""
    data = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    return digest({"stage": name, "version": version, "params": settings(data)})[:20]


def stage(
    version: int,
    reads: Mapping[str, Sequence[str]],
    meaning: Callable[[Any], Any] = lambda params: params,
    is_final: Callable[[Any, Any], bool] = lambda outputs, build: True,
) -> Callable[[Callable[..., Outputs]], Callable[..., Outputs]]:
    """Make `fn(build, *tables, params) -> NamedTuple of Tables` do its work once per key.

    `reads` names, for each table argument, the columns its key covers; an argument may also be a
    mapping of tables. `meaning` gives what of the parameters affects the result; a result that is
    not `is_final` is returned, not recorded. The function gains `.stage`, `.version`, `.reads`.
    """

    def wrap(fn: Callable[..., Outputs]) -> Callable[..., Outputs]:
        name = fn.__name__
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def run(build: Any, *args: Any, **kwargs: Any) -> Outputs:
            bound = signature.bind(build, *args, **kwargs)
            bound.apply_defaults()
            inputs = bound.arguments
            kin = family(name, version, meaning(inputs["params"]))
            key = digest({arg: _digest(build.store, inputs[arg], reads[arg]) for arg in reads})
            outputs = get_type_hints(fn)["return"]
            record = build.ledger.find(name, kin, key)
            if record is not None:
                return outputs(**_tables(record["tables"]))
            build.begin(name, inputs)
            result = fn(*bound.args, **bound.kwargs)
            if is_final(result, build):
                build.ledger.write(name, kin, key, {"tables": _json(_named(result))})
            return result

        run.stage, run.version, run.reads = name, version, dict(reads)  # type: ignore[attr-defined]
        return run

    return wrap


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
