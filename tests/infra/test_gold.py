"""The gold set as a file: read, written, and settled where people differ."""

import json

import pytest

from infra.errors import ConfigError
from infra.gold import Verdict, read, settled, write


def verdict(pair="a", said="fits", who="ann", text="Make it red", **more):
    ids = dict.fromkeys(("pair_id", "query", "target"), pair * 64)
    return Verdict(**ids, instruction=text, verdict=said, who=who, when="2026-11-21T04:00", **more)


def test_what_is_written_is_read_in_order_of_the_item(tmp_path):
    path = tmp_path / "deep" / "gold.jsonl"
    rows = [verdict("b"), verdict("a", text="Z"), verdict("a", text="Ä \u2028 <b>"), verdict("a")]
    write(path, rows)
    assert [row.item for row in read(path)] == sorted(row.item for row in rows)
    assert len(path.read_text("utf-8").split("\n")) == 5
    assert [p.name for p in path.parent.iterdir()] == ["gold.jsonl"]


def test_no_file_is_an_empty_set(tmp_path):
    assert read(tmp_path / "gold.jsonl") == []


def test_the_last_verdict_of_a_person_counts(tmp_path):
    path = tmp_path / "gold.jsonl"
    write(path, [verdict(said="fits"), verdict(said="wrong", reason="vague"), verdict(who="bo")])
    assert [(row.who, row.verdict) for row in read(path)] == [("ann", "wrong"), ("bo", "fits")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"verdict": "good"}, "line 2: verdict: Input should be 'fits', 'partly' or 'wrong'"),
        ({"pair_id": "../x"}, "line 2: pair_id: String should match pattern"),
        ({"caption": "a fox"}, "line 2: caption: Extra inputs are not permitted"),
        ({"who": ""}, "line 2: who"),
    ],
)
def test_a_line_that_is_no_verdict_is_named(tmp_path, changed, said):
    path = tmp_path / "gold.jsonl"
    good = verdict().model_dump()
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | changed)}\n")
    with pytest.raises(ConfigError, match="mend or delete that line") as error:
        read(path)
    assert said in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="name a JSONL file"):
        read(path)
    with pytest.raises(ConfigError, match="name a JSONL file"):
        read(tmp_path)


def test_most_people_decide_and_a_tie_is_left_open():
    found = settled([
        verdict("a", "fits", "ann"), verdict("a", "wrong", "bo"), verdict("a", "wrong", "cy"),
        verdict("b", "fits", "ann"), verdict("b", "wrong", "bo"),
        verdict("c", "partly", "ann"), verdict("c", "fits", "ann"),
    ])  # fmt: skip
    assert [(row.pair_id[0], row.verdict) for row in found.verdicts] == [
        ("a", "wrong"), ("c", "fits"),
    ]  # fmt: skip
    assert found.open == 1
