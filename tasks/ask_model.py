"""Ask a model one question about every sample; the fields of its answer become columns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, Field, create_model

from infra import mllm, samples, tables
from infra.asking import AskParams, Noted, ask_all, none_waits
from infra.build import Build
from infra.canonical import digest, settings
from infra.ledger import pinned, stage
from infra.mllm import Flawed, Picture, Request
from infra.pictures import Prepared, View
from infra.prompting import enclosed
from infra.tables import Table

PROMPTS = Path(__file__).parent / "prompts"
TEXT_LIMIT = 4_000  # characters of each untrusted text that is shown
_templates = Environment(loader=FileSystemLoader(PROMPTS), undefined=StrictUndefined)


class ModelParams(AskParams):
    """The model that answers, and how it is asked."""

    max_pixels: int = Field(
        1_003_520,
        ge=784,
        description="Pixels per picture sent; 1003520 is 1280 patches of 28 x 28. Our own default.",
    )
    max_tokens: int = Field(1_024, ge=1, description="Tokens an answer may have. Our own default.")
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Sampling temperature; null leaves it to the server."
    )
    seed: int | None = Field(
        0, description="Sampling seed where the server takes one; null sends none."
    )


class Answer(BaseModel, extra="forbid"):
    """What answers derive from: a model is held to their fields, and to no others."""


def several(name: str, member: type[Answer], most: int) -> type[Answer]:
    """The answer that lists one to `most` members in a field, for `split_answers`."""
    members: Any = (list[member], Field(min_length=1, max_length=most))  # type: ignore[valid-type]
    return create_model(name.capitalize(), __base__=Answer, **{name: members})


@dataclass(frozen=True)
class Question:
    """What is asked of each sample.

    `prompt` names a template with the blocks `system` (what all questions share; perhaps empty)
    and `user`. `pictures` are columns with names of views, each with what it is called; a null
    shows none. `texts` are columns of untrusted text, enclosed before `user`; `values` are columns
    that the template may use as they are: numbers and words of closed sets. `on_flaw` says what
    becomes of a sample whose answer is flawed: dropped, or kept with nulls.
    """

    prompt: str
    answer: type[BaseModel]
    pictures: Mapping[str, str]
    texts: Sequence[str] = ()
    values: Sequence[str] = ()
    on_flaw: Literal["drop", "null"] = "drop"
    calls: int = 1

    @property
    def name(self) -> str:
        """The question in drops and reports."""
        return self.prompt.rpartition("/")[2]


class Asking(NamedTuple):
    """A question and the model that it goes to."""

    question: Question
    model: ModelParams

    def pinned(self, build: Build) -> "Asking":
        """With the numerics of a model in process: other weights give other answers."""
        return self._replace(model=pinned(self.model, build))


class Asked(NamedTuple):
    """Samples with what the model said, those it gave no usable answer on, and keys of requests."""

    samples: Table
    drops: Table
    asked: Table


def meaning(params: Asking) -> Any:
    """What decides the answers: not where the model is served, nor at what pace."""
    question, model = params
    chosen = model.model_dump(include={"max_pixels", "max_tokens", "temperature", "seed"})
    return settings(
        {
            **chosen,
            "model": model.model,
            "attempt": model.attempt,
            "prompt": digest((PROMPTS / f"{question.prompt}.jinja").read_text("utf-8")),
            "schema": mllm.schema_of(question.answer),
            "shown": [dict(question.pictures), list(question.texts), list(question.values)],
            "on_flaw": question.on_flaw,
        }
    )


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning, is_final=none_waits)
def ask_model(build: Build, given: Table, objects: Table, params: Asking) -> Asked:
    """Ask about every sample. What was answered before is in the store, and is not asked again.

    Raises infra.mllm.EndpointUnavailable where the model has never answered.
    """
    question, model = params
    rows = tables.frame(build.store, given).sort("image_id", "sample_id")
    named = [c for c in question.pictures if c in rows.columns]
    used = (name for row in rows.select(named).iter_rows() for name in row if name)
    images = Prepared(build, used, objects, model.max_pixels)

    async def work(ask: mllm.Ask, row: dict[str, Any]) -> tuple[Any, list[str]]:
        noted = Noted(ask)
        answer = await mllm.ask_for(noted, request(row, params), question.answer)
        return answer, noted.keys

    items = list(rows.iter_rows(named=True))
    found = ask_all(build, question.name, items, work, model, images, question.calls)
    return _tables(
        build, rows, [answer for answer, _ in found], [keys for _, keys in found], params
    )


def request(row: Mapping[str, Any], params: Asking) -> Request:
    """The question about one sample."""
    question, model = params
    shown = {name: called for name, called in question.pictures.items() if row[name]}
    texts = [(name, str(row[name])) for name in question.texts if row[name] is not None]
    values = {name: row[name] for name in question.values}
    return Request(
        instructions=render(question.prompt, "system", values),
        pictures=tuple(Picture(called, row[name]) for name, called in shown.items()),
        text=render(question.prompt, "user", values | enclosed(texts, TEXT_LIMIT)),
        answer=question.answer,
        resize=f"at most {model.max_pixels} px, JPEG",
        model=model.model,
        max_tokens=model.max_tokens,
        temperature=model.temperature,
        seed=model.seed,
        about=tuple(dict.fromkeys(View.of(row[name]).image_id for name in ("image_id", *shown))),
    )


def render(prompt: str, block: str, values: Mapping[str, Any]) -> str:
    """A block of a prompt file."""
    template = _templates.get_template(f"{prompt}.jinja")
    if block not in template.blocks:
        return ""
    return "".join(template.blocks[block](template.new_context(dict(values)))).strip()


def _tables(
    build: Build,
    rows: pl.DataFrame,
    answers: Sequence[Any],
    keys: Sequence[Sequence[str]],
    params: Asking,
) -> Asked:
    question = params.question
    columns = samples.columns_of(question.answer)
    lost = [isinstance(answer, Flawed) for answer in answers]
    said = [
        dict.fromkeys(columns) if isinstance(answer, Flawed) else _plain(answer, columns)
        for answer in answers
    ]
    found = rows.drop(list(columns), strict=False).hstack(pl.DataFrame(said, columns))
    rules = pl.Series([a.rule if isinstance(a, Flawed) else None for a in answers], dtype=pl.String)
    pending = rules.is_in(list(mllm.PENDING)).fill_null(False)
    dropped = pl.Series(lost, dtype=pl.Boolean) & (pending | (question.on_flaw == "drop"))
    gone = [
        {"id": name, "rule": rule, "detail": question.name}
        for name, rule, is_gone in zip(rows["sample_id"], rules, dropped, strict=True)
        if is_gone
    ]
    asked = rows.select("sample_id").with_columns(
        pl.lit(question.prompt).alias("prompt"),
        pl.Series("requests", [list(k) for k in keys], pl.List(pl.String)),
    )
    return Asked(
        samples.write(build.store, found.filter(~dropped)),
        samples.write_drops(build.store, samples.drops(gone, "ask_model")),
        samples.write(build.store, asked, "asked_samples"),
    )


def _plain(answer: BaseModel, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an answer as values of their columns."""
    return {name: _value(value, columns[name]) for name, value in answer.model_dump().items()}


def _value(value: Any, kind: Any) -> Any:
    if isinstance(value, float):
        return round(value * 1e6)
    nested = isinstance(value, dict | list) and kind == pl.String
    return json.dumps(value, ensure_ascii=False) if nested else value
