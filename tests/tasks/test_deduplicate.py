"""Near-duplicates are tied to the survivor, never chained; each way of finding them, by example."""

import io

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from infra import images, tables
from tasks.deduplicate import DedupParams, deduplicate
from tests.tasks.examples import new_build


def photograph(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A smooth random picture with detail at several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 24):
        noise = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), float) / cells
    total = 255 * (total - total.min()) / np.ptp(total)
    return Image.fromarray(total.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    across, down = round(0.015 * width), round(0.015 * height)
    return image.crop((across, down, width - across, height - down))


def requantised(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "quality 50": requantised,
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brightened by 12 %": lambda image: image.point(lambda v: min(255, round(1.12 * v))),
    "cropped by 3 %": cropped,
}


def tabled(build, pictures, captions=None, vectors=None):
    """The tables deduplicate reads, of (image_id, picture) in the order given."""
    captions = captions or {}
    header = images.Header("PNG", 1, 1, 1, "RGB")
    rows, looks, texts = [], [], {}
    for name, picture in pictures.items():
        rows.append(
            {"image_id": name, "key": name, "bytes": 1, "format": "PNG", "licence": "CC0",
             "width": picture.width, "height": picture.height}
        )  # fmt: skip
        quality = images.quality(picture, header)
        looks.append(
            {"image_id": name, "phash": images.phash(picture), "dhash": images.dhash(picture),
             "thumbnail": images.thumbnail(picture).tobytes(), "informative": quality.informative}
        )  # fmt: skip
        if name in captions:
            texts[captions[name]] = f"caption {captions[name]}"
    aligned = [{"image_id": n, "caption_id": captions.get(n), "clip_score": None} for n in pictures]
    kept = [{"caption_id": c, "text": captions_text} for c, captions_text in texts.items()]
    found = {"dino": tables.Table("vectors")}
    if vectors is not None:
        matrix = np.array(list(vectors.values()), np.float16)
        shard = tables.write_shard(build.store, tables.vector_rows("image_id", vectors, matrix))
        found = {"dino": tables.Table("vectors-x", (shard,))}
    return (
        tables.write(build.store, "images", rows),
        tables.write(build.store, "looks", looks)._replace(name="looks-x"),
        tables.write(build.store, "aligned", aligned),
        tables.write(build.store, "captions", kept),
        found,
    )


def survivors(build, tables_in, params=None):
    result = deduplicate(build, *tables_in, params or DedupParams())
    frame = pl.DataFrame(tables.read(build.store, result.survivors))
    return dict(frame.select("image_id", "survivor_id").iter_rows())


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_tied_to_its_original_and_strangers_to_themselves(build, kind):
    original = photograph(1)
    found = survivors(
        build, tabled(build, {"a": original, "b": COPIES[kind](original), "c": photograph(2)})
    )
    assert found["a"] == found["b"]
    assert found["c"] == "c"


def test_the_larger_picture_survives_then_the_lesser_id(build):
    small, large = photograph(1, (120, 90)), photograph(1)
    assert survivors(build, tabled(build, {"a": small, "b": large}))["a"] == "b"
    assert survivors(build, tabled(build, {"d": large, "c": large}))["d"] == "c"


def test_a_captioned_picture_survives_a_larger_one_without(build):
    pictures = {"a": photograph(1, (120, 90)), "b": photograph(1)}
    assert survivors(build, tabled(build, pictures, {"a": "x"}))["b"] == "a"


def test_flat_pictures_are_no_ones_near_duplicate(build):
    pictures = {name: Image.new("RGB", (90, 90), colour) for name, colour in
                (("a", "white"), ("b", "#fefefe"), ("c", "red"))}  # fmt: skip
    assert survivors(build, tabled(build, pictures)) == {"a": "a", "b": "b", "c": "c"}


def test_another_shape_is_another_picture(build):
    wide = photograph(1).resize((240, 100))
    found = survivors(build, tabled(build, {"a": photograph(1), "b": wide}))
    assert found == {"a": "a", "b": "b"}


def test_captions_must_match_where_the_config_says_so(build):
    pictures = {name: photograph(1) for name in "abc"}
    tabled_ = tabled(build, pictures, {"a": "x", "b": "x", "c": "y"})
    found = survivors(build, tabled_, DedupParams(captions="must_match"))
    assert found == {"a": "a", "b": "a", "c": "c"}


def test_off_leaves_near_duplicates_alone(build):
    pictures = {name: photograph(1) for name in "ab"}
    assert survivors(build, tabled(build, pictures), DedupParams(near="off")) == {
        "a": "a",
        "b": "b",
    }


def test_cosine_ties_to_the_survivor_and_never_through_a_duplicate(build):
    # a ~ b and b ~ c, but a and c are strangers: c must not follow b to a.
    turned = [np.deg2rad(angle) for angle in (0, 15, 30)]
    vectors = {n: [np.cos(t), np.sin(t)] for n, t in zip("abc", turned, strict=True)}
    pictures = {name: photograph(seed) for seed, name in enumerate("abc")}
    params = DedupParams(near="cosine", cosine=0.95)
    found = survivors(build, tabled(build, pictures, vectors=vectors), params)
    assert found == {"a": "a", "b": "a", "c": "c"}


def test_each_drop_names_its_survivor_and_distance(build):
    result = deduplicate(
        build, *tabled(build, {"a": photograph(1), "b": photograph(1)}), DedupParams()
    )
    (drop,) = tables.read(build.store, result.drops).to_pylist()
    assert drop["rule"] == "near_duplicate"
    assert (drop["id"], drop["detail"], drop["value"]) == ("b", "a", 0)


# Nights ----------------------------------------------------------------------------------------

RELATIVES = {
    f"{kind[:4]}{seed}": change(photograph(seed))
    for seed in range(4)
    for kind, change in ({"orig": lambda image: image} | COPIES).items()
}
ANGLES = {name: [np.cos(n / 7), np.sin(n / 7)] for n, name in enumerate(RELATIVES)}


@pytest.mark.parametrize(
    "params",
    [
        DedupParams(),
        DedupParams(captions="must_match"),
        DedupParams(near="cosine", cosine=0.95),
        DedupParams(near="off"),
    ],
    ids=["hash", "captions", "cosine", "off"],
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_any_history_ends_at_the_survivors_of_its_set(tmp_path_factory, params, seed):
    """Families of copies, of which a few come, go, or get another caption every night."""
    rng = np.random.default_rng(seed)
    names = sorted(RELATIVES)
    present = {n: rng.choice(["x", "y", ""]) for n in names if rng.random() < 0.8}
    build = new_build(tmp_path_factory.mktemp("nights"))
    for _ in range(4):
        for name in rng.choice(names, 3, replace=False).tolist():
            if name in present and rng.random() < 0.6:
                del present[name]
            else:
                present[name] = rng.choice(["x", "y", ""])
        captions = {name: caption for name, caption in present.items() if caption}
        given = (
            {name: RELATIVES[name] for name in present},
            captions,
            {name: ANGLES[name] for name in present},
        )
        after = survivors(build, tabled(build, *given), params)
    other = new_build(tmp_path_factory.mktemp("whole"))
    assert after == survivors(other, tabled(other, *given), params)


def test_a_duplicate_takes_the_place_of_a_survivor_that_left(build):
    many = {f"s{n}": photograph(10 + n) for n in range(6)}
    family = {"a": photograph(1), "b": photograph(1), "c": photograph(1)}
    assert survivors(build, tabled(build, many | family))["c"] == "a"
    left = {name: picture for name, picture in (many | family).items() if name != "a"}
    found = survivors(build, tabled(build, left))
    assert (found["b"], found["c"]) == ("b", "b")
