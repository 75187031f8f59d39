"""A model that really reads: the words of a yellow sign, if they have pixels enough.

For the scenes of sample/recipes/crop_gap_records.py; whoever asks it about a sign gets what it
reads off the pictures that came with the question, and a guess where it can't.
"""

import base64
import functools
import io
import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.mllm_answers import BEHAVIOURS, Reply, completion, said

SIGN = (255, 221, 51)
WORDS = (
    "bakery", "pharmacy", "library", "museum", "flowers", "garage", "tailor", "butcher", "books",
    "coffee", "tickets", "police", "theatre", "gallery", "harbour", "optician", "hotel", "school",
)  # fmt: skip
LEAST_HEIGHT = 6  # pixels of a capital
SHAPE = (96, 16)
STRANGE = 60  # mean difference in levels above which nothing is recognised
GUESS = "I can't read it"


def read(picture: Image.Image) -> str | None:
    """The word on the yellow sign of a picture, or None."""
    channels = (np.asarray(channel) for channel in picture.convert("RGB").split())
    near = [
        (channel > level - 70) & (channel < level + 70)
        for channel, level in zip(channels, SIGN, strict=True)
    ]
    on_sign = near[0] & near[1] & near[2]
    if (box := _bounds(on_sign, 0.3)) is None:
        return None
    sign = np.asarray(picture.convert("L").crop(box))
    inked = _bounds(sign < 115)
    if inked is None or inked[3] - inked[1] < LEAST_HEIGHT:
        return None
    letters = _normal(Image.fromarray(sign).crop(inked))
    apart = {word: np.abs(letters - _template(word)).mean() for word in WORDS}
    best = min(apart, key=lambda word: apart[word])
    return best if apart[best] < STRANGE else None


def pictures(request: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a request, decoded."""
    parts = [part for m in request["messages"] if isinstance(m["content"], list)
             for part in m["content"] if part["type"] == "image_url"]  # fmt: skip
    data = [part["image_url"]["url"].partition("base64,")[2] for part in parts]
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in data]


def reads(request: dict[str, Any]) -> Reply:
    """What the first legible picture says."""
    found = (read(picture) for picture in pictures(request))
    word = next((word for word in found if word), GUESS)
    return completion(request, json.dumps({"said": word}))


def rule(request: dict[str, Any]) -> str:
    """Questions about a sign are read, all others answered as ever."""
    return "reads" if "the yellow sign" in said(request) else "good"


BEHAVIOURS["reads"] = reads


def _bounds(mask: np.ndarray, share: float = 0.0) -> tuple[int, int, int, int] | None:
    """The box of what is set, without rows and columns that have less than a share of the most."""
    counts = mask.sum(axis=1), mask.sum(axis=0)
    rows, columns = (np.flatnonzero((n > 0) & (n >= share * n.max())) for n in counts)
    if not rows.size:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _normal(letters: Image.Image) -> np.ndarray:
    """Levels of a word in a fixed size, from its darkest to its lightest."""
    levels = np.asarray(letters.resize(SHAPE, Image.Resampling.BILINEAR)).astype(float)
    return (levels - levels.min()) / max(1.0, levels.max() - levels.min()) * 255


@functools.cache
def _template(word: str) -> np.ndarray:
    canvas = Image.new("L", (900, 120), 255)
    ImageDraw.Draw(canvas).text((10, 10), word.upper(), font=ImageFont.load_default(64), fill=0)
    box = _bounds(np.asarray(canvas) < 128)
    return _normal(canvas.crop(box))
