"""Image files: what is read, what is refused and why, and what is derived from the pixels."""

import math
import pickle
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from infra import images
from infra.images import Header, Unreadable, decode, fit, read_header
from tests import pictures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

SAMPLE = Path(__file__).parents[2] / "sample" / "bucket" / "images"
WHITE = (255, 255, 255)

HEADERS = {
    "jpeg": Header("JPEG", 64, 48, 1, "RGB"),
    "jpeg_grey": Header("JPEG", 64, 48, 1, "L"),
    "jpeg_wide": Header("JPEG", 5000, 10, 1, "RGB"),
    "jpeg_one_pixel": Header("JPEG", 1, 1, 1, "RGB"),
    "jpeg_cmyk": Header("JPEG", 64, 48, 1, "CMYK"),
    "jpeg_broken_exif": Header("JPEG", 64, 48, 1, "RGB"),
    "jpeg_large_profile": Header("JPEG", 64, 48, 1, "RGB"),
    "mpo": Header("MPO", 64, 48, 3, "RGB"),
    "png_1_bit": Header("PNG", 64, 48, 1, "1"),
    "png_16_bit": Header("PNG", 64, 48, 1, "I;16"),
    "png_palette": Header("PNG", 64, 48, 1, "P"),
    "png_palette_clear": Header("PNG", 64, 48, 1, "PA"),
    "png_rgb_clear_colour": Header("PNG", 64, 48, 1, "RGBA"),
    "png_grey_alpha": Header("PNG", 64, 48, 1, "LA"),
    "png_animated": Header("PNG", 64, 48, 3, "RGB"),
    "gif_animated": Header("GIF", 64, 48, 3, "P"),
    "gif_clear": Header("GIF", 64, 48, 1, "PA"),
    "webp": Header("WEBP", 64, 48, 1, "RGB"),
    "webp_animated": Header("WEBP", 64, 48, 3, "RGBA"),
    "bmp": Header("BMP", 64, 48, 1, "RGB"),
    "tiff_pages": Header("TIFF", 64, 48, 3, "RGB"),
    "tiff_float": Header("TIFF", 64, 48, 1, "F"),
    "png_turned_6": Header("PNG", 64, 48, 1, "RGB"),
}
RULES = {
    "no_bytes": "empty",
    "zeros": "not_an_image",
    "text_named_jpg": "not_an_image",
    "html_error_page": "not_an_image",
    "svg": "unsupported_format",
    "heic": "unsupported_format",
    "tiff_lab": "unsupported_format",
    "tiff_not_finite": "unsupported_format",
    "jpeg_cut": "truncated",
    "jpeg_cut_in_header": "truncated",
    "jpeg_progressive_cut": "truncated",
    "jpeg_corrupt_header": "truncated",
    "jpeg_magic_only": "corrupt",
    "png_cut": "truncated",
    "png_without_end": "truncated",
    "png_flipped_bits": "corrupt",
    "png_bomb": "too_large",
    "png_144_megapixels": "too_large",
    "png_text_bomb": "too_large",
    "png_profile_bomb": "too_large",
    "gif_cut": "truncated",
    "webp_cut": "corrupt",
    "bmp_cut": "truncated",
    "tiff_cut": "corrupt",
    "avif_cut": "corrupt",
}


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def sample_pictures(suffix: str, every: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(SAMPLE.rglob(f"*.{suffix}"))[::every]]


def decoded_samples() -> list[Image.Image]:
    files = sample_pictures("jpg", 40) + sample_pictures("png", 80)
    shapes = [(3, 7), (1, 1), (700, 100), (1000, 90), (333, 77)]
    return [decode(data, 96) for data in files] + [pictures.scene(*shape) for shape in shapes]


@pytest.mark.parametrize("name", HEADERS)
def test_header(name):
    assert read_header(pictures.READABLE[name]()) == HEADERS[name]


@pytest.mark.parametrize("name", pictures.READABLE)
def test_a_readable_file_decodes_to_its_header_s_size(name):
    data = pictures.READABLE[name]()
    header, picture = read_header(data), decode(data, 1000)
    assert (picture.mode, picture.size) == ("RGB", (header.width, header.height))


@pytest.mark.parametrize("name", pictures.UNREADABLE)
def test_an_unreadable_file_is_refused_by_rule(name):
    data = pictures.UNREADABLE[name]()
    with pytest.raises(Unreadable) as refusal:
        decode(data, 96)
    assert refusal.value.rule == RULES[name]
    assert "0x" not in refusal.value.detail  # the same bytes give the same detail


