"""Leases: one holder at a time, an epoch for each, and a way on when a holder dies."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import pytest

from infra import lease, pins
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.s3 import S3Store
from infra.store import Location, StoreError
from tests.infra.conftest import create_bucket

KEY = "leases/answers.json"


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


def held(store):
    return json.loads(store.get(KEY))


def test_each_holder_has_an_epoch_of_its_own(store):
    epochs = []
    for _ in range(3):
        with lease.hold(store, "answers") as found:
            found.check()
            epochs.append(found.epoch)
            assert held(store)["holder"] == found.holder
        assert "holder" not in held(store)
    assert epochs == [epochs[0] + more for more in range(3)]


def test_leases_of_other_names_are_others(store):
    with lease.hold(store, "answers") as one, lease.hold(store, "else") as other:
        assert {one.name, other.name} == {"answers", "else"}


def test_a_second_one_is_told_who_has_it_and_waits(store):
    got, told, epochs = threading.Event(), [], []

    def wait():
        with lease.hold(store, "answers", on_wait=told.append) as second:
            epochs.append(second.epoch)
            got.set()

    with lease.hold(store, "answers") as first:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.wait(0.7)
    thread.join(10)
    assert got.is_set() and epochs == [first.epoch + 1]
    assert len(told) == 1 and told[0].startswith(f"process {held_process()} on ")


def held_process():
    return lease.signs.this_process()["process"]


def test_who_has_waited_long_enough_ends_with_cause_and_remedy(store):
    with (
        lease.hold(store, "answers"),
        pytest.raises(PairmillError, match=r"in use by process \d+ on .*; run this again when"),
        lease.hold(store, "answers", wait_s=0),
    ):
        pass


def test_a_lease_is_renewed_and_one_that_is_not_is_taken(store):
    with lease.hold(store, "answers", life=0.5) as found:
        time.sleep(0.8)
        found.check()
        with pytest.raises(PairmillError), lease.hold(store, "answers", wait_s=0.3):
            pass
    stranger = {"format": 1, "epoch": 7, "holder": "x", "life_ms": 300}
    store.put(KEY, json.dumps(stranger).encode())
    with lease.hold(store, "answers", life=0.5) as found:
        assert found.epoch == 8


def test_the_lease_of_a_killed_process_is_free_at_once(store):
    program = (
        "import os, sys\n"
        "from infra import lease\n"
        "from infra.folder import FolderStore\n"
        "with lease.hold(FolderStore(sys.argv[1]), 'answers'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, store.uri], check=False, timeout=60)
    dead = held(store)
    with lease.hold(store, "answers", wait_s=0) as found:
        assert found.epoch == dead["epoch"] + 1


def test_who_was_overtaken_learns_it_and_leaves_the_other_alone(store):
    with lease.hold(store, "answers") as found:
        other = held(store) | {"holder": "another", "epoch": 2}
        store.put(KEY, json.dumps(other).encode())
        found.renew()
        with pytest.raises(PairmillError, match="another build may have it; run this one again"):
            found.check()
    assert held(store)["holder"] == "another"


def test_a_lease_that_nobody_took_is_good_again_after_an_outage(store, monkeypatch):
    def refused(*given, **named):
        raise StoreError("the disk is full")

    with lease.hold(store, "answers", life=1.0) as found:
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "put", refused)
            found.renewed -= 1.0
            with pytest.raises(PairmillError, match="could not be renewed"):
                found.check()
        found.check()


def test_of_an_event_loop_it_is_as_of_a_thread(store):
    told = []

    async def wait_and_give_up():
        async with lease.hold_async(store, "answers", on_wait=told.append):
            raise AssertionError("two have it")

    async def hold():
        async with lease.hold_async(store, "answers") as first:
            first.check()
            waiting = asyncio.create_task(wait_and_give_up())
            while not told:
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(PairmillError, match="in use by process"):
                async with lease.hold_async(store, "answers", wait_s=0):
                    pass
            return first.epoch

    epoch = asyncio.run(hold())
    assert held(store) == {"format": 1, "epoch": epoch} and len(told) == 1


def test_who_is_cancelled_while_it_takes_the_lease_leaves_none_behind(store, monkeypatch):
    taking, put = threading.Event(), FolderStore.put

    def slow(self, key, data, **conditions):
        taking.set()
        time.sleep(0.2)
        return put(self, key, data, **conditions)

    async def hold():
        async with lease.hold_async(store, "answers"):
            raise AssertionError("it was cancelled")

    async def cancel():
        task = asyncio.create_task(hold())
        await asyncio.to_thread(taking.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(FolderStore, "put", slow)
    asyncio.run(cancel())
    assert "holder" not in held(store) and held(store)["epoch"]


@pytest.mark.parametrize("harm", [FolderStore.delete, lambda store, key: store.put(key, b"{")])
def test_an_epoch_never_comes_twice_even_where_the_object_is_lost(store, harm, monkeypatch):
    with lease.hold(store, "answers") as first:
        pass
    harm(store, KEY)
    monkeypatch.setattr(lease, "LIFE", 0.0)  # how long a damaged one is waited for
    clock = pins.clock(store)
    monkeypatch.setattr(pins, "clock", lambda store: clock + 1)
    with lease.hold(store, "answers", wait_s=0) as second:
        assert second.epoch > first.epoch


CONTENDER = """
import os, sys
from infra import lease
from infra.folder import FolderStore
store, inside, rounds = FolderStore(sys.argv[1]), sys.argv[2], int(sys.argv[3])
lease.TICK = 0.001
for _ in range(rounds):
    with lease.hold(store, "answers") as found:
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        print(found.epoch, flush=True)
        found.check()
        os.remove(inside)
"""


def test_of_processes_that_contend_never_two_have_it(store, tmp_path):
    command = [sys.executable, "-c", CONTENDER, store.uri, str(tmp_path / "inside"), "12"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    epochs = sorted(int(epoch) for out in said for epoch in out.split())
    assert epochs == [*range(epochs[0], epochs[0] + 24)]


def test_in_a_bucket_it_is_as_in_a_folder(moto_endpoint):
    create_bucket(moto_endpoint, "leases")
    where = Location(uri="s3://leases/store", endpoint=moto_endpoint, region="us-east-1")
    store = S3Store(where, "leases", "store/")
    with lease.hold(store, "answers", life=30.0) as first:
        first.renew()
        first.check()
        with pytest.raises(PairmillError), lease.hold(store, "answers", wait_s=0):
            pass
    with lease.hold(store, "answers", wait_s=0) as found:
        assert found.epoch == first.epoch + 1


def test_where_conditions_do_not_hold_a_holder_is_waited_for_too(shared_rclone_endpoint):
    where = Location(uri="s3://corpus/l", endpoint=shared_rclone_endpoint, region="us-east-1")
    store = S3Store(where, "corpus", "l/")
    with lease.hold(store, "answers") as first:
        with (
            pytest.raises(PairmillError, match="in use by"),
            lease.hold(store, "answers", wait_s=0),
        ):
            pass
        store.put(KEY, json.dumps(held(store) | {"holder": "another"}).encode())
        first.renew()
        with pytest.raises(PairmillError, match="another build may have it"):
            first.check()
