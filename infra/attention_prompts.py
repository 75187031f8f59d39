"""What a model is shown that is watched while it answers: a picture in a grey square, a question.

SD-RPN, arXiv 2509.16944, and its released code.
"""

import io
import math

from infra import images
from infra.attention_maps import square_of
from infra.local_mllm import Prompt, Shown


def watched_prompt(key: str, data: bytes, text: str, pixels: int | None, most: int) -> Prompt:
    """A question about an encoded picture, answered greedily in at most `most` tokens."""
    shown = (Shown("", squared(data, pixels)),)
    return Prompt(key, "", shown, text, max_tokens=most, temperature=0.0)


def squared(data: bytes, pixels: int | None) -> bytes:
    """A picture padded to a grey square of so many pixels, without loss, as PNG."""
    header = images.read_header(data, images.MOST_PIXELS)
    side = math.isqrt(pixels) if pixels else None
    short = min(header.width, header.height)
    if side is not None:
        short = max(1, min(short, short * side // max(header.width, header.height)))
    picture = images.decode(data, short, images.MOST_PIXELS)
    buffer = io.BytesIO()
    square_of(picture, side).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
