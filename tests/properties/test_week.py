"""A week of nights on a real bucket ends at the digest of a full build.

Every night some pictures arrive, some change under their old name, some leave. The short form walks
through 90 pictures of the sample; the long one, in `make soak`, through the WebDataset tars in the
folder that PAIRMILL_WEEK_CORPUS names.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from rich.table import Table

from tests.faults import buckets

WEEK = os.environ.get("PAIRMILL_WEEK_CORPUS")
Picture = dict[str, bytes]  # by extension: the picture and its caption


def sample_pictures(count: int) -> list[Picture]:
    bucket = buckets.SAMPLE / "bucket"
    with (bucket / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(buckets.csv.DictReader(file))[:count]
    return [
        {
            Path(row["file_name"]).suffix: (bucket / row["file_name"]).read_bytes(),
            ".txt": row["caption"].encode(),
        }
        for row in rows
    ]


def tar_pictures(folder: Path) -> list[Picture]:
    """The samples of WebDataset tars."""
    found: dict[str, Picture] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stem, dot, kind = member.name.partition(".")
                data = tar.extractfile(member)
                if data and kind in ("png", "jpg", "webp", "txt"):
                    found.setdefault(f"{path.stem}/{stem}", {})[dot + kind] = data.read()
    return [picture for picture in found.values() if len(picture) > 1]


class Bucket:
    """A folder of pictures with captions beside them, that changes by shares of a pool."""

    def __init__(self, folder: Path, pool: list[Picture], start: int, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.waiting = [pool[i] for i in self.rng.permutation(len(pool))]
        self.names: list[str] = []
        self.made = 0
        for _ in range(start):
            self.arrive()

    def arrive(self) -> None:
        self.names.append(f"{self.made % 7}/{self.made:05d}")
        self.made += 1
        self.write(self.names[-1])

    def write(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for kind, data in self.waiting.pop().items():
            path.with_suffix(kind).write_bytes(data)

    def remove(self, name: str) -> None:
        for path in self.folder.glob(f"{name}.*"):
            path.unlink()

    def night(self, share: float) -> tuple[int, int, int]:
        """`share` of the bucket arrives, changes and leaves; how many of each."""
        count = max(1, min(round(share * len(self.names)), len(self.waiting) // 2))
        leaving = self.rng.choice(len(self.names), 2 * count, replace=False)
        changing = [self.names[i] for i in leaving[count:]]
        for name in [self.names[i] for i in leaving[:count]]:
            self.remove(name)
            self.names.remove(name)
        for name in changing:
            self.remove(name)
            self.write(name)
        for _ in range(count):
            self.arrive()
        return count, len(changing), count


def built(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a build in a process of its own; what it says at its end."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def built_here(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same in this process, without Prefect."""
    return buckets.build_here(config)


def nights(
    bucket: Bucket,
    shares: list[float],
    folder: Path,
    built: Callable[[dict[str, Any], Path], dict[str, Any]],
    **sections: Any,
) -> Iterator[Any]:
    """What changed and what the build said, for the first build, each night and a full build."""
    config = buckets.config(bucket.folder, folder / "store", **sections)
    yield "first", (len(bucket.names), 0, 0), built(config, folder)
    for number, share in enumerate(shares, 1):
        yield f"night {number}", bucket.night(share), built(config, folder)
    yield "full", (0, 0, 0), built({**config, "store": {"uri": str(folder / "whole")}}, folder)


def test_nights_of_a_small_bucket_end_at_the_digest_of_a_full_build(tmp_path):
    bucket = Bucket(tmp_path / "bucket", sample_pictures(110), 80, seed=1)
    *_, (_, _, last), (_, _, full) = nights(bucket, [0.05, 0.03, 0.05], tmp_path, built_here)
    assert last["version"] == 4
    assert last["digest"] == full["digest"]
    assert last["work"]["images_decoded"] <= 8
    assert full["work"]["images_decoded"] >= 75


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.skipif(not WEEK, reason="PAIRMILL_WEEK_CORPUS names no folder of WebDataset tars")
def test_a_week_of_nights(tmp_path, capsys):
    pool = tar_pictures(Path(WEEK or ""))
    bucket = Bucket(tmp_path / "bucket", pool, round(0.7 * len(pool)), seed=7)
    shares = np.random.default_rng(7).uniform(0.01, 0.05, 7).tolist()
    table = Table("", "arrived", "changed", "left", "decoded", "similarities", "records", "seconds")
    *_, (_, _, last), (_, _, full) = steps = list(
        nights(bucket, shares, tmp_path, built, cluster={"kind": "local", "workers": 2})
    )
    for name, changed, said in steps:
        work, seconds = said["work"], sum(said["seconds"].values())
        table.add_row(
            name,
            *(f"{count:,}" for count in changed),
            f"{work['images_decoded']:,}",
            f"{work['similarities_computed']:,}",
            f"{said['records']:,}",
            f"{seconds:.1f}",
        )
    with capsys.disabled():
        Console(width=110).print(table)
    assert last["digest"] == full["digest"]
