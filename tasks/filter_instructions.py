"""Filter instructions by the grades, 1 to 5, that judges gave them.

Oasis (ICCV 2025, arXiv 2503.08741); the numbers are of its code, github.com/Letian2003/MM_INF.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import Rule, by_rules
from infra.tables import Table


class InstructionFilter(BaseModel):
    """The least grades of an instruction; 5 is the best of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nonsense_least: int = Field(5, ge=1, le=5, description="As the code; 5 is none.")
    hallucination_least: int = Field(5, ge=1, le=5, description="As the code; 5 is none.")
    solvability_least: int = Field(3, ge=1, le=5, description="As the code.")
    clarity_least: int = Field(3, ge=1, le=5, description="As the code.")
    sum_least: int = Field(
        7, ge=2, le=10, description="Least solvability and clarity together. As the code."
    )


class Filtered(NamedTuple):
    """Samples with grades that are high enough, and the others with the grade that decided."""

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL})
def filter_instructions(build: Build, given: Table, params: InstructionFilter) -> Filtered:
    """Keep samples by `nonsense`, `hallucination`, `solvability` and `clarity`."""
    kept, gone = by_rules(tables.frame(build.store, given), rules(params))
    return Filtered(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(gone, "filter_instructions")),
    )


def rules(params: InstructionFilter) -> Sequence[Rule]:
    """What the grades must be, in the order in which they are looked at."""
    return (
        Rule("nonsense", "nonsense", "least", params.nonsense_least),
        Rule("hallucination", "hallucination", "least", params.hallucination_least),
        Rule("not_solvable", "solvability", "least", params.solvability_least),
        Rule("unclear", "clarity", "least", params.clarity_least),
        Rule("low_sum", ("solvability", "clarity"), "least", params.sum_least),
    )
