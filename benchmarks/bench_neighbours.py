"""Exact neighbour search, beside the matrix product it can't do without and what FAISS takes.

Every contender runs in turn, several rounds, on the same vectors and cores. CPU time (user and
system, all threads) is the figure to compare on a machine that others use as well.
"""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from infra import neighbours


def clustered(n: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Unit float16 vectors in clusters of about 40, 3 % of them copies, 1 % near copies."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 40), dimension), dtype=np.float32)
    vectors = rng.standard_normal((n, dimension), dtype=np.float32)
    vectors += centres[rng.integers(0, len(centres), n)]
    copies, near = rng.permutation(n)[: n // 25].reshape(-1, 4)[:, :3].ravel(), n // 100
    vectors[copies] = vectors[rng.integers(0, n, len(copies))]
    vectors[:near] = vectors[near : 2 * near] * (1 + 1e-3 * rng.standard_normal((near, 1)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16)


def product(wide: np.ndarray, block: int = 4096) -> None:
    """All against all in float32 with NumPy, nothing kept."""
    out = np.empty((block, block), np.float32)
    for i in range(0, len(wide), block):
        for j in range(0, len(wide), block):
            left, right = wide[i : i + block], wide[j : j + block]
            np.matmul(left, right.T, out=out[: len(left), : len(right)])


def ours(vectors: np.ndarray, k: int) -> np.ndarray:
    groups = neighbours.distinct(vectors)
    some = vectors[groups.first]
    lists = neighbours.search(some, some, k, same=True, device="cpu")
    return neighbours.expand(lists, groups, k).neighbour


def ours_added(vectors: np.ndarray, k: int) -> np.ndarray:
    """A tenth of the vectors against all, as for a corpus that grew."""
    some = vectors[: len(vectors) // 10]
    return neighbours.search(some, vectors, k, own=np.arange(len(some)), device="cpu").neighbour


def faiss_flat(wide: np.ndarray, k: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(wide.shape[1])
    index.add(wide)
    return index.search(wide, k + 1)[1]


def faiss_ivf(wide: np.ndarray, k: int) -> np.ndarray:
    import faiss

    cells = int(4 * np.sqrt(len(wide)))
    index = faiss.index_factory(wide.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(wide)
    index.add(wide)
    index.nprobe = 16
    return index.search(wide, k + 1)[1]


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def agreement(exact: np.ndarray, found: np.ndarray) -> float:
    """The share of the exact lists' rows that another's k + 1 rows hold, over 2,000 lists."""
    rows = np.linspace(0, len(exact) - 1, min(2000, len(exact))).astype(int)
    return float(np.mean([np.isin(exact[i], found[i]).mean() for i in rows]))


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {neighbours._cores()} cores, NumPy {np.__version__}"


def main(
    n: Annotated[int, typer.Option(help="vectors")] = 100_000,
    dimension: Annotated[int, typer.Option(help="dimensions")] = 512,
    k: Annotated[int, typer.Option(help="neighbours")] = 50,
    rounds: Annotated[int, typer.Option(help="rounds, contenders in turn")] = 3,
    faiss: Annotated[bool, typer.Option(help="run FAISS too")] = True,
) -> None:
    vectors = clustered(n, dimension)
    wide = vectors.astype(np.float32)
    contenders: dict[str, Callable[[], Any]] = {
        "float32 product alone": lambda: product(wide),
        "Pairmill, exact, all": lambda: ours(vectors, k),
        "Pairmill, exact, a tenth added": lambda: ours_added(vectors, k),
    }
    if faiss:
        contenders["faiss IndexFlatIP"] = lambda: faiss_flat(wide, k)
        contenders["faiss IVF, nprobe 16"] = lambda: faiss_ivf(wide, k)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in contenders.items():
            wall, cpu, results[name] = timed(call)
            runs[name].append((wall, cpu))
    report(f"{n:,} x {dimension}, k = {k}; {machine()}", runs, results)


def report(title: str, runs: dict[str, list[tuple[float, float]]], results: dict[str, Any]) -> None:
    table = Table(
        "", "CPU s", "wall s", "CPU / product", "wall / product", "agreement", title=title
    )
    one = runs["float32 product alone"]
    exact = results["Pairmill, exact, all"]
    for name, times in runs.items():
        wall, cpu = (median(x) for x in zip(*times, strict=True))
        ratios = [(w / w1, c / c1) for (w, c), (w1, c1) in zip(times, one, strict=True)]
        wall_ratio, cpu_ratio = (median(x) for x in zip(*ratios, strict=True))
        found = results[name]
        agree = "" if found is None else f"{agreement(exact[: len(found)], found):.4f}"
        figures = (f"{cpu:.1f}", f"{wall:.1f}", f"{cpu_ratio:.2f}", f"{wall_ratio:.2f}")
        table.add_row(name, *figures, agree)
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
