"""Filter samples by a table of rules on their columns; each that fails is a fate."""

from typing import Any, NamedTuple

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import Rule as Rule
from infra.rules import by_rules
from infra.tables import Table


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
    kept, gone = by_rules(tables.frame(build.store, given), params.rules)
    return Filtered(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(gone, "filter_samples")),
    )
