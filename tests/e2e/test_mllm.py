"""The whole build with an MLLM behind real HTTP writing the instructions."""

import json
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


def test_a_budget_makes_a_partial_version_and_later_builds_go_on(few, build):
    with MllmServer() as server:

        def night(**more):
            return build(few, labels=labels(server, **more), pairs={"targets": 1})

        def limited(calls, **more):
            return build(
                few,
                labels={**labels(server), "budget": {"calls": calls}, **more},
                pairs={"targets": 1},
            )

        first = limited(40)
        assert first["waiting"] == {"over_budget": first["pairs"] - first["records"]}
        assert server.counts["good"] == 40 and first["records"] == 20
        manifest = json.loads(Path(first["manifest"]).read_text())
        assert manifest["partial"] == first["waiting"]
        assert manifest["cost"]["label_pairs"]["calls"] == 40
        second = limited(31, publish_partial=False)
        assert server.counts["good"] == 71
        assert (second["version"], second["fresh"], second["records"]) == (1, False, None)
        third = night()
        assert third["waiting"] == {} and third["records"] == third["pairs"]
    assert set(server.paid.values()) == {1}
    assert server.counts["good"] == 2 * third["pairs"]
