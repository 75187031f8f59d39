"""Agreement of a judge with people: shares with intervals, Cohen's kappa, confusion tables."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95

Confusion = Mapping[tuple[str, str], int]  # (by people, by the judge) -> items


class Share(NamedTuple):
    """`part` of `of`, and the bounds between which the share of all such items lies."""

    part: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.part / self.of if self.of else 0.0


def share(part: int, of: int, confidence: float = CONFIDENCE) -> Share:
    """A share with its score interval (Wilson 1927), which also holds near 0, near 1 and for few.

    Of nothing at all it is (0, 0, 0.0, 1.0). Raises ValueError where `part` is not within `of`.
    """
    if not 0 <= part <= of:
        raise ValueError(f"{part} of {of} is no share")
    if not of:
        return Share(0, 0, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = part / of, z * z / of
    middle = (p + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * (p * (1 - p) + spread / 4)) / (1 + spread)
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if part == 0 else max(0.0, middle - reach)
    high = 1.0 if part == of else min(1.0, middle + reach)
    return Share(part, of, low, high)


def least_size(bound: float, confidence: float = CONFIDENCE) -> int:
    """How many items are needed for a lower bound of `bound` where all of them agree."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    size = max(1, math.ceil(z * z * bound / (1 - bound)) - 1)
    while share(size, size, confidence).low < bound:
        size += 1
    return size


def confusion(verdicts: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How often people said one thing and the judge another."""
    return Counter(verdicts)


def agreed(found: Confusion, confidence: float = CONFIDENCE) -> Share:
    """The share of items on which both said the same."""
    same = sum(count for (one, other), count in found.items() if one == other)
    return share(same, sum(found.values()), confidence)


def kappa(found: Confusion) -> float | None:
    """Agreement beyond that of two who guess with the same frequencies (Cohen 1960).

    None where chance alone agrees always: both know one verdict only, or there are no items.
    """
    total = sum(found.values())
    people, judge = Counter[str](), Counter[str]()
    for (one, other), count in found.items():
        people[one] += count
        judge[other] += count
    expected = sum(people[name] * judge[name] for name in people)
    if total * total == expected:
        return None
    same = sum(count for (one, other), count in found.items() if one == other)
    return (total * same - expected) / (total * total - expected)