def test_the_pixel_bound_is_the_caller_s():
    data = pictures.png(64, 48)
    assert read_header(data, max_pixels=64 * 48).width == 64
    with pytest.raises(Unreadable, match=r"too_large.*64 x 48"):
        decode(data, 96, max_pixels=64 * 48 - 1)


def test_pillow_s_switches_are_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_refusal_travels_between_processes():
    refusal = pickle.loads(pickle.dumps(Unreadable("corrupt", "PNG header")))
    assert (refusal.rule, refusal.detail) == ("corrupt", "PNG header")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_picture(orientation):
    upright = levels(pictures.scene())
    assert np.array_equal(levels(decode(pictures.turned(orientation), 1000)), upright)
    lossy = levels(decode(pictures.turned(orientation, "JPEG"), 1000))
    assert np.abs(lossy - upright).mean() < 12


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_file_says_its_upright_size(format):
    header = read_header(pictures.turned(6, format, width=64, height=32))
    assert (header.width, header.height) == (64, 32)


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 128))
    assert decode(pictures.encode(clear, "PNG"), 96).getpixel((0, 0)) == WHITE
    assert decode(pictures.encode(half, "PNG"), 96).getpixel((0, 0)) == (227, 127, 127)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_lies_on_white(mode):
    dark = Image.new(mode, (8, 8))
    dark.paste("white", (0, 0, 1, 8))
    clear = decode(pictures.encode(dark, "PNG", transparency=0 if mode == "L" else (0, 0, 0)), 96)
    assert clear.getextrema() == ((255, 255),) * 3


def test_a_transparent_palette_entry_lies_on_white():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    solid, clear = (pictures.encode(picture, "GIF", transparency=entry) for entry in (0, 1))
    assert decode(solid, 96).getpixel((4, 4)) == (10, 20, 30)
    assert decode(clear, 96).getpixel((4, 4)) == WHITE


def test_16_bits_are_scaled_and_not_clipped():
    expected = pictures.deep_levels() >> 8
    for name in ("png_16_bit", "png_16_bit_rgb"):
        got = levels(decode(pictures.READABLE[name](), 1000))
        assert np.array_equal(got, np.repeat(expected[..., None], 3, axis=-1)), name
    clear = levels(decode(pictures.READABLE["png_16_bit_clear_level"](), 1000))
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(clear[1:, :, 0], expected[1:])


@pytest.mark.parametrize("name", ["tiff_float", "tiff_32_bit"])
def test_wide_pixels_are_stretched_from_their_extremes(name):
    grey = levels(decode(pictures.READABLE[name](), 1000))[..., 0]
    assert (grey.min(), grey.max()) == (0, 255)
    assert np.abs(grey - pictures.deep_levels() / 257).max() <= 0.51


@pytest.mark.parametrize("name", ["jpeg_cmyk_adobe", "jpeg_cmyk"])
def test_inks_come_back_as_the_light_they_leave(name):
    picture = decode(pictures.READABLE[name](), 1000)
    assert np.abs(levels(picture) - levels(pictures.scene())).mean() < 12


@pytest.mark.parametrize("name", ["gif_animated", "png_animated", "webp_animated", "tiff_pages"])
def test_an_animation_is_its_first_frame(name):
    picture = decode(pictures.READABLE[name](), 1000)
    assert np.abs(levels(picture) - levels(pictures.scene())).mean() < 12


@pytest.mark.parametrize(
    ("short_side", "size"),
    [(96, (256, 192)), (97, (512, 384)), (48, (128, 96)), (12, (32, 24)), (1000, (1024, 768))],
)
def test_decode_keeps_at_least_twice_the_short_side(short_side, size):
    assert decode(pictures.jpeg(1024, 768), short_side).size == size


