"""Images a second through the whole describe stage: read, hash, decode, pHash, both models, write.

Makes 512 px JPEGs out of the sample bucket's pictures, describes them on a local Dask cluster with
the sample models, and prints images a second (start-up of workers and models apart) and the
largest resident memory of a worker.
"""

import argparse
import io
import os
import platform
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
from PIL import Image

from infra.build import Build
from infra.cluster import ClusterParams, open_pool
from infra.models import ModelParams
from infra.store import Location, open_store
from tasks.describe import DescribeParams, describe
from tasks.snapshot import CorpusParams, snapshot

SAMPLE = Path(__file__).parents[1] / "sample"


def write_jpegs(source: Path, folder: Path, count: int) -> None:
    """`count` JPEGs of 512 x 512 px, quality 90, each a sample picture, later ones turned."""
    pictures = sorted(p for p in source.rglob("*") if p.suffix in (".png", ".jpg"))
    folder.mkdir(parents=True)
    for number in range(count):
        with Image.open(pictures[number % len(pictures)]) as image:
            picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        turned = white.convert("RGB").rotate(number // len(pictures) * 3, fillcolor="white")
        buffer = io.BytesIO()
        turned.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{number:06d}.jpg").write_bytes(buffer.getvalue())


def largest_worker() -> float:
    """Resident megabytes of the largest child process."""
    children = psutil.Process().children(recursive=True)
    return max((child.memory_info().rss for child in children), default=0) / 1e6


def run(corpus: Path, store: Path, workers: int) -> tuple[float, float, float]:
    """Seconds to load models, seconds to describe, and megabytes of the largest worker."""
    models = {
        "clip": ModelParams(library="open_clip", name=str(SAMPLE / "models/clip")),
        "dino": ModelParams(library="timm", name=str(SAMPLE / "models/dino")),
    }
    params = CorpusParams(uri=str(corpus))
    most = 0.0

    def watch(stage: str, done: int, total: int | None) -> None:
        nonlocal most
        most = max(most, largest_worker())

    with open_pool(ClusterParams(workers=workers)) as pool:
        bucket, place = open_store(params), open_store(Location(uri=str(store)))
        build = Build(bucket, place, pool, watch)
        started = time.perf_counter()
        list(pool.map(partial(warm, models), range(2 * workers)))
        loaded = time.perf_counter()
        listed = snapshot(build, params)
        describe(build, *listed[:2], params, models, DescribeParams(shard_images=500))
        return loaded - started, time.perf_counter() - loaded, most


def warm(models: dict[str, ModelParams], number: int) -> int:
    """Load the models in this worker; slow enough that every worker gets one."""
    from infra.models import load

    for params in models.values():
        load(params, "cpu")
    time.sleep(1)
    return os.getpid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, store = Path(folder) / "corpus", Path(folder) / "store"
        write_jpegs(SAMPLE / "bucket", corpus, options.images)
        size = sum(path.stat().st_size for path in corpus.iterdir()) / options.images / 1e3
        loading, seconds, most = run(corpus, store, options.workers)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"machine            {platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    print(f"images             {options.images} JPEGs of 512 px, {size:.0f} kB on average")
    print(f"workers            {options.workers}; start and models {loading:.1f} s")
    print(f"describe           {seconds:.1f} s, {options.images / seconds:.0f} images/s")
    print(f"worker CPU         {(spent.ru_utime + spent.ru_stime):.1f} s in all, start included")
    print(f"largest worker     {most:.0f} MB resident")


if __name__ == "__main__":
    main()
