"""Captions: what becomes of every kind of text that a bucket may hold."""

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import captions
from infra.captions import Columns, Text, caption_id, from_row, normalise, read_rows, sidecar
from infra.errors import ConfigError, PairmillError
from tests.corpora import jsonl, parquet

SCRIPTS = [
    "Vollmond über Köln",
    "полная луна",
    "πανσέληνος",
    "満月の夜",
    "보름달",
    "البدر",
    "ירח מלא",
    "पूर्णिमा",
    "พระจันทร์เต็มดวง",
    "លោកខែពេញវង់ 🌕",
]


def rows(name: str, data: bytes | str) -> list[dict]:
    return list(read_rows(name, data.encode() if isinstance(data, str) else data))


def complaint(name: str, data: bytes | str) -> str:
    with pytest.raises(PairmillError) as caught:
        rows(name, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# One caption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_caption_in_any_script_is_itself_in_nfc(text):
    assert normalise(f"  {unicodedata.normalize('NFD', text)}\n", 100) == Text((text,))


@pytest.mark.parametrize("nothing", ["", " \t\r\n", "\u3000", None, 3, 0.5, ["a"], {"a": "b"}])
def test_what_is_empty_or_no_text_is_no_caption(nothing):
    assert normalise(nothing, 100) == Text()


def test_an_over_long_caption_is_refused_not_cut():
    assert normalise("a" * 100, 100).captions == ("a" * 100,)
    assert normalise("a" * 101, 100) == Text(refused="caption_too_long")
    assert normalise("a" * 100_000, 4_096) == Text(refused="caption_too_long")
    assert normalise("e\u0301" * 100, 100).captions == ("é" * 100,)


def test_a_lone_surrogate_becomes_a_question_mark():
    assert normalise("a \ud83d cat", 100).captions == ("a ? cat",)
    assert from_row({"text": "a", "l": "\udcff"}, Columns("", "text", "l"), 9).licence == "?"


@given(st.text(max_size=60), st.integers(1, 50))
def test_normalising_is_nfc_bounded_and_done_once(text, most):
    found = normalise(text, most)
    for caption in found.captions:
        assert unicodedata.is_normalized("NFC", caption)
        assert 0 < len(caption) <= most and caption == caption.strip()
        assert normalise(caption, most) == found
        assert len(caption_id(caption)) == 64


# Rows ----------------------------------------------------------------------------------------


def test_columns_are_the_customary_ones_or_those_asked_for():
    def choose(*names: str, wanted: Columns = captions.CUSTOMARY) -> Columns | None:
        return captions.choose_columns(names, wanted)

    assert choose("file_name", "text") == Columns("file_name", "text", None)
    assert choose("image", "caption", "license") == Columns("image", "caption", "license")
    assert choose("id", "caption") is None
    assert choose("file_name", "alt") is None
    asked = Columns("id", "alt", "rights")
    assert choose("id", "alt", "rights", "caption", wanted=asked) == asked
    assert choose("id", "caption", wanted=asked) is None


def test_a_list_of_captions_gives_several_and_keeps_the_good_ones():
    row = {"captions": ["a cat", None, "", "x" * 50, "b cat"], "licence": " CC0 "}
    text = from_row(row, Columns("k", "captions", "licence"), 10)
    assert text == Text(("a cat", "b cat"), "CC0", "caption_too_long")


def test_a_licence_is_bounded_and_text():
    assert len(from_row({"l": "x" * 999}, Columns("", "", "l"), 9).licence or "") == 200
    assert from_row({"l": 3}, Columns("", "", "l"), 9).licence is None


# Sidecars ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "\ufeffa cat\n".encode(), Text(("a cat",))),
        ("a.txt", b"", Text()),
        ("a.txt", "Müll".encode("latin-1"), Text(refused="caption_unreadable")),
        ("a.txt", b"x" * 5000, Text(refused="caption_too_long")),
        ("a.json", b'{"caption": "a cat", "license": "CC0", "x": 1}', Text(("a cat",), "CC0")),
        ("A.JSON", b'{"caption": "a cat"}', Text(("a cat",))),
        ("a.json@512", b'{"caption": "a cat"}', Text(("a cat",))),
        ("a.json", b'{"caption": "\\ud83d"}', Text(("?",))),
        ("a.json", b'{"caption": null}', Text()),
        ("a.json", b'{"nothing": "of ours"}', Text()),
        ("a.json", b'["a cat"]', Text()),
        ("a.json", b'{"caption": ', Text(refused="caption_unreadable")),
        ("a.json", b"[" * 100_000, Text(refused="caption_unreadable")),
        ("a.json", b'{"caption": ' + b"9" * 5000 + b"}", Text(refused="caption_unreadable")),
        ("a.json", b"\xff\xfe{", Text(refused="caption_unreadable")),
    ],
)
def test_a_sidecar_is_a_caption_or_says_why_not(name, data, text):
    assert sidecar(name, data, 4_096) == text


