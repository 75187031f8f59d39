"""Clean prompts: what tells a model to answer without thinking goes, at the head and at the tail.

Source: Bee's HoneyPipe (arXiv 2510.13795), which gives "Answer directly" as the example and no
list. The phrases are ours, after those that public instruction sets end their questions with.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table

REACH = 400  # characters from the end in which a phrase may begin

_PLEASE = r"(?:please |kindly |just |only |simply |and )*"
_SHORT = r"(?:short|brief|concise|direct|final|quick|simple|one[- ]word|single[- ]word)"
_REPLY = r"(?:answer|response|reply)"
_UNIT = (
    r"(?:word|phrase|number|letter|sentence|option|option'?s letter|(?:correct )?option letter|"
    r"letter of the (?:correct |right )?(?:option|choice|answer)|yes or no|true or false)"
)
_OF = r"(?: (?:from|of|among) the (?:given |provided )?(?:choices|options))?"
PHRASES = (
    rf"{_PLEASE}(?:answer|respond|reply)(?: to)?(?: the| this)?(?: questions?)?(?: below)?"
    r" (?:directly|briefly|concisely|shortly|succinctly|in short|in brief)",
    rf"{_PLEASE}directly (?:answer|respond|reply)(?: to)?(?: the| this)?(?: questions?)?",
    rf"{_PLEASE}(?:answer|respond|reply)(?: to)?(?: the| this)?(?: questions?)?(?: (?:using|with|in"
    rf"|by))?(?: only| just)?(?: an?| one| the)?(?: single| short| few)?(?: correct)? {_UNIT}s?"
    rf"(?: (?:or|and)(?: an?)?(?: short| single)? {_UNIT}s?)?{_OF}(?: directly| only)?",
    rf"{_PLEASE}(?:give|provide|write|output|return|state)(?: me| us)?(?: only| just)?"
    rf"(?: an?| the| your)?(?:,? {_SHORT})+(?: and {_SHORT})? {_REPLY}(?: only| directly)?"
    r"(?: to (?:the|this) question)?",
    rf"{_PLEASE}(?:give|provide|output|return|state)(?: me| us)?(?: only| just) (?:the|your)"
    rf" (?:final )?{_REPLY}",
    rf"(?:please |kindly )?(?:just |only |simply )(?:give|provide|output|return|state)(?: me| us)?"
    rf" (?:the|your) (?:final )?{_REPLY}",
    rf"{_PLEASE}(?:do not|don'?t|no need to|there is no need to|you need not|without)"
    r" (?:explain|explaining|reason|reasoning|think|thinking|show|showing|provide|providing|give"
    r"|giving|include|including|any)(?: it| about it| out loud| step by step)?(?: any| an?| your"
    r"| the)?(?: further)?(?: explanations?| reasoning| rationale| steps?| working| work| details?"
    r"| answer)?",
    r"no (?:explanations?|reasoning)(?: is| are)?(?: needed| necessary| required)?",
    rf"{_PLEASE}(?:be|keep (?:it|your {_REPLY}|the {_REPLY})) (?:brief|short|concise|direct)"
    r"(?: and (?:brief|short|concise|direct))?",
    rf"(?:{_SHORT} )?{_REPLY}(?= ?:)",
)  # fmt: skip


class PromptCleaning(BaseModel):
    """Which phrases go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phrases: tuple[str, ...] = Field(
        PHRASES,
        description="Regular expressions of phrases, without regard to case. The list is not given"
        " in the source; our own default, after the endings that public instruction sets use.",
    )

    @field_validator("phrases")
    @classmethod
    def _is_pattern(cls, phrases: Sequence[str]) -> Sequence[str]:
        for phrase in phrases:
            try:
                re.compile(phrase)
            except re.error as error:
                raise ValueError(f"{phrase!r} is no regular expression: {error}") from None
        return phrases


class PromptsCleaned(NamedTuple):
    """Samples with `instruction_used`, and `prompt_cleaned`: whether it differs."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL})
def clean_prompts(build: Build, given: Table, params: PromptCleaning) -> PromptsCleaned:
    """Take the phrases from each `instruction`; a text that is nothing else stays."""
    rows = tables.frame(build.store, given)
    ends = patterns(params.phrases)
    used = pl.Series(
        "instruction_used", [cleaned(text, ends) for text in rows["instruction"]], pl.String
    )
    differs = (used != rows["instruction"].str.strip_chars()).alias("prompt_cleaned")
    return PromptsCleaned(samples.write(build.store, rows.with_columns(used, differs)))


def patterns(phrases: Sequence[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a text may begin with, and what it may end with: whole sentences or lines."""
    said = "|".join(f"(?:{phrase})" for phrase in phrases)
    head = re.compile(rf"\(?(?:{said})\s?(?:[.:!\n)]+|, ?|$)\s*", re.IGNORECASE)
    tail = re.compile(
        rf"(?:^|(?<=[.?!:;,)\n\]])|\n)\s*[(\[]?(?:{said})\s?[.:!)\]]*$", re.IGNORECASE
    )
    return head, tail


def cleaned(text: str, ends: tuple[re.Pattern[str], re.Pattern[str]]) -> str:
    """The text without such beginnings and endings, however many; doing it twice is doing it once.

    It stops before nothing would be left.
    """
    head, tail = ends
    text = text.strip()
    while True:
        begun = head.match(text)
        shorter = text[begun.end() :] if begun else text
        ended = tail.search(shorter, max(0, len(shorter) - REACH))
        shorter = (shorter[: ended.start()] if ended else shorter).strip()
        if shorter == text or not re.search(r"\w", shorter):
            return text
        text = shorter
