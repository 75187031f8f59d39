"""Filter by difficulty: what context should make easier and does not, goes; what is too easy, too.

The rule of Cherry LLM (Li et al. 2024, arXiv 2308.12032): a ratio above 1 says that a question
makes its answer less likely, and the highest below 1 teach most. LLaVAR-2 (arXiv 2412.16364)
filters by mIFD and FFD, and gives no cut-offs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import Rule, by_rules, by_share
from infra.tables import Table


class DifficultyFilter(BaseModel):
    """Which scores, as `score_difficulty` gives them, samples for training have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mifd_max: float = Field(
        1.0,
        gt=0,
        description="Both answers of a pair have at most this mIFD. Not given in the source; our"
        " own default, because above 1 the question makes its answer less likely (Cherry LLM).",
    )
    ffd_max: float = Field(
        1.0,
        gt=0,
        description="The explanation has at most this FFD. Not given in the source; our own"
        " default, because above 1 the first answer makes its explanation less likely.",
    )
    keep_top_quantile: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of those that is kept, the highest mIFD first. Not given in the"
        " source; our own default is all, where Cherry LLM keeps 0.1.",
    )


class Filtered(NamedTuple):
    """Samples within the bounds and the share, and the others with the score that decided."""

    samples: Table
    drops: Table


@stage(version=1, reads={"given": tables.ALL})
def filter_by_difficulty(build: Build, given: Table, params: DifficultyFilter) -> Filtered:
    """Keep samples by their `mifd` and `ffd` in millionths; one without either is `unscored`."""
    fit, failed = by_rules(tables.frame(build.store, given), rules(params))
    kept, beyond = by_share(fit, "mifd", params.keep_top_quantile)
    return Filtered(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops([*failed, *beyond], "filter_by_difficulty")),
    )


def rules(params: DifficultyFilter) -> Sequence[Rule]:
    """What the scores must be, in the order in which they are looked at."""
    return (
        Rule("unscored", "mifd", "least", 0),
        Rule("unscored", "ffd", "least", 0),
        Rule("high_mifd", "mifd", "most", round(1e6 * params.mifd_max)),
        Rule("high_ffd", "ffd", "most", round(1e6 * params.ffd_max)),
    )
