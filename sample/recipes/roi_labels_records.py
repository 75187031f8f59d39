"""Questions about pictures for roi_labels: drawn scenes and signs, of which the truth is known, and
clip art of the sample bucket, of which a person can judge.
"""

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

BUCKET = Path(__file__).parents[1] / "bucket"
COLOURS = {
    "red": (220, 30, 40), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (245, 220, 30),
}  # fmt: skip
SIZES = ((480, 360), (360, 480), (420, 420), (600, 300))
WORDS = ("EXIT", "Bakery", "Platform 9", "No parking", "Open 8 to 5", "Museum")
SHORT = "\nAnswer the question using a single word or phrase."
CLIP_ART = 12
Box = tuple[int, int, int, int]


class Asked(NamedTuple):
    """A picture, a question about it, the answer, and where it is: a box in pixels, or None."""

    key: str
    data: bytes
    question: str
    answer: str
    box: Box | None


def scenes() -> Iterator[Asked]:
    """Four shapes of four colours, one in each quarter; the last two have a colour twice, or
    lack one."""
    for number in range(10):
        draw = random.Random(number)
        size = SIZES[number % len(SIZES)]
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        names = draw.sample(list(COLOURS), 4)
        if number == 9:
            names.remove("red")
        boxes = {}
        for at, name in enumerate(names):
            boxes[name] = box = _quarter(draw, size, at)
            shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
            shape((box[0], box[1], box[2] - 1, box[3] - 1), fill=COLOURS[name])
        if number == 8:
            boxes = {}  # in two corners: no region
            for corner in ((10, 10), (size[0] - 50, size[1] - 50)):
                pen.rectangle((*corner, corner[0] + 40, corner[1] + 40), fill=COLOURS["red"])
        for name in list(COLOURS)[: 1 if number > 7 else 2]:
            yield Asked(
                f"scenes/{number:02d}.png", _png(picture), f"Where is the {name} shape?", name,
                boxes.get(name),
            )  # fmt: skip


def _quarter(draw: random.Random, size: tuple[int, int], at: int) -> Box:
    wide, high = size[0] // 2, size[1] // 2
    width, height = (draw.randrange(side // 4, side // 2) for side in (wide, high))
    left = (at % 2) * wide + draw.randrange(10, wide - width - 10)
    top = (at // 2) * high + draw.randrange(10, high - height - 10)
    return left, top, left + width, top + height


def signs() -> Iterator[Asked]:
    """Words in black on white; where they are is where the font put its ink."""
    for number, words in enumerate(WORDS):
        draw = random.Random(words)
        size = SIZES[number % len(SIZES)]
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        font = ImageFont.load_default(size[0] // 12)
        place = draw.randrange(10, size[0] // 3), draw.randrange(10, size[1] - size[0] // 8)
        pen.text(place, words, (0, 0, 0), font, stroke_width=1)
        box = pen.textbbox(place, words, font, stroke_width=1)
        whole = int(box[0]), int(box[1]), int(box[2] + 1), int(box[3] + 1)
        yield Asked(f"signs/{number}.png", _png(picture), "What does it say?", words, whole)


def clip_art() -> Iterator[Asked]:
    """Pictures of the sample bucket, asked for what their captions say."""
    with (BUCKET / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["file_name"].endswith(".png")]
    for row in random.Random(5).sample(rows, CLIP_ART):
        key = row["file_name"].replace("images/", "clip_art/")
        data = (BUCKET / row["file_name"]).read_bytes()
        yield Asked(key, data, "What is drawn here?", row["caption"], None)


def asked() -> Iterator[Asked]:
    yield from scenes()
    yield from signs()
    yield from clip_art()


def files() -> Iterator[tuple[str, bytes]]:
    """Pictures, and one file of LLaVA's conversations: a second turn is there and is not asked."""
    records = []
    for number, item in enumerate(asked()):
        yield item.key, item.data
        turns = [f"<image>\n{item.question}{SHORT}", item.answer, "Are you sure?", "Yes."]
        said = [
            {"from": "gpt" if at % 2 else "human", "value": text} for at, text in enumerate(turns)
        ]
        records.append({"id": str(number), "image": item.key, "conversations": said})
    plain = Image.new("RGB", (200, 150), (90, 90, 90))
    yield "other/plain.png", _png(plain)
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "Who knows."}]
    records.append({"id": "other", "image": "other/plain.png", "conversations": turns})
    yield "questions.json", json.dumps(records, indent=1).encode()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
