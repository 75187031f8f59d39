"""Forgetting, on real pictures: what was forgotten is in nothing that the next build leaves."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from flows.forget import read_names
from infra import pins, tombstones
from infra.errors import PairmillError
from infra.folder import FolderStore
from tests.flows.place import Place, pictures
from tests.infra.conftest import aws_environment, create_bucket, moto_endpoint  # noqa: F401


def test_what_is_forgotten_is_nowhere_after_the_next_build(place):
    row = pictures()[5]
    image = place.image(row["file_name"])
    said = place.forget(row["file_name"])
    assert said[0] == f"image {image}: {row['file_name']}"
    assert said[-1] == "images forgotten from the next build on: 1"
    assert place.forget(image)[-1] == "all of this was forgotten before; nothing to record"
    assert len(place.verify()) > 10
    result = place.build()
    assert result["fates"]["forgotten"] == 1 and result["version"] == 2
    assert sum(result["fates"].values()) == result["work"]["objects_listed"]
    assert result["work"]["images_decoded"] == result["work"]["images_embedded"] == 0
    needles = (image, row["file_name"], row["caption"])
    left = place.holding(*needles)
    assert left and all(key.startswith("datasets/few/v000001/") for key in left)
    assert set(place.verify()) == left - {"datasets/few/v000001/README.md"}
    levels = place.fates(2).filter(pl.col("fate") == "forgotten")["level"]
    assert sorted(levels) == ["image", "object"]
    again = place.build()
    assert not again["fresh"] and again["work"]["labels_requested"] == 0
    assert place.forget(image, purge=True)[-1] == "few: version 1 is withdrawn"
    assert place.holding(*needles) == set() and place.verify() == []
    told = json.loads((place.folder / "store/datasets/few/v000001/withdrawn.json").read_text())
    assert (told["version"], told["reason"]) == (1, "it held images that were forgotten")


def test_near_duplicates_and_twins_of_the_same_bytes_are_forgotten_too(place):
    first, second = (row["file_name"] for row in pictures()[:2])
    assert any("near-duplicate of" in line and "copy.jpg" in line for line in place.forget(first))
    (said, _) = place.forget(second)
    names = said.partition(": ")[2].split(", ")
    assert {second, "twin.png"} < set(names)
    assert place.build()["fates"]["forgotten"] == 2 + len(names)
    for name in ("copy.jpg", first, *names):
        assert all("/v000001/" in key for key in place.holding(name))


def test_exactly_these_bytes_leave_their_place_to_a_copy(place):
    assert len(place.forget(pictures()[0]["file_name"], exact=True)) == 2
    place.build()
    (fate,) = place.fates(2).filter(pl.col("id") == "copy.jpg")["fate"]
    assert fate in ("paired", "unpaired", "low_clip_score")
    assert place.build()["fates"]["forgotten"] == 1


def test_the_same_bytes_under_another_name_are_read_once_and_never_described(place, monkeypatch):
    key = pictures()[7]["file_name"]
    data = (place.corpus / key).read_bytes()
    place.forget(key)
    place.build()
    (place.corpus / "back again.png").write_bytes(data)
    result = place.build()
    assert result["fates"]["forgotten"] == 2 and result["work"]["images_decoded"] == 0
    assert place.holding("back again") == set()
    read = []
    monkeypatch.setattr("infra.corpus._loose", lambda *given: read.append(given))
    assert place.build()["fates"]["forgotten"] == 2 and not read


def test_a_forgotten_file_that_is_written_anew_leaves_no_trace_of_its_captions(place):
    row = pictures()[2]  # it has a caption in the file of captions, and one beside it
    place.forget(row["file_name"], purge=True)
    place.build()
    for turn in range(2):
        path = place.corpus / row["file_name"]
        path.write_bytes(path.read_bytes())
        (place.corpus / f"back {turn}.jpg").write_bytes(path.read_bytes())
        assert place.build()["fates"]["forgotten"] == 3 + turn
    name, caption = row["file_name"].partition(".")[0], row["caption"] or "words"
    needles = (f"{name}.", caption, "words beside it", "back 1")
    assert place.holding(*needles) == set() and place.verify() == []


def test_members_of_a_tar_go_with_their_captions_and_the_others_stay(place, monkeypatch):
    name = next(
        i for i in place.fates(1)["id"] if i.startswith("packed.tar::2.") and "txt" not in i
    )
    image = place.image(name)
    place.forget(name)
    read = []
    monkeypatch.setattr("infra.corpus._tar", lambda *given: read.append(given))
    result = place.build()
    assert result["fates"]["forgotten"] == 2 and not read
    assert result["fates"]["metadata"] == 1 + 1 + 5
    for needle in (image, "words of member 2", "::2."):
        assert all("/v000001/" in key for key in place.holding(needle))
    assert not place.build()["fresh"]
    monkeypatch.undo()
    (place.corpus / "packed.tar").touch()
    assert not place.build()["fresh"]
    (place.corpus / "packed.tar").rename(place.corpus / "moved.tar")
    result = place.build()
    assert result["fates"]["forgotten"] == 2 and result["work"]["images_decoded"] == 0


def test_a_prefix_takes_a_whole_tar_and_its_name(place):
    place.forget(prefix="packed")
    result = place.build()
    assert result["fates"]["forgotten"] == 1
    assert all("/v000001/" in key for key in place.holding("packed.tar"))
    assert not place.build()["fresh"]


def test_a_caption_beside_a_picture_goes_with_it(place):
    key = pictures()[2]["file_name"]
    beside = str(Path(key).with_suffix(".txt"))
    place.forget(key)
    assert place.build()["fates"]["forgotten"] == 2
    for needle in (beside, "words beside it"):
        assert all("/v000001/" in held for held in place.holding(needle))


def test_a_name_that_stands_for_other_bytes_is_innocent(place):
    row = pictures()[9]
    key = row["file_name"]
    place.forget(key)
    place.build()
    Image.radial_gradient("L").resize((300, 200)).save(place.corpus / key)
    result = place.build()
    assert result["fates"]["forgotten"] == 0 and result["work"]["images_decoded"] == 1
    assert place.build()["fates"]["forgotten"] == 0
    assert place.image(key, 3) in {row["id"] for row in place.fates(3).to_dicts()}
    assert place.verify() and all("/v000001/" in held for held in place.verify())


def test_forgetting_can_be_taken_back_by_deleting_the_tombstones(place):
    key = pictures()[7]["file_name"]
    digest = place.build()["digest"]
    place.forget(key)
    assert place.build()["digest"] != digest
    for stat in list(place.store.list(tombstones.PREFIX)):
        if stat.key != tombstones.SECRET:
            place.store.delete(stat.key)
    result = place.build()
    assert result["fates"]["forgotten"] == 0 and result["digest"] == digest


def test_a_build_at_work_while_something_is_forgotten_publishes_nothing(place, monkeypatch):
    import flows.build

    check = flows.build.check_forgotten

    def forget_first(build: Any) -> None:
        place.forget(pictures()[3]["file_name"])
        check(build)

    monkeypatch.setattr("flows.build.check_forgotten", forget_first)
    with pytest.raises(PairmillError, match="were forgotten while this build ran"):
        place.build(**{"pairs.targets": 1})
    monkeypatch.undo()
    assert place.build()["fates"]["forgotten"] == 1


def test_a_damaged_tombstone_stops_every_build(place):
    place.forget(pictures()[3]["file_name"])
    (name,) = (s.key for s in place.store.list(tombstones.PREFIX) if s.key != tombstones.SECRET)
    body = place.store.get(name)
    place.store.put(name, body.replace(b'"images":["', b'"images":["0'))
    with pytest.raises(PairmillError, match="damaged"):
        place.build()
    place.store.put(name, body)
    place.store.delete(tombstones.SECRET)
    with pytest.raises(PairmillError, match="secret is missing"):
        place.build()


def test_what_means_nothing_is_refused_and_nothing_is_recorded(place, tmp_path):
    known = pictures()[3]["file_name"]
    for names, prefix, said in [
        (["no such key"], None, "unknown, the first 'no such key'"),
        (["a\x00b\x1b[31m"], None, "unknown"),
        (["*"], None, "unknown"),
        (["0" * 63], None, "unknown"),
        ([known, "x" * 5000], None, "1 unknown"),
        ([], None, "nothing is named"),
        ([], "nowhere/", "begins with 'nowhere/'"),
        ([], "", "would forget .*; say --yes"),
    ]:
        with pytest.raises(PairmillError, match=said):
            place.forget(*names, prefix=prefix)
    assert not tombstones.load(place.store)
    assert place.forget("0" * 64)[0].endswith("not seen so far; it will not come in")
    file = tmp_path / "ids.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PairmillError, match="UTF-8"):
        read_names([str(file)])
    file.write_text(f"{known}\n\ntwin.png\n")
    assert read_names([str(file)]) == [known, "twin.png"]


def test_the_commands_say_and_return_what_they_found(place):
    run = CliRunner().invoke
    where = ["-c", str(place.config_file)]
    nothing = run(app, ["verify-absent", *where])
    assert (nothing.exit_code, nothing.stdout) == (0, "nothing is forgotten in this store\n")
    key = pictures()[4]["file_name"]
    assert run(app, ["forget", "who?", *where]).exit_code == 1
    done = run(app, ["forget", key, *where])
    assert done.exit_code == 0 and key in done.stdout
    found = run(app, ["verify-absent", *where])
    assert found.exit_code == 1 and "run a build" in found.stdout and "out of reach" in found.stdout
    removed = run(app, ["gc", *where])
    assert removed.exit_code == 0 and "could hold what was forgotten" in removed.stdout
    place.build()
    assert run(app, ["forget", key, "--purge", *where]).exit_code == 0
    done = run(app, ["verify-absent", *where])
    assert done.exit_code == 0, done.stdout


KEEPERS = ("pin", "alone", "lease")  # threads that keep a sign of life


class Died(BaseException):
    """What `kill -9` would be, as far as one process can try it on itself."""


@pytest.mark.parametrize("at", [60, 100])
def test_wherever_the_build_dies_that_forgets_the_next_one_ends_it(at, place, monkeypatch):
    key = pictures()[5]["file_name"]
    image = place.image(key)
    place.forget(key, prefix="packed", purge=True)
    # Signs of this process look alive to the next build, so it waits until they are old.
    monkeypatch.setattr(pins, "ALONE_SECONDS", 0.5)
    monkeypatch.setattr(pins, "WAIT_SECONDS", 0.5)
    put, delete, count = FolderStore.put, FolderStore.delete, [0]

    def dying(write):
        def call(store, name, *given, **named):
            if threading.current_thread().name not in KEEPERS:
                count[0] += 1
                if count[0] > at:
                    raise Died
            return write(store, name, *given, **named)

        return call

    monkeypatch.setattr(FolderStore, "put", dying(put))
    monkeypatch.setattr(FolderStore, "delete", dying(delete))
    with pytest.raises(Died):
        place.build()
    monkeypatch.setattr(FolderStore, "put", put)
    monkeypatch.setattr(FolderStore, "delete", delete)
    for stat in place.store.list(pins.PREFIX):
        place.store.delete(stat.key)
    place.store.delete("leases/responses.json")  # its process lives, since it is this one
    result = place.build()
    assert result["fates"]["forgotten"] == 2
    assert place.holding(image, key, "packed.tar") == set() and place.verify() == []


def test_in_a_bucket_it_is_as_in_a_folder(first_night, tmp_path, moto_endpoint):  # noqa: F811
    create_bucket(moto_endpoint, "forgetting")
    shutil.copytree(first_night / "corpus", tmp_path / "corpus")
    where = {"uri": "s3://forgetting/store", "endpoint": moto_endpoint, "region": "us-east-1"}
    place = Place(tmp_path, store=where)
    key = pictures()[5]["file_name"]
    assert place.build()["version"] == 1
    place.forget(key, purge=True)
    assert place.build()["fates"]["forgotten"] == 1
    assert place.holding(key) == set() and place.verify() == []
    assert not place.build()["fresh"]
