"""Pictures for an MLLM: small JPEGs, joined, each found by its range."""

import hashlib
import io

import pytest
from PIL import Image

from infra import images
from infra.corpus import Source
from infra.pictures import View, cut, prepare, shown, shrink
from infra.store import NotFound
from tests import pictures
from tests.corpora import fill, tar


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize(
    ("width", "height", "most", "size"),
    [
        (64, 48, 10_000, (64, 48)),
        (640, 480, 76_800, (320, 240)),
        (480, 640, 76_800, (240, 320)),
        (5000, 10, 10_000, (2236, 4)),
        (5000, 1, 100, (100, 1)),
        (1, 1, 100, (1, 1)),
    ],
)
def test_a_picture_is_made_small_enough_and_never_larger(width, height, most, size):
    picture = opened(shrink(pictures.png(width, height), most))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", size)
    assert size[0] * size[1] <= most


def test_a_turned_picture_is_upright_and_transparency_is_white():
    upright = opened(shrink(pictures.turned(6, "JPEG", 64, 40), 100_000))
    assert upright.size == (64, 40)
    clear = pictures.encode(Image.new("RGBA", (32, 32), (0, 0, 0, 0)), "PNG")
    assert opened(shrink(clear, 10_000)).getpixel((5, 5)) == (255, 255, 255)


def test_every_readable_picture_can_be_shown():
    for name, make in pictures.READABLE.items():
        assert opened(shrink(make(), 20_000)).format == "JPEG", name


def rows(build, *keys: str) -> list[tuple[str, Source]]:
    found = []
    for key in keys:
        data = build.corpus.get(key)
        image_id = hashlib.sha256(data).hexdigest()
        found.append((image_id, Source(key, "loose", "s", len(data))))
    return found


def test_pictures_are_joined_and_read_by_range(build):
    fill(build, {f"{n}.jpg": pictures.jpeg(64, 48, n) for n in range(3)})
    wanted = rows(build, "0.jpg", "1.jpg", "2.jpg")
    places = prepare((build.corpus, build.store, 1_000), wanted)
    assert list(places) == [image_id for image_id, _ in wanted]
    for image_id, source in wanted:
        key, offset, length = places[image_id]
        data = build.store.get(key, offset, length)
        assert data == shrink(build.corpus.get(source.key), 1_000)
    assert len({key for key, *_ in places.values()}) == 1


def test_the_same_pictures_are_prepared_once(build):
    fill(build, {"0.jpg": pictures.jpeg()})
    wanted = rows(build, "0.jpg")
    first = prepare((build.corpus, build.store, 1_000), wanted)
    build.corpus.delete("0.jpg")
    assert prepare((build.corpus, build.store, 1_000), wanted) == first
    with pytest.raises(NotFound):
        prepare((build.corpus, build.store, 2_000), wanted)


def test_a_member_of_a_tar_is_a_picture_too(build):
    data = pictures.jpeg(64, 48)
    fill(build, {"a.tar": tar([("x.txt", b"words"), ("x.jpg", data)])})
    source = Source("a.tar", "tar", "s", len(data), (), "x.jpg", 3 * 512)
    places = prepare((build.corpus, build.store, 1_000), [("id", source)])
    assert build.store.get(*places["id"]) == shrink(data, 1_000)


def test_what_became_unreadable_is_said(build):
    fill(build, {"0.jpg": b"other bytes"})
    with pytest.raises(images.Unreadable):
        prepare((build.corpus, build.store, 1_000), rows(build, "0.jpg"))


@pytest.mark.parametrize(
    ("view", "name"),
    [
        (View("i"), "i"),
        (View("i", (1, 2, 3, 4)), "i#crop=1,2,3,4"),
        (View("i", None, 784), "i#pixels=784"),
        (View("i", (0, 0, 9, 9), 784, True), "i#crop=0,0,9,9#pixels=784#noise"),
        (View("i", None, None, True), "i#noise"),
    ],
)
def test_a_view_is_named_by_what_it_shows(view, name):
    assert (view.name, View.of(name)) == (name, view)


@pytest.mark.parametrize("name", ["i#crop=1,2,x,4", "i#pixels=many"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError):
        View.of(name)


def quarters() -> bytes:
    """Red, green, blue and black quarters of 100 x 60 px."""
    image = Image.new("RGB", (200, 120))
    for place, colour in {(0, 0): "red", (100, 0): "lime", (0, 60): "blue"}.items():
        image.paste(colour, (*place, place[0] + 100, place[1] + 60))
    return pictures.encode(image, "PNG")


def test_a_crop_is_cut_at_full_size_and_only_then_made_smaller():
    whole = opened(shown(quarters(), View("i", (100, 0, 200, 60)), 100_000))
    assert whole.size == (100, 60)
    assert all(abs(a - b) < 4 for a, b in zip(whole.getpixel((50, 30)), (0, 255, 0), strict=True))
    assert opened(shown(quarters(), View("i", (100, 0, 200, 60)), 1_500)).size == (50, 30)
    assert opened(shown(quarters(), View("i", (100, 0, 200, 60), 1_500), 100_000)).size == (50, 30)
    assert opened(shown(quarters(), View("i", None, 6_000), 100_000)).size == (100, 60)


def test_what_of_a_crop_lies_outside_is_not_shown():
    assert cut(quarters(), View("i", (-50, -50, 100, 60))).size == (100, 60)
    assert cut(quarters(), View("i", (150, 100, 900, 900))).size == (50, 20)


def test_noise_has_the_size_of_what_it_stands_for_and_is_the_same_every_time():
    view = View("i", (0, 0, 100, 60), None, True)
    noise = opened(shown(quarters(), view, 100_000))
    assert noise.size == (100, 60) and len(noise.getcolors(6_000)) > 1_000
    assert shown(quarters(), view, 100_000) == shown(quarters(), view, 100_000)
    assert shown(quarters(), view._replace(crop=(0, 0, 99, 60)), 100_000) != shown(
        quarters(), view, 100_000
    )


def test_views_are_prepared_beside_whole_pictures(build):
    fill(build, {"0.png": quarters()})
    [(name, source)] = rows(build, "0.png")
    views = [name, View(name, (0, 0, 100, 60)).name, View(name, None, 600).name]
    places = prepare((build.corpus, build.store, 100_000), [(view, source) for view in views])
    sizes = [opened(build.store.get(*places[view])).size for view in views]
    assert sizes == [(200, 120), (100, 60), (31, 18)]
