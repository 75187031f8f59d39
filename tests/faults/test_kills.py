"""Kill -9 of the flow at every write and at any moment: a re-run reaches the same digest."""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from infra.store import Location, open_store
from tests.faults.buckets import config, content, fill, published, reader
from tests.faults.night import Die, Night


class Scene(NamedTuple):
    """A corpus, the store as it was before the night, and what an undisturbed night makes of it."""

    name: str
    corpus: Path
    before: Path
    expected: tuple[Any, Any]
    writes: int
    seconds: float


def undisturbed(corpus: Path, store: Path, told: Path) -> tuple[tuple[Any, Any], int, float]:
    """What a night that nobody disturbs publishes, its writes to the store, and its seconds."""
    start = time.monotonic()
    end = Night(config(corpus, store), told).end()
    assert end.status == 0, end.said
    found = content(published(open_store(Location(uri=str(store)))))
    return found, end.writes, time.monotonic() - start


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    """A first night; and one after pictures came, changed and left."""
    base = tmp_path_factory.mktemp("kills")
    corpus, old, told = base / "corpus", base / "old corpus", base / "told"
    (base / "empty").mkdir()
    fill(corpus, 0, 44)
    shutil.copytree(corpus, old)
    first = Scene("first", old, base / "empty", *undisturbed(corpus, base / "kept", told))
    fill(corpus, 6, 50)
    pictures = sorted(corpus.rglob("*.png"))
    pictures[0].write_bytes(pictures[1].read_bytes())
    pictures[2].rename(pictures[2].with_name("renamed.png"))
    shutil.copytree(base / "kept", base / "built on")
    second = Scene("second", corpus, base / "kept", *undisturbed(corpus, base / "built on", told))
    full, _, _ = undisturbed(corpus, base / "full", told)
    assert full == second.expected != first.expected
    return [first, second]


def kill_and_run_again(scene: Scene, folder: Path, how: dict[str, Any]) -> int:
    """Kill a night, once or more often, and run it again; returns how many kills hit it."""
    store = folder / "store"
    shutil.copytree(scene.before, store)
    reads = open_store(Location(uri=str(store)))
    settings = config(scene.corpus, store)
    with reader(reads) as seen:
        hits = 0
        for _ in range(how.get("times", 1)):
            hooks = {k: Die(how["at"]) for k in ("before", "after") if k == how.get("when")}
            night = Night(settings, folder / "told", **hooks)
            if "seconds" in how:
                time.sleep(how["seconds"])
                if night.process.is_alive():
                    night.kill()
            end = night.end()
            assert end.killed or end.status == 0, end.said
            hits += end.killed
        end = Night(settings, folder / "told").end()
        assert end.status == 0, end.said
    found = published(reads)
    assert content(found) == scene.expected, (scene.name, how)
    assert [content(v) for v in seen[-1:]] in ([], [scene.expected])
    shutil.rmtree(folder)
    return hits


def spread(total: int, count: int) -> list[int]:
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


@pytest.mark.timeout(600)
def test_after_a_kill_at_any_boundary_a_re_run_reaches_the_same_digest(scenes, tmp_path):
    hits = 0
    for scene, count in zip(scenes, (5, 4), strict=True):
        for number, at in enumerate(spread(scene.writes, count)):
            how = {"at": at, "when": ("before", "after")[number % 2]}
            hits += kill_and_run_again(scene, tmp_path / "night", how)
    assert hits == 9


@pytest.mark.timeout(600)
def test_after_kills_at_any_moment_a_re_run_reaches_the_same_digest(scenes, tmp_path):
    for scene, share in zip(scenes, (0.5, 0.8), strict=True):
        how = {"seconds": share * scene.seconds}
        kill_and_run_again(scene, tmp_path / "night", how)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_kills(scenes, tmp_path, capsys):
    """Every boundary, before or after its write; then random moments, once to three times."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, rows = random.Random(seed), Counter[tuple[str, str]]()
    with capsys.disabled():
        print(f"\nkills of the flow, seed {seed} (PAIRMILL_SOAK_SEED)")
    for scene in scenes:
        for at in range(scene.writes):
            when = draw.choice(["before", "after"])
            how = {"at": at, "when": when}
            hits = kill_and_run_again(scene, tmp_path / "night", how)
            rows[scene.name, f"{when} a write"] += hits
        for _ in range(40):
            how = {"seconds": draw.uniform(0, scene.seconds), "times": draw.randint(1, 3)}
            rows[scene.name, "at any moment"] += kill_and_run_again(scene, tmp_path / "night", how)
    killed = rows.total()
    with capsys.disabled():
        for (name, moment), count in sorted(rows.items()):
            print(f"  {name:<6} night, {moment:<14} {count:4}")
        print(f"  {killed} kills, digests equal after each re-run")
    assert killed >= 200
