"""Regions of interest from a model's own attention: maps, sinks, labels of cells, boxes.

SD-RPN, arXiv 2509.16944, and its released code. Maps are float32[height, width] over the visual
tokens of a picture that was padded to a square.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1
GREY = (127, 127, 127)
SMALLEST = 4  # cells; a component with fewer grows to 3 x 3
LARGEST = 225  # cells; a component with more is no region
EIGHT = np.ones((3, 3), bool)  # neighbours of a cell, corners too
UNIT = 1_000_000_000  # of weights where they are stored: 1 is the whole attention
STRENGTH = 1_000  # of strengths of hidden states where they are stored

Status = Literal["ok", "too_large", "too_weak"]
SinkRule = Literal["attention", "norm", "dims"]


class Thresholds(NamedTuple):
    """Where a cell is foreground or background, and which maps say nothing.

    Defaults are those of the released code: shares of the map's maximum, share of the grid, and
    the least maximum (its script for Qwen).
    """

    foreground: float = 0.2
    background: float = 0.1
    largest: float = 0.5
    weakest: float = 5e-3


GIVEN = Thresholds()


class Cells(NamedTuple):
    """A box of whole cells: from `top` and `left` up to, not including, `bottom` and `right`."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


class Labels(NamedTuple):
    """Labels of cells, int8[height, width]: 1 foreground, 0 background, -1 ignored.

    `box` is the smallest around the foreground. Unless the status is ok, all cells are ignored.
    """

    status: Status
    cells: np.ndarray
    box: Cells | None


class Square(NamedTuple):
    """A picture of `width` x `height` pixels in the middle of the square that it was padded to."""

    width: int
    height: int

    @property
    def side(self) -> int:
        return max(self.width, self.height)

    @property
    def corner(self) -> tuple[int, int]:
        """Where the picture's own left upper corner lies: x, y."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2


# Maps ----------------------------------------------------------------------------------------


def mean_map(rows: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The mean over steps of float32[steps, cells], as a grid; zeros where there was no step."""
    if not len(rows):
        return np.zeros(grid, np.float32)
    return rows.mean(0, dtype=np.float64).astype(np.float32).reshape(grid)


def stored(looked: np.ndarray) -> list[int]:
    """A map as it is stored: billionths, row by row. A float has no canonical form."""
    whole: list[int] = np.rint(looked.astype(np.float64) * UNIT).astype(np.int64).ravel().tolist()
    return whole


def stored_strengths(strengths: np.ndarray) -> list[int]:
    """Strengths of hidden states, float32[cells], as they are stored: thousandths, in 32 bits."""
    most = np.iinfo(np.int32).max
    whole: list[int] = np.rint(np.minimum(strengths * STRENGTH, most, dtype=np.float64)).astype(
        np.int64).tolist()  # fmt: skip
    return whole


