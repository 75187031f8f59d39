"""Files of records as their trainers read them, beside the Parquet files of every version."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import polars as pl

from infra import changes, tables, versions
from infra.errors import PairmillError
from infra.product import Contents, Product
from infra.store import Store

Files = Iterator[tuple[str, bytes]]


def samples_of(files: Callable[[pl.DataFrame], Files]) -> Product:
    """A version whose records are samples, with these files."""
    return Product(_since, lambda rows: rows["image_id"], files, "sample_card.md")


def llava(rows: pl.DataFrame) -> Files:
    """LLaVA's conversation JSON: {id, image, conversations: [{from, value}, ...]}.

    Of columns `turns` (texts, questions and answers in turn), or `instruction` and `response`.
    """
    for split, part in _splits(rows):
        entries = [
            {
                "id": row["sample_id"],
                "image": row["key"],
                "conversations": [
                    {"from": "gpt" if at % 2 else "human", "value": text}
                    for at, text in enumerate(_turns(row))
                ],
            }
            for row in part.iter_rows(named=True)
        ]
        yield f"llava/{split}.json", json.dumps(entries, ensure_ascii=False, indent=1).encode()


def _turns(row: Mapping[str, Any]) -> list[str]:
    turns = list(row.get("turns") or [row["instruction"], row["response"]])
    return [f"<image>\n{turns[0]}", *turns[1:]]


def lines(rows: pl.DataFrame) -> Files:
    """JSON lines: every column of a record, one object a line."""
    for split, part in _splits(rows):
        dumped = (json.dumps(row, ensure_ascii=False) for row in part.iter_rows(named=True))
        yield f"jsonl/{split}.jsonl", "".join(f"{line}\n" for line in dumped).encode()


def _splits(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for split in ("train", "validation"):
        part = rows.filter(pl.col("split") == split) if rows.height else rows
        if part.height:
            yield split, part


EXPORTS: Mapping[str, Callable[[pl.DataFrame], Files]] = {"llava": llava, "lines": lines}


def _since(
    store: Store, last: Mapping[str, Any] | None, manifest: Mapping[str, Any], contents: Contents
) -> dict[str, Any] | None:
    """How the records differ from those of the last version, in counts; None for the first."""
    if last is None:
        return None
    try:
        old = versions.records(store, last)
    except PairmillError as error:
        return {"version": last["version"], "unreadable": str(error).partition("\n")[0]}
    new = tables.frame(store, contents.records, ["sample_id"])
    was = set(old["sample_id"]) if old.width else set()
    now = set(new["sample_id"])
    counts = {"added": len(now - was), "removed": len(was - now)}
    rows = [["record", change, "its samples", n] for change, n in counts.items() if n]
    return {
        "version": last["version"],
        "config": [list(r) for r in changes.config_changes(last["config"], manifest["config"])],
        "models": [],
        "changes": rows,
    }
