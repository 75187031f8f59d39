"""The index: every key is found where it lies, of doubles the first, and nothing else."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.answer_index import Run, halves
from tests.answers import key

# Few digits, so that halves are often the same.
KEYS = st.builds(lambda a, b: a * 16 + b * 16 + "0" * 32, *[st.sampled_from("0189af")] * 2)


def column(keys):
    return pa.chunked_array([pa.array(keys, pa.string())])


@given(st.lists(st.lists(KEYS, max_size=6), min_size=1, max_size=4), KEYS)
def test_a_key_is_found_where_it_came_first(shards, other):
    first: dict[str, tuple[int, int]] = {}
    for shard, keys in enumerate(shards):
        for row, name in enumerate(keys):
            first.setdefault(name, (shard, row))
    parts = [halves(column(keys)) for keys in shards]
    whole = Run.of(parts, 0)
    grown = Run.of(parts[:1], 0)
    for at, part in enumerate(parts[1:], 1):
        grown = grown.with_later(Run.of([part], at))
    for run in (whole, grown):
        assert {name: run.find(name) for name in first} == first
        assert run.find(other) == first.get(other)


def test_a_key_is_held_as_two_numbers():
    name = "0123456789abcdef" + "f" * 15 + "e" + "0" * 32
    assert halves(column([name])).tolist() == [[0x0123456789ABCDEF, 0xFFFFFFFFFFFFFFFE]]
    run = Run.of([halves(column([key(n) for n in range(1000)]))], 0)
    held = (run.high, run.low, run.shard, run.row)
    assert sum(part.nbytes for part in held) == 24 * 1000 and run.high.dtype == np.uint64


@pytest.mark.parametrize("wrong", ["0" * 63, "g" * 64, "A" * 64, None, ""])
def test_what_is_no_key_is_refused(wrong):
    with pytest.raises(ValueError, match="a key is not"):
        halves(column([key("a"), wrong]))
