"""Encoded image files: what the header says, the pixels as RGB, and what is derived from those.

One decode feeds everything: model inputs, perceptual hashes, thumbnail, quality. A file that can't
be read whole is `Unreadable`; no half-decoded picture leaves this module.
"""

import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from typing import Literal, NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray

# Registered by import: Image.open would otherwise load every plugin it has at the first WebP.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    ExifTags,
    Image,
    ImageFile,
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    features,
)
from PIL.Image import Resampling, Transpose

from infra.errors import PairmillError

Rule = Literal["empty", "not_an_image", "unsupported_format", "too_large", "truncated", "corrupt"]
Mode = Literal["shortest", "longest", "squash"]
Colour = int | tuple[int, int, int]

MAX_PIXELS = 100_000_000
MOST_PIXELS = 178_956_970  # Pillow refuses more than this by itself, whatever `max_pixels` says

SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "AVIF": rb".{4}ftyp(?:.{4}){0,11}?avi[fs]",
}
UNSUPPORTED = {
    "HEIF": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:[?!].{0,900}?<)?svg[\s>]",
    "Photoshop": rb"8BPS",
    "Windows icon": rb"\0\0[\1\2]\0[^\0]\0",
    "Netpbm": rb"P[1-7]\s",
    "QOI": rb"qoif",
    "DirectDraw": rb"DDS ",
    "OpenEXR": rb"v/1\x01",
    "Radiance": rb"#\?RADIANCE",
    "PDF": rb"%PDF-",
    "PostScript": rb"%!PS",
}
# fmt: off
MODES = frozenset((
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
    "I;16", "I;16B", "I;16L", "I;16N", "I", "F",
))
# fmt: on
# What Pillow's plugins raise on bytes that are not what they claim to be; found by fuzzing. Not
# MemoryError: a machine that is short of memory says nothing about the file.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    EOFError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
)
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDE = 128  # of the luma that `quality` measures
INFORMATIVE = 3000  # thousandths of a level; see `quality`
# The first 8 rows of the orthonormal DCT-II of length 32.
DCT = np.cos(np.pi / 64 * np.outer(np.arange(8), np.arange(1, 64, 2))) / 4
DCT[0] /= math.sqrt(2)
BAND = 4_000_000  # pixels converted at a time, which bounds what a conversion adds to a decode


class Header(NamedTuple):
    """What a file says of itself; width and height in pixels, as seen after EXIF orientation.

    `mode` is Pillow's, except that a transparent colour or palette entry counts as alpha: a mode
    ends in "A" or "a" exactly when the picture may be transparent.
    """

    format: str
    width: int
    height: int
    frames: int
    mode: str


class Quality(NamedTuple):
    """Integer facts of a picture's luma, squashed to 128 x 128; see `quality`."""

    contrast: int
    sharpness: int
    entropy: int
    white: int
    uniform: int
    hash_margin: int
    has_alpha: bool
    informative: bool


