"""A catalogue of image files, pleasant and nasty, made in memory: the same bytes on every run.

`READABLE` and `UNREADABLE` map a name to a function that builds the file's bytes.
"""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, features
from PIL.Image import Transpose

Builder = Callable[[], bytes]

ORIENTATION = 0x0112
# What a camera held this way stores, given the upright picture.
STORED_TURN = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


def scene(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """An RGB picture without symmetry: gradients, noise, and shapes drawn by the seed."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    layers = np.stack([across, down, (across + 2 * down) / 3], axis=-1)
    noisy = np.clip(layers + rng.normal(20, 6, layers.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(noisy)
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        left, top, wide, high = rng.random(4) * (width, height, width / 2, height / 2)
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        pen.ellipse((left, top, left + wide, top + high), fill=colour)
    return picture


def encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    """The picture as a file of Pillow's format name."""
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def jpeg(width: int = 64, height: int = 48, seed: int = 0, **options: Any) -> bytes:
    return encode(scene(width, height, seed), "JPEG", **{"quality": 90, **options})


def png(
    width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB", **options: Any
) -> bytes:
    return encode(scene(width, height, seed).convert(mode), "PNG", **options)


def veiled(mode: str = "RGBA", width: int = 64, height: int = 48) -> Image.Image:
    """The scene with an alpha channel that runs from clear on the left to solid on the right."""
    picture = scene(width, height).convert("RGB" if mode == "RGBA" else "L")
    picture.putalpha(Image.linear_gradient("L").rotate(90).resize((width, height)))
    return picture


def turned(orientation: int, format: str = "PNG", width: int = 64, height: int = 48) -> bytes:
    """The scene, stored as a camera in that EXIF orientation (1 to 8) would store it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = scene(width, height)
    if orientation in STORED_TURN:
        picture = picture.transpose(STORED_TURN[orientation])
    return encode(picture, format, exif=exif)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write; `rows` are unfiltered, each after a 0 byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def deep_levels(width: int = 64, height: int = 48) -> np.ndarray:
    """uint16 [height, width]: a ramp over all of 16 bits."""
    return np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)


def deep_rgb_png() -> bytes:
    levels = np.repeat(deep_levels()[..., None], 3, axis=-1).astype(">u2")
    return raw_png(64, 48, 16, 2, b"".join(b"\0" + row.tobytes() for row in levels))


def cut(data: bytes, share: float = 0.6) -> bytes:
    return data[: int(len(data) * share)]


def without_adobe_marker(data: bytes) -> bytes:
    """The JPEG without its APP14 segment, which says how the inks are stored."""
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[start + 2 : start + 4])
    return data[:start] + data[start + 2 + length :]


def scribbled(data: bytes, at: int, length: int = 8) -> bytes:
    """The same file with some bytes inverted."""
    wrong = bytes(byte ^ 0xFF for byte in data[at : at + length])
    return data[:at] + wrong + data[at + length :]


def animated(format: str, **options: Any) -> bytes:
    later = [scene(seed=1), scene(seed=2)]
    return encode(scene(), format, save_all=True, append_images=later, **options)


def broken_exif_jpeg() -> bytes:
    return jpeg(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12")


def swollen_png(kind: bytes, prefix: bytes) -> bytes:
    """A PNG of 8 x 8 px with 8 MB of zeros compressed into one chunk of metadata."""
    body = prefix + zlib.compress(bytes(8_000_000))
    return raw_png(8, 8, 8, 0, bytes(9 * 8), png_chunk(kind, body))


READABLE: dict[str, Builder] = {
    "jpeg": jpeg,
    "jpeg_progressive": partial(jpeg, progressive=True),
    "jpeg_grey": lambda: encode(scene().convert("L"), "JPEG"),
    "jpeg_large": partial(jpeg, 1024, 768),
    "jpeg_wide": partial(jpeg, 5000, 10),
    "jpeg_one_pixel": partial(jpeg, 1, 1),
    "jpeg_cmyk_adobe": lambda: encode(scene().convert("CMYK"), "JPEG"),
    "jpeg_cmyk": lambda: without_adobe_marker(encode(scene().convert("CMYK"), "JPEG")),
    "jpeg_broken_exif": broken_exif_jpeg,
    "jpeg_large_profile": partial(jpeg, icc_profile=bytes(3_000_000)),
    "mpo": lambda: animated("MPO"),
    "png": png,
    "png_one_pixel": partial(png, 1, 1),
    "png_wide": partial(png, 5000, 10),
    "png_flat": lambda: encode(Image.new("RGB", (64, 48), (200, 30, 30)), "PNG"),
    "png_grey": partial(png, mode="L"),
    "png_1_bit": partial(png, mode="1"),
    "png_16_bit": lambda: encode(Image.fromarray(deep_levels()), "PNG"),
    "png_16_bit_clear_level": lambda: encode(Image.fromarray(deep_levels()), "PNG", transparency=0),
    "png_16_bit_rgb": deep_rgb_png,
    "png_palette": partial(png, mode="P"),
    "png_palette_clear": partial(png, mode="P", transparency=bytes(range(256))),
    "png_rgb_clear_colour": partial(png, transparency=(0, 0, 0)),
    "png_grey_clear_level": partial(png, mode="L", transparency=0),
    "png_grey_alpha": lambda: encode(veiled("LA"), "PNG"),
    "png_alpha": lambda: encode(veiled(), "PNG"),
    "png_animated": lambda: animated("PNG"),
    "gif": lambda: encode(scene(), "GIF"),
    "gif_animated": lambda: animated("GIF"),
    "gif_two_colours": lambda: encode(scene().quantize(2), "GIF"),
    "gif_clear": lambda: encode(scene().quantize(16), "GIF", transparency=0),
    "webp": lambda: encode(scene(), "WEBP"),
    "webp_lossless_alpha": lambda: encode(veiled(), "WEBP", lossless=True),
    "webp_animated": lambda: animated("WEBP", lossless=True),
    "bmp": lambda: encode(scene(), "BMP"),
    "tiff": lambda: encode(scene(), "TIFF"),
    "tiff_pages": lambda: animated("TIFF"),
    "tiff_lzw": lambda: encode(scene(), "TIFF", compression="tiff_lzw"),
    "tiff_float": lambda: encode(Image.fromarray(deep_levels() / np.float32(65535)), "TIFF"),
    "tiff_32_bit": lambda: encode(Image.fromarray(deep_levels().astype(np.int32)), "TIFF"),
    **{f"jpeg_turned_{turn}": partial(turned, turn, "JPEG") for turn in range(1, 9)},
    **{f"png_turned_{turn}": partial(turned, turn, "PNG") for turn in range(1, 9)},
}
if features.check("avif"):
    READABLE["avif"] = lambda: encode(scene(), "AVIF")

UNREADABLE: dict[str, Builder] = {
    "no_bytes": bytes,
    "zeros": partial(bytes, 1000),
    "text_named_jpg": lambda: b"BMX bikes and other words, not a picture at all.\n",
    "html_error_page": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "tiff_lab": lambda: encode(Image.new("LAB", (8, 8)), "TIFF"),
    "tiff_not_finite": lambda: encode(Image.fromarray(np.full((8, 8), np.nan, "f4")), "TIFF"),
    "jpeg_cut": lambda: cut(jpeg()),
    "jpeg_cut_in_header": lambda: jpeg()[:100],
    "jpeg_progressive_cut": lambda: cut(jpeg(256, 192, progressive=True)),
    "jpeg_corrupt_header": lambda: b"\xff\xd8\xff\xe0" + scribbled(jpeg(), 4, 400)[4:],
    "jpeg_magic_only": lambda: b"\xff\xd8\xff",
    "png_cut": lambda: cut(png()),
    "png_without_end": lambda: png()[:-12],
    "png_flipped_bits": lambda: scribbled(png(), 3000),
    "png_bomb": lambda: raw_png(60_000, 60_000, 1, 0, bytes(100)),
    "png_144_megapixels": lambda: raw_png(12_000, 12_000, 1, 0, bytes(100)),
    "png_text_bomb": lambda: swollen_png(b"zTXt", b"Comment\0\0"),
    "png_profile_bomb": lambda: swollen_png(b"iCCP", b"profile\0\0"),
    "gif_cut": lambda: cut(encode(scene(), "GIF")),
    "webp_cut": lambda: cut(encode(scene(), "WEBP")),
    "bmp_cut": lambda: cut(encode(scene(), "BMP")),
    "tiff_cut": lambda: encode(scene(), "TIFF", compression="tiff_lzw")[:-200],
}
if features.check("avif"):
    UNREADABLE["avif_cut"] = lambda: cut(encode(scene(), "AVIF"))
