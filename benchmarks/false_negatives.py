"""Sheets for a reader: does a hard negative fit the instruction as well as the target does?

A reader sees a query, an instruction, and target and hard negative as A and B in an order drawn by
hash; neither which is which nor which settings drew the negative. Each of the two gets a verdict of
its own on the scale of the line-up, in the form of a gold set: fits where it shows what the
instruction asks for, partly where something else was changed too or was not, wrong otherwise.
"""

import hashlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
from PIL import Image, ImageDraw, ImageFont

from infra import corpus, images
from infra.agreement import Share, share
from infra.corpus import Source
from infra.gold import Verdict
from infra.store import Store
from tasks.mine_pairs import pair_id

SIDE, GAP, LINE = 190, 12, 22  # pixels
ROWS = 5  # cases a sheet


class Case(NamedTuple):
    """A labelled pair with one of its instructions and one of its hard negatives; image_ids."""

    query: str
    target: str
    negative: str
    instruction: str

    @property
    def candidates(self) -> tuple[str, str]:
        """Target and negative in the order in which they are shown."""
        first, second = sorted(
            (self.target, self.negative), key=lambda image: drawn(f"{self.query} {image}")
        )
        return first, second


def drawn(name: str) -> int:
    """A number that says nothing of what it was drawn for, the same every time."""
    return int(hashlib.sha256(f"false negatives {name}".encode()).hexdigest()[:12], 16)


def cases_of(pairs: pl.DataFrame, labels: pl.DataFrame, count: int) -> list[Case]:
    """A draw of labelled pairs with a hard negative beside the query, one a query at most.

    Presets that share a pair show it both with the same instruction, if both draw it.
    """
    rows = labels.join(pairs, on="pair_id").filter(pl.col("negatives").list.len() > 1)
    wanted = rows.select("pair_id", "query", "target", "negatives", "instructions").iter_rows()
    found: dict[str, Case] = {}
    for pair, query, target, negatives, texts in sorted(wanted, key=lambda row: drawn(row[0])):
        others = [image for image in negatives if image != query]
        negative, text = (
            of[drawn(f"{pair} {what}") % len(of)]
            for what, of in (("negative", others), ("instruction", texts))
        )
        found.setdefault(query, Case(query, target, negative, text))
    return list(found.values())[:count]


def judged(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    """How many hard negatives, and targets, a reader says fit; of the cases judged."""
    said = {verdict.item: verdict.verdict for verdict in verdicts}
    for verdict, role, name in (
        ("fits", "negative", "a reader: hard negatives that fit"),
        ("partly", "negative", "a reader: hard negatives that fit partly"),
        ("fits", "target", "a reader: targets that fit"),
    ):
        asked = ((pair_id(case.query, getattr(case, role)), case.instruction) for case in cases)
        known = [said[item] for item in asked if item in said]
        if known:
            yield name, rate(share(known.count(verdict), len(known)))


def rate(of: Share) -> str:
    """A share with its interval (Wilson, 95 %), for a table."""
    low, high = (f"{100 * end:.1f}" for end in (of.low, of.high))
    return f"{100 * of.value:.1f} % ({low} to {high}; {of.part:,} of {of.of:,})"


def sheets(
    store: Store,
    sources: Mapping[str, Source],
    captions: Mapping[str, str],
    cases: Sequence[Case],
    folder: Path,
) -> None:
    """Write sheets as PNG, and cases.jsonl with what each numbered row shows."""
    folder.mkdir(parents=True, exist_ok=True)
    mixed = sorted(set(cases), key=lambda case: drawn(" ".join(case)))
    numbered = list(enumerate(mixed, 1))
    for number, first in enumerate(range(0, len(numbered), ROWS), 1):
        sheet = Image.new("RGB", (3 * (SIDE + GAP) + 430, ROWS * (SIDE + 3 * LINE)), "white")
        for row, (at, case) in enumerate(numbered[first : first + ROWS]):
            shown = (case.query, *case.candidates)
            pictures = [_picture(corpus.fetch(store, sources[image])) for image in shown]
            words = [captions.get(image, "") for image in shown]
            _draw(sheet, row * (SIDE + 3 * LINE), at, pictures, words, case.instruction)
        sheet.save(folder / f"sheet-{number:02}.png")
    lines = [
        {"number": at, "query": c.query, "candidates": c.candidates, "instruction": c.instruction}
        for at, c in numbered
    ]
    (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _picture(data: bytes) -> Image.Image:
    picture = images.decode(data, SIDE)
    picture.thumbnail((SIDE, SIDE))
    return picture


def _draw(
    sheet: Image.Image,
    top: int,
    number: int,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    instruction: str,
) -> None:
    """One case: query, A, B with their captions below, the instruction at the right."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    pen.line((0, top, sheet.width, top), fill="gray")
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = place * (SIDE + GAP) + GAP
        pen.text((left, top + 4), f"{number} query" if not place else " AB"[place], "black", font)
        sheet.paste(picture, (left, top + LINE + 4))
        pen.text((left, top + SIDE + LINE + 6), caption[:26], "dimgray", font)
    text = "\n".join(textwrap.wrap(instruction, 50))
    pen.text((3 * (SIDE + GAP) + GAP, top + SIDE // 2), text, "black", font)
