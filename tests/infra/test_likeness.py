"""What counts as a copy: drawn pictures, with thumbnails as the describe stage makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from infra import images, likeness


def scene(seed: int, size: int = 320) -> Image.Image:
    """Something like a photograph: smooth light, a horizon, and blobs of several sizes."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(20, 215, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, r = draw.integers(0, size, 3) // (1, 1, 8)
        colour = tuple(draw.integers(0, 220, 3).tolist())
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


def card(pips: list[tuple[int, int]], paper: str = "white") -> Image.Image:
    image = Image.new("RGB", (200, 280), paper)
    pen = ImageDraw.Draw(image)
    pen.rectangle((4, 4, 195, 275), outline="black", width=6)
    for x, y in pips:
        pen.ellipse((x, y, x + 30, y + 30), fill="red")
    return image


def alike(one: Image.Image, other: Image.Image) -> bool:
    thumbnails = np.stack([images.thumbnail(one), images.thumbnail(other)])
    return bool(likeness.alike(thumbnails, np.array([0]), np.array([1]))[0])


def cropped(image: Image.Image, left: float, top: float, right: float, low: float) -> Image.Image:
    width, height = image.size
    return image.crop(
        (
            round(left * width),
            round(top * height),
            round(width - right * width),
            round(height - low * height),
        )
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(lambda image: image, id="same"),
        pytest.param(lambda image: image.resize((160, 160)), id="halved"),
        pytest.param(lambda image: image.resize((128, 90)), id="thumbnail"),
        pytest.param(lambda image: ImageEnhance.Brightness(image).enhance(1.12), id="brighter"),
        pytest.param(lambda image: cropped(image, 0.03, 0.03, 0.03, 0.03), id="crop all round"),
        pytest.param(lambda image: cropped(image, 0.03, 0.03, 0, 0), id="crop at a corner"),
        pytest.param(lambda image: cropped(image, 0, 0, 0, 0.03), id="crop at the bottom"),
    ],
)
def test_a_copy_of_a_photograph_is_alike(seed: int, copy):
    assert alike(scene(seed), copy(scene(seed)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(scene(1), scene(2), id="another scene"),
        pytest.param(scene(1), scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), id="mirrored"),
        pytest.param(scene(1), cropped(scene(1), 0.2, 0.2, 0.2, 0.2), id="a detail"),
        pytest.param(card([(85, 125)]), card([(85, 60), (85, 190)]), id="another card"),
        pytest.param(card([(85, 125)]), card([(85, 145)]), id="a pip moved"),
        pytest.param(card([(85, 125)]), card([(85, 125)], "khaki"), id="on other paper"),
    ],
)
def test_relatives_are_not_alike(one: Image.Image, other: Image.Image):
    assert not alike(one, other)


def test_flat_pictures_are_like_nothing():
    plain = np.full((2, 16, 16, 3), 128, dtype=np.uint8)
    assert likeness.flat(plain).tolist() == [True, True]
    assert likeness.alike(plain, np.array([0]), np.array([1])).tolist() == [False]


def test_the_likeness_of_equal_pictures_is_a_million():
    ready = likeness.prepare(images.thumbnail(scene(1))[None])
    assert likeness.likeness(ready, ready).tolist() == [1_000_000]


def test_the_likeness_of_a_negative_is_negative():
    one = images.thumbnail(scene(1))[None]
    assert likeness.likeness(likeness.prepare(one), likeness.prepare(255 - one))[0] < 0


PIXELS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
)


@given(pixels=PIXELS, share=st.sampled_from([0.0, 0.9, 0.97, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_verdict_is_symmetric_and_alone_what_it_is_in_company(pixels: np.ndarray, share: float):
    near = (share * pixels[:1] + (1 - share) * pixels).astype(np.uint8)
    i, j = (column.ravel() for column in np.meshgrid(np.arange(6), np.arange(6)))
    together = likeness.alike(near, i, j)
    assert together.tolist() == likeness.alike(near, j, i).tolist()
    alone = [
        likeness.alike(near[[a, b]], np.array([0]), np.array([1]))[0]
        for a, b in zip(i, j, strict=True)
    ]
    assert together.tolist() == alone


def test_many_pairs_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch):
    thumbnails = np.stack([images.thumbnail(scene(seed)) for seed in (1, 2, 1)])
    i, j = np.array([0, 0, 1, 2, 2]), np.array([1, 2, 2, 0, 1])
    monkeypatch.setattr(likeness, "BLOCK", 2)
    assert likeness.alike(thumbnails, i, j).tolist() == [False, True, False, True, False]


def test_no_pairs_have_no_verdicts():
    none = np.zeros(0, dtype=np.int64)
    assert likeness.alike(np.zeros((0, 16, 16, 3), np.uint8), none, none).tolist() == []


@pytest.mark.parametrize("margin", [0.03, 0.045])
def test_the_hashes_foresee_a_crop(margin: float):
    whole, part = scene(3), cropped(scene(3), margin, margin, margin, margin)
    hashes = np.array([images.phash(image) for image in (whole, part)], dtype=np.uint64)
    columns = likeness.hashes(hashes, np.stack([images.thumbnail(x) for x in (whole, part)]))
    assert columns.shape == (2, 7)
    assert columns[:, 0].tolist() == hashes.tolist()
    foreseen = int(np.bitwise_count(columns[0] ^ columns[1, 0]).min())
    assert foreseen <= likeness.RADIUS
    assert foreseen < int(np.bitwise_count(hashes[0] ^ hashes[1]))
