"""Two builds of one dataset at once: one version or two ordered ones, and the loser says so."""

import json
import multiprocessing
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.store import Location, Store, open_store
from tests.faults.buckets import config, content, published, reader
from tests.faults.night import End, Night
from tests.infra.conftest import aws_environment, moto_endpoint  # noqa: F401

OTHER = {"pairs": {"targets": 2}}


@pytest.fixture(scope="module")
def both(corpus: Path, expected: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the two configs publishes where it is alone."""
    base = tmp_path_factory.mktemp("alone")
    assert Night(config(corpus, base / "s", **OTHER), base / "told").end().status == 0
    other = content(published(open_store(Location(uri=str(base / "s")))))
    assert other != expected
    return [expected, other]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Makes new places for a store, in a folder or on S3."""

    def make(kind: str) -> dict[str, Any]:
        if kind == "folder":
            return {"uri": str(tmp_path / uuid.uuid4().hex)}
        server = {"endpoint": request.getfixturevalue("moto_endpoint"), "region": "us-east-1"}
        return {"uri": f"s3://corpus/{uuid.uuid4().hex}", **server}

    return make


class Meet:
    """Before its process first writes a key of this ending, it waits for the other one there."""

    def __init__(self, ending: str, barrier: Any):
        self.ending, self.barrier = ending, barrier

    def __call__(self, number: int, key: str) -> None:
        if key.endswith(self.ending) and self.barrier:
            barrier, self.barrier = self.barrier, None
            barrier.wait(60)


def race(
    corpus: Path, where: dict[str, Any], told: Path, second: dict[str, Any], meet: str | None = None
) -> list[End]:
    """Two nights at once, on one store; they meet before the write of a key."""
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    before = Meet(meet, barrier) if meet else None
    nights = [
        Night(config(corpus, where, **sections), told.with_name(f"told{number}"), before=before)
        for number, sections in enumerate(({}, second))
    ]
    return [night.end() for night in nights]


def check(store: Store, ends: list[End], expected: list[tuple[Any, Any]], same: bool) -> str:
    """Raise AssertionError unless the ends and the store tell one story; returns it."""
    latest = published(store)
    assert latest is not None
    assert content(latest) in expected[: 1 if same else 2]
    for number, end in enumerate(ends):
        assert end.status in (0, 1), end
        if end.status:
            assert not same, end.said
            assert "another build published version" in end.said["error"]
            assert "\n" not in end.said["error"]
        else:
            assert end.said["digest"] == expected[0 if same else number][0]
    winners = [end for end in ends if end.status == 0]
    assert latest["version"] in [end.said["version"] for end in winners]
    for name in {stat.key.split("/")[2] for stat in store.list("datasets/few/v")}:
        _whole_or_unnamed(store, name)
    if len(winners) == 1:
        return "one version, and a loser that says so"
    versions = {end.said["version"] for end in winners}
    return "one version for both" if len(versions) == 1 else "two versions, one after the other"


def _whole_or_unnamed(store: Store, name: str) -> None:
    """A version is whole, or has no manifest, so that nobody finds it."""
    keys = {stat.key for stat in store.list(f"datasets/few/{name}/")}
    if f"datasets/few/{name}/manifest.json" in keys:
        manifest = json.loads(store.get(f"datasets/few/{name}/manifest.json"))
        named = {f"datasets/few/{name}/{file['name']}" for file in manifest["files"]}
        assert named <= keys


@pytest.mark.parametrize(
    ("kind", "content_is", "meet"),
    [
        ("folder", "same", "/claim"),
        ("folder", "different", "/latest.json"),
        ("s3", "same", "/latest.json"),
        ("s3", "different", "/claim"),
    ],
)
def test_two_builds_that_meet_end_in_one_order(
    corpus, both, place, tmp_path, kind, content_is, meet
):
    where, same = place(kind), content_is == "same"
    store = open_store(Location(**where))
    with reader(store):
        ends = race(corpus, where, tmp_path / "told", {} if same else OTHER, meet)
    story = check(store, ends, both, same)
    assert story == ("one version for both" if same else "one version, and a loser that says so")
    # The loser runs again, and its version comes after the winner's.
    again = Night(config(corpus, where, **({} if same else OTHER)), tmp_path / "told").end()
    assert again.status == 0, again.said
    assert content(published(store)) == both[0 if same else 1]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_soak_races(corpus, both, place, tmp_path, capsys, kind):
    """Two builds that start within a second of one another, and meet nowhere by design."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, stories = random.Random(seed), Counter[str]()
    for number in range(15):
        where, same = place(kind), number % 2 == 0
        store = open_store(Location(**where))
        second = {} if same else OTHER
        with reader(store):
            first = Night(config(corpus, where), tmp_path / "told0")
            time.sleep(draw.uniform(0, 1))
            other = Night(config(corpus, where, **second), tmp_path / "told1")
            ends = [first.end(), other.end()]
        stories[check(store, ends, both, same)] += 1
    with capsys.disabled():
        print(f"\nraces of two builds, {kind}, seed {seed}")
        for story, count in sorted(stories.items()):
            print(f"  {story:<38} {count:3}")