def test_a_json_sidecar_has_the_column_that_was_asked_for():
    wanted = Columns("", "alt", None)
    data = b'{"alt": "a dog", "caption": "a cat"}'
    assert sidecar("a.json", data, 100, wanted) == Text(("a dog",))


# Files ---------------------------------------------------------------------------------------


def test_csv_is_read_with_its_quotes_newlines_and_mark():
    data = '\ufefffile_name,caption\r\na.jpg,"a ""big"" cat,\nsitting"\r\nb.jpg,\nc.jpg\n,\n'
    assert rows("captions.csv", data) == [
        {"file_name": "a.jpg", "caption": 'a "big" cat,\nsitting'},
        {"file_name": "b.jpg", "caption": ""},
        {"file_name": "c.jpg", "caption": None},
        {"file_name": "", "caption": ""},
    ]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ('file_name,caption\na.jpg,ok\nb.jpg,"never closed\nc.jpg,x\n', 3),
        ('file_name,caption\na.jpg,"two\nlines"\nb.jpg,"a"b\n', 4),
        ("file_name,caption\na.jpg,a cat, sitting\n", 2),
        ("file_name,caption\na.jpg," + "x" * 200_000 + "\n", 2),
        ('file_name,"cap\n', 1),
    ],
)
def test_a_broken_csv_says_the_line_where_the_row_starts(data, line):
    assert f"caption file captions.csv, line {line}: " in complaint("captions.csv", data)


def test_empty_columns_at_the_end_of_a_csv_row_do_no_harm():
    assert rows("captions.csv", "file_name,caption\na.jpg,a cat,,\n") == [
        {"file_name": "a.jpg", "caption": "a cat"}
    ]


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_a_file_that_is_not_utf_8_says_where(name):
    assert "not UTF-8 at byte 4; convert" in complaint(name, b"a,b\n\xe9")


def test_jsonl_is_read_with_blank_lines_and_captions_of_any_type():
    data = '{"file_name": "a.jpg", "caption": ["a", "b"]}\n\n{"file_name": 3, "text": null}\n'
    assert rows("metadata.jsonl", data) == [
        {"file_name": "a.jpg", "caption": ["a", "b"]},
        {"file_name": 3, "text": None},
    ]


@pytest.mark.parametrize("line", ["{", "[1]", "3", "x" * 2_000_000, "[" * 50_000])
def test_a_broken_jsonl_says_the_line(line):
    said = complaint("metadata.jsonl", jsonl({"file_name": "a"}) + line + "\n")
    assert "metadata.jsonl, line 2, is not a JSON object" in said


def test_parquet_is_read_by_its_text_columns_alone():
    data = parquet(
        {"file_name": ["a", "b"], "captions": [["x", "y"], None], "embedding": [[0.5], [1.5]]}
    )
    assert rows("captions.parquet", data) == [
        {"file_name": "a", "captions": ["x", "y"]},
        {"file_name": "b", "captions": None},
    ]


def test_text_in_parquet_that_is_not_utf_8_spoils_its_own_row_only():
    bad = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    found = rows("captions.parquet", parquet({"file_name": ["a", "b"], "caption": bad}))
    assert [normalise(row["caption"], 9) for row in found] == [
        Text(("ok",)),
        Text(refused="caption_unreadable"),
    ]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"x" * 500])
def test_what_is_no_parquet_says_so(data):
    assert "captions.parquet is not readable Parquet" in complaint("captions.parquet", data)


def test_damaged_parquet_says_so():
    data = bytearray(parquet({"file_name": ["a"] * 999, "caption": ["b"] * 999}))
    data[4:60] = b"\xff" * 56
    assert "is not readable Parquet" in complaint("captions.parquet", bytes(data))


def test_another_kind_of_file_is_a_config_error():
    with pytest.raises(ConfigError, match=r"labels\.tsv is no caption file; .* \.csv, \.jsonl"):
        rows("labels.tsv", "a\tb")


def test_which_files_hold_captions_by_their_name():
    assert captions.is_caption_file("a/b/captions.csv")
    assert captions.is_caption_file("metadata.jsonl")
    assert not captions.is_caption_file("a/captions.txt")
    assert not captions.is_caption_file("captions/a.csv")
