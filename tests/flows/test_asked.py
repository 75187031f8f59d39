"""What was asked about a pair: by the keys of its requests, or by its images."""

import polars as pl
import pytest

from flows.asked import requests, tables_of, told
from infra import responses
from infra.folder import FolderStore
from infra.schema import SCHEMAS
from tests.answers import answer, kept, key, segment

PAIR = {"pair_id": "p", "query": "i1", "target": "i2"}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.01)
    return FolderStore(str(tmp_path / "store"))


def rows(*keys):
    return pl.DataFrame({"pair_id": ["p", "q"], "requests": [list(keys), ["of another"]]})


def test_each_request_of_a_pair_is_told_with_its_answer(store):
    kept(
        store,
        answer("a", '{"instructions": ["\x1b[31mred"]}')._replace(cached_tokens=512),
        answer("b", "")._replace(status="refused", input_tokens=None, cost=None, stage="line_up"),
    )
    found = list(told(store, [rows(key("a")), rows(key("b"), key("c"))], PAIR))
    assert found == [
        (
            "asked",
            f"label_pairs, request {key('a')[:12]}: answered, m, 900 tokens in (512 cached), "
            "20 out, cost 0.001500",
        ),
        ("", '{"instructions": ["red"]}'),
        (
            "asked",
            f"line_up, request {key('b')[:12]}: refused, m, tokens not reported, cost unknown",
        ),
        ("", "(no text)"),
        ("asked", f"request {key('c')[:12]}: its answer is gone from the store"),
    ]


def test_where_no_row_has_requests_the_images_find_them(store):
    kept(store, answer("a"), answer("back", images=("i2", "i1")), answer("c", images=("i1",)))
    older = pl.DataFrame({"pair_id": ["p"], "instructions": [["one"]]})
    assert requests([older], "p") == []
    for frames in ([], [older], [rows()]):
        first, second = told(store, frames, PAIR)
        assert key("a")[:12] in first[1] and second == ("", "yes")


def test_where_nothing_was_asked_nothing_is_said(store):
    assert list(told(store, [], PAIR)) == []


def test_a_damaged_store_is_told_in_a_line(store):
    store.put(segment(store, 1, 1, answer("a")), b"")
    ((label, text),) = told(store, [], PAIR)
    assert label == "answers" and "can't be read" in text


def test_tables_with_requests_are_known_by_their_columns():
    shards = {"name": "x", "shards": []}
    named = {
        "label_pairs": {"labels": shards, "asked": shards},
        "mine_pairs": {"pairs": shards},
        "of_a_newer_pairmill": {"unknown": shards},
    }
    known = [("label_pairs", "asked")] if "requests" in SCHEMAS["asked"].names else []
    assert tables_of({"tables": named}) == known
    assert tables_of({}) == []
