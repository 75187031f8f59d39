"""Filter crops: parts of pictures that are what they are called, and that their captions fit.

RegionGPT (arXiv 2403.02330) removes captions of regions by CLIP score; cut-off, model and against
what are not given. That a crop must look like its class, and a caption say more than its context
does, are additions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import Rule, by_rules, by_share
from infra.tables import Table


class CropFilter(BaseModel):
    """Which described crops are kept, by what `score_crops` and `measure_copying` say of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_rank: int = Field(
        5,
        ge=1,
        description="The crop must rank its class so high among `score.classes`. Not given in the"
        " source; our own addition against boxes on the wrong thing.",
    )
    clip_min: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Least cosine of crop and caption. The paper's is not given in the source; none"
        " is our own default, since cosines don't carry over between models.",
    )
    copy_max: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Most of its 5-grams that a caption may share with that of the whole; null"
        " measures only. Not given in the source; our own addition.",
    )
    clip_keep: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of each class that is kept, best cosine first. Not given in the source;"
        " our own default.",
    )


class Filtering(NamedTuple):
    """The bounds, and the columns of the text and of the class of a crop."""

    bounds: CropFilter
    text: str
    label: str


class Filtered(NamedTuple):
    """Samples within the bounds and their class's share, and the others with what decided."""

    samples: Table
    drops: Table


def meaning(params: Filtering) -> dict[str, Any]:
    return {**params.bounds.model_dump(mode="json"), "text": params.text, "label": params.label}


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def filter_crops(build: Build, given: Table, params: Filtering) -> Filtered:
    """Keep samples by `class_rank`, `clip_score` and `<text>_copied`, the latter in millionths.

    A crop without a class has no rank to fail by.
    """
    rows = tables.frame(build.store, given)
    fit, failed = by_rules(rows, tuple(rules(params.bounds, params.text)))
    best, beyond = by_share(fit, "clip_score", params.bounds.clip_keep, per=params.label)
    return Filtered(
        samples.write(build.store, best),
        samples.write_drops(build.store, samples.drops([*failed, *beyond], "filter_crops")),
    )


def rules(bounds: CropFilter, text: str) -> Iterator[Rule]:
    """The bounds that are set, in the order in which they are looked at."""
    yield Rule("unlike_its_class", "class_rank", "most", bounds.class_rank, null_passes=True)
    if bounds.clip_min is not None:
        yield Rule("low_clip_score", "clip_score", "least", round(1e6 * bounds.clip_min))
    if bounds.copy_max is not None:
        yield Rule("copies_the_whole", f"{text}_copied", "most", round(1e6 * bounds.copy_max))
