"""What the checks said of a pair, for `pairmill why`: verdicts, the line-up, the round trip."""

from collections.abc import Callable, Iterator, Mapping
from string import ascii_uppercase
from typing import Any

import polars as pl

from infra.text import plain

Line = tuple[str, str]
Tables = Callable[[str, str], pl.DataFrame | None]


def told(table: Tables, pair: Mapping[str, Any], name_of: Callable[[str], str]) -> Iterator[Line]:
    """`table(stage, name)` gives what a version kept, `name_of` an image as it is shown."""

    def rows(stage: str, name: str, order: str) -> list[dict[str, Any]]:
        found = table(stage, name)
        if found is None:
            return []
        return found.filter(pl.col("pair_id") == pair["pair_id"]).sort(order).to_dicts()

    labels = rows("label_pairs", "labels", "pair_id")
    texts = labels[0]["instructions"] if labels else []
    for row in rows("judge_labels", "verdicts", "number"):
        yield "judge", _verdict(row, texts)
    for row in rows("line_up", "line_ups", "place"):
        yield "line-up", _candidate(row, pair, name_of)
    for row in rows("round_trip", "preferences", "number"):
        target, negative = (f"{row[side] / 1e6:.4f}" for side in ("target", "negative"))
        yield "round trip", f"instruction {row['number']}: target {target}, best other {negative}"


def _verdict(row: Mapping[str, Any], texts: list[str]) -> str:
    by = plain(row["model"] or "", 120)
    if not row["number"]:
        return f"no verdict by {by}: {row['reason']}"
    reason = "" if row["reason"] == "none" else f", {row['reason']}"
    number = row["number"]
    text = plain(texts[number - 1], 300) if number <= len(texts) else ""
    return f"{row['verdict']}{reason} (by {by}): {text}"


def _candidate(
    row: Mapping[str, Any], pair: Mapping[str, Any], name_of: Callable[[str], str]
) -> str:
    if not row["place"]:
        return f"no answer by {plain(row['model'] or '', 120)}: {row['reason']}"
    letter = ascii_uppercase[row["place"] - 1]
    best = ", the best" if row["best"] else ""
    role = "the target" if row["image_id"] == pair["target"] else "a hard negative"
    return f"{letter} {row['verdict']}{best}: {role}, {name_of(row['image_id'])}"
