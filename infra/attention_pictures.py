"""Labels of cells and boxes drawn over their picture, so that a person can judge them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from infra.attention_maps import BACKGROUND, FOREGROUND, IGNORED, Square

Box = Sequence[int]
GAP = 8  # pixels between the two panels
PALE = 0.45  # how much white is in the grey picture below the labels
EDGE = (205, 210, 218)  # of a panel, since many pictures are white
# Red, green, blue, and how much of the picture they cover, of 255.
COLOURS = {FOREGROUND: (200, 30, 20, 160), IGNORED: (240, 180, 20, 90), BACKGROUND: (0, 0, 0, 0)}
REGION, AROUND, WHITE = (200, 30, 20), (30, 80, 190), (255, 255, 255)


def draw_labels(
    picture: Image.Image,
    square: Square,
    labels: np.ndarray,
    box: Box,
    boxes: Sequence[Box],
    side: int,
) -> Image.Image:
    """Two panels with a long side of `side` pixels: boxes over the picture, labels over a pale one.

    `labels` are int8[height, width] over the square that the picture was padded to, `box` (around
    the foreground) and `boxes` (of regions) left, top, right, bottom in pixels of the original,
    whose size is that of `square`.
    """
    scale = side / square.side
    size = max(1, round(square.width * scale)), max(1, round(square.height * scale))
    plain = picture.resize(size, Image.Resampling.LANCZOS)
    right = _pale(plain)
    over = _unpadded(labels, square, size)
    right.paste(over.convert("RGB"), (0, 0), over.getchannel("A"))
    stretch = size[0] / square.width, size[1] / square.height
    for places, colour, outset in ((boxes, REGION, 0), ([box], AROUND, 3)):
        for place in places:
            _frame(plain, [edge * stretch[at % 2] for at, edge in enumerate(place)], colour, outset)
    both = Image.new("RGB", (2 * size[0] + GAP, size[1]), "white")
    for left, panel in ((0, plain), (size[0] + GAP, right)):
        ImageDraw.Draw(panel).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=EDGE)
        both.paste(panel, (left, 0))
    return both


def _pale(picture: Image.Image) -> Image.Image:
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, "white"), PALE)


def _unpadded(labels: np.ndarray, square: Square, size: tuple[int, int]) -> Image.Image:
    """Labels as colours over the picture alone, whose edges may cut through cells."""
    cells = np.zeros((*labels.shape, 4), np.uint8)
    for label, colour in COLOURS.items():
        cells[labels == label] = colour
    x, y = square.corner
    down, across = labels.shape[0] / square.side, labels.shape[1] / square.side
    left, top = x * across, y * down
    edges = (left, top, left + square.width * across, top + square.height * down)
    return Image.fromarray(cells, "RGBA").transform(
        size, Image.Transform.EXTENT, edges, Image.Resampling.NEAREST
    )


def _frame(
    picture: Image.Image, edges: Sequence[float], colour: tuple[int, int, int], outset: int
) -> None:
    """A frame of two pixels, so far outside of the edges, between two white ones."""
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = (round(edge) for edge in edges)
    paints: tuple[tuple[int, int, int], ...] = (WHITE, colour, colour, WHITE)
    for inset, paint in enumerate(paints, -outset):
        place = (
            max(0, left + inset), max(0, top + inset),
            min(picture.width, right - inset) - 1, min(picture.height, bottom - inset) - 1,
        )  # fmt: skip
        if place[0] <= place[2] and place[1] <= place[3]:
            pen.rectangle(place, outline=paint)
