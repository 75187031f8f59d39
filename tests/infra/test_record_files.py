"""Entries of files, however small the part of a file that is in memory, and whatever is in it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import record_files
from infra.errors import ConfigError
from infra.folder import FolderStore
from tests.corpora import parquet

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
LAYOUT = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FolderStore(str(tmp_path_factory.mktemp("files")))


@pytest.fixture(scope="module")
def narrow():
    """A window of three characters: everything lies across its edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "WINDOW", 3)
        yield


@settings(max_examples=30)
@given(entries=st.lists(VALUES), layout=LAYOUT)
def test_a_list_is_read_as_json_reads_it(store, narrow, entries, layout):
    text = json.dumps(entries, **layout).encode("utf-8", "replace")
    store.put("a.json", text)
    assert list(record_files.entries(store, "a.json")) == json.loads(text)


@settings(max_examples=30)
@given(members=st.dictionaries(st.text(), st.lists(VALUES) | VALUES), layout=LAYOUT)
def test_so_is_the_list_of_a_member_whatever_is_before_it(store, narrow, members, layout):
    wanted = {**members, "annotations": [1, {"id": 2}], "after": 5}
    store.put("a.json", json.dumps(wanted, **layout).encode("utf-8", "replace"))
    assert list(record_files.entries(store, "a.json", "annotations")) == [1, {"id": 2}]


@settings(max_examples=30)
@given(data=st.binary())
def test_any_bytes_are_entries_or_one_line(store, narrow, data):
    for key in ("b.json", "b.jsonl", "b.parquet"):
        store.put(key, data)
        try:
            list(record_files.entries(store, key))
        except ConfigError as error:
            assert key in str(error) and "\n" not in str(error)
        except TypeError as error:
            assert "a list of records is wanted" in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a" 2}]', "Expecting ':' delimiter: character 16"),
        ('[{"a": 1} {"a": 2}]', "',' is wanted: character 10"),
        ('[{"a": 1}', "cut off: character 9"),
        ('["open', "Unterminated string starting at: character 1"),
        ("[12", "cut off: character 3"),
        ("[1.]", "cut off: character 2"),
        ("[1, 2] [3]", "files of JSON lines are to end in .jsonl"),
        ("[" + "[" * 100_000, "recursion"),
        ("[" + "9" * 5_000 + "]", "4300 digits"),
    ],
)
def test_what_is_no_json_is_named_by_its_place(store, text, said):
    store.put("c.json", text.encode())
    with pytest.raises(ConfigError, match="is not JSON") as error:
        list(record_files.entries(store, "c.json"))
    assert said in str(error.value)


def test_an_entry_of_any_length_would_be_any_memory(store, monkeypatch):
    monkeypatch.setattr(record_files, "ENTRY", 1 << 10)
    monkeypatch.setattr(record_files, "WINDOW", 1 << 8)
    store.put("d.json", json.dumps(["x" * 500] * 100).encode())
    assert len(list(record_files.entries(store, "d.json"))) == 100
    store.put("d.json", json.dumps(["x" * 10_000]).encode())
    store.put("d.jsonl", json.dumps("x" * 10_000).encode())
    for key in ("d.json", "d.jsonl"):
        with pytest.raises(ConfigError, match=r"is not JSON \(over 0 MiB: "):
            list(record_files.entries(store, key))


def test_numbers_that_are_none_are_read_as_python_writes_them(store):
    store.put("e.json", b"[NaN, -Infinity, 1e999]")
    assert [str(n) for n in record_files.entries(store, "e.json")] == ["nan", "-inf", "inf"]


def test_rows_of_parquet_name_their_own_picture_and_bring_no_bytes(store):
    data = {"picture": [{"bytes": b"1", "path": "x.jpg"}] * 3, "raw": [b"1"] * 3, "q": ["a"] * 3}
    store.put("f.parquet", parquet(data, row_group_size=2))
    rows = list(record_files.entries(store, "f.parquet"))
    assert rows[2] == {"picture": "f.parquet::00000002", "q": "a", "image": "f.parquet::00000002"}
