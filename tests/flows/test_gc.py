"""Builds and garbage collection at once, and what of earlier versions stays."""

import json
import shutil
import threading
import time

import pytest
import yaml

from flows.config import load_config
from infra import growing, pins
from infra.errors import PairmillError
from tasks.tidy import collect
from tests.flows.place import Place, pictures


def changed(place, **sections):
    """The place under a config with other sections."""
    data = yaml.safe_load(place.config_file.read_text("utf-8"))
    return Place(place.folder, **{"labels": data["labels"], **sections})


def versions(place):
    folder = place.folder / "store/datasets/few"
    return sorted(int(p.parent.name[1:]) for p in folder.glob("v*/manifest.json"))


def night(place):
    """A build; once more where this machine was too busy to renew its pin in time."""
    try:
        return place.build()
    except PairmillError as error:
        assert "could not be renewed" in str(error)
        return night(place)


def objects(place):
    return {stat.key for stat in place.store.list() if stat.key.startswith(("data/", "ledger/"))}


def test_builds_end_right_while_garbage_is_collected_all_the_time(place, tmp_path):
    """The corpus goes to and fro between two states, so what was garbage is wanted again."""
    place = changed(place, tidy={"pin_minutes": 3 / 60, "keep_builds": 1})
    params = load_config(place.config_file).tidy
    away = [place.corpus / row["file_name"] for row in pictures()[10:14]]
    ended, reports, digests = threading.Event(), [], []

    def gc():
        while not ended.is_set():
            reports.append(collect(place.store, params, dry_run=False)[1])
            time.sleep(0.02)

    collector = threading.Thread(target=gc)
    collector.start()
    try:
        for turn in range(4):
            for path in away:
                if turn % 2:
                    shutil.move(tmp_path / path.name, path)
                else:
                    shutil.move(path, tmp_path / path.name)
            digests.append(night(place)["digest"])
            time.sleep(0.3)
    finally:
        ended.set()
        collector.join()
    assert len(set(digests)) == 2 and digests[:2] * 2 == digests
    assert reports
    assert night(place)["digest"] == digests[1]


def test_a_store_does_not_grow_when_the_corpus_goes_to_and_fro(place, monkeypatch):
    place = changed(place, tidy={"keep_builds": 1})
    path = place.corpus / pictures()[10]["file_name"]
    data, sizes = path.read_bytes(), []
    for turn in range(6):
        night = time.time() + turn * 86_400
        monkeypatch.setattr(pins, "clock", lambda store, night=night: night)
        if turn % 2:
            path.write_bytes(data)
        else:
            path.unlink()
        place.build(**{"publish.keep_versions": 1})
        sizes.append(len(objects(place)))
    assert sizes[5] <= sizes[3] + 4 and versions(place) == [7]


def test_old_versions_go_and_never_the_latest(place):
    for targets in (1, 2, 3):
        result = place.build(**{"pairs.targets": targets, "publish.keep_versions": 2})
    assert versions(place) == [3, 4] and result["tidied"]["retired"] == 1
    place.build(**{"pairs.targets": 3, "publish.keep_versions": 1})
    assert versions(place) == [4]
    gone = place.folder / "store/datasets/few/v000002"
    assert not gone.exists()


def test_a_retention_that_dies_in_the_middle_is_finished_by_the_next_build(place, monkeypatch):
    from infra.folder import FolderStore

    place.build(**{"pairs.targets": 1})
    delete = FolderStore.delete

    def dies(self, key):
        delete(self, key)
        if key.endswith("manifest.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "delete", dies)
    with pytest.raises(KeyboardInterrupt):
        place.build(**{"pairs.targets": 2, "publish.keep_versions": 2})
    monkeypatch.undo()
    old = place.folder / "store/datasets/few/v000001"
    assert versions(place) == [2, 3] and old.exists()
    place.build(**{"pairs.targets": 3, "publish.keep_versions": 2})
    assert versions(place) == [3, 4] and not old.exists()


def test_a_build_notes_what_it_used_and_leaves_no_pin(place):
    (*_, last) = place.store.list("builds/few/")
    noted = json.loads(place.store.get(last.key))
    stages = {path.split("/")[1] for path in noted["records"]}
    assert {"deduplicate", "find_neighbours", "mine_pairs", "label_pairs"} <= stages
    assert [*place.store.list(pins.PREFIX)] == []


def test_rows_of_files_that_are_no_more_are_compacted_away(place):
    for path in list(place.corpus.rglob("*.png")):
        path.rename(path.with_name(f"new {path.name}"))
    renamed = place.build(**{"tidy.superseded": 0.9})
    assert renamed["work"]["images_decoded"] == 0
    before = set(growing.objects(place.store)["key"])
    assert any(key.endswith("/new 000000090.png") for key in before) and "twin.png" in before
    kept = place.build(**{"tidy.superseded": 0.1, "pairs.targets": 1})
    after = set(growing.objects(place.store).filter(family=mine(place))["key"])
    assert "new twin.png" in after and "twin.png" not in after
    again = place.build(**{"pairs.targets": 1})
    assert not again["fresh"] and again["digest"] == kept["digest"]


def mine(place):
    """The family of the place's own corpus: the store also holds that of the first night."""
    rows = growing.objects(place.store)
    (family,) = set(rows.filter(key="new twin.png")["family"])
    return family


def test_what_was_forgotten_waits_for_a_build_that_is_at_work(place):
    key = pictures()[5]["file_name"]
    place.forget(key)
    with pins.hold(place.store):
        (waits,) = place.build()["tidied"]["waits"]
        assert "another build is at work" in waits
        assert any("/v000001/" not in held for held in place.holding(key))
    assert place.build()["tidied"]["waits"] == ()
    assert all("/v000001/" in held for held in place.holding(key))
