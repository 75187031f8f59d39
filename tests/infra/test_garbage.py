"""Garbage collection: two passes, and nothing that a running build found or wrote."""

import hashlib
import json
import threading
import time

import pytest

from infra import garbage, pins
from infra.folder import FolderStore
from infra.ledger import Ledger


@pytest.fixture
def store(tmp_path):
    store = FolderStore(str(tmp_path / "store"))
    store.put("datasets/d/latest.json", b'{"version": 1}')
    return store


def shard(store, text):
    data = text.encode()
    sha = hashlib.sha256(data).hexdigest()
    pins.put(store, f"data/{sha[:2]}/{sha}.parquet", data)
    return sha


def record(store, stage, key, *shas):
    table = {"name": stage, "shards": [[sha, 1, 1] for sha in shas]}
    Ledger(store).write(stage, "fam", key, {"tables": {"rows": table}})
    return f"ledger/{stage}/fam/{key}.json"


def noted(store, *records, tombstones=""):
    garbage.note_build(store, "d", {"records": list(records), "tombstones": tombstones}, kept=2)


def collect(store, **more):
    return garbage.collect(store, kept=2, life=0.0, **more)


def shards(store):
    return {stat.key.split("/")[2][:-8] for stat in store.list("data/")}


def test_what_nothing_names_is_listed_and_then_deleted(store):
    named, lost = shard(store, "named"), shard(store, "lost")
    noted(store, record(store, "search", "k", named))
    first = collect(store)
    assert (first.garbage, first.deleted) == (1, 0) and shards(store) == {named, lost}
    assert collect(store).deleted == 1 and shards(store) == {named}
    assert collect(store).garbage == 0


def test_a_dry_run_changes_nothing(store):
    lost = shard(store, "lost")
    noted(store)
    before = [(s.key, s.etag) for s in store.list() if s.key != pins.CLOCK]
    for _ in range(3):
        assert collect(store, dry_run=True)[:3] == (1, 4, 0)
    assert before == [(s.key, s.etag) for s in store.list() if s.key != pins.CLOCK]
    assert shards(store) == {lost}


def test_the_passes_lie_further_apart_than_a_pin_lives(store):
    shard(store, "lost")
    noted(store)
    collect(store)
    found = garbage.collect(store, kept=2, life=60.0)
    assert found.deleted == 0 and "a pin lives 60 s" in found.waits


def test_a_build_that_began_before_the_list_holds_up_the_second_pass(store):
    shard(store, "lost")
    noted(store)
    with pins.hold(store, life=0.4):
        collect(store)
        time.sleep(0.5)
        found = collect(store)
        assert found.deleted == 0 and "began before" in found.waits
    assert collect(store).deleted == 1


def test_a_build_that_began_after_the_list_holds_up_nothing(store):
    shard(store, "lost")
    noted(store)
    collect(store)
    with pins.hold(store, life=0.4):
        time.sleep(0.5)
        assert collect(store).deleted == 1


def test_what_is_written_again_stays(store):
    lost = shard(store, "lost")
    noted(store)
    collect(store)
    assert shard(store, "lost") == lost
    assert collect(store).deleted == 0 and shards(store) == {lost}


def test_what_a_record_names_again_stays(store):
    lost = shard(store, "lost")
    noted(store)
    collect(store)
    noted(store, record(store, "search", "k", lost))
    assert collect(store).deleted == 0 and shards(store) == {lost}


def test_a_record_goes_first_and_its_shards_a_collection_later(store):
    sha = shard(store, "old")
    path = record(store, "search", "old", sha)
    noted(store)
    collect(store)
    assert collect(store).deleted == 1 and path not in {s.key for s in store.list()}
    assert shards(store) == {sha}
    assert collect(store).deleted == 1 and shards(store) == set()