def restored(values: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """A stored map as float32[height, width]."""
    return (np.asarray(values, np.float64) / UNIT).astype(np.float32).reshape(grid)


def without_sinks(
    looked: np.ndarray, sink: np.ndarray, threshold: float, rule: SinkRule = "attention"
) -> np.ndarray:
    """A map with 0 where there is a sink. The maps stay as they are.

    By the attention of heads that show sinks it is one from the threshold on (1e-3 for LLaVA, 1e-2
    for Qwen, the code); by hidden states above it (the paper; the code).
    """
    is_sink = sink >= threshold if rule == "attention" else sink > threshold
    return np.where(is_sink, np.float32(0), looked)


def blurred(looked: np.ndarray) -> np.ndarray:
    """A map after a 3 x 3 Gaussian with a deviation of 1; how edges are treated is not given."""
    smooth = ndimage.gaussian_filter(looked.astype(np.float64), 1.0, mode="mirror", radius=1)
    return smooth.astype(np.float32)


# Labels --------------------------------------------------------------------------------------


def label_cells(
    looked: np.ndarray,
    thresholds: Thresholds = GIVEN,
    padding: np.ndarray | None = None,
    margin: int = 0,
) -> Labels:
    """What each cell is evidence for, from a map without sinks.

    Cells of the `padding`, bool[height, width], are background. `margin` widens the box: the code
    for Qwen finds it after a 3 x 3 blur, which makes it one cell larger on each side. Cells in the
    box that are no foreground are ignored, however low they are.
    """
    grid = looked.shape
    ignored = np.full(grid, IGNORED, np.int8)
    peak = float(looked.max(initial=0.0))
    if peak <= 0 or peak < thresholds.weakest:
        return Labels("too_weak", ignored, None)
    foreground = looked > thresholds.foreground * peak
    box = _around(foreground, margin)
    if box.area >= thresholds.largest * looked.size:
        return Labels("too_large", ignored, box)
    outside = np.ones(grid, bool)
    outside[box.top : box.bottom, box.left : box.right] = False
    background = outside & (looked < thresholds.background * peak)
    if padding is not None:
        background |= padding
    cells = np.where(background, np.int8(BACKGROUND), ignored)
    cells[foreground & ~background] = FOREGROUND
    return Labels("ok", cells, box)


def _around(cells: np.ndarray, margin: int) -> Cells:
    rows, columns = (np.flatnonzero(cells.any(axis)) for axis in (1, 0))
    height, width = cells.shape
    return Cells(
        max(0, int(rows[0]) - margin),
        max(0, int(columns[0]) - margin),
        min(height, int(rows[-1]) + 1 + margin),
        min(width, int(columns[-1]) + 1 + margin),
    )


# Boxes ---------------------------------------------------------------------------------------


def find_boxes(looked: np.ndarray, threshold: float = -0.2) -> list[Cells]:
    """Boxes of what is above a threshold after a blur, those with the highest peaks first.

    A negative threshold is a share of the blurred map's maximum. Components are 8-connected; single
    cells are dropped, fewer than 4 grow to 3 x 3 cells about their middle, more than 225 are
    dropped.
    """
    smooth = blurred(looked)
    level = -threshold * float(smooth.max(initial=0.0)) if threshold < 0 else threshold
    parts, _ = ndimage.label(smooth > level, EIGHT)
    found: list[tuple[float, Cells]] = []
    for at, place in enumerate(ndimage.find_objects(parts), 1):
        inside = parts[place] == at
        count = int(inside.sum())
        if not 1 < count <= LARGEST:
            continue
        (top, bottom), (left, right) = ((part.start, part.stop) for part in place)
        box = Cells(top, left, bottom, right)
        box = _grown(box, looked.shape) if count < SMALLEST else box
        found.append((-float(smooth[place][inside].max()), box))
    return [box for _, box in sorted(found)]


def _grown(box: Cells, grid: tuple[int, ...]) -> Cells:
    """3 x 3 cells about the middle of a box, moved to where the grid has them."""

    def span(low: int, high: int, most: int) -> tuple[int, int]:
        start = min(max((low + high - 1) // 2 - 1, 0), max(most - 3, 0))
        return start, min(start + 3, most)

    (top, bottom), (left, right) = (
        span(box.top, box.bottom, grid[0]),
        span(box.left, box.right, grid[1]),
    )
    return Cells(top, left, bottom, right)


# Between cells and pixels --------------------------------------------------------------------


def pad_square(picture: Image.Image, fill: tuple[int, int, int] = GREY) -> Image.Image:
    """A picture in the middle of a square of one colour."""
    square = Square(*picture.size)
    padded = Image.new("RGB", (square.side, square.side), fill)
    padded.paste(picture, square.corner)
    return padded


def square_of(picture: Image.Image, side: int | None) -> Image.Image:
    """A picture made as large as a square of `side` pixels holds, padded to it; None: as it is."""
    if side is not None:
        scale = side / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return pad_square(picture)


def to_pixels(
    box: Cells, grid: tuple[int, int], square: Square
) -> tuple[float, float, float, float] | None:
    """The box left, top, right, bottom in pixels of the picture before it was padded.

    Cut to the picture; None where nothing of it is left.
    """
    down, across = square.side / grid[0], square.side / grid[1]
    x, y = square.corner
    left, right = (min(max(at * across - x, 0.0), square.width) for at in (box.left, box.right))
    top, bottom = (min(max(at * down - y, 0.0), square.height) for at in (box.top, box.bottom))
    return (left, top, right, bottom) if left < right and top < bottom else None


def to_cells(
    box: tuple[float, float, float, float], grid: tuple[int, int], square: Square
) -> Cells:
    """The smallest box of cells that covers a box in pixels of the picture before its padding."""
    down, across = grid[0] / square.side, grid[1] / square.side
    x, y = square.corner
    left, top, right, bottom = box
    return Cells(
        int(np.floor((top + y) * down + 1e-9)),
        int(np.floor((left + x) * across + 1e-9)),
        int(np.ceil((bottom + y) * down - 1e-9)),
        int(np.ceil((right + x) * across - 1e-9)),
    )


def padding_cells(grid: tuple[int, int], square: Square) -> np.ndarray:
    """Cells that hold padding alone, bool[height, width]."""
    inner = to_cells((0, 0, square.width, square.height), grid, square)
    padding = np.ones(grid, bool)
    padding[inner.top : inner.bottom, inner.left : inner.right] = False
    return padding
