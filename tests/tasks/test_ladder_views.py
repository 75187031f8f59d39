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
from tasks.size_originals import Sizes, size_originals
from tests import pictures


def views(build: Build, width: int, height: int, least: int = 1024, **params):
    """The levels of a picture by tokens, and drops as (rule, value)."""
    frame = pl.DataFrame({"sample_id": ["s"], "image_id": ["i"], "question": ["?"]})
    images = tables.write(
        build.store, "images", [{"image_id": "i", "width": width, "height": height}]
    )
    large = size_originals(build, samples.write(build.store, frame), images, Sizes(least, 28))
    made = ladder_views(build, large.samples, Ladder(**params))
    rows = tables.frame(build.store, made.views).sort("tokens")
    drops = tables.read(build.store, large.drops).to_pylist()
    return dict(rows.select("tokens", "view").iter_rows()), [(d["rule"], d["value"]) for d in drops]


def test_every_level_is_smaller_than_the_original(build):
    found, drops = views(build, 1512, 1008)
    assert list(found) == [64, 128, 256, 384, 576, 768, 1024]
    assert found[64] == "i#pixels=50176"
    assert drops == []


@pytest.mark.parametrize(
    ("width", "height", "drops"),
    # 896 x 896 px are 1024 tokens; a column less is too small.
    [
        (896, 896, []),
        (895, 896, [("small_original", 1022)]),
        (896, 895, [("small_original", 1022)]),
    ],
)
def test_originals_below_the_least_are_dropped(build, width, height, drops):
    found, lost = views(build, width, height)
    assert lost == drops
    assert list(found) == ([] if drops else [64, 128, 256, 384, 576, 768])


def test_a_small_picture_has_fewer_levels(build):
    found, _ = views(build, 448, 448, least=1)  # 256 tokens
    assert list(found) == [64, 128]


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
