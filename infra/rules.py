"""Rules on columns of samples: who keeps them all, and of the others the first that each breaks."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

PARTS = 1_000_000
Comparison = Literal["least", "most", "is", "is_not", "longer"]
Parted = tuple[pl.DataFrame, list[dict[str, Any]]]  # who is kept, and rows for samples.drops


class Rule(NamedTuple):
    """What a sample must satisfy: its name is the fate of those that don't.

    Of several columns the sum is looked at; it is null where one of them is.
    `least` and `most` bound a number, both ends kept; `is` and `is_not` compare with a value;
    `longer` wants a text of at least so many characters. A null fails unless `null_passes`.
    """

    name: str
    column: str | tuple[str, ...]
    comparison: Comparison
    value: Any = None
    null_passes: bool = False


def by_rules(rows: pl.DataFrame, rules: Sequence[Rule]) -> Parted:
    """Those that satisfy all rules, and the others: the first that fails is the fate."""
    each = [pl.when(~_holds(rule)).then(at) for at, rule in enumerate(rules)]
    values = [_value(rule).alias(f"_value {at}") for at, rule in enumerate(rules)]
    fails = pl.coalesce(*each, pl.lit(None, pl.Int32))
    judged = rows.with_columns(fails.alias("_fails"))
    kept = judged.filter(pl.col("_fails").is_null()).drop("_fails")
    lost = judged.filter(pl.col("_fails").is_not_null()).with_columns(values)
    return kept, [_drop(row, rules[row["_fails"]]) for row in lost.iter_rows(named=True)]


def by_share(
    rows: pl.DataFrame, column: str, share: float, highest: bool = True, per: str | None = None
) -> Parted:
    """The first of each group by value, then id, and the others, as `beyond_quantile`.

    It is a function of the set. Of n samples the share is rounded up. A null is behind all values.
    """
    order = rows.sort(column, "sample_id", descending=[highest, False], nulls_last=True)
    place, count = pl.int_range(pl.len()), pl.len()
    if per:
        place, count = place.over(per), count.over(per)
    # place < ceil(n * share), without a float.
    within = place * PARTS < count.cast(pl.Int64) * round(share * PARTS)
    ranked = order.with_columns(within.alias("_kept"))
    lost = ranked.filter(~pl.col("_kept")).select("sample_id", column)
    gone = [{"id": name, "rule": "beyond_quantile", "value": value} for name, value in lost.rows()]
    return ranked.filter(pl.col("_kept")).drop("_kept"), gone


def _value(rule: Rule) -> pl.Expr:
    if isinstance(rule.column, str):
        return pl.col(rule.column)
    return pl.sum_horizontal(*rule.column, ignore_nulls=False)


def _holds(rule: Rule) -> pl.Expr:
    column = _value(rule)
    holds = {
        "least": lambda: column >= rule.value,
        "most": lambda: column <= rule.value,
        "is": lambda: column == rule.value,
        "is_not": lambda: column != rule.value,
        "longer": lambda: column.str.strip_chars().str.len_chars() >= rule.value,
    }
    return holds[rule.comparison]().fill_null(rule.null_passes)


def _drop(row: dict[str, Any], rule: Rule) -> dict[str, Any]:
    value = row[f"_value {row['_fails']}"]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    number, text = (value, None) if is_number else (None, None if value is None else str(value))
    return {"id": row["sample_id"], "rule": rule.name, "value": number,
            "detail": text and text[:200]}  # fmt: skip
