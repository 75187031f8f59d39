"""Licences: a pair has the stricter of its two images' licences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.licences import ORDER, stricter, strictness

SPELLINGS = [
    *ORDER,
    "CC BY-SA 4.0",
    "cc-by-sa-3.0",
    "Public Domain",
    "unknown",
    "All rights reserved",
    "",
    "CC0 1.0",
]
LICENCES = st.sampled_from(SPELLINGS) | st.text(max_size=12)


@pytest.mark.parametrize(
    ("spelling", "plain"),
    [
        ("CC0", "cc0"),
        ("CC0-1.0", "cc0"),
        ("CC0 1.0 Universal", "cc0"),
        ("Public Domain", "pd"),
        ("CC BY 4.0", "cc-by"),
        ("cc_by_nc_sa_2.5", "cc-by-nc-sa"),
        ("Apache-2.0", "apache"),
        ("MIT", "mit"),
    ],
)
def test_versions_and_spelling_do_not_matter(spelling, plain):
    assert strictness(spelling) == ORDER.index(plain)


@pytest.mark.parametrize("licence", ["unknown", "", "All rights reserved", "cc-by-xx", "CC"])
def test_what_is_not_known_is_strictest(licence):
    assert strictness(licence) == len(ORDER)


def test_the_stricter_of_two():
    assert stricter("CC0", "CC BY-NC 4.0") == "CC BY-NC 4.0"
    assert stricter("cc-by-sa", "unknown") == "unknown"
    assert stricter("CC BY 4.0", "CC BY 3.0") == "CC BY 3.0"


@given(LICENCES, LICENCES)
def test_it_is_one_of_the_two_in_either_order_and_never_freer(a, b):
    assert stricter(a, b) == stricter(b, a)
    assert stricter(a, b) in (a, b)
    assert strictness(stricter(a, b)) == max(strictness(a), strictness(b))


@given(LICENCES, LICENCES, LICENCES)
def test_it_can_be_folded_over_any_number(a, b, c):
    assert stricter(a, stricter(b, c)) == stricter(stricter(a, b), c)
    assert stricter(a, a) == a
