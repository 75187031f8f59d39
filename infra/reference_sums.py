"""Log-sum-exps of cosines with a set of references, kept up to date as references come and go.

Terms are integers, so that what was added can be taken away again without a trace.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.neighbours import ONE

UNIT = 1 << 36  # of a term of 1; a sum of 2^17 such terms is still exact in float64
CHUNK = 1024
UNKNOWN = np.iinfo(np.int32).min

Vectors = NDArray[np.float16]
Scores = NDArray[np.int32]


class Sums(NamedTuple):
    """Of n rows: the largest score with any reference, int32[n], UNKNOWN where nothing is known;
    and the sum of exp((score - largest) / temperature) in units of 1 / UNIT, int64[n]."""

    largest: Scores
    total: NDArray[np.int64]


def sums(rows: Vectors, references: Vectors, temperature: float) -> Sums:
    """Sums of rows, float16[n, d], over references, float16[r, d] with r <= 2^17."""
    found = Sums(np.full(len(rows), UNKNOWN, np.int32), np.zeros(len(rows), np.int64))
    for at in range(0, len(rows) if len(references) else 0, CHUNK):
        part = slice(at, at + CHUNK)
        score = _scores(rows[part], references)
        found.largest[part] = score.max(axis=1)
        found.total[part] = _terms(found.largest[part, None] - score, temperature).sum(axis=1)
    return found


def update(
    before: Sums,
    rows: Vectors,
    references: Vectors,
    gone: Vectors,
    come: Vectors,
    temperature: float,
) -> tuple[Sums, int]:
    """Sums of rows over references that `gone` left and `come` joined, and the scores computed.

    A row is summed anew where nothing is known of it, or its largest score may have changed.
    """
    known = np.flatnonzero(before.largest != UNKNOWN)
    redo = before.largest == UNKNOWN
    total = before.total.copy()
    moved = np.concatenate([gone, come]) if len(gone) and len(come) else gone if len(gone) else come
    for at in range(0, len(known) if len(moved) else 0, CHUNK):
        part = known[at : at + CHUNK]
        largest = before.largest[part, None]
        less, more = np.split(_scores(rows[part], moved), [len(gone)], axis=1)
        redo[part] = (less == largest).any(axis=1) | (more > largest).any(axis=1)
        total[part] -= _terms(largest - less, temperature).sum(axis=1)
        total[part] += _terms(np.maximum(largest - more, 0), temperature).sum(axis=1)
    largest = before.largest.copy()
    largest[redo], total[redo] = sums(rows[redo], references, temperature)
    computed = len(known) * (len(gone) + len(come)) + int(redo.sum()) * len(references)
    return Sums(largest, total), computed


def log_means(found: Sums, count: int, temperature: float) -> NDArray[np.float64]:
    """log(mean(exp(cos / temperature))) over `count` references."""
    return np.log(found.total / UNIT / count) + found.largest / ONE / temperature


def _scores(rows: Vectors, references: Vectors) -> Scores:
    """Scores [n, r]. Sums of products of float16 are exact in float64, see `neighbours.scores`."""
    (left, lengths), (right, others) = _wide(rows), _wide(references)
    if not len(references):
        return np.zeros((len(rows), 0), np.int32)
    return np.rint(left @ right.T / np.outer(lengths, others) * ONE).astype(np.int32)


def _wide(vectors: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vectors in float64 and their lengths, 1 for the zero vector: its cosine is 0."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return wide, np.where(lengths > 0, lengths, 1)


def _terms(below: Scores, temperature: float) -> NDArray[np.int64]:
    """exp(-below / temperature) in units of 1 / UNIT."""
    table = _table(temperature)
    return table[np.minimum(below, len(table) - 1)]


@cache
def _table(temperature: float) -> NDArray[np.int64]:
    """The terms of all differences of scores, up to the first that is 0."""
    furthest = min(2 * ONE, int(temperature * ONE * np.log(2.0 * UNIT)) + 1)
    terms = np.exp(-np.arange(furthest + 1) / ONE / temperature) * UNIT
    return np.rint(terms).astype(np.int64)
