"""Text-rich pictures with known text: index cards of the sample bucket's pictures, drawn here.

A card shows a picture above its title and keywords, in the words of its author. The title is the
human caption; of every fourth card it is left out, so that the model writes alone.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BUCKET = Path(__file__).parents[1] / "bucket"
CARDS = 24
SIDE, TEXT = 320, 150  # pixels of the picture's square, and of what is written below it
WORDS = 5  # keywords on a card


def files() -> Iterator[tuple[str, bytes]]:
    """The corpus as (key, bytes): cards, and the records that name them."""
    rows, table = [], io.StringIO()
    captions = csv.writer(table, lineterminator="\n")
    captions.writerow(("file_name", "caption", "licence"))
    for number, (name, title, keywords) in enumerate(chosen()):
        lines = [title, f"keywords: {', '.join(keywords)}", f"card no. {number + 1:03d}"]
        key = f"cards/{Path(name).stem}.png"
        yield key, card(BUCKET / name, lines)
        caption = "" if number % 4 == 3 else title
        rows.append({"image": key, "caption": caption, "ocr": "\n".join(lines)})
        captions.writerow((key, title, "CC0-1.0"))
    yield "records.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    yield "captions.csv", table.getvalue().encode()


def chosen() -> list[tuple[str, str, list[str]]]:
    """Pictures with a title of several plain words and enough keywords, each title once."""
    with (BUCKET / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, tuple[str, str, list[str]]] = {}
    for row in rows:
        title, keywords = row["caption"], [w for w in row["keywords"].split(";") if is_word(w)]
        if title.isascii() and 10 <= len(title) <= 36 and " " in title and len(keywords) >= 4:
            found.setdefault(title, (row["file_name"], title, keywords[:WORDS]))
    step = len(found) // CARDS
    return list(found.values())[::step][:CARDS]


def is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and 3 <= len(text) <= 10 and text != "hash"


def card(path: Path, lines: list[str]) -> bytes:
    """A PNG of a picture with lines of text below it, the first one larger."""
    sheet = Image.new("RGB", (SIDE + 40, SIDE + TEXT), "white")
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    left, top = (sheet.width - picture.width) // 2, 10 + (SIDE - picture.height) // 2
    sheet.paste(picture, (left, top), picture)
    pen, line = ImageDraw.Draw(sheet), SIDE + 30
    for at, text in enumerate(lines):
        size = fitting(text, 22 if at == 0 else 16, sheet.width - 40)
        pen.text((20, line), text, "black", ImageFont.load_default(size))
        line += size + 14
    buffer = io.BytesIO()
    sheet.quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def fitting(text: str, size: int, width: int) -> int:
    """The largest size up to this one at which a line is no wider than that."""
    while size > 8 and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    return size
