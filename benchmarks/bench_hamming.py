"""Near-duplicate search over 64-bit hashes, exact, and what the alternatives take.

python benchmarks/bench_hamming.py [--count 1000000] [--radius 4] [--subset 50000]

`random` are uniform hashes. `clumped` are drawn to look like pHashes of a crawl: 32 bits set, a
tenth near one of 2,000 centres (0 to 6 pairs of bits flipped, so clumps of about 50, pairs within
every distance), one clump of 1,100 and one in a hundred equal to another.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable

import numpy as np

from infra import hamming

FLIPS = 6


def balanced(draw: np.random.Generator, count: int) -> np.ndarray:
    """Hashes with 32 bits set, as pHash has."""
    order = np.argsort(draw.random((count, 64), dtype=np.float32), axis=1)
    return np.packbits(order < 32, axis=1).view(np.uint64)[:, 0]


def near(draw: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    """Each centre with 0 to FLIPS random bits flipped, twice."""
    flips = draw.integers(0, 64, (len(centres), 2 * FLIPS), dtype=np.uint64)
    kept = np.arange(2 * FLIPS) < 2 * draw.integers(0, FLIPS + 1, len(centres))[:, None]
    return centres ^ np.bitwise_xor.reduce(np.where(kept, np.uint64(1) << flips, 0), axis=1)


def random_hashes(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64)


def clumped_hashes(count: int) -> np.ndarray:
    draw = np.random.default_rng(2)
    hashes = np.concatenate([balanced(draw, part) for part in [10_000] * (count // 10_000)])
    tenth, hundredth = len(hashes) // 10, len(hashes) // 100
    hashes[:tenth] = near(draw, draw.choice(hashes[-2000:], tenth))
    hashes[tenth : tenth + 1100] = near(draw, np.repeat(hashes[-1:], 1100))
    hashes[-hundredth - 2000 : -2000] = draw.choice(hashes[: 2 * tenth], hundredth)
    return draw.permutation(hashes)


def counted(hashes: np.ndarray, radius: int) -> int:
    return sum(len(i) for i, _, _ in hamming.pairs_within(hashes, radius))


def faiss_pairs(hashes: np.ndarray, radius: int) -> int:
    import faiss

    index = faiss.IndexBinaryFlat(64)
    codes = hashes.view(np.uint8).reshape(-1, 8)
    index.add(codes)
    limits, _, _ = index.range_search(codes, radius + 1)  # faiss takes what is strictly nearer
    return (int(limits[-1]) - len(hashes)) // 2


def brute_pairs(hashes: np.ndarray, radius: int) -> int:
    """All pairs by popcount, in tiles: what a brute-force search with numpy takes."""
    return sum(len(i) for i, _, _ in hamming._scanned(hashes, hashes, radius, same=True))


def timed(search: Callable[[np.ndarray, int], int], hashes: np.ndarray, radius: int):
    wall, cpu = time.perf_counter(), time.process_time()
    found = search(hashes, radius)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--radius", type=int, nargs="+", default=[4])
    parser.add_argument("--subset", type=int, default=50_000, help="for those that compare all")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("hashes    n          radius  search             pairs       wall s    cpu s  peak MB")
    for name, make in (("random", random_hashes), ("clumped", clumped_hashes)):
        hashes = make(options.count)
        for radius in options.radius:
            report(name, hashes, radius, "pairs_within", counted)
            for label, search in (
                ("faiss BinaryFlat", faiss_pairs),
                ("all pairs, numpy", brute_pairs),
            ):
                report(name, hashes, radius, label, search, options.subset)


def report(
    name: str,
    hashes: np.ndarray,
    radius: int,
    label: str,
    search: Callable[[np.ndarray, int], int],
    subset: int = 0,
) -> None:
    part = hashes[:subset] if subset else hashes
    found, wall, cpu = timed(search, part, radius)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row = f"{name:8s}  {len(part):<9,}  {radius:<6}  {label:17s}  {found:<10,}"
    print(f"{row}  {wall:8.1f} {cpu:8.1f}  {peak:6}", end="")
    scale = (len(hashes) / len(part)) ** 2
    print(f"   (at {len(hashes):,}: {wall * scale:,.0f} s, extrapolated)" if subset else "")


if __name__ == "__main__":
    main()