def test_records_of_the_last_builds_and_the_newest_growing_tables_are_kept(store):
    paths = [record(store, "search", f"k{n}", shard(store, f"{n}")) for n in range(3)]
    for path in paths:
        noted(store, path)
    kept = [path for path in paths if garbage.keeper(store, 2)(path, store.get(path))]
    assert kept == paths[1:]
    for number in (1, 2, 10):
        name = f"{number:08d}-{'0' * 64}"
        Ledger(store).write("describe/looks", "fam", name, {"tables": {}})
    Ledger(store).write("describe", "fam/receipts", "k", {"tables": {}})
    Ledger(store).write("models", "cpu", "k", {"model": []})
    is_kept = garbage.keeper(store, 2)
    found = [s.key for s in store.list("ledger/") if is_kept(s.key, store.get(s.key))]
    assert [key for key in found if "search" not in key] == [
        f"ledger/describe/looks/fam/00000010-{'0' * 64}.json",
        "ledger/models/cpu/k.json",
    ]


def test_a_store_published_before_builds_were_noted_keeps_all_its_stages(store):
    path = record(store, "search", "k", shard(store, "x"))
    assert garbage.keeper(store, 2)(path, store.get(path))
    noted(store)
    assert not garbage.keeper(store, 2)(path, store.get(path))


def test_tables_named_by_the_manifest_of_a_version_stay_as_long_as_it(store):
    sha = shard(store, "objects")
    table = {"name": "objects", "shards": [[sha, 1, 1]]}
    manifest = {"version": 1, "digest": "x", "tables": {"describe": {"objects": table}}}
    store.put("datasets/d/v000001/manifest.json", json.dumps(manifest).encode())
    noted(store)
    for _ in range(3):
        collect(store)
    assert shards(store) == {sha}
    store.delete("datasets/d/v000001/manifest.json")
    assert [collect(store).deleted for _ in range(2)] == [0, 1] and shards(store) == set()


def test_a_damaged_list_of_garbage_is_made_anew(store):
    lost = shard(store, "lost")
    noted(store)
    store.put(pins.MARKS, b"{")
    assert collect(store).deleted == 0 and shards(store) == {lost}
    assert collect(store).deleted == 1


def yes():
    return True


def test_purging_takes_at_once_what_is_not_kept_and_records_first(store, monkeypatch):
    keep, drop = shard(store, "keep"), shard(store, "drop")
    kept = record(store, "search", "keep", keep)
    path = record(store, "search", "drop", drop)
    delete, gone = FolderStore.delete, []

    def dies(self, key):
        if key.startswith("data/"):
            raise KeyboardInterrupt
        gone.append(key)
        delete(self, key)

    def is_kept(path, body):
        return path == kept

    monkeypatch.setattr(FolderStore, "delete", dies)
    with pytest.raises(KeyboardInterrupt):
        garbage.purge(store, is_kept, (), yes)
    monkeypatch.undo()
    assert gone == [path] and shards(store) == {keep, drop}
    assert garbage.purge(store, is_kept, (), yes) == 1 and shards(store) == {keep}


def test_a_purge_ends_where_it_is_alone_no_more(store):
    drop = shard(store, "drop")
    record(store, "search", "drop", drop)
    answers = iter((True, False))
    assert garbage.purge(store, lambda path, body: False, (), lambda: next(answers)) is None
    assert shards(store) == {drop}


def test_builds_and_collections_at_once_lose_nothing(store):
    """Shards come, go and come again all the time; what a build wrote is there at its end."""
    ended = threading.Event()
    reports = []

    def sweep():
        while not ended.is_set():
            reports.append(collect(store))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for turn in range(50):
            with pins.hold(store, life=30):
                written = [shard(store, f"{turn % 3} {part}") for part in range(2)]
                noted(store, record(store, "search", f"{turn % 3}", *written))
                assert shards(store) >= set(written)
            noted(store)
            noted(store)
    finally:
        ended.set()
        sweeper.join()
    # How many come between two builds depends on the machine; what is left goes now.
    reports += [collect(store) for _ in range(3)]
    assert sum(report.deleted for report in reports) > 0
