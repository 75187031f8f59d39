"""Pins: seen while their build lives, renewed, dead with their process, and waited for."""

import json
import subprocess
import sys
import threading
import time

import pytest

from infra import pins
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.store import StoreError


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


def keys(store, prefix=pins.PREFIX):
    return [stat.key for stat in store.list(prefix)]


def test_a_pin_is_there_for_the_length_of_a_build(store):
    with pins.hold(store) as pin:
        (held,) = pins.held(store)
        assert (held.key, held.saw, held.life) == (pin.key, 0, pins.LIFE)
        assert pins.held(store, apart_from=pin.key) == []
        pin.check()
    assert keys(store) == [] and pins.held(store) == []


def test_a_pin_says_which_list_of_garbage_its_build_knew(store):
    store.put(pins.MARKS, b'{"generation": 7, "garbage": {}}')
    with pins.hold(store):
        assert [held.saw for held in pins.held(store)] == [7]


def test_a_pin_is_renewed_and_one_that_is_not_dies(store):
    with pins.hold(store, life=0.5) as pin:
        time.sleep(0.9)
        assert len(pins.held(store)) == 1
        pin.check()
    stranger = {"format": 1, "saw": 0, "life_ms": 300}
    store.put("pins/stranger.json", json.dumps(stranger).encode())
    assert len(pins.held(store)) == 1
    time.sleep(0.4)
    assert pins.held(store) == [] and keys(store) == []


def test_a_build_whose_pin_lapsed_does_not_go_on(store):
    pin = pins.Pin(store, "pins/x.json", 0.2, 0)
    pin.renew()
    time.sleep(0.2)
    with pytest.raises(PairmillError, match="could not be renewed"):
        pin.check()
    pin.renew()
    with pytest.raises(PairmillError, match="run it again"):
        pin.check()


def test_the_pin_of_a_killed_process_is_dead_at_once(store):
    program = (
        "import os, sys\n"
        "from infra import pins\n"
        "from infra.folder import FolderStore\n"
        "with pins.hold(FolderStore(sys.argv[1])):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, store.uri], check=False, timeout=60)
    assert len(keys(store)) == 1
    assert pins.held(store) == []


def test_a_damaged_pin_counts_as_one_that_saw_nothing(store):
    store.put("pins/broken.json", b"{")
    assert [held.saw for held in pins.held(store)] == [-1]


def test_of_one_who_wants_to_be_alone_and_one_who_begins_one_sees_the_other(store):
    with pins.hold(store) as pin:
        with pins.alone(store) as is_alone:
            assert not is_alone()
        with pins.alone(store, own=pin.key) as is_alone:
            assert is_alone()
    began = threading.Event()

    def begin():
        with pins.hold(store):
            began.set()

    with pins.alone(store) as is_alone:
        assert is_alone()
        thread = threading.Thread(target=begin)
        thread.start()
        assert not began.wait(0.5)
    thread.join(10)
    assert began.is_set()


def test_a_sign_without_life_holds_nobody_up_for_ever(store, monkeypatch):
    monkeypatch.setattr(pins, "ALONE_SECONDS", 0.3)
    store.put(pins.ALONE, b"left by a dead process")
    with pins.hold(store):
        pass


def refused(*given, **named):
    raise StoreError("the disk is full")


def test_who_can_not_renew_the_sign_is_alone_no_more(store, monkeypatch):
    monkeypatch.setattr(pins, "ALONE_SECONDS", 0.5)
    with pins.alone(store) as is_alone:
        time.sleep(0.7)
        assert is_alone()
        monkeypatch.setattr(FolderStore, "put", refused)
        time.sleep(0.7)
        assert not is_alone()
        monkeypatch.undo()


def test_the_sign_of_a_dead_sweep_holds_one_writer_up_once(store, monkeypatch):
    monkeypatch.setattr(pins, "WAIT_SECONDS", 0.1)
    store.put(f"{pins.SWEEPING}dead.json", b'{"keys": ["data/a"]}')
    pins.put(store, "data/a", b"x")
    assert keys(store, pins.SWEEPING) == [] and store.get("data/a") == b"x"


def test_who_writes_what_is_being_swept_writes_it_again(store):
    sign = f"{pins.SWEEPING}x.json"
    store.put(sign, json.dumps({"keys": ["data/a"]}).encode())
    pins.put(store, "data/b", b"at once")

    def sweep():
        time.sleep(0.4)
        store.delete("data/a")
        store.delete(sign)

    thread = threading.Thread(target=sweep)
    thread.start()
    pins.put(store, "data/a", b"after the sweep")
    thread.join()
    assert store.get("data/a") == b"after the sweep"
