"""Questions with known answers: what clip art is called, which folder it lies in, and drawings of
words, discs and sums. A few records are bad on purpose, one for each rule of the recipe.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

BUCKET = Path(__file__).parents[1] / "bucket"
KINDS = {"animals": "animal", "buildings": "building", "food": "food", "transportation": "vehicle"}
EACH = 8
SIGNS = ("OPEN", "Exit", "Room 12", "No parking", "Bakery", "Platform 4", "Push", "Mind the gap")
SUMS = ((3, 4), (12, 9), (25, 17), (48, 36), (7, 8), (19, 23))
SIZE = 224


def pictures() -> list[tuple[str, str, str]]:
    """(key, title, folder) of clip art whose title is a plain name."""
    with (BUCKET / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["file_name"], row["caption"]) for row in csv.DictReader(file)]
    plain = [(key, title) for key, title in rows if re.fullmatch(r"[A-Za-z]{3,}( [a-z]+)?", title)]
    return [
        (key, title, folder)
        for folder in KINDS
        for key, title in [r for r in plain if r[0].startswith(f"images/{folder}/")][:EACH]
    ]


def drawn(draw: Any, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A PNG of what `draw(canvas)` puts on white."""
    picture = Image.new("RGB", size, "white")
    draw(ImageDraw.Draw(picture))
    return png(picture)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def text(words: str, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    font = ImageFont.load_default(30)
    middle = (size[0] // 2, size[1] // 2)
    return drawn(lambda canvas: canvas.text(middle, words, "black", font, anchor="mm"), size)


def discs(count: int) -> bytes:
    def draw(canvas: Any) -> None:
        for at in range(count):
            left, top = 12 + 70 * (at % 3), 12 + 70 * (at // 3)
            canvas.ellipse((left, top, left + 50 + at, top + 50), "navy")

    return drawn(draw)


def record(image: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def sources(known: list[tuple[str, str, str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The files of records by their names, each a source."""
    letters = dict(zip(KINDS, "ABCD", strict=True))
    choices = "\n".join(f"{letters[folder]}. {kind}" for folder, kind in KINDS.items())
    asks = "What is shown here?\nAnswer the question using a single word or phrase."
    which = f"What kind of thing is this?\n{choices}\nAnswer with the option's letter from the"
    yield "naming", [record(key, asks, title) for key, title, _ in known]
    yield (
        "choosing",
        [record(key, f"{which} given choices directly.", letters[f]) for key, _, f in known[::2]],
    )
    yield (
        "checking",
        [
            record(key, "Is this an animal? Answer yes or no.", "Yes" if f == "animals" else "No")
            for key, _, f in known[1::2]
        ],
    )
    yield (
        "counting",
        [
            record(f"drawn/discs{n}.png", "How many discs are there? Answer directly.", str(n))
            for n in range(1, 9)
        ],
    )
    yield (
        "signs",
        [
            record(f"drawn/sign{n}.png", "What does the sign say? Answer briefly.", words)
            for n, words in enumerate(SIGNS)
        ],
    )
    yield (
        "sums",
        [
            record(f"drawn/sum{n}.png", "What is the result?", str(sum(pair)))
            for n, pair in enumerate(SUMS)
        ],
    )
    yield "odd", list(odd(known, asks))


def odd(known: list[tuple[str, str, str]], asks: str) -> Iterator[dict[str, Any]]:
    """A record for each rule: what the recipe should do with it stands beside it."""
    key, title, _ = known[0]
    yield record("drawn/copy.png", asks, title)  # same picture, same text: dropped
    yield record("drawn/copy.png", "Describe the drawing.", f"A drawing called {title}.")  # kept
    yield record("drawn/banner.png", "What does the banner say?", "sale")  # too long and thin
    yield record(key, "what is it " * 30, title)  # repeats itself
    yield record(
        known[1][0], "Solve the function problem: f(x) = 3x + 2, f(4) = ?", "14"
    )  # unrelated
    yield record(known[2][0], "What is it?", "")  # no response
    yield record("drawn/missing.png", "What is it?", "nothing")  # no such picture


def files() -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of pictures and records."""
    known = pictures()
    for key, _, _ in known:
        yield key, (BUCKET / key).read_bytes()
    yield "drawn/copy.png", png(Image.open(BUCKET / known[0][0]).convert("RGB"))
    yield "drawn/banner.png", text("sale", (363, 66))
    for count in range(1, 9):
        yield f"drawn/discs{count}.png", discs(count)
    for number, words in enumerate(SIGNS):
        yield f"drawn/sign{number}.png", text(words)
    for number, (one, other) in enumerate(SUMS):
        yield f"drawn/sum{number}.png", text(f"{one} + {other} = ?")
    for source, rows in sources(known):
        entries = [{"id": f"{source}-{at}", **row} for at, row in enumerate(rows)]
        yield f"records/{source}.json", json.dumps(entries, indent=1).encode()
