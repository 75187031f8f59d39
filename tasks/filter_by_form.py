"""Filter by form: pictures too small or too long to show anything, texts that repeat themselves.

The rule filters of Bee's HoneyPipe (arXiv 2510.13795), which gives no numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.rules import Rule, by_rules
from infra.tables import Table


class FormFilter(BaseModel):
    """The form of pictures and texts, as `measure_images` and `measure_texts` tell it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(
        32,
        ge=1,
        description="Least short side in pixels. Not given in the source; our own default, because"
        " less shows nothing.",
    )
    max_aspect: float = Field(
        5.0,
        ge=1,
        description="Most long / short side. Not given in the source; our own default, because"
        " strips shrink to lines.",
    )
    max_repetition: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Most share of 3-grams of words that repeat. Not given in the source; our own"
        " default, because only loops do.",
    )


class Filtering(NamedTuple):
    """The bounds, and the column of texts that must not repeat themselves."""

    bounds: FormFilter
    text: str


class Filtered(NamedTuple):
    """Samples of good form, and the others with the measure that decided."""

    samples: Table
    drops: Table


def meaning(params: Filtering) -> dict[str, Any]:
    return {**params.bounds.model_dump(mode="json"), "text": params.text}


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def filter_by_form(build: Build, given: Table, params: Filtering) -> Filtered:
    """Keep samples by `short_side` in pixels, `aspect` in per mille and `<text>_repetition` in
    millionths.
    """
    kept, gone = by_rules(tables.frame(build.store, given), rules(*params))
    return Filtered(
        samples.write(build.store, kept),
        samples.write_drops(build.store, samples.drops(gone, "filter_by_form")),
    )


def rules(bounds: FormFilter, text: str) -> Sequence[Rule]:
    """The bounds in the order in which they are looked at."""
    aspect, share = round(1_000 * bounds.max_aspect), round(1e6 * bounds.max_repetition)
    return (
        Rule("small_image", "short_side", "least", bounds.min_side),
        Rule("extreme_aspect", "aspect", "most", aspect),
        Rule("repeated_text", f"{text}_repetition", "most", share),
    )
