"""Street scenes with one sign each: its words are known, and so are the boxes of words and sign.

The smaller the letters, the more pixels it takes to read them. Drawn with Pillow's own font.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1512, 1008  # 1,944 tokens of 28 x 28
SIGN, INK = (255, 221, 51), (16, 16, 16)
WORDS = (
    "BAKERY", "PHARMACY", "LIBRARY", "MUSEUM", "FLOWERS", "GARAGE", "TAILOR", "BUTCHER", "BOOKS",
    "COFFEE", "TICKETS", "POLICE", "THEATRE", "GALLERY",
)  # fmt: skip
SIZES = (7, 13, 17, 24, 34, 46, 90)  # pixels of the font; they take turns
WALLS = ((178, 92, 74), (196, 174, 150), (120, 134, 150), (150, 110, 140), (98, 128, 104))

Box = tuple[int, int, int, int]


def scene(word: str, size: int, number: int) -> tuple[Image.Image, Box, Box]:
    """A picture, the box of the words in it, and the box of their sign; a function of the three."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (176, 206, 232))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 860, WIDTH, HEIGHT), fill=(110, 110, 112))
    for at in range(6):
        left, top = at * 252, 240 + 60 * ((at * 7 + number * 5) % 6)
        draw.rectangle((left, top, left + 251, 860), fill=WALLS[(at + number) % len(WALLS)])
        for row in range(top + 40, 700, 110):
            for column in (left + 40, left + 150):
                draw.rectangle((column, row, column + 60, row + 64), fill=(206, 222, 230))
    font = ImageFont.load_default(size)
    left, top = 90 + (number * 397) % (WIDTH - 840), 560 + (number * 53) % 120
    words = draw.textbbox((left + size, top + size), word, font=font)
    inner = (int(words[0]), int(words[1]), int(words[2]) + 1, int(words[3]) + 1)
    outer = (left, top, inner[2] + size, inner[3] + size)
    draw.rectangle((outer[0], outer[1], outer[2] - 1, outer[3] - 1), fill=SIGN)
    draw.text((left + size, top + size), word, font=font, fill=INK)
    return picture, inner, outer


def scenes() -> Iterator[tuple[str, int, Image.Image, Box, Box]]:
    """(word, size of the font, picture, box of the words, box of the sign)."""
    for number, word in enumerate(WORDS):
        size = SIZES[number % len(SIZES)]
        yield (word, size, *scene(word, size, number))


def records() -> Iterator[tuple[dict[str, Any], bytes]]:
    """A record and a PNG of each scene; of five, one has no boxes and one a single one."""
    for number, (word, _, picture, inner, outer) in enumerate(scenes()):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        boxes = [list(inner), list(outer)][: 1 + (number % 5 != 3)] if number % 5 != 4 else []
        row = {
            "image": f"scenes/{word.lower()}.png",
            "question": "What does the yellow sign say?",
            "answer": word.lower(),
            "boxes": boxes,
        }
        yield row, buffer.getvalue()


def files() -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of the corpus."""
    lines = []
    for row, data in records():
        yield row["image"], data
        lines.append(json.dumps(row))
    yield "questions.jsonl", "".join(f"{line}\n" for line in lines).encode()
