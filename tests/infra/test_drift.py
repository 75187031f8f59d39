"""Drift: the values a version calibrated on its corpus, and where they lay before."""

from typing import Any

from infra.drift import KEPT, calibrated, courses, history


def manifest(version: int, low: int, fraction: str = "0.9", unit: str = "quantile") -> Any:
    band = {"unit": unit, "low": "0.7", "high": "0.99"}
    return {
        "version": version,
        "counts": {"eligible": 10, "records": 3},
        "config": {
            "spaces": {"look": {"model": "clip", "of": "image", "band": band}},
            "clip_score": {"model": "clip", "keep": "neg_clip_loss", "fraction": fraction},
        },
        "bands": [{"space": "look", "low": low, "high": 950_000}],
        "clip_score_cut": -12_345,
    }


def test_calibrated_values_come_with_the_line_that_pins_them():
    found = calibrated(manifest(1, 812_345))
    assert {name: value.value for name, value in found.items()} == {
        "look band low": 812_345,
        "look band high": 950_000,
        "caption cut": -12_345,
    }
    assert found["look band low"].pin == (
        "spaces: {look: {model: clip, of: image, "
        "band: {unit: cosine, low: 0.812345, high: 0.950000}}}"
    )
    assert found["caption cut"].pin == "clip_score: {cut: -0.012345}"


def test_what_is_pinned_does_not_drift():
    pinned = manifest(1, 812_345, unit="cosine")
    pinned["config"]["clip_score"]["cut"] = "-0.012345"
    assert calibrated(pinned) == {}


def test_an_empty_band_is_no_value():
    empty = manifest(1, 1_000_000)
    empty["bands"][0]["high"] = 999_999
    assert set(calibrated(empty)) == {"caption cut"}


def test_a_course_goes_back_to_where_its_setting_changed():
    last, versions = None, []
    for number, (low, fraction) in enumerate([(1, "0.8"), (2, "0.9"), (3, "0.9")], 1):
        now = {**manifest(number, low, fraction), "history": history(last)}
        versions.append(now)
        last = now
    found = {course.name: course.points for course in courses(versions[-1])}
    assert found["look band low"] == ((1, 1), (2, 2), (3, 3))
    assert found["caption cut"] == ((2, -12_345), (3, -12_345))


def test_history_is_bounded():
    last = None
    for number in range(1, KEPT + 20):
        last = {**manifest(number, number), "history": history(last)}
    assert len(last["history"]) == KEPT
    assert last["history"][-1]["version"] == KEPT + 18
