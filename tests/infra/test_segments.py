"""Segments: what is read from one is what was written, whatever became of its bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import PairmillError
from infra.segments import DamagedSegment, decode, encode, readable, storable
from tests.answers import answer

TEXTS = st.lists(st.text(st.characters()), min_size=1, max_size=4)


@given(TEXTS)
def test_whatever_a_model_says_comes_back(texts):
    answers = [storable(answer(at, text)) for at, text in enumerate(texts)]
    assert decode("x", encode(answers)) == answers


@given(TEXTS, st.integers(0), st.integers(1, 255))
def test_a_flipped_byte_never_becomes_an_answer(texts, at, bits):
    answers = [storable(answer(number, text)) for number, text in enumerate(texts)]
    data = bytearray(encode(answers))
    data[at % len(data)] ^= bits
    try:
        found, lost = readable("x", bytes(data))
    except PairmillError:
        return  # it looks like the segment of a newer Pairmill
    assert set(found) <= set(answers)
    assert found == answers or lost


def test_a_segment_is_lines_of_json():
    head, line = encode([answer("a")]).splitlines()
    assert json.loads(head) == {"answers": 1, "format": 1}
    assert json.loads(line)["images"] == ["i1", "i2"] and len(json.loads(line)["sum"]) == 16


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[]\n[]", b'{"answers": 2}\n1.5'])
def test_what_is_no_segment_is_damaged(data):
    with pytest.raises(DamagedSegment, match=r"\d of \d paid answers in x can't be read"):
        decode("x", data)
