"""The judge: a model that gives a second opinion, asked about a fair draw of pairs."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, create_model

from infra import mllm, tables
from infra.asking import AskParams
from infra.budget import Budget
from infra.build import Build
from infra.canonical import settings
from infra.local_mllm import LocalModel
from infra.mllm import Picture, Request
from infra.schema import SCHEMAS
from infra.tables import Table

PENDING = mllm.PENDING


class JudgeModel(BaseModel):
    """Which model judges, and how it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: mllm.Endpoint | None = Field(
        None, description="Where the judge is served; null: the labeller judges its own work."
    )
    local: LocalModel | None = Field(
        None, description="In place of an endpoint, a model that the workers of the build run."
    )
    budget: Budget | None = Field(
        None,
        description="What a build may have spent, labels included, when the judge is asked; null:"
        " that of labels. More than theirs leaves room for the judge.",
    )
    max_pixels: int = Field(401_408, ge=784, description="Pixels per picture sent to the judge.")
    max_tokens: int = Field(1_024, ge=64, description="Tokens an answer of the judge may have.")
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Sampling temperature; null leaves it to the server."
    )
    seed: int | None = Field(
        0, description="Sampling seed where the server takes one; null sends none."
    )


class Judge(BaseModel):
    """The judge of a stage: how it is asked, and what may be spent on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: JudgeModel
    asking: AskParams

    @property
    def meaning(self) -> dict[str, Any]:
        """What decides its answers, besides prompts: never where it is served, or at what pace."""
        chosen = self.model.model_dump(exclude={"endpoint", "local", "budget"})
        attempt = self.asking.attempt
        return settings({**chosen, "name": self.asking.model, "attempt": attempt})

    def request(
        self,
        instructions: str,
        pictures: Sequence[Picture],
        text: str,
        answer: type[BaseModel],
        about: Sequence[str],
    ) -> Request:
        """A question to it. `about` are ids of captions that the text comes from."""
        return Request(
            instructions=instructions,
            pictures=tuple(pictures),
            text=text,
            answer=answer,
            resize=f"at most {self.model.max_pixels} px, JPEG",
            model=self.asking.model,
            max_tokens=self.model.max_tokens,
            temperature=self.model.temperature,
            seed=self.model.seed,
            about=tuple(about),
        )


def captions_of(build: Build, eligible: Table) -> dict[str, str]:
    """The caption that each image uses, by their ids."""
    rows = tables.frame(build.store, eligible, ["image_id", "caption_id"])
    return dict(rows.drop_nulls().iter_rows())


def carried(build: Build, name: str, before: Table | None, asked: Iterable[str]) -> pl.DataFrame:
    """Rows of an earlier build that answer questions of today; none that waited for an answer.

    `name` is that of their schema, `asked` tells questions apart.
    """
    if before is None:
        return pl.DataFrame(SCHEMAS[name].empty_table())
    today = pl.DataFrame({"asked": list(asked)}, {"asked": pl.String})
    waited = pl.col("reason").is_in(PENDING).fill_null(False)
    return tables.frame(build.store, before).join(today, on="asked", how="semi").filter(~waited)


def drawn(what: str, name: str, share: float) -> bool:
    """Whether a name is in the draw of a share of all: by its hash, whoever else there is."""
    return int(hashlib.sha256(f"{what} {name}".encode()).hexdigest()[:8], 16) < share * 2**32


def answer_model(name: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    """The model of an answer with just these fields, so that none is missing and none too many."""
    kinds: Any = {field: (kind, ...) for field, kind in fields.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **kinds)
