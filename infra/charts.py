"""Histograms of scores as SVG: equal data give equal bytes, text stays text, nothing behind it."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

INK, QUIET, KEPT, LEFT = "#191c22", "#565d69", "#2350b8", "#c6ccd6"
SETTINGS: Any = {
    "svg.hashsalt": "pairmill",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
}
STEP = 20
LEAST = -3_000_000
BARS = 56
HEAT_SIDE = 240  # pixels of a map that is not shown cell by cell
TAIL = 0.005  # share of the scores at either end that may lie outside the picture


class Tally(NamedTuple):
    """How many scores lie in each step of STEP from LEAST up, int64[n]."""

    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def between(self, low: int, high: int | None) -> int:
        """How many scores lie from `low` to `high`, to within a step; None is no bound."""
        first = max(0, (low - LEAST) // STEP)
        return int(self.counts[first : None if high is None else (high - LEAST) // STEP + 1].sum())

    def quantile(self, share: float) -> int:
        """The score below which a share of all lies, to within a step; 0 where there are none."""
        if not self.total:
            return 0
        at = np.searchsorted(np.cumsum(self.counts), max(1, share * self.total))
        return int(at) * STEP + LEAST


def tally(parts: Iterable[NDArray[np.integer[Any]]]) -> Tally:
    """Counts scores (cosines * 10^6, also losses down to -3 and up to 3) that arrive in parts."""
    size = -2 * LEAST // STEP + 1
    counts = np.zeros(size, np.int64)
    for part in parts:
        steps = np.clip((part.astype(np.int64) - LEAST) // STEP, 0, size - 1)
        counts += np.bincount(steps, minlength=size)
    return Tally(counts)


def histogram(found: Tally, low: int, high: int | None) -> bytes:
    """Draws scores as SVG, those from `low` to `high` in colour; None is no upper bound."""
    # pyplot would keep every figure and look for a display; importing any of it takes a second.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    edges, heights = _bars(found, [low] if high is None else [low, high])
    with rc_context(SETTINGS):
        figure = Figure(figsize=(5, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _draw(axes, edges / 1e6, heights, low / 1e6, None if high is None else high / 1e6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _bars(found: Tally, marks: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges int64[n + 1] and counts int64[n] of what is drawn: nearly all scores, and the marks."""
    low = min(found.quantile(TAIL), *marks)
    high = max(found.quantile(1 - TAIL) + STEP, *marks)
    width = max(5 * STEP, -(-(high - low) // BARS // STEP) * STEP)
    first = (low - LEAST) // STEP * STEP + LEAST - 2 * width
    edges = first + width * np.arange((high - first) // width + 4, dtype=np.int64)
    centres = LEAST + STEP * np.arange(len(found.counts)) + STEP // 2
    heights, _ = np.histogram(centres, edges, weights=found.counts)
    return edges, heights.astype(np.int64)


def _draw(
    axes: Any,
    edges: NDArray[np.float64],
    heights: NDArray[np.int64],
    low: float,
    high: float | None,
) -> None:
    top = max(1, int(heights.max()))
    end = float(edges[-1])
    axes.stairs(heights, edges, fill=True, color=LEFT, linewidth=0)
    inside = axes.stairs(heights, edges, fill=True, color=KEPT, linewidth=0)
    right = end if high is None else high
    box = axes.axvspan(low, right, ymin=0, ymax=1, color=KEPT, alpha=0.07, linewidth=0)
    inside.set_clip_path(box)
    marks = [(low, "right", 1.3)] + ([] if high is None else [(high, "left", 1.3)])
    for mark, side, height in marks:
        axes.axvline(mark, color=INK, linewidth=1)
        # Near the edge of the picture a label stands on the other side of its line, and lower.
        share = (mark - edges[0]) / (end - edges[0])
        side, height = ("left", 1.15) if share < 0.14 else (side, height)
        side, height = ("right", 1.15) if share > 0.86 and side == "left" else (side, height)
        gap = 4 if side == "left" else -4
        axes.annotate(
            f"{mark:.3f}".replace("-", "\u2212"), (mark, top * height), (gap, 0),
            textcoords="offset points", ha=side, va="top", color=INK, fontsize=10,
        )  # fmt: skip
    axes.set_xlim(edges[0], end)
    axes.set_ylim(0, top * 1.32)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=6)
    axes.tick_params(colors=QUIET, length=3)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)


def heat(
    values: Sequence[int], height: int, width: int, padded: tuple[int, int] | None = None
) -> str:
    """A map of height x width cells, row by row, as a PNG data URI, clear where it is least.

    With `padded`, the width and height of a picture, the map is one over the square in whose middle
    the picture stands, and only what lies on the picture is drawn.
    """
    cells = np.asarray(values, np.float64).reshape(height, width)
    share = (cells - cells.min()) / max(1e-9, float(np.ptp(cells)))
    shown = np.zeros((height, width, 4), np.uint8)
    shown[..., 0], shown[..., 1] = 212, (1 - share) * 180
    shown[..., 3] = 255 * share
    picture = Image.fromarray(shown, "RGBA")
    if padded and padded[0] != padded[1]:
        picture = _unpadded(picture, *padded)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


def _unpadded(cells: Image.Image, width: int, height: int) -> Image.Image:
    """The part of a square's cells that lies on its picture, whose edges may cut through cells."""
    side = max(width, height)
    x, y = (side - width) / 2 / side, (side - height) / 2 / side
    edges = (x * cells.width, y * cells.height, (1 - x) * cells.width, (1 - y) * cells.height)
    size = max(1, round(width / side * HEAT_SIDE)), max(1, round(height / side * HEAT_SIDE))
    return cells.transform(size, Image.Transform.EXTENT, edges, Image.Resampling.NEAREST)
