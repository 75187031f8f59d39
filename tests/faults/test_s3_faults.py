"""A store that fails on the way: the same digest, or one line and a re-run that repairs."""

import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from infra.store import Location, Store, open_store
from tests.faults.buckets import config, content, published, reader
from tests.faults.night import Night
from tests.faults.proxy import FAULTS, Impatient, Proxy
from tests.infra.conftest import aws_environment, moto_endpoint  # noqa: F401


@pytest.fixture
def proxy(moto_endpoint: str) -> Iterator[Proxy]:  # noqa: F811
    proxy = Proxy(moto_endpoint)
    yield proxy
    proxy.close()


def place(endpoint: str) -> dict[str, Any]:
    """A new store on a server."""
    uri = f"s3://corpus/{uuid.uuid4().hex}"
    return {"uri": uri, "endpoint": endpoint, "region": "us-east-1"}


def directly(where: dict[str, Any], endpoint: str) -> Store:
    return open_store(Location(**where | {"endpoint": endpoint}))


def test_a_night_with_faults_in_a_tenth_of_the_requests_ends_as_one_without(
    corpus, expected, proxy, moto_endpoint, tmp_path  # noqa: F811
):  # fmt: skip
    where = place(proxy.endpoint)
    store = directly(where, moto_endpoint)
    proxy.share = 0.1
    with reader(store):
        end = Night(config(corpus, where), tmp_path / "told", prepare=Impatient()).end()
    assert end.status == 0, end.said
    assert content(published(store)) == expected
    assert sum(proxy.drawn.values()) > 5, proxy.drawn


@pytest.mark.parametrize("at", ["/ledger/deduplicate/", "/latest.json"])
def test_a_store_that_is_cut_off_ends_in_one_line_and_a_re_run_repairs(
    corpus, expected, proxy, moto_endpoint, tmp_path, at  # noqa: F811
):  # fmt: skip
    where = place(proxy.endpoint)
    store = directly(where, moto_endpoint)
    proxy.cut_before = at
    with reader(store) as seen:
        end = Night(config(corpus, where), tmp_path / "told", prepare=Impatient()).end()
        assert (end.status, seen) == (1, [])
        assert "the connection keeps breaking" in end.said["error"]
        assert "\n" not in end.said["error"]
        proxy.cut, proxy.cut_before = False, ""
        end = Night(config(corpus, where), tmp_path / "told", prepare=Impatient()).end()
    assert end.status == 0, end.said
    assert content(published(store)) == expected


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_s3_faults(corpus, expected, proxy, moto_endpoint, tmp_path, capsys):  # noqa: F811
    """Random shares of random faults; each night ends right or in one line, the last one right."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, ends = random.Random(seed), Counter[str]()
    for _ in range(30):
        where = place(proxy.endpoint)
        store = directly(where, moto_endpoint)
        proxy.draw, proxy.passed = random.Random(draw.random()), 0
        proxy.faults = tuple(draw.sample(FAULTS, draw.randint(1, len(FAULTS))))
        proxy.share, proxy.cut, proxy.cut_at = draw.choice([0.05, 0.2, 0.5]), False, -1
        if draw.random() < 0.5:
            proxy.cut_at = draw.randint(1, 400)
        with reader(store):
            for attempt in range(20):
                end = Night(config(corpus, where), tmp_path / "told", prepare=Impatient()).end()
                if end.status == 0:
                    break
                assert end.status == 1 and "\n" not in end.said["error"], end
                ends["one line, latest unmoved" if not published(store) else "one line"] += 1
                proxy.cut, proxy.cut_at = False, -1
                proxy.share = proxy.share / 2 if attempt else proxy.share
        assert end.status == 0, end.said
        assert content(published(store)) == expected
        ends["the right version"] += 1
    with capsys.disabled():
        print(f"\nfaults of S3, seed {seed}: {sum(proxy.drawn.values())} requests broken")
        for name, count in [*proxy.drawn.most_common(), *ends.most_common()]:
            print(f"  {name:<26} {count:5}")
