"""Money: a build of 2,000 pairs through a kill, two storms of 429 and a budget that ends; the
server counts what it was paid for.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl

from infra.responses import look
from infra.store import Location, open_store
from tests.faults.buckets import config, fill
from tests.faults.night import Night
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
