"""Rewards for a crop that a model takes: arithmetic on boxes, for whoever trains on the records.

Source: LFPC (arXiv 2603.27494), section on the grounding loss. Boxes are (left, top, right, bottom)
in pixels; nested ones go from the smallest, B1, outwards.
"""

from collections.abc import Sequence

Box = Sequence[float]
LEAST_OVERLAP = 0.9  # as the paper: IoU counts above it only
OMEGA = 0.5  # not given in the source; our own default, because neither part is known to be better


def area(box: Box) -> float:
    """Pixels of a box; one that is turned over has none."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(one: Box, other: Box) -> float:
    """Pixels that two boxes share."""
    low = [max(one[at], other[at]) for at in (0, 1)]
    high = [min(one[at], other[at]) for at in (2, 3)]
    return area([*low, *high])


def overlap(predicted: Box, smallest: Box) -> float:
    """Share of B1 that the predicted box covers."""
    return intersection(predicted, smallest) / area(smallest)


def iou(one: Box, other: Box) -> float:
    """Intersection over union."""
    shared = intersection(one, other)
    return shared / (area(one) + area(other) - shared)


def l1(one: Box, other: Box, size: tuple[int, int]) -> float:
    """Mean distance of the four sides as shares of the picture's (width, height).

    The source normalises corners and does not say how it adds them; the mean keeps it within 0..1.
    """
    sides = (*size, *size)
    return sum(abs(one[at] - other[at]) / sides[at] for at in range(4)) / 4


def iou_reward(predicted: Box, nested: Sequence[Box]) -> float:
    """The best IoU with one of the nested boxes where B1 is covered by more than 0.9, else 0."""
    if overlap(predicted, nested[0]) <= LEAST_OVERLAP:
        return 0.0
    return max(iou(predicted, box) for box in nested)


def l1_reward(predicted: Box, nested: Sequence[Box], size: tuple[int, int]) -> float:
    """One less the distance from the nearest of the nested boxes."""
    return 1.0 - min(l1(predicted, box, size) for box in nested)


def geo_reward(
    predicted: Box, nested: Sequence[Box], size: tuple[int, int], omega: float = OMEGA
) -> float:
    """omega * r_IoU + (1 - omega) * r_L1."""
    near = l1_reward(predicted, nested, size)
    return omega * iou_reward(predicted, nested) + (1 - omega) * near


def total_reward(accuracy: float, form: float, tool: float) -> float:
    """r_acc + r_format, and the tool's reward where the answer is right."""
    return accuracy + form + (tool if accuracy > 0 else 0.0)
