"""Paid answers in a store: forgotten with their images, never garbage, saved from damage."""

from contextlib import suppress

import pytest

from flows.absent import Remains, verify_absent
from flows.verify_store import Damaged, verify_store
from infra import garbage, lease, pins, responses, tables, tombstones
from infra.batches import Intent, Line, unfinished
from infra.captions import caption_id
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.responses import look
from infra.store import Location, open_store
from tasks.tidy import remove_forgotten
from tests.answers import answer, kept, key, segment
from tests.flows.place import pictures
from tests.infra.conftest import aws_environment, create_bucket, moto_endpoint  # noqa: F401

ALICE, BOB, EVE = (key(name) for name in ("alice", "bob", "eve"))
WORDS = "a portrait of Alice"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.01)


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


def filled(store):
    """Answers of two processes, the later of which died; half of them are about Alice."""
    kept(
        store,
        answer("1", images=(ALICE, BOB)),
        answer("2", images=(BOB, EVE)),
        answer("3", images=(), captions=(caption_id(WORDS),)),
    )
    dead = segment(store, 1, 9, answer("4", images=(EVE, ALICE)), answer("5", images=(EVE,)))
    gone = tombstones.open_for_writing(store)
    tombstones.add(
        store, gone, images=[gone.keyed(ALICE)], captions=[gone.keyed(caption_id(WORDS))]
    )
    return dead, tombstones.load(store)


def told(store):
    """What still holds something forgotten, as `pairmill verify-absent` says it."""
    said = []
    with suppress(Remains):
        said.extend(verify_absent(store))
    return [line for line in said if line.startswith(("data/", "responses/"))]


def test_answers_about_what_is_forgotten_go_and_nobody_pays_for_others_again(store):
    dead, gone = filled(store)
    (shard,) = look(store).grown.table.shards
    assert told(store) == [
        f"{tables.shard_key(shard.sha256)}: 1 captions, 1 images; run a build, whose end removes "
        "it, or `pairmill gc`",
        f"{dead}: 1 images; run a build, whose end removes it, or `pairmill gc`",
    ]
    assert remove_forgotten(store, gone)
    assert told(store) == []
    view = look(store)
    found = {name: view.get(key(name)) for name in "12345"}
    assert found == dict.fromkeys("134") | {
        "2": answer("2", images=(BOB, EVE)),
        "5": answer("5", images=(EVE,)),
    }


def test_in_a_bucket_it_is_as_in_a_folder(moto_endpoint):  # noqa: F811
    create_bucket(moto_endpoint, "answers")
    where = Location(uri="s3://answers/store", endpoint=moto_endpoint, region="us-east-1")
    store = open_store(where)
    _, gone = filled(store)
    assert remove_forgotten(store, gone) and told(store) == []
    view = look(store)
    assert [key(name) in view for name in "12345"] == [False, True, False, False, True]


def test_who_adds_answers_without_a_sign_of_life_is_not_disturbed(store, monkeypatch):
    _, gone = filled(store)
    monkeypatch.setattr(responses, "LIFE", 0.1)
    with lease.hold(store, responses.LEASE), pytest.raises(PairmillError, match="in use by"):
        remove_forgotten(store, gone)
    assert told(store)


def test_answers_are_never_garbage(store):
    dead, _ = filled(store)
    for _ in range(4):
        garbage.collect(store, kept=1, life=0.0)
    assert [key(name) in look(store) for name in "12345"] == [True] * 5
    assert store.get(dead) and store.get("leases/responses.json")


def test_a_store_without_answers_gets_no_lease(store):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=[gone.keyed(ALICE)])
    assert remove_forgotten(store, tombstones.load(store)) == 0
    assert not list(store.list("leases/"))


def flip(store, name, at):
    data = bytearray(store.get(name))
    data[at] ^= 1
    store.put(name, bytes(data))


def repaired(store):
    with pytest.raises(Damaged):
        list(verify_store(store))
    said = list(verify_store(store, repair=True))
    assert list(verify_store(store))[-1].endswith("nothing damaged or missing")
    return said


def test_of_a_damaged_segment_the_rest_is_saved(store):
    dead, _ = filled(store)
    flip(store, dead, store.get(dead).index(b'"text":"yes"') + 9)
    assert repaired(store) == [
        f"damaged answers  {dead}: 1 of 2 can't be read",
        "2 objects checked, 1 damaged or missing",
        f"{dead}: 1 answers are left",
        "removed 0 records and 0 objects; the next build does their work again",
    ]
    assert [key(name) in look(store) for name in "45"] == [False, True]


def test_a_damaged_shard_of_answers_says_what_it_costs(store):
    filled(store)
    (shard,) = look(store).grown.table.shards
    flip(store, tables.shard_key(shard.sha256), 100)
    assert "3 paid answers are lost; what asks for them again pays again" in repaired(store)
    assert [key(name) in look(store) for name in "12345"] == [False] * 3 + [True] * 2


def test_a_damaged_record_of_answers_loses_none_but_what_is_forgotten(store):
    filled(store)
    for stat in list(store.list(responses.RECORDS)):
        store.put(stat.key, b"{")
    assert "1 paid answers are found again" in repaired(store)
    view = look(store)
    assert [key(name) in view for name in "12345"] == [False, True, False, True, True]


def test_answers_are_left_alone_while_a_build_is_at_work(store):
    dead, gone = filled(store)
    with pins.hold(store):
        assert remove_forgotten(store, gone) is None
    assert store.get(dead) and told(store)


def test_a_batch_under_way_forgets_too_and_waits_for_the_others(store):
    _, gone = filled(store)
    lines = [Line(key(str(n)), 0, (of, EVE), (), "test") for n, of in enumerate((ALICE, BOB))]
    intent = Intent(id="b" * 32, url="http://localhost/v1", created=1, lines=tuple(lines))
    store.put(intent.place, intent.model_dump_json().encode())
    assert any(line.startswith(intent.place) for line in told(store))
    assert remove_forgotten(store, gone) is not None
    assert told(store) == []
    assert [left.lines for left in unfinished(store)] == [(lines[1],)]


def without_labels(place):
    """The store as it would be had no stage of labels ever ended."""
    for stat in list(place.store.list("ledger/label_pairs/")):
        place.store.delete(stat.key)


def test_nobody_pays_again_whatever_became_of_labels_or_neighbours(place, pairmill):
    without_labels(place)
    result = place.build(dataset="another")
    assert result["work"]["labels_requested"] == place.server.calls == 0
    place.forget(pictures()[5]["file_name"], purge=True)
    place.build()
    without_labels(place)
    result = place.build(dataset="another")
    assert result["fates"]["forgotten"] == 1 and result["work"]["labels_requested"] == 0
    assert set(place.server.paid.values()) <= {1} and told(place.store) == []
    fates = place.fates_of_latest()
    pairs = [row["id"] for row in fates if row["level"] == "pair"]
    said = pairmill("why", pairs[0], "-c", place.config_file).out
    assert said.count("  asked        label_pairs, request ") == 2  # pictures, then instructions
    assert ": answered, test, " in said
