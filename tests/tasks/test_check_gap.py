"""The gap: right with the crop, wrong with noise."""

import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from infra import samples, tables
from infra.build import Build
from infra.pictures import View, shown
from tasks.check_gap import GapCheck, check_gap
from tasks.crop_views import Crops, crop_views
from tests import pictures

# (said with the crop, with noise): right is "red".
SAID = {
    "gap": ("red", "blue"), "guessed": ("red", "red"), "lost": ("blue", "blue"),
    "perverse": ("blue", "red"),
}  # fmt: skip


@pytest.fixture
def given(build: Build):
    names = [*SAID, "boxless"]
    frame = pl.DataFrame(
        {
            "sample_id": names, "image_id": ["i"] * 5, "answer": ["red"] * 5,
            "global_view": ["i#pixels=50176"] * 5,
            "boxes": [[10, 10, 50, 30, 0, 0, 90, 60]] * 4 + [[]],
        },
        {"sample_id": pl.String, "image_id": pl.String, "answer": pl.String,
         "global_view": pl.String, "boxes": pl.List(pl.Int64)},
    )  # fmt: skip
    return samples.write(build.store, frame)


def checked(build, given, unanswered=(), **params):
    views = tables.frame(build.store, crop_views(build, given, Crops()).views)
    said = [
        SAID[name][kind == "noise"] for name, kind in views.select("sample", "kind").iter_rows()
    ]
    rows = views.with_columns(pl.Series("said", said, pl.String))
    waits = samples.write_drops(build.store, samples.drops(unanswered, "ask_model"))
    answers = samples.write(build.store, rows)
    found = check_gap(build, given, answers, waits, GapCheck(**params))
    drops = tables.read(build.store, found.drops).to_pylist()
    return tables.frame(build.store, found.samples), {row["id"]: row["rule"] for row in drops}


def test_what_a_crop_must_bring(build, given):
    kept, drops = checked(build, given)
    assert dict(kept.select("sample_id", "gap").iter_rows()) == {"gap": 1, "boxless": None}
    assert drops == {
        "guessed": "right_with_noise", "lost": "wrong_with_crop", "perverse": "wrong_with_crop",
    }  # fmt: skip


def test_the_gap_may_only_be_noted(build, given):
    kept, drops = checked(build, given, without_gap="keep")
    gaps = dict(kept.select("sample_id", "gap").iter_rows())
    assert gaps == {"gap": 1, "guessed": 0, "lost": 0, "perverse": -1, "boxless": None}
    assert drops == {}


@pytest.mark.parametrize("rule", ["endpoint_error", "refused"])
def test_noise_that_brought_no_answer_proves_no_gap(build, given, rule):
    lost = [{"id": "gap@noise", "rule": rule, "detail": "answer_with_part"}]
    kept, drops = checked(build, given, lost)
    assert drops["gap"] == rule
    assert kept["sample_id"].to_list() == ["boxless"]


def test_crops_come_from_the_original_and_noise_has_their_size(build, given):
    views = tables.frame(build.store, crop_views(build, given, Crops()).views)
    names = dict(views.filter(pl.col("sample") == "gap").select("kind", "part_view").iter_rows())
    data = pictures.png(2000, 1000)
    crop, noise = (
        Image.open(io.BytesIO(shown(data, View.of(names[kind]), 10**8)))
        for kind in ("crop", "noise")
    )
    assert crop.size == noise.size == (40, 20)
    original = Image.open(io.BytesIO(data)).convert("RGB").crop((10, 10, 50, 30))
    apart = np.abs(np.asarray(crop).astype(int) - np.asarray(original).astype(int))
    assert apart.mean() < 8  # what JPEG adds
    assert np.asarray(noise).std() > 40


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_a_crop_beyond_its_budget_is_made_smaller_in_its_shape(kind):
    view = View("i", (100, 50, 1900, 950), 1024 * 784, kind == "noise")
    width, height = Image.open(io.BytesIO(shown(pictures.png(2000, 1000), view, 10**8))).size
    # 1800 x 900 px are more than 1024 tokens; in the same shape, 1267 x 633 are not.
    assert (width, height) == (1267, 633)
