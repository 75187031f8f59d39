"""What a stage did before, by its records in the ledger: the nearest, and what differs from it."""

import inspect
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

from infra import versions
from infra.changes import config_changes
from infra.store import NotFound, Store
from infra.tables import Table
from infra.text import plain

RECORDS = 128  # records of a stage that are looked at, the newest
READERS = 16


def records(store: Store, stage: str, used: set[str]) -> list[dict[str, Any]]:
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
        read = list(threads.map(lambda stat: versions.parsed(store.get(stat.key)), last))
    return [record for record in read if record and "tables" in record]


def outputs(stage: Any, record: Mapping[str, Any] | None) -> Any:
    """The results of a stage as a record names them; without one, empty tables."""
    known = record["tables"] if record else {}
    kind = get_type_hints(inspect.unwrap(stage))["return"]
    return kind(**{field: _table(known.get(field), field) for field in fields(stage)})


def fields(stage: Any) -> tuple[str, ...]:
    """The names of a stage's tables."""
    named: tuple[str, ...] = get_type_hints(inspect.unwrap(stage))["return"]._fields
    return named


def _table(data: Any, name: str) -> Any:
    if not data:
        return Table(name)
    if "shards" in data:
        return Table.from_json(data)
    return {part: _table(item, name) for part, item in data.items()}


def distance(record: Mapping[str, Any], means: Any) -> int:
    """In how many settings a record differs."""
    return len(list(differences(record, means)))


def differences(record: Mapping[str, Any], means: Any) -> Iterator[tuple[str, Any, Any]]:
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


def as_json(params: Any) -> Any:
    """Parameters as the ledger has them."""
    return params.model_dump(mode="json") if hasattr(params, "model_dump") else params


def short(value: Any) -> str:
    """A setting in a few characters; of a digest its beginning."""
    said = "not set" if value is None else str(value)
    return said[:12] if re.fullmatch("[0-9a-f]{64}", said) else plain(said, 60)