def test_reducing_by_bands_equals_reducing_at_once(monkeypatch):
    data = pictures.encode(pictures.veiled(width=333, height=251), "PNG")
    at_once = levels(decode(data, 30))
    monkeypatch.setattr(images, "BAND", 333 * 40)
    assert at_once.shape == (63, 84, 3)
    assert np.array_equal(levels(decode(data, 30)), at_once)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_fit_is_open_clip_s_preprocessing(mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose

    config = PreprocessCfg(96, resize_mode=mode, interpolation=interpolation, fill_color=7)
    theirs = Compose(image_transform_v2(config, is_train=False).transforms[:-2])
    for picture in decoded_samples():
        ours = fit(picture, 96, mode, interpolation, fill=7)
        assert np.array_equal(ours, np.asarray(theirs(picture))), picture.size


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize(
    ("crop_mode", "mode"), [("center", "shortest"), ("border", "longest"), ("squash", "squash")]
)
def test_fit_is_timm_s_evaluation_transform(crop_mode, mode, crop_pct):
    from timm.data.transforms_factory import transforms_imagenet_eval
    from torchvision.transforms import Compose

    mean = (0.485, 0.456, 0.406)
    built = transforms_imagenet_eval(
        96, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic", mean=mean
    )
    theirs = Compose(built.transforms[:-2])
    fill = tuple(round(255 * level) for level in mean)
    for picture in decoded_samples():
        ours = fit(picture, 96, mode, "bicubic", fill, resize=math.floor(96 / crop_pct))
        assert np.array_equal(ours, np.asarray(theirs(picture))), picture.size


@pytest.mark.parametrize("size", [(5000, 10), (10, 5000), (60_000, 1)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_fit_of_an_extreme_shape_is_a_square(mode, size):
    assert fit(pictures.scene(*size), 224, mode).shape == (224, 224, 3)


def test_fit_of_an_extreme_shape_is_the_centre_of_the_whole_resize():
    picture = pictures.scene(5000, 10)
    whole = picture.resize((48_000, 96), Image.Resampling.BICUBIC)
    centre = levels(whole.crop((23_952, 0, 24_048, 96)))
    assert np.abs(fit(picture, 96).astype(int) - centre).max() <= 2


def test_hashes_are_imagehash_s():
    for picture in decoded_samples():
        assert f"{images.phash(picture):016x}" == str(imagehash.phash(picture))
        assert f"{images.dhash(picture):016x}" == str(imagehash.dhash(picture))
        assert images.phash(picture.convert("L")) == images.phash(picture)


def test_thumbnail_averages_boxes():
    picture = pictures.scene(160, 320)
    boxes = levels(picture).reshape(16, 20, 16, 10, 3).mean(axis=(1, 3))
    assert images.thumbnail(picture).shape == (16, 16, 3)
    assert np.abs(images.thumbnail(picture) - boxes).max() <= 1


def test_quality_of_a_flat_picture():
    flat = images.quality(Image.new("RGB", (64, 48), WHITE), HEADERS["jpeg"])
    assert flat == (0, 0, 0, 1000, 1000, 0, False, False)


def test_quality_of_half_black_half_white():
    halves = Image.new("L", (128, 128))
    halves.paste(255, (0, 0, 64, 128))
    facts = images.quality(halves, HEADERS["gif_clear"])
    assert facts[:5] == (127_500, 1032, 1000, 500, 500)
    assert facts.has_alpha


@pytest.mark.parametrize(
    ("picture", "informative"),
    [
        (pictures.scene(), True),
        (pictures.scene(400, 300, seed=5), True),
        (Image.new("RGB", (64, 48), (10, 200, 30)), False),
        (Image.linear_gradient("L"), False),  # full contrast, but 56 coefficients are nothing
    ],
)
def test_a_hash_made_of_noise_is_not_informative(picture, informative):
    assert images.quality(picture, HEADERS["jpeg"]).informative is informative


@pytest.mark.parametrize("name", ["jpeg", "png_alpha", "gif", "webp"])
def test_the_same_bytes_give_the_same_facts(name):
    data = pictures.READABLE[name]()
    header = read_header(data)
    first, second = decode(data, 96), decode(data, 96)
    assert np.array_equal(levels(first), levels(second))
    assert images.quality(first, header) == images.quality(second, header)
    assert all(type(fact) in (int, bool) for fact in images.quality(first, header))


FILES = [build() for name, build in pictures.READABLE.items() if name != "jpeg_large_profile"]


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        reach = min(len(data), draw(st.sampled_from([64, 1000, 10**9])))
        at = draw(st.integers(0, reach - 1))
        data[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
        if not data:
            break
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged())
def test_damaged_bytes_are_read_or_refused(data):
    try:
        read_header(data, max_pixels=1_000_000)
        picture = decode(data, 32, max_pixels=1_000_000)
    except Unreadable:
        return
    assert picture.mode == "RGB"
    assert picture.width * picture.height <= 1_000_000
