"""Filter samples by a table of rules on their columns; each that fails is a fate."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

Comparison = Literal["least", "most", "is", "is_not", "longer"]


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


class Rules(NamedTuple):
    """Rules in the order in which they are looked at: the first that fails is the fate."""

    rules: tuple[Rule, ...]


class Filtered(NamedTuple):
    """Samples that satisfy every rule, and the others with the value that decided."""

    samples: Table
    drops: Table


def meaning(params: Rules) -> Any:
    return [list(rule) for rule in params.rules]


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def filter_samples(build: Build, given: Table, params: Rules) -> Filtered:
    """Keep the samples that satisfy all rules."""
    rows = tables.frame(build.store, given)
    each = [pl.when(~_holds(rule)).then(at) for at, rule in enumerate(params.rules)]
    values = [_value(rule).alias(f"_value {at}") for at, rule in enumerate(params.rules)]
    fails = pl.coalesce(*each, pl.lit(None, pl.Int32))
    judged = rows.with_columns(fails.alias("_fails"))
    kept = judged.filter(pl.col("_fails").is_null()).drop("_fails")
    lost = judged.filter(pl.col("_fails").is_not_null()).with_columns(values)
    return Filtered(
        samples.write(build.store, kept),
        samples.write_drops(
            build.store, samples.drops(_drops(lost, params.rules), "filter_samples")
        ),
    )


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


def _drops(lost: pl.DataFrame, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    found = []
    for row in lost.iter_rows(named=True):
        rule = rules[row["_fails"]]
        value = row[f"_value {row['_fails']}"]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        number, text = (value, None) if is_number else (None, None if value is None else str(value))
        found.append(
            {
                "id": row["sample_id"],
                "rule": rule.name,
                "value": number,
                "detail": text and text[:200],
            }
        )
    return found
