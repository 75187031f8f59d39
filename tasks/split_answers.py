"""Split answers: each member of a list that a model gave becomes a sample of its own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel

from infra import samples, tables
from infra.build import Build
from infra.ledger import stage
from infra.tables import Table


class Splitting(NamedTuple):
    """The column of lists, and what a member is; without `member`, a text that keeps the column's
    name.
    """

    column: str
    member: type[BaseModel] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        return samples.columns_of(self.member) if self.member else {self.column: pl.String}


class Split(NamedTuple):
    """A sample for each member: the columns of the one it is from, the member's fields,
    `split_from` and `part`. Every sample that was split is a drop, with the count of its parts.
    """

    samples: Table
    drops: Table


def meaning(params: Splitting) -> list[Any]:
    return [params.column, sorted(params.fields), params.member is None]


@stage(version=1, reads={"given": tables.ALL}, meaning=meaning)
def split_answers(build: Build, given: Table, params: Splitting) -> Split:
    """Split each sample by its list. Of equal members the first stays."""
    rows = tables.frame(build.store, given)
    found: dict[str, dict[str, Any]] = {}
    drops: list[dict[str, Any]] = []
    for row in rows.iter_rows(named=True):
        parent, members = row["sample_id"], _members(row.pop(params.column), params)
        rule = "split" if members else "nothing_to_split"
        drops.append({"id": parent, "rule": rule, "value": len(members)})
        for at, member in enumerate(members):
            name = samples.sample_id(row["image_id"], {"of": parent, **member})
            if name in found:
                drops.append({"id": f"{parent}#{at}", "rule": "same_answer", "detail": name})
                continue
            about = {"sample_id": name, "split_from": parent, "part": at}
            found[name] = {**row, **member, **about}
    schema: dict[str, Any] = dict(rows.drop(params.column).schema)
    schema |= {**params.fields, "split_from": pl.String, "part": pl.Int64}
    return Split(
        samples.write(build.store, pl.DataFrame(list(found.values()), schema, orient="row")),
        samples.write_drops(build.store, samples.drops(drops, "split_answers")),
    )


def _members(value: str | Sequence[str] | None, params: Splitting) -> list[dict[str, Any]]:
    """Members of a list of texts, or of the JSON in which nested answers are kept."""
    listed: Any = json.loads(value) if isinstance(value, str) else value or []
    if params.member is None:
        return [{params.column: text} for text in listed]
    return [{name: _plain(member.get(name)) for name in params.fields} for member in listed]


def _plain(value: Any) -> Any:
    """Floats in millionths and what is nested as JSON, as everywhere in samples."""
    if isinstance(value, float):
        return round(value * 1e6)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value
