"""Samples: names by content, tables that carry their own columns."""

from typing import Literal

import polars as pl
import pyarrow as pa
import pytest
from pydantic import BaseModel

from infra import samples, tables
from tests.tasks.examples import new_build, rows


@pytest.fixture
def build(tmp_path):
    return new_build(tmp_path)


class Answer(BaseModel):
    text: str
    right: bool
    count: int
    share: float
    tags: list[str]
    places: list[int]
    kind: Literal["fact", "description"]
    shares: list[float]
    nested: dict[str, int]


def test_columns_of_an_answer_have_no_floats():
    assert samples.columns_of(Answer) == {
        "text": pl.String, "right": pl.Boolean, "count": pl.Int64, "share": pl.Int64,
        "tags": pl.List(pl.String), "places": pl.List(pl.Int64), "kind": pl.String,
        "shares": pl.List(pl.Int64), "nested": pl.String,
    }  # fmt: skip


def test_a_sample_is_named_by_its_image_and_what_was_said_of_it():
    one = samples.sample_id("i", {"q": "?", "box": [1, 2, 3, 4]})
    assert one == samples.sample_id("i", {"box": [1, 2, 3, 4], "q": "?"})
    others = [("j", {"q": "?"}), ("i", {"q": "!"}), ("i", {"a": "?"}), ("i", {})]
    assert len({one, *(samples.sample_id(*other) for other in others)}) == 5


def test_rows_are_sorted_and_types_are_plain(build):
    frame = pl.DataFrame({"sample_id": ["b", "a"], "image_id": ["i", "i"], "box": [[1], [2, 3]],
                          "n": [None, 5]})  # fmt: skip
    table = samples.write(build.store, frame)
    assert [row["sample_id"] for row in rows(build, table)] == ["a", "b"]
    schema = tables.read(build.store, table).schema
    assert schema.field("box").type == pa.list_(pa.int64())
    assert schema.field("sample_id").type == pa.string()
    again = samples.write(build.store, frame.reverse())
    assert again == table


def test_a_table_without_rows_keeps_its_columns(build):
    empty = samples.write(
        build.store, pl.DataFrame(schema={**samples.BASE, "box": pl.List(pl.Int64)})
    )
    assert empty.rows == 0
    assert tables.frame(build.store, empty).columns == ["sample_id", "image_id", "box"]
    assert tables.digest(build.store, empty, tables.ALL)


def test_a_float_has_no_place_in_a_sample(build):
    frame = pl.DataFrame({"sample_id": ["a"], "image_id": ["i"], "share": [0.5]})
    with pytest.raises(TypeError, match="float"):
        tables.digest(build.store, samples.write(build.store, frame), tables.ALL)


def test_drops_say_level_and_stage(build):
    lost = samples.drops([{"id": "b", "rule": "r", "value": 3}, {"id": "a", "rule": "q"}], "s")
    found = rows(build, samples.write_drops(build.store, lost))
    assert [(r["level"], r["id"], r["stage"], r["rule"], r["value"]) for r in found] == [
        ("sample", "a", "s", "q", None), ("sample", "b", "s", "r", 3),
    ]  # fmt: skip
