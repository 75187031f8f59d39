"""Quality gates: which counts of a build speak against publishing it."""

import pytest

from infra.gates import failed

MANIFEST = {
    "counts": {
        "eligible": 80,
        "records": 30,
        "fates": {
            "object": {
                "paired": 90, "unreadable": 6, "crashed_decoder": 3, "vanished": 1,
                "metadata": 50, "ignored": 7, "forgotten": 5,
            }
        },
    },
    "members": {"look": 80, "words": 40},
    "occupied": {"look": 60, "words": 10},
}  # fmt: skip
LAST = {"version": 4, "counts": {"eligible": 100, "records": 30}}


@pytest.mark.parametrize(
    ("gate", "passes", "shut", "said"),
    [
        ("min_images", 80, 81, "80"),
        ("min_records", 30, 31, "30"),
        ("max_drop_images", 0.2, 0.19, "0.200: 80 after 100 in version 4"),
        ("max_drop_records", 0.0, None, ""),
        (
            "max_failures", 0.1, 0.09,
            "0.100: 6 unreadable, 3 crashed decoder, 1 vanished of 100 pictures",
        ),
        (
            "min_band_occupancy", 0.25, 0.3,
            "0.250 in words: 10 of 40 images have a neighbour in its band",
        ),
    ],
)  # fmt: skip
def test_a_gate_passes_at_its_bound_and_not_beyond(gate, passes, shut, said):
    assert failed(MANIFEST, LAST, {gate: passes}) == []
    if shut is not None:
        (found,) = failed(MANIFEST, LAST, {gate: shut})
        assert (found.gate, found.bound, found.said) == (gate, shut, said)


def test_every_gate_that_is_shut_is_named():
    shut = failed(MANIFEST, LAST, {"min_images": 90, "min_records": 90, "min_band_occupancy": 0.9})
    assert [s.gate for s in shut] == ["min_images", "min_records", *["min_band_occupancy"] * 2]


def test_the_first_version_drops_nothing():
    assert failed(MANIFEST, None, {"max_drop_images": 0.0, "max_drop_records": 0.0}) == []


def test_more_than_before_is_no_drop():
    grown = {"version": 4, "counts": {"eligible": 8, "records": 0}}
    assert failed(MANIFEST, grown, {"max_drop_images": 0.0, "max_drop_records": 0.0}) == []


def test_an_empty_build_fails_what_asks_for_something():
    empty = {
        "counts": {"eligible": 0, "records": 0, "fates": {}},
        "members": {"look": 0},
        "occupied": {"look": 0},
    }
    gates = {"min_images": 1, "max_drop_images": 0.5, "max_failures": 0.0}
    assert [s.gate for s in failed(empty, LAST, gates)] == ["min_images", "max_drop_images"]
    assert [s.gate for s in failed(empty, LAST, {"min_band_occupancy": 0.1})]
