"""Levels of a ladder: which a picture has, and how large they are."""

import io

import polars as pl
import pytest
from PIL import Image
from pydantic import ValidationError

from infra import samples, tables
from infra.build import Build
from infra.pictures import View, fitted, shown
from tasks.ladder_views import Ladder, ladder_views
from tests import pictures


def views(build: Build, width: int, height: int, **params):
    frame = pl.DataFrame({"sample_id": ["s"], "image_id": ["i"], "question": ["?"]})
    images = tables.write(
        build.store, "images", [{"image_id": "i", "width": width, "height": height}]
    )
    made = ladder_views(build, samples.write(build.store, frame), images, Ladder(**params))
    rows = tables.frame(build.store, made.views).sort("tokens")
    drops = tables.read(build.store, made.drops).to_pylist()
    return dict(rows.select("tokens", "view").iter_rows()), drops


def test_every_level_is_smaller_than_the_original(build):
    found, drops = views(build, 1512, 1008)
    assert list(found) == [0, 64, 128, 256, 384, 576, 768, 1024]
    assert found[0] == "i"
    assert found[64] == "i#pixels=50176"
    assert drops == []


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    # 896 x 896 px are 1024 tokens; a column less is too small.
    [(896, 896, True), (895, 896, False), (896, 895, False)],
)
def test_originals_below_the_least_are_dropped(build, width, height, kept):
    found, drops = views(build, width, height)
    assert (1024 not in found, bool(found)) == (True, kept)
    assert [drop["rule"] for drop in drops] == [] if kept else ["small_original"]
    assert kept or drops[0]["value"] == width * height // 784


def test_a_small_picture_has_fewer_levels(build):
    found, _ = views(build, 448, 448, min_tokens=1)  # 256 tokens
    assert list(found) == [0, 64, 128]


@pytest.mark.parametrize("budgets", [[64, 128], [64, 64], [], [0]])
def test_ladders_fall(budgets):
    with pytest.raises(ValidationError):
        Ladder(budgets=budgets)


@pytest.mark.parametrize("size", [(1512, 1008), (700, 1900), (1031, 997)])
@pytest.mark.parametrize("tokens", [1024, 256, 64])
def test_sizes_are_exact_and_keep_their_shape(size, tokens):
    pixels = tokens * 784
    jpeg = shown(pictures.png(*size), View("i", pixels=pixels), 12_845_056)
    width, height = Image.open(io.BytesIO(jpeg)).size
    assert (width, height) == fitted(*size, pixels)
    assert width * height <= pixels
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
