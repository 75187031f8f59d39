"""Boxes for `regions`: clip art placed on sheets, so that every box is true by construction.

Each sheet holds four drawings of the sample bucket at places drawn by hash; the box of a drawing is
that of its ink. Sheets 0 to 23 are told in COCO's form and 24 to 31 in REFER's, and a few boxes are
there to be refused: too small, outside, of a crowd, of a picture that nobody has.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps

BUCKET = Path(__file__).parents[1] / "bucket"
SHEETS, COCO_SHEETS, SIDE, CELL = 32, 24, 512, 256
CLASSES = ("animal", "food", "flag", "people", "transport", "plant", "building", "tool")


def drawings() -> dict[str, list[tuple[Path, str]]]:
    """Pictures of each class with their captions; the class is the keyword of the library."""
    found: dict[str, list[tuple[Path, str]]] = {name: [] for name in CLASSES}
    with (BUCKET / "captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = next((c for c in CLASSES if c in row["keywords"].split(";")), None)
            if name and row["caption"].strip():
                found[name].append((BUCKET / row["file_name"], row["caption"].strip()))
    return found


def inked(path: Path) -> Image.Image | None:
    """A drawing on white, cut to what is drawn; None where it is blank, or a line."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    ink = ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).convert("L")
    box = ink.point(lambda level: 255 * (level > 16)).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 24:
        return None
    return flat.crop(box)


def draw(key: str, of: int) -> int:
    return int(hashlib.sha256(f"regions {key}".encode()).hexdigest()[:12], 16) % of


def sheet(number: int, found: dict[str, list[tuple[Path, str]]]) -> tuple[bytes, list[Any]]:
    """A sheet as a JPEG, and (class, caption, left, top, width, height) of what is on it."""
    page, regions = Image.new("RGB", (SIDE, SIDE), "white"), []
    for cell in range(4):
        key = f"{number} {cell}"
        name = CLASSES[draw(f"class {key}", len(CLASSES))]
        path, caption = found[name][draw(f"picture {key}", len(found[name]))]
        drawing = inked(path)
        if drawing is None:
            continue
        drawing.thumbnail((CELL - 32, CELL - 32))
        left = cell % 2 * CELL + draw(f"left {key}", CELL - drawing.width)
        top = cell // 2 * CELL + draw(f"top {key}", CELL - drawing.height)
        page.paste(drawing, (left, top))
        regions.append((name, caption, left, top, drawing.width, drawing.height))
    data = io.BytesIO()
    page.save(data, "JPEG", quality=85)
    return data.getvalue(), regions


def files() -> Iterator[tuple[str, bytes]]:
    """The sheets, `annotations/instances.json` and `annotations/refs.json`."""
    found, sheets = drawings(), []
    for number in range(SHEETS):
        data, regions = sheet(number, found)
        yield f"images/{number:06}.jpg", data
        sheets.append(regions)
    coco = instances(list(enumerate(sheets))[:COCO_SHEETS])
    coco["annotations"] += odd(len(coco["annotations"]))
    coco["images"].append({"id": 999, "file_name": "999999.jpg", "width": SIDE, "height": SIDE})
    yield "annotations/instances.json", _json(coco)
    rest = instances(list(enumerate(sheets))[COCO_SHEETS:])
    refs = [
        {
            "ref_id": at, "ann_id": row["id"], "image_id": row["image_id"], "split": "train",
            "category_id": row["category_id"],
            "file_name": f"{row['image_id']:06}_{row['id']}.jpg",
            "sentences": [{"sent": caption, "sent_id": at}],
        }
        for at, (row, caption) in enumerate(
            zip(rest["annotations"], (r[1] for rs in sheets[COCO_SHEETS:] for r in rs), strict=True)
        )
    ]  # fmt: skip
    yield "annotations/refs.json", _json({"refs": refs, **rest})


def instances(sheets: list[tuple[int, list[Any]]]) -> dict[str, Any]:
    """Sheets in the form of COCO's instances."""
    rows = [(number, region) for number, regions in sheets for region in regions]
    return {
        "images": [
            {"id": number, "file_name": f"{number:06}.jpg", "width": SIDE, "height": SIDE}
            for number, _ in sheets
        ],
        "categories": [{"id": at, "name": name} for at, name in enumerate(CLASSES, 1)],
        "annotations": [
            {
                "id": at, "image_id": number, "category_id": 1 + CLASSES.index(name),
                "bbox": [*map(float, box)], "area": float(box[2] * box[3]), "iscrowd": 0,
            }
            for at, (number, (name, _, *box)) in enumerate(rows)
        ],
    }  # fmt: skip


def odd(after: int) -> list[dict[str, Any]]:
    """Boxes that no caption should come of."""
    flaws: list[dict[str, Any]] = [
        {"image_id": 0, "bbox": [10, 10, 20, 60]},  # small
        {"image_id": 1, "bbox": [10, 10, 34, 36]},  # a small share
        {"image_id": 2, "bbox": [2, 2, 508, 508]},  # nearly the whole
        {"image_id": 3, "bbox": [600, 10, 50, 50]},  # outside
        {"image_id": 4, "bbox": [10, 10, 0, 50]},  # without an area
        {"image_id": 5, "bbox": [10, 10, 90, 90], "iscrowd": 1},
        {"image_id": 999, "bbox": [10, 10, 90, 90]},  # of no picture
    ]
    return [{"id": after + at, "category_id": 1, **flaw} for at, flaw in enumerate(flaws)]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
