"""Kill -9 of who adds paid answers, at any write and any moment: what `add` returned is there."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from infra import growing, responses, tables
from infra.folder import FolderStore
from infra.ledger import Ledger
from infra.responses import FAMILY, KIND, SEGMENTS, look
from infra.store import Location, listed, open_store
from tests.answers import answer, kept, key
from tests.faults.adder import FOR_EVER, REFUSED, Server, keys, served
from tests.faults.proxy import Proxy
from tests.infra.conftest import aws_environment, moto_endpoint  # noqa: F401


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


def life(server: Server, store: FolderStore, told: Path, name: str, **how: object) -> bool:
    """One life on a store; says whether it was killed. Seconds count from its start, or else from
    its first answer, `at_work`.
    """
    seconds, at_work = how.pop("seconds", None), how.pop("at_work", False)
    before = len(keys(told))
    how |= {} if seconds is None else {"rounds": FOR_EVER}
    process = server.begin(store=store.uri, told=str(told), name=name, **how)
    while at_work and len(keys(told)) == before:
        time.sleep(0.005)
    if seconds is not None:
        time.sleep(float(str(seconds)))
        os.kill(process, signal.SIGKILL)
    status = server.ended()
    assert status in (0, -signal.SIGKILL)
    return status != 0


def check(store: FolderStore, told: Path) -> int:
    """Every answer whose `add` returned is there; returns how many."""
    view, said = look(store), keys(told)
    assert len(said) == len(set(said))
    for name in said:
        found = view.get(name)
        assert found is not None and found.key == name and found.text == "yes"
    return len(said)


def each_once(store: FolderStore) -> None:
    """After the next process has moved them, all answers are in the table, each once."""
    kept(store)
    assert listed(store, SEGMENTS) == []
    table = growing.load(Ledger(store), KIND, FAMILY).table
    found = tables.read(store, table, ["key"])["key"].to_pylist()
    assert len(found) == len(set(found)) >= 1


def test_whoever_is_killed_at_a_write_has_lost_nothing_that_add_returned(server, store, tmp_path):
    told = tmp_path / "told"
    for at in (3, 8, 9, 11, 12, 13, 14, 17, 40, 90):
        assert life(server, store, told, f"life {at}", at=at)
        check(store, told)
    each_once(store)
    assert check(store, told) > 100


def test_whoever_is_killed_at_any_moment_has_lost_nothing_either(server, store, tmp_path):
    told, draw = tmp_path / "told", random.Random(4)
    for at in range(6):
        how = {"seconds": draw.uniform(0, 0.1), "at_work": at % 2 == 0}
        assert life(server, store, told, f"life {at}", **how)
    assert check(store, told)
    each_once(store)


def test_of_contenders_that_are_killed_never_two_have_the_lease(server, store, tmp_path):
    told, draw = tmp_path / "told", random.Random(5)
    how = {"store": store.uri, "told": str(told), "name": "", "mode": "contend"}
    with served() as other:
        for _ in range(4):
            process = server.begin(**how, rounds=FOR_EVER)
            other.begin(**how)
            time.sleep(draw.uniform(0.01, 0.1))
            os.kill(process, signal.SIGKILL)
            assert server.ended() == -signal.SIGKILL
            assert other.ended() == 0  # it went on alone
    epochs = [int(line) for line in told.read_text().split()]
    assert epochs == sorted(set(epochs)) and len(epochs) > 160


def test_whoever_stood_still_and_was_overtaken_stops_and_loses_nothing(server, store, tmp_path):
    told = tmp_path / "told"
    process = server.begin(store=store.uri, told=str(told), name="slow", rounds=FOR_EVER, life=0.5)
    while not keys(told):
        time.sleep(0.01)
    os.kill(process, signal.SIGSTOP)
    others = [answer(f"slow {worker} {number}", "mine") for worker in (0, 1) for number in range(9)]
    kept(store, *others)  # it waits until nobody has given a sign of life for half a second
    os.kill(process, signal.SIGCONT)
    assert server.ended() == REFUSED
    assert all(look(store).get(name) for name in keys(told))
    each_once(store)
    assert all(look(store).get(name) for name in keys(told))


def test_a_bucket_that_fails_on_the_way_loses_nothing(moto_endpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(responses, "FLUSH_ANSWERS", 4)
    monkeypatch.setattr(responses, "PILE", 3)
    proxy = Proxy(moto_endpoint, seed=3, faults=("500", "503", "reset", "truncated", "lost answer"))
    where = Location(uri="s3://corpus/paid", endpoint=proxy.endpoint, region="us-east-1")
    names = [[f"{turn} {number}" for number in range(24)] for turn in range(3)]
    try:
        proxy.share = 0.1
        for turn in names:
            said = kept(open_store(where), *map(answer, turn))
            assert said == [answer(name) for name in turn]
    finally:
        proxy.close()
    store = open_store(where.model_copy(update={"endpoint": moto_endpoint}))
    each_once(store)
    assert all(look(store).get(key(name)) for turn in names for name in turn)
    assert sum(proxy.drawn.values()) > 5, proxy.drawn


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_kills_of_who_adds_answers(server, tmp_path, capsys):
    """Each write in turn, and any moment, many lives on one store and many stores."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, rows = random.Random(seed), Counter[str]()
    for place in range(20):
        store, told = FolderStore(str(tmp_path / f"store {place}")), tmp_path / f"told {place}"
        for number in range(25):
            how = draw.choice([{"at": draw.randrange(160)}, {"seconds": draw.uniform(0, 0.5)}])
            killed = life(server, store, told, f"life {number}", **how)
            rows["at a write" if "at" in how else "at any moment"] += killed
            rows["answers"] += check(store, told) if number % 5 == 4 else 0
        each_once(store)
    with capsys.disabled():
        print(f"\nkills of who adds answers, seed {seed} (PAIRMILL_SOAK_SEED): {dict(rows)}")
