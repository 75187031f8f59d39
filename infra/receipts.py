"""Receipts: shards that workers wrote down before their stage came to its end.

ledger/<stage>/<family>/receipts/<sha256>.json
"""

import json
from collections.abc import Collection, Iterable, Iterator

import pyarrow as pa

from infra import tables
from infra.ledger import Ledger
from infra.store import Store, listed
from infra.tables import Shard, Table


def write(store: Store, stage: str, family: str, shard: Shard) -> None:
    """Say of a shard that it is done."""
    Ledger(store).write(stage, f"{family}/receipts", shard.sha256, {"shard": list(shard)})


def read(store: Store, stage: str, family: str) -> Iterator[Shard]:
    """The shards that are done, of a build that did not come to its end as well."""
    for stat in listed(store, f"ledger/{stage}/{family}/receipts/"):
        yield Shard(*json.loads(store.get(stat.key))["shard"])


def wanted(
    store: Store, name: str, column: str, known: Iterable[Shard], ids: Collection[str]
) -> tuple[list[Shard], set[str]]:
    """Shards of a table with the known rows whose ids are wanted, each once, and their ids.

    They are read one at a time; one in which all are wanted stays as it is.
    """
    found: list[Shard] = []
    have: set[str] = set()
    for shard in dict.fromkeys(known):
        part = tables.read(store, Table(name, (shard,)))
        names = part[column].to_pylist()
        mask = [row in ids and row not in have for row in names]
        if all(mask):
            found.append(shard)
        elif any(mask):
            found.append(tables.write_shard(store, part.filter(pa.array(mask)), name))
        have.update(row for row, is_kept in zip(names, mask, strict=True) if is_kept)
    return found, have
