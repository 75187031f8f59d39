"""Money: a build of 2,000 pairs through a kill, two storms of 429 and a budget that ends; the
server counts what it was paid for.
"""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from infra.responses import look
from infra.store import Location, open_store
from tests.faults.buckets import config, fill
from tests.faults.night import Night
from tests.mllm_batches import PLANS
from tests.mllm_server import MllmServer, Storm

PICTURES, TARGETS = 135, 20
CONCURRENCY = 32
UNDER_WAY = 4 * CONCURRENCY + 64  # questions of a build at one time, answers on their way included
BUDGET = 700


def labels(server: MllmServer, **budget: int) -> dict[str, Any]:
    endpoint = {"url": server.url, "model": "test", "concurrency": CONCURRENCY, "backoff_s": 0.01}
    asking = {"endpoint": endpoint, "budget": budget}
    return {"labeller": "mllm", "calls": "one", "max_pixels": 4096, **asking}


def quiet(server: MllmServer) -> None:
    """Wait until the server has taken in all that was sent before the sender died."""
    seen = -1
    while server.in_flight or server.calls != seen:
        seen = server.calls
        time.sleep(0.1)


def records(store: Path, version: int) -> pl.DataFrame:
    return pl.read_parquet(store / f"datasets/few/v{version:06d}/records/*.parquet")


@pytest.mark.timeout(600)
def test_a_kill_two_storms_and_a_spent_budget_and_every_pair_is_paid_for_once(tmp_path):
    corpus, store, calm = (tmp_path / name for name in ("corpus", "store", "calm"))
    fill(corpus, 0, PICTURES)
    pairs = {"targets": TARGETS}

    def start(where: Path = store, **budget: int) -> Night:
        settings = config(corpus, where, pairs=pairs, labels=labels(server, **budget))
        return Night(settings, tmp_path / "told")

    def night(where: Path = store, **budget: int) -> dict[str, Any]:
        end = start(where, **budget).end()
        assert end.status == 0, end.said
        return end.said

    with MllmServer(keep=False, delay_ms=50) as server:
        server.storms = [Storm(200, seconds=0.5), Storm(1_000, seconds=0.5, retry_after="1")]
        killed = start()
        while server.paid.total() < 600:
            assert killed.process.is_alive()
            time.sleep(0.005)
        killed.kill()
        assert killed.end().killed
        quiet(server)
        paid = server.paid.copy()
        stored = look(open_store(Location(uri=str(store)))).count
        lost = paid.total() - stored
        assert 0 < lost <= UNDER_WAY and set(paid.values()) == {1}
        shutil.copytree(store, calm, ignore=shutil.ignore_patterns("responses"))

        stopped = night(calls=BUDGET)
        assert server.paid.total() - paid.total() == BUDGET
        assert stopped["waiting"] == {"over_budget": stopped["pairs"] - stored - BUDGET}
        assert records(store, 1).height == stored + BUDGET

        finished = night()
        idle = night()
    assert all(storm.refused for storm in server.storms)
    assert finished["waiting"] == {} and finished["pairs"] >= 2_000
    assert finished["records"] == len(server.paid) == finished["pairs"]
    twice = {asked for asked, times in server.paid.items() if times > 1}
    assert server.paid.total() == finished["pairs"] + lost
    assert len(twice) == lost and twice <= set(paid)
    whole = records(store, finished["version"])
    assert whole["pair_id"].n_unique() == whole.height == finished["pairs"]
    before = records(store, 1).select("pair_id", "instructions")
    assert whole.join(before, on=["pair_id", "instructions"], how="semi").height == before.height
    assert not idle["fresh"] and idle["work"]["labels_requested"] == 0
    with MllmServer(keep=False) as server:
        undisturbed = night(calm)
    assert server.paid.total() == finished["pairs"]
    assert undisturbed["digest"] == finished["digest"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_batches(tmp_path, capsys):
    """Kills at any moment of builds that ask in batches: no line of a batch is paid for twice."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, corpus, kills, singles = random.Random(seed), tmp_path / "corpus", 0, 0
    fill(corpus, 0, 40)
    batch = {"collect_s": 0.1, "poll_s": 0.1, "wait_s": 2.0, "settle_s": 0.3, "most": 40}
    for number in range(4):
        store = tmp_path / f"store {number}"
        with MllmServer(keep=False) as server:
            server.batches.script = draw.choices(sorted({*PLANS} - {"never"}), k=30)
            asking = labels(server)
            asking["endpoint"]["batch"] = batch
            settings = config(corpus, store, labels=asking)
            said: dict[str, Any] = {"waiting": True}
            while said["waiting"]:
                night = Night(settings, tmp_path / "told")
                night.process.join(draw.uniform(1, 6) if kills < 6 * (number + 1) else None)
                if night.process.is_alive():
                    night.kill()
                end = night.end()
                kills += end.killed
                said = said if end.killed else end.said
            assert not server.batches.files
        assert set(Counter(server.batches.asked).values()) == {1}
        # The first call of a build goes by itself, and is in flight like any other.
        singles += (twice := server.paid.total() - said["pairs"])
        assert twice <= server.counts["good"] and set(server.paid.values()) <= {1, 2}
    with capsys.disabled():
        print(f"\n{kills} kills of builds in batches, {singles} single calls paid twice, {seed=}")
