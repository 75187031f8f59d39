"""The whole build with an MLLM behind real HTTP writing the instructions."""

from pathlib import Path

import polars as pl
import pytest

from infra.errors import PairmillError
from tests.mllm_server import MllmServer


def labels(server, **more):
    endpoint = {"url": server.url, "model": "test", "concurrency": 4, "backoff_s": 0.01, **more}
    return {"labeller": "mllm", "endpoint": endpoint, "max_pixels": 4096}


def records_of(result):
    return pl.read_parquet(Path(result["manifest"]).parent / "records" / "*.parquet")


def test_every_pair_is_described_and_gets_three_instructions(few, build):
    with MllmServer() as server:
        result = build(few, labels=labels(server), pairs={"targets": 1})
    assert result["records"] == result["pairs"] > 50
    assert result["work"]["labels_requested"] == 2 * result["pairs"]
    records = records_of(result)
    assert set(records["labeller"]) == {"mllm"}
    assert records["instructions"].list.n_unique().min() >= 3
    assert records["description"].null_count() == 0


def test_a_second_build_asks_nothing(few, build):
    with MllmServer() as server:
        first = build(few, labels=labels(server), pairs={"targets": 1})
        asked = len(server.requests)
        second = build(few, labels=labels(server), pairs={"targets": 1})
        assert len(server.requests) == asked
    assert second["digest"] == first["digest"]
    assert second["work"]["labels_requested"] == 0


def test_a_dead_endpoint_ends_the_build_in_one_line(few, build):
    with MllmServer() as server:
        gone = labels(server, attempts=1)
    with pytest.raises(PairmillError) as caught:
        build(few, labels=gone, pairs={"targets": 1})
    assert "\n" not in str(caught.value)
