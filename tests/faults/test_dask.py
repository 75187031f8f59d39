"""Kill -9 of Dask workers and of the scheduler, while the flow lives."""

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.store import Location, Store, open_store
from tests.faults.buckets import config, content, fill, published, reader
from tests.faults.night import End, Night
from tests.infra.test_cluster import Machine

LOCAL = {"cluster": {"kind": "local", "workers": 2}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards."""
    folder = tmp_path_factory.mktemp("dask") / "corpus"
    fill(folder, 0, 130)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What threads give, which nobody kills."""
    base = tmp_path_factory.mktemp("undisturbed")
    assert Night(config(corpus, base / "store"), base / "told").end().status == 0
    return content(published(open_store(Location(uri=str(base / "store")))))


def at_work(pid: int) -> Iterator[psutil.Process]:
    """The worker processes of a local cluster."""
    for process in psutil.Process(pid).children(recursive=True):
        if "spawn_main" in " ".join(process.cmdline()):
            yield process


def kill_workers(night: Night, moments: list[float]) -> int:
    """Kill one worker after each pause, counted from when there are some; returns how many."""
    killed, start = 0, time.monotonic()
    while night.process.is_alive() and not list(at_work(night.pid)):
        time.sleep(0.05)
        assert time.monotonic() - start < 60
    for pause in moments:
        time.sleep(pause)
        try:
            next(at_work(night.pid)).kill()
        except (psutil.Error, StopIteration):
            continue
        killed += 1
    return killed


def lose_the_scheduler(
    corpus: Path, where: dict[str, Any], folder: Path, pause: float
) -> tuple[End, End]:
    """A night whose scheduler is killed, and the next one on a new cluster."""
    ends = []
    for pause_now in (pause, None):
        machine = Machine(folder)
        try:
            machine.scheduler().worker()
            night = Night(config(corpus, where, cluster=_address(machine)), folder / "told")
            if pause_now is not None:
                _wait_for_a_shard(night, Path(where["uri"]))
                time.sleep(pause_now)
                machine.processes[0].kill()
            ends.append(night.end())
        finally:
            machine.stop()
    return ends[0], ends[1]


def _address(machine: Machine) -> dict[str, Any]:
    return {"kind": "address", "address": machine.address}


def _wait_for_a_shard(night: Night, store: Path) -> None:
    """Until the first of three shards is done."""
    while night.process.is_alive() and not list(store.glob("ledger/describe/*/receipts/*")):
        time.sleep(0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(Location(uri=str(tmp_path / "store")))


@pytest.mark.timeout(240)
def test_a_killed_worker_changes_nothing(corpus, expected, store, tmp_path):
    with reader(store):
        night = Night(config(corpus, store.uri, **LOCAL), tmp_path / "told")
        assert kill_workers(night, [1.0]) > 0
        end = night.end()
    assert end.status == 0, end.said
    assert content(published(store)) == expected


@pytest.mark.timeout(240)
def test_a_killed_scheduler_ends_the_night_in_one_line_and_the_next_goes_on(
    corpus, expected, store, tmp_path, impatient
):
    with reader(store):
        lost, again = lose_the_scheduler(corpus, {"uri": store.uri}, tmp_path, 0.0)
    assert lost.status == 1
    assert lost.said["error"].startswith("describe")
    assert "scheduler" in lost.said["error"] and "\n" not in lost.said["error"]
    assert again.status == 0, again.said
    assert content(published(store)) == expected


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_dask(corpus, expected, tmp_path, impatient, capsys):
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, rows = random.Random(seed), Counter[str]()
    for number in range(16):
        store = open_store(Location(uri=str(tmp_path / f"store{number}")))
        with reader(store):
            if number % 2:
                night = Night(config(corpus, store.uri, **LOCAL), tmp_path / "told")
                moments = [draw.uniform(0, 4) for _ in range(draw.randint(1, 2))]
                rows["workers killed"] += kill_workers(night, moments)
                end = night.end()
            else:
                lost, end = lose_the_scheduler(
                    corpus, {"uri": store.uri}, tmp_path, draw.uniform(0, 4)
                )
                assert lost.status in (0, 1), lost
                rows["schedulers killed"] += lost.status
        assert end.status == 0, end.said
        assert content(published(store)) == expected
    with capsys.disabled():
        print(f"\nkills of Dask, seed {seed}: digests equal after each")
        for name, count in rows.items():
            print(f"  {name:<18} {count:3}")
