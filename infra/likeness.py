"""When two pictures are copies of one another, judged by pHash and 16 x 16 thumbnail.

A copy may be re-encoded, resized, brightened or cropped a little; a relative drawn on the same
template is no copy. Verdicts are symmetric and don't depend on what else is compared.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Thumbnails = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]
Verdicts = NDArray[np.bool_]

RADIUS = 10
LIKE = 800_000
NEAR = 20  # levels of 255 by which no cell of a re-encoded or resized copy differs
FLAT = 1  # levels of 255
WHITE = 250  # levels of 255: brightening clips there
PAPER = 96  # white cells of 256
HEAVEN = 160  # levels of 255: brighter cells hold pixels that clip
GAIN = (1.04, 1.25)  # of a brightened copy
CROP = 900_000
SPARED = 0.7  # of the difference, at most, remains when a crop is undone
SLACK = 1.0  # cells by which a crop may seem to reach outside the picture
REACH = 1.6  # cells that a crop takes from a side at most
BLOCK = 2048

# What is left of the 16 cells of a side, in quarters of a cell: two interiors and four corners.
INTERIORS = [(2, 62), (3, 61)]
CORNERS = [(0, 62), (2, 64)]
CROPS = [(part, part) for part in INTERIORS] + [(y, x) for y in CORNERS for x in CORNERS]


class Prepared(NamedTuple):
    """What of thumbnails is compared; see `prepare`."""

    cells: NDArray[np.uint8]  # [n, 3, 16, 16]
    smooth: NDArray[np.int16]  # [n, 3, 16, 16], in 1/4 levels, white snapped to 1020
    energy: NDArray[np.int64]  # [n], sum of the squares of `smooth`
    spread: NDArray[np.int64]  # [n], 256 times the sum of squares about each channel's mean


def _stretch(low: int, high: int) -> NDArray[np.int64]:
    """Stretches low..high (quarter cells) to 16 cells by linear interpolation; rows sum to 128."""
    middle = 32 * low + (high - low) * (2 * np.arange(16) + 1) - 64  # 1/128 cells from a centre
    cell, part = np.divmod(np.clip(middle, 0, 128 * 15 - 1), 128)
    matrix = np.zeros((16, 16), dtype=np.int64)
    matrix[np.arange(16), cell] = 128 - part
    matrix[np.arange(16), cell + 1] += part
    return matrix


def _smooth() -> NDArray[np.int64]:
    """The filter [1 2 1] over 16 cells, edges repeated; rows sum to 4."""
    apart = np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    matrix = np.choose(np.minimum(apart, 2), (2, 1, 0))
    matrix[0, 0] = matrix[15, 15] = 3
    return matrix


def _cosines() -> NDArray[np.int64]:
    """The first 8 rows of the DCT-II of length 16, in 1/128."""
    angles = np.outer(np.arange(8), 2 * np.arange(16) + 1) * (np.pi / 32)
    return np.rint(128 * np.cos(angles)).astype(np.int64)


def hashes(phash: Hashes, thumbnails: Thumbnails) -> Hashes:
    """Gives every picture the pHashes by which a copy that was cropped is found as well.

    phash uint64 [n] of the whole pictures and thumbnails uint8 [n, 16, 16, 3] make uint64 [n, 7]:
    column 0 is `phash`; the others are what it would be without 3 % or 4.5 % at every side, and
    without 3 % at two adjacent sides, taken from the thumbnail. Two pictures are candidates where
    column 0 of one lies within RADIUS of any column of the other.
    """
    luma = _exact(thumbnails @ np.array([77, 150, 29]))
    columns = [phash.astype(np.uint64)]
    for down, across in CROPS:
        left, right = (_exact(_cosines() @ _stretch(*part)) for part in (down, across))
        spectrum = (left @ luma @ right.T).reshape(-1, 64)
        bits = np.packbits(spectrum > np.median(spectrum, axis=1, keepdims=True), axis=1)
        columns.append(bits.view(">u8")[:, 0].astype(np.uint64))
    return np.stack(columns, axis=1)


def prepare(thumbnails: Thumbnails) -> Prepared:
    """Smooths thumbnails uint8 [n, 16, 16, 3] by [1 2 1] and sums what `likeness` needs of each."""
    cells = thumbnails.transpose(0, 3, 1, 2)
    across = _smooth().astype(np.float32)
    smooth = np.rint(across @ cells.astype(np.float32) @ across.T / 4).astype(np.int16)
    smooth[smooth >= 4 * WHITE] = 4 * 255
    wide = smooth.reshape(-1, 3, 256).astype(np.int64)
    squares, sums = (wide * wide).sum(axis=2), wide.sum(axis=2)
    spread = (256 * squares - sums * sums).sum(axis=1)
    return Prepared(np.ascontiguousarray(cells), smooth, squares.sum(axis=1), spread)


def likeness(one: Prepared, other: Prepared) -> NDArray[np.int32]:
    """Compares pictures row by row: int32 [m], 1,000,000 for equal ones; symmetric.

    1 - residual / contrast in millionths: what the best common gain leaves of the squared RGB
    difference, over the geometric mean of both variances. Cells white in both are left out of the
    gain. -1,000,000 at the least, and where one picture is flat.
    """
    left, right = (x.smooth.reshape(-1, 768).astype(np.int32) for x in (one, other))
    clipped = ((left == 1020) & (right == 1020)).sum(axis=1) * 1020**2
    shared = np.einsum("nx,nx->n", left, right) - clipped
    energy = _exact(one.energy - clipped) * _exact(other.energy - clipped)
    residual = (energy - _exact(shared) ** 2) / np.sqrt(np.maximum(energy, 1))
    value = np.rint(1_000_000 * np.maximum(-1, 1 - residual / _contrast(one, other)))
    return np.where(_flat(one) | _flat(other), -1_000_000, value).astype(np.int32)


def alike(thumbnails: Thumbnails, i: Rows, j: Rows) -> Verdicts:
    """Tells whether rows i and j, int64 [m], of `thumbnails` uint8 [n, 16, 16, 3] are copies.

    No cell differs by more than NEAR; or one is the other brightened by a factor within GAIN; or
    one is the other cropped by REACH cells a side at most, unless both are drawn on white PAPER,
    where relatives on one template look like crops. The former two want a likeness of LIKE, the
    latter of CROP once the crop is undone. Symmetric, whatever else is asked at the same time.

    Measured with RADIUS on planted copies of 1,085 photographs and tiles of them (see
    benchmarks/bench_planted.py): 99.6 % found, no false pair. Of 6,784 clip-art pictures, likeness
    alone took hundreds of playing cards, flags and road signs for copies; this takes some tens.
    """
    verdict = np.empty(len(i), dtype=np.bool_)
    for start in range(0, len(i), BLOCK):
        part = slice(start, start + BLOCK)
        rows, place = np.unique(np.concatenate([i[part], j[part]]), return_inverse=True)
        ready, half = prepare(thumbnails[rows]), len(place) // 2
        verdict[part] = _copies(_take(ready, place[:half]), _take(ready, place[half:]))
    return verdict


def flat(thumbnails: Thumbnails) -> Verdicts:
    """Tells which thumbnails vary by less than FLAT levels, so that all look alike: bool [n]."""
    return _flat(prepare(thumbnails))


def _copies(one: Prepared, other: Prepared) -> Verdicts:
    like = likeness(one, other) >= LIKE
    apart = np.abs(one.cells.astype(np.int16) - other.cells).max(axis=(1, 2, 3))
    found = like & (apart <= NEAR)
    open_ = ~found & ~(_paper(one) & _paper(other)) & ~_flat(one) & ~_flat(other)
    rest = np.flatnonzero(like & ~found)
    found[rest] = _either(_brightened, _take(one, rest), _take(other, rest))
    rest = np.flatnonzero(open_ & ~found)
    found[rest] = _either(_cropped, _take(one, rest), _take(other, rest))
    return found


def _brightened(dark: Prepared, light: Prepared) -> Verdicts:
    """Whether every cell of `light` is that of `dark` times one gain; above HEAVEN it may clip."""
    left, right = (x.smooth.reshape(-1, 768).astype(np.float64) for x in (dark, light))
    unclipped = (np.minimum(left, right) >= 40) & (np.maximum(left, right) < 4 * WHITE)
    ratio = np.where(unclipped, right / np.maximum(left, 1), np.nan)
    ratio[~unclipped.any(axis=1)] = 1
    gain = np.nanmedian(ratio, axis=1)
    least, cells = (x.cells.reshape(-1, 768).astype(np.float64) for x in (dark, light))
    most = gain[:, None] * least
    least = np.where(most > HEAVEN, least, most)
    within = (cells >= least - NEAR) & (cells <= most + NEAR)
    return (gain >= GAIN[0]) & (gain <= GAIN[1]) & within.all(axis=1)


def _cropped(whole: Prepared, part: Prepared) -> Verdicts:
    """Whether `part` is `whole` without a strip at one side or more.

    Least squares on the picture and its first derivatives (Lucas and Kanade, 1981): a gain, a shift
    and a stretch for either axis. The sums are exact; only the solution of 5 x 5 rounds.
    """
    basis, target = _derivatives(whole, part)
    gram = _exact(basis @ basis.transpose(0, 2, 1)) + np.eye(5)
    image = (basis @ target[..., None])[..., 0]
    squares = np.einsum("nx,nx->n", target, target)
    fit = np.linalg.solve(gram, image[..., None])[..., 0]
    before = squares - image[:, 0] ** 2 / gram[:, 0, 0]
    after = squares - np.einsum("nk,nk->n", fit, image)
    gain = np.where(fit[:, 0] == 0, 1, fit[:, 0])
    shift, stretch = 2 * fit[:, 1:3] / gain[:, None], 32 * fit[:, 3:5] / gain[:, None]
    inside = (stretch <= SLACK - np.abs(shift)).all(axis=1)
    small = (np.maximum(np.abs(shift), np.abs(stretch)) <= REACH).all(axis=1)
    like = 1 - after / _contrast(whole, part) >= CROP / 1_000_000
    return inside & small & like & (after <= SPARED * before)


def _derivatives(
    whole: Prepared, part: Prepared
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The regressors [m, 5, 768] and the target [m, 768] of `_cropped`, integers."""
    picture, target = _exact(whole.smooth), _exact(part.smooth)
    down, across = 2 * np.gradient(picture, axis=2), 2 * np.gradient(picture, axis=3)
    place = 2.0 * np.arange(16) - 15
    basis = [picture, across, down, across * place, down * place[:, None]]
    seen = ~((picture == 1020) & (target == 1020)).reshape(-1, 1, 768)
    stacked = np.stack([x.reshape(-1, 768) for x in basis], axis=1)
    return stacked * seen, target.reshape(-1, 768) * seen[:, 0]


def _contrast(one: Prepared, other: Prepared) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(_exact(one.spread) * _exact(other.spread), 1)) / 256


def _paper(pictures: Prepared) -> Verdicts:
    return (pictures.cells.min(axis=1) >= WHITE).sum(axis=(1, 2)) > PAPER


def _flat(pictures: Prepared) -> Verdicts:
    return pictures.spread < 256 * 768 * (4 * FLAT) ** 2


def _either(
    check: Callable[[Prepared, Prepared], Verdicts], one: Prepared, other: Prepared
) -> Verdicts:
    return check(one, other) | check(other, one)


def _take(pictures: Prepared, rows: Rows) -> Prepared:
    cells, smooth, energy, spread = pictures
    return Prepared(cells[rows], smooth[rows], energy[rows], spread[rows])


def _exact(integers: NDArray[np.generic]) -> NDArray[np.float64]:
    """Integers as float64: BLAS is fast on it, and exact while sums stay below 2^53."""
    return integers.astype(np.float64)
