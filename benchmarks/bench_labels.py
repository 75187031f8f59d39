"""What labelling costs its own machine: rate, CPU time per call and memory, against a server that
does nothing but wait.

A real server process answers each call after a while; pairs go through the stage `label_pairs` into
a folder, one call a pair, pictures resized and encoded on the way. Then the same again, and the
same with the answers alone.
"""

import hashlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable

from infra import tables
from infra.build import Build
from infra.cluster import ClusterParams, ThreadPool
from infra.folder import FolderStore
from infra.tables import Table
from tasks.label_pairs import LabelParams, label_pairs

TARGETS = 4  # pairs of a query
SIDE = 512
FAST = "no delay, "


class Run(NamedTuple):
    """One run of the stage: calls, seconds, CPU seconds of client and server, labels."""

    calls: int
    seconds: float
    client: float
    server: float
    labels: int


def draw(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write smooth coloured noise as loose JPEGs of about 35 kB; rows of `objects`."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
        picture = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        picture = picture + rng.integers(-4, 4, (SIDE, SIDE, 1), np.int16)
        buffer, key = io.BytesIO(), f"{number:06d}.jpg"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        (folder / key).write_bytes(buffer.getvalue())
        rows.append(_object(key, None, 0, buffer.getvalue()))
    return rows


def in_tars(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first pictures in the tars of a folder as rows of `objects`."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if len(rows) == count:
                    return [*rows.values()]
                if Path(member.name).suffix.lower() in (".jpg", ".jpeg", ".png"):
                    file = tar.extractfile(member)
                    assert file
                    row = _object(path.name, member.name, member.offset_data, file.read())
                    rows.setdefault(row["image_id"], row)
    return [*rows.values()]


def _object(key: str, member: str | None, offset: int, data: bytes) -> dict[str, Any]:
    return {
        **{"key": key, "member": member, "stamp": "1", "offset": offset if member else None},
        **{"size": len(data), "image_id": hashlib.sha256(data).hexdigest(), "captions": []},
        **{"licence": None, "rule": None, "detail": None},
    }


def inputs(build: Build, objects: list[dict[str, Any]], pairs: int) -> dict[str, Table]:
    """Pairs of neighbours in a ring of images, each image the query of some."""
    images = sorted({row["image_id"] for row in objects})
    rows = [
        {"pair_id": f"{at:08d}", "query": images[at // TARGETS % len(images)]}
        | {"target": images[(at // TARGETS + at % TARGETS + 1) % len(images)]}
        | {"ties": [], "negatives": []}
        for at in range(pairs)
    ]
    texts = [f"drawing number {at}" for at in range(len(images))]
    ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    eligible = [
        {"image_id": image, "caption_id": caption, "clip_score": 0}
        for image, caption in zip(images, ids, strict=True)
    ]
    captions = [{"caption_id": i, "text": text} for i, text in zip(ids, texts, strict=True)]
    found = {"pairs": rows, "eligible": eligible, "captions": captions, "objects": objects}
    return {name: tables.write(build.store, name, rows) for name, rows in found.items()}


@contextmanager
def server(delay_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.mllm_server", "--port", "0"]
    with subprocess.Popen(
        [*command, "--delay-ms", str(delay_ms)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def ledger(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url.removesuffix('/v1')}/ledger", timeout=30).json())


@contextmanager
def opened(corpus: Path, store: Path, workers: int) -> Iterator[Build]:
    store.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pool = ThreadPool(ClusterParams(kind="threads", workers=workers), stack)
        yield Build(FolderStore(str(corpus)), FolderStore(str(store)), pool)


def label(build: Build, found: dict[str, Table], url: str, concurrency: int) -> Run:
    endpoint = {"url": url, "model": "waits", "concurrency": concurrency}
    params = LabelParams(labeller="mllm", endpoint=endpoint, calls="one")
    before, cpu, began = ledger(url), time.process_time(), time.perf_counter()
    labelled = label_pairs(build, **found, params=params)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    after = ledger(url)
    calls = after["calls"] - before["calls"]
    assert not any(count > 1 for count in after["paid"].values())
    return Run(calls, seconds, cpu, after["cpu_s"] - before["cpu_s"], labelled.labels.rows)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}"


def show(runs: dict[str, Run], most: float | None) -> RichTable:
    shown = RichTable(title=machine())
    columns = ("", "labels", "calls", "s", "calls/s", "of most", "ms/call", "server's")
    for name in columns:
        shown.add_column(name, justify="right" if name else "left")
    for name, run in runs.items():
        row = [name, str(run.labels), str(run.calls), f"{run.seconds:.1f}"]
        if run.calls:
            rate, each = run.calls / run.seconds, 1000 / run.calls
            part = f"{rate / most:.1%}" if most and not name.startswith(FAST) else ""
            row += [f"{rate:.0f}", part, f"{each * run.client:.2f}", f"{each * run.server:.2f}"]
        shown.add_row(*row)
    return shown


def main(
    pairs: int = 10_000,
    delay_ms: Annotated[float, typer.Option(help="What each answer takes.")] = 500,
    concurrency: Annotated[int, typer.Option(help="Calls in flight.")] = 64,
    corpus: Annotated[Path | None, typer.Option(help="A folder of tars with pictures.")] = None,
    workers: Annotated[int, typer.Option(help="Threads that resize pictures.")] = 2,
    output: Annotated[Path | None, typer.Option("-o", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure labelling with a waiting server, twice, and with one that does not wait."""
    runs: dict[str, Run] = {}
    most = 1000 * concurrency / delay_ms if delay_ms else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = corpus or Path(temporary) / "corpus"
        folder.mkdir(exist_ok=True)
        objects = (in_tars if corpus else draw)(folder, pairs // TARGETS)
        for name, delay in (("", delay_ms), (FAST, 0.0)):
            store = Path(temporary) / f"store {delay}"
            with server(delay) as url:
                with opened(folder, store, workers) as build:
                    found = inputs(build, objects, pairs)
                    runs[f"{name}first run"] = label(build, found, url, concurrency)
                with opened(folder, store, workers) as build:
                    runs[f"{name}second run"] = label(build, found, url, concurrency)
                for record in (store / "ledger/label_pairs").rglob("*.json"):
                    record.unlink()
                with opened(folder, store, workers) as build:
                    runs[f"{name}from answers"] = label(build, found, url, concurrency)
            if not delay_ms:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Console().print(show(runs, most))
    cpu = sum(run.client for run in runs.values() if not run.calls)
    print(f"ms/call: CPU time of the client, pictures included. Without calls: {cpu:.1f} s in all.")
    print(f"Memory of the client at its peak: {peak:.0f} MB; {len(objects)} pictures.")
    if output:
        figures = {name: run._asdict() for name, run in runs.items()}
        output.write_text(json.dumps({"machine": machine(), "peak_mb": peak, "runs": figures}))


if __name__ == "__main__":
    typer.run(main)