class Unreadable(PairmillError):
    """These bytes are no picture that can be read whole: the rule that says so, and the detail."""

    def __init__(self, rule: Rule, detail: str) -> None:
        super().__init__(rule, detail)
        self.rule: Rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"unreadable image ({self.rule}): {self.detail}; replace the file or leave it out"


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads format, size, frames and mode of an encoded image; decodes no pixel.

    Raises Unreadable, with rule `too_large` over `max_pixels` (at most MOST_PIXELS). A header that
    reads well does not promise that `decode` will.
    """
    with _opened(data, max_pixels) as image:
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        frames = getattr(image, "n_frames", 1)
        return Header(str(image.format), width, height, frames, _mode(image))


def decode(data: bytes, short_side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to RGB, reduced while its short side stays >= 2 * `short_side` pixels.

    EXIF orientation applied; transparency composited on white; the first frame of an animation;
    16 bits a channel keep the high byte; 32-bit integers and floats are stretched from their
    extremes. Colour profiles are ignored. JPEG is reduced in the DCT by 2, 4 or 8, what remains
    by averaging blocks. Raises Unreadable.

    Against a full decode, over the sample bucket's pictures that 2 * 96 px reduces: informative
    pHashes moved 0.5 bits (124 JPEGs; at most 10) and 0.4 (97 PNGs; at most 14), 96 px inputs by
    a median of 0.3 levels a value; more (10 and above) where the reduced size rounds to another
    aspect ratio and the crop of sharp line art shifts by half a pixel.

    PNG checksums are verified. A JPEG has none: libjpeg fills a damaged stretch without a word
    if an end marker follows. Peak memory, measured at 40 megapixels, in bytes a pixel as stored:
    baseline JPEG 0.2, progressive JPEG 3, PNG 2 (grey) or 5 (RGBA), WebP 16.
    """
    with _opened(data, max_pixels) as image:
        turn = TURNS.get(_orientation(image))
        if image.format == "PNG":
            Image.open(BytesIO(data), formats=("PNG",)).verify()
        image.draft(None, (2 * short_side, 2 * short_side))
        image.load()
    flat = _flattened(image, max(1, min(image.size) // (2 * short_side)))
    return flat if turn is None else flat.transpose(turn)


def fit(
    image: Image.Image,
    size: int,
    mode: Mode = "shortest",
    interpolation: str = "bicubic",
    fill: Colour = 0,
    resize: int | None = None,
) -> NDArray[np.uint8]:
    """Makes a square model input, uint8 [size, size, 3], of an RGB picture.

    `shortest` resizes the short side to `resize` (default `size`) and crops the centre, `longest`
    resizes the long side and pads with `fill`, `squash` resizes both. The same bytes as open_clip
    (`image_transform_v2`) before normalisation, and as timm's evaluation transform with `center`,
    `border` and `squash`, where `resize` is floor(size / crop_pct). Where the resized picture would
    be over 64 times the square (an aspect ratio that would fill memory), only the visible part is
    computed; values then differed by at most 2 of 255.
    """
    width, height = _resized(image.size, resize or size, mode)
    left, top = (max(0, round((side - size) / 2)) for side in (width, height))
    seen = (min(width, size), min(height, size))
    method = Resampling[interpolation.upper()]
    if width * height > 64 * size * size:
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + seen[0]) * across, (top + seen[1]) * down)
        picture = image.resize(seen, method, box=box)
    else:
        picture = image.resize((width, height), method)
        picture = picture.crop((left, top, left + seen[0], top + seen[1]))
    if seen != (size, size):
        padded = Image.new(
            "RGB", (size, size), (fill, fill, fill) if isinstance(fill, int) else fill
        )
        padded.paste(picture, ((size - seen[0]) // 2, (size - seen[1]) // 2))
        picture = padded
    return np.asarray(picture)


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Averages an RGB picture into 16 x 16 boxes, whatever its shape: uint8 [16, 16, 3]."""
    return np.asarray(image.resize((16, 16), Resampling.BOX))


def phash(image: Image.Image) -> int:
    """The 64-bit perceptual hash of `imagehash.phash`, first bit highest.

    Takes an RGB picture or its luma (mode L), with equal results. Where `Quality.informative` is
    false, bits are decided by rounding errors and may differ between kinds of CPU.
    """
    return _integer(imagehash.phash(image))


def dhash(image: Image.Image) -> int:
    """The 64-bit difference hash of `imagehash.dhash`, first bit highest; takes RGB or luma."""
    return _integer(imagehash.dhash(image))


def quality(image: Image.Image, header: Header) -> Quality:
    """Measures a picture (RGB or luma) on its luma squashed to 128 x 128.

    contrast: standard deviation * 1000. sharpness: variance of the 4-neighbour Laplacian. entropy:
    of the 256 levels, in millibits. white: pixels of level 250 and above, per mille. uniform:
    pixels of the commonest level, per mille. has_alpha: of the file, even if wholly opaque.

    hash_margin: the median distance of pHash's 64 coefficients from their median, in 1/1000
    levels (orthonormal DCT). informative: at least INFORMATIVE. Rounding 32 x 32 pixels to
    integers moves a coefficient by 0.3 levels, so under 3 about half the bits are noise: flat
    colour, but also stripes and mirrored shapes, whose coefficients cancel at any contrast. Of the
    sample bucket's 1,212 pictures 955 are informative: scaling and re-encoding moves their pHash
    by 1.1 bits (over 10 for 8 of them); the other 257 move by 20 and make 4,460 of the 4,770
    pairs within 10 bits.
    """
    small = image.convert("L").resize((SIDE, SIDE), Resampling.BILINEAR)
    levels = np.array(small.histogram(), dtype=np.int64)
    pixels = np.asarray(small, dtype=np.int64)
    margin = _hash_margin(small)
    return Quality(
        contrast=math.isqrt(int(1_000_000 * _variance(pixels))),
        sharpness=int(_variance(_laplacian(pixels))),
        entropy=_millibits(levels),
        white=1000 * int(levels[250:].sum()) // pixels.size,
        uniform=1000 * int(levels.max()) // pixels.size,
        hash_margin=margin,
        has_alpha=header.mode[-1] in "Aa",
        informative=margin >= INFORMATIVE,
    )


def _format(data: bytes) -> str:
    """Names the supported format that the first bytes promise, or raises Unreadable."""
    if not data:
        raise Unreadable("empty", "no bytes")
    for name, signature in SIGNATURES.items():
        if re.match(signature, data, re.DOTALL):
            return name
    for name, signature in UNSUPPORTED.items():
        if re.match(signature, data, re.DOTALL):
            raise Unreadable("unsupported_format", name)
    raise Unreadable("not_an_image", f"starts with {data[:8].hex(' ')}")


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file, judged by its header; what Pillow raises inside becomes Unreadable."""
    name = _format(data)
    if name == "AVIF" and not features.check("avif"):
        raise Unreadable("unsupported_format", "AVIF, which this Pillow was built without")
    try:
        image = Image.open(BytesIO(data), formats=(name,))
        if image.width * image.height > max_pixels:
            raise Unreadable("too_large", f"{image.width} x {image.height} px")
        if image.mode not in MODES:
            raise Unreadable("unsupported_format", f"{name} of pixel mode {image.mode}")
        if image.mode == "P" and image.palette is None:
            raise Unreadable("corrupt", f"{name} without its palette")
        yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise Unreadable("corrupt", f"{name} header") from error
    except BROKEN as error:
        raise Unreadable(_rule(error), f"{name}: {type(error).__name__}: {error}") from error


def _rule(error: Exception) -> Rule:
    message = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in message or "not enough" in message:
        return "truncated"
    return "too_large" if "too large" in message else "corrupt"


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 where there is none or it can't be read; TIFF is turned by Pillow.

    Read from what precedes the pixels, so that header and decode agree; PngImageFile.getexif
    would decode to look behind them.
    """
    if image.format == "TIFF":
        return 1
    try:
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return 1
    return turn if turn in TURNS else 1


def _mode(image: Image.Image) -> str:
    if not image.has_transparency_data or image.mode[-1] in "Aa":
        return image.mode
    return {"1": "LA", "RGB": "RGBA"}.get(image.mode, image.mode + "A")


def _flattened(image: Image.Image, factor: int) -> Image.Image:
    """RGB on white with factor x factor blocks averaged, band by band of rows."""
    extremes = _extremes(image) if image.mode in ("I", "F") else (0.0, 0.0)
    width, height = image.size
    rows = max(1, BAND // (width * factor)) * factor
    if rows >= height:
        return _rgb(image, extremes).reduce(factor)
    flat = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        flat.paste(_rgb(band, extremes).reduce(factor), (0, top // factor))
    return flat


def _rgb(image: Image.Image, extremes: tuple[float, float]) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _high_bytes(image)
    elif image.mode in ("I", "F"):
        image = _stretched(image, *extremes)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    picture = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def _high_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey as L, as Pillow reads 16-bit RGB; a transparent level makes it LA."""
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    if "transparency" in image.info:
        opaque = (levels != image.info["transparency"]).astype(np.uint8) * 255
        return Image.merge("LA", (grey, Image.fromarray(opaque)))
    return grey


def _extremes(image: Image.Image) -> tuple[float, float]:
    low, high = image.getextrema()
    if not (isinstance(low, int | float) and isinstance(high, int | float)):
        raise ValueError(f"a single band was expected in mode {image.mode}")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unreadable("unsupported_format", "float pixels without finite extremes")
    return float(low), float(high)


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    scale = 255 / (high - low) if high > low else 0.0
    levels = (np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low) - low) * scale
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def _resized(size: tuple[int, int], target: int, mode: Mode) -> tuple[int, int]:
    """Width and height after resizing, rounded as open_clip and timm round; at least 1 px."""
    width, height = size
    if mode == "squash":
        return target, target
    if mode == "longest":
        ratio = max(width, height) / target
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if width <= height:
        return target, int(target * height / width)
    return int(target * width / height), target


def _integer(hashed: imagehash.ImageHash) -> int:
    return int.from_bytes(np.packbits(hashed.hash).tobytes(), "big")


def _variance(values: NDArray[np.int64]) -> Fraction:
    total, squares = int(values.sum()), int((values * values).sum())
    return Fraction(squares * values.size - total * total, values.size**2)


def _laplacian(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    beside = pixels[1:-1, :-2] + pixels[1:-1, 2:]
    above = pixels[:-2, 1:-1] + pixels[2:, 1:-1]
    return 4 * pixels[1:-1, 1:-1] - beside - above


def _millibits(counts: NDArray[np.int64]) -> int:
    shares = counts[counts > 0] / counts.sum()
    return round(-1000 * math.fsum(shares * np.log2(shares)))


def _hash_margin(small: Image.Image) -> int:
    grid = np.asarray(small.reduce(SIDE // 32), dtype=np.float64)
    spectrum = DCT @ grid @ DCT.T
    return round(1000 * float(np.median(np.abs(spectrum - np.median(spectrum)))))
