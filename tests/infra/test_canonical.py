"""Canonical bytes: equal values have equal bytes, whatever order they came in."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.canonical import canonical, digest, settings

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def test_keys_are_sorted_blanks_left_out_and_text_stays_text():
    value = {"b": [1, True, None], "a": "naïve 東京"}
    assert canonical(value) == '{"a":"naïve 東京","b":[1,true,null]}'.encode()


def test_the_digest_is_sha256_of_the_bytes():
    empty_object = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({}) == empty_object


@pytest.mark.parametrize("value", [0.5, np.float64(1), [1, (2, 0.5)], {"a": {"b": 1e9}}])
def test_a_float_has_no_canonical_form(value):
    with pytest.raises(TypeError, match="float"):
        canonical(value)


@pytest.mark.parametrize("value", [b"bytes", Decimal("0.5"), {1, 2}, np.int64(1)])
def test_nor_has_what_json_does_not_know(value):
    with pytest.raises(TypeError):
        canonical(value)


@given(st.dictionaries(TEXT, VALUES), st.randoms())
def test_the_order_of_keys_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@given(VALUES, VALUES)
def test_different_values_have_different_bytes(a, b):
    same = repr(settings(a)) == repr(settings(b)) or a == b
    # True == 1 in Python, but not in JSON.
    assert (canonical(a) == canonical(b)) <= same


def test_settings_write_floats_as_their_shortest_decimals():
    assert settings({"a": 0.1, "b": (8.0, 1e-9), 3: True}) == {
        "a": "0.1",
        "b": ["8.0", "1e-09"],
        "3": True,
    }
    assert digest(settings(0.1 + 0.2)) != digest(settings(0.3))
