"""What a night costs after a change of 1 %, beside a full build: similarities and time by stage.

Everything between description and publishing runs, over synthetic features of N images in a folder:
align, deduplicate, score, filter, neighbours in three spaces, pairs, labels, records, fates.
"""

import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table as RichTable

from tests.worlds import World, config_of, make_world, new_build, run, seen

CLIP, DINO = 768, 768  # dimensions of ViT-L-14 and of DINOv2 ViT-B/14


def clustered(rng: np.random.Generator, n: int, dimension: int) -> np.ndarray:
    """Unit float16 vectors in clusters of about 40."""
    centres = rng.standard_normal((max(1, n // 40), dimension), dtype=np.float32)
    vectors = rng.standard_normal((n, dimension), dtype=np.float32)
    vectors += centres[rng.integers(0, len(centres), n)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16)


def pool(n: int, seed: int = 0) -> World:
    """n images, 3 % of them copies, with captions of three to six words, one in twelve shared."""
    rng = np.random.default_rng(seed)
    words = np.array([f"word{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i % 7}" for i in range(600)])
    texts = sorted({" ".join(rng.choice(words, rng.integers(3, 7))) for _ in range(n - n // 12)})
    thumbnails = np.repeat(np.repeat(rng.integers(0, 255, (n, 4, 4, 3), np.uint8), 4, 1), 4, 2)
    phash = rng.integers(0, 2**63, n, np.uint64)
    copies = rng.permutation(n)[: n // 33]
    originals = rng.integers(0, n, len(copies))
    thumbnails[copies], phash[copies] = thumbnails[originals], phash[originals]
    sizes = {"width": 512, "height": 512, "bytes": rng.integers(20_000, 90_000, n)}
    return make_world(
        pl.DataFrame(sizes, schema_overrides={"width": pl.Int32, "height": pl.Int32}),
        {"phash": pa.array(phash), "thumbnail": [t.tobytes() for t in thumbnails]},
        texts,
        {"clip": clustered(rng, n, CLIP), "dino": clustered(rng, n, DINO)},
        {"clip": clustered(rng, len(texts), CLIP)},
    )


class Night(NamedTuple):
    """What one build took: seconds by stage and of all cores, similarities, labels, its digest."""

    seconds: dict[str, float]
    cpu: float
    similarities: int
    labels: int
    digest: str


def night(world: World, folder: Path, present: np.ndarray, fraction: float = 0.9) -> Night:
    """Run the stages over the images that are `present`, bool[n]."""
    build = new_build(folder)
    ids, texts = np.array(world.ids), world.captions["caption_id"].to_list()
    linked = pl.DataFrame(
        {"image_id": ids, "caption_id": [texts[i % len(texts)] for i in range(len(ids))]}
    )
    objects = pl.DataFrame({"key": ids[present], "image_id": ids[present]})
    described = seen(build, world, objects, linked)
    before = time.process_time()
    digest, _ = run(build, config_of(clip_score={"fraction": fraction}), described)
    cpu, work = time.process_time() - before, build.work
    scored, asked = work["similarities_computed"], work["labels_requested"]
    return Night(build.seconds, cpu, scored, asked, digest)


def changes(
    n: int, extra: int, percent: float, seed: int = 1
) -> dict[str, tuple[np.ndarray, float]]:
    """Who is there after each kind of change, and the share of captions that is kept."""
    rng = np.random.default_rng(seed)
    base = np.arange(n + extra) < n
    count = min(extra, round(n * percent / 100))
    gone, come = rng.choice(n, count, replace=False), n + np.arange(count)
    removed, added = base.copy(), base.copy()
    removed[gone], added[come] = False, True
    replaced = removed.copy()
    replaced[come] = True
    return {
        "nothing": (base, 0.9),
        "added": (added, 0.9),
        "removed": (removed, 0.9),
        "replaced": (replaced, 0.9),
        "cut lets in": (base, 0.9 + percent / 100),
        "cut shuts out": (base, 0.9 - percent / 100),
    }


def main(
    n: int = 50_000,
    percent: Annotated[list[float], typer.Option(help="Changed share, in percent.")] = [1.0],  # noqa: B006
    check: Annotated[bool, typer.Option(help="Compare each digest with a full build's.")] = False,
    output: Annotated[Path | None, typer.Option("-o", help="Write the figures as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw them, as PNG.")] = None,
) -> None:
    """Measure a full build and nights after changes."""
    extra = round(n * max(percent) / 100)
    world, figures = pool(n + extra), []
    with tempfile.TemporaryDirectory() as folder:
        base, copy = Path(folder) / "base", Path(folder) / "night"
        full = night(world, base, np.arange(n + extra) < n)
        figures.append({"change": "full", "percent": 100.0, **full._asdict()})
        for share in percent:
            for name, (present, fraction) in changes(n, extra, share).items():
                shutil.copytree(base, copy)
                found = night(world, copy, present, fraction)
                shutil.rmtree(copy)
                figures.append({"change": name, "percent": share, **found._asdict()})
                if check:
                    whole = night(world, copy, present, fraction)
                    shutil.rmtree(copy)
                    assert whole.digest == found.digest, f"{name}: delta differs from full"
    show(figures, n)
    if output:
        output.write_text(json.dumps(figures, indent=1))
    if chart:
        draw(figures, chart)


def show(figures: list[dict[str, Any]], n: int) -> None:
    console = Console(width=190)
    stages = list(figures[0]["seconds"])
    table = RichTable("change", "%", "similarities", "", "s", "", "CPU s", "", *stages, "labels")
    whole = figures[0]
    total = sum(whole["seconds"].values())
    for row in figures:
        spent = sum(row["seconds"].values())
        table.add_row(
            row["change"],
            f"{row['percent']:g}",
            f"{row['similarities']:,}",
            f"{100 * row['similarities'] / whole['similarities']:.2f} %",
            f"{spent:.1f}",
            f"{100 * spent / total:.1f} %",
            f"{row['cpu']:.1f}",
            f"{100 * row['cpu'] / whole['cpu']:.1f} %",
            *(f"{row['seconds'].get(stage, 0):.2f}" for stage in stages),
            f"{row['labels']:,}",
        )
    console.print(f"N = {n:,}, {platform.machine()}, Python {platform.python_version()}")
    console.print(table)


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Similarities and CPU time as shares of a full build's, over the share that changed."""
    from matplotlib.figure import Figure

    whole, nights = figures[0], figures[1:]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("similarities", "cpu"), ("similarities", "CPU time"), strict=True
    ):
        for change in dict.fromkeys(row["change"] for row in nights):
            rows = [row for row in nights if row["change"] == change]
            shares = [100 * row[key] / whole[key] for row in rows]
            if change != "nothing":
                axes.plot([row["percent"] for row in rows], shares, "o-", label=change, ms=4)
        axes.set(
            xscale="log", yscale="log", xlabel="changed, %", title=f"{title}, % of a full build"
        )
        axes.axhline(5, color="grey", lw=0.8, ls=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        ticks = sorted({row["percent"] for row in nights})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        levels = [0.001, 0.01, 0.1, 1, 10, 100] if key == "similarities" else [1, 2, 5, 10, 20, 50]
        axes.set_yticks(levels, [f"{level:g}" for level in levels])
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
