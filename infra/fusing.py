"""A picture and a text as one query: their vectors put together, and how near pictures are."""

import numpy as np
from numpy.typing import NDArray

from infra import neighbours

Vectors = NDArray[np.float16]


def fuse(images: Vectors, texts: Vectors, weight: float) -> Vectors:
    """`weight` of each image vector and the rest of the text vector, float16[n, d] of length 1.

    Both are brought to length 1 before. With 0.5 it is the sum that MegaPairs trains CLIP with
    (Zhou et al. 2024, arXiv 2412.14475).
    """
    joined = weight * _unit(images) + (1 - weight) * _unit(texts)
    return _unit(joined).astype(np.float16)


def preferences(
    fused: Vectors, targets: Vectors, negatives: Vectors, sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The scores of each query's target and of the best of its negatives, int32[n] each.

    `negatives` [sum(sizes), d] holds those of the first query, then of the second, ...; each has
    one at least.
    """
    rows = np.repeat(np.arange(len(fused)), sizes)
    found = neighbours.scores(fused[rows], negatives)
    starts = np.cumsum(sizes) - sizes
    best = np.maximum.reduceat(found, starts) if len(found) else found
    return neighbours.scores(fused, targets), best


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    # Not a product of matrices: the order of its sums depends on how many rows there are.
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
    return np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
