"""Pictures for an MLLM: small JPEGs, joined, each found by its range."""

import hashlib
import io

import pytest
from PIL import Image

from infra import images
from infra.corpus import Source
from infra.pictures import prepare, shrink
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
