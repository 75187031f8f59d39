"""A store on a real file system that is full: one line at once, and a re-run with space repairs."""

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.store import Location, open_store
from tests.faults.buckets import config, content, published, reader
from tests.faults.night import Night


class Disk:
    """A file system in memory, of any size."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", "size=64m", "none")

    def resize(self, kilobytes: int) -> None:
        self._mount("-o", f"remount,size={kilobytes}k")

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def _mount(self, *arguments: str) -> None:
        command = ["mount", *arguments, str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()[-80:]}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def fill_up(corpus: Path, disk: Disk, store: Path, told: Path, kilobytes: int) -> str:
    """A night on a disk with this much room, then one with enough; returns what the first said."""
    reads = open_store(Location(uri=str(store)))
    disk.resize(kilobytes)
    with reader(reads) as seen:
        start = time.monotonic()
        end = Night(config(corpus, store), told).end()
        spent = time.monotonic() - start
        if end.status:
            assert end.status == 1 and "\n" not in end.said["error"]
            assert "the disk is full: free space, or move the store" in end.said["error"]
            assert spent < 60
        disk.resize(64 << 10)
        again = Night(config(corpus, store), told).end()
    assert again.status == 0, again.said
    assert [content(version) for version in seen[-1:]] in ([], [content(published(reads))])
    return str(end.said["error"]).split(":")[0] if end.status else "there was room"


def test_a_full_disk_ends_in_one_line_and_a_re_run_repairs(corpus, expected, disk, tmp_path):
    store = disk.folder / "store"
    assert fill_up(corpus, disk, store, tmp_path / "told", 400) != "there was room"
    assert content(published(open_store(Location(uri=str(store))))) == expected


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_soak_full_disk(corpus, expected, disk, tmp_path, capsys):
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, ends = random.Random(seed), Counter[str]()
    store = disk.folder / "store"
    for _ in range(20):
        ends[fill_up(corpus, disk, store, tmp_path / "told", draw.randint(40, 800))] += 1
        assert content(published(open_store(Location(uri=str(store))))) == expected
        subprocess.run(["rm", "-rf", str(store)], check=True)
    with capsys.disabled():
        print(f"\nfull disks, seed {seed}: digests equal after each")
        for where, count in ends.most_common():
            print(f"  {where:<20} {count:3}")
