"""Paid answers: kept when `add` returns, found again by anybody, in order, moved without a loss."""

import asyncio
import json

import pytest

from infra import answer_index, growing, lease, responses, tables, tombstones
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.responses import SEGMENTS, look, open_responses
from infra.segments import DamagedSegment
from infra.store import Outage, StoreError
from tests.answers import answer, kept, key, segment
from tests.stores import READS, NotingStore


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits two seconds for a test."""
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.01)


def segments(store):
    return [stat.key for stat in store.list(SEGMENTS)]


def shards(store):
    return growing.load(responses.Ledger(store), "responses", "all").table.shards


def test_an_answer_is_found_by_whoever_asks_again(store):
    assert look(store).get(key("a")) is None
    one, two = answer("a"), answer("b", "no", captions=("c",))
    assert kept(store, one, two) == [one, two]
    view = look(store)
    assert (view.get(one.key, 0), view.get(two.key, 0), view.count) == (one, two, 2)
    assert one.key in view and key("c") not in view and view.get(key("c")) is None
    assert segments(store) == [] and len(shards(store)) == 1


def test_add_returns_when_the_answer_is_stored(store):
    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened:
                adding = asyncio.create_task(opened.add(answer("a")))
                await asyncio.sleep(0)
                assert opened.get(key("a")) is None
                await adding
                assert opened.get(key("a")) == look(store).get(key("a")) == answer("a")
                return segments(store), held.epoch

    names, epoch = asyncio.run(add())
    assert names == [f"{SEGMENTS}{epoch:08d}-00000001.jsonl"]


def test_sixty_four_answers_make_a_segment_at_once(store, monkeypatch):
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 60.0)

    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened:
                adding = [opened.add(answer(number)) for number in range(64)]
                await asyncio.wait_for(asyncio.gather(*adding), 20)
                assert len(segments(store)) == 1
                last = asyncio.create_task(opened.add(answer("late")))
                await asyncio.sleep(0)
        assert (await last) == answer("late")  # the end of the block waits for nobody

    asyncio.run(add())
    assert look(store).count == 65


def test_of_two_answers_the_first_holds(store):
    first, second = answer("a", "first"), answer("a", "second")
    segment(store, 2, 1, second)
    segment(store, 1, 9, first)
    assert look(store).get(key("a")) == first
    assert kept(store, second) == [first]
    assert look(store).get(key("a")) == first and look(store).count == 1


def test_two_that_ask_the_same_at_once_share_an_answer(store):
    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened:
                adding = (opened.add(answer("a", text)) for text in ("first", "second"))
                return [one.text for one in await asyncio.gather(*adding)]

    assert asyncio.run(add()) == ["first", "first"]


def test_what_a_dead_process_left_is_moved_into_the_table_in_its_order(store):
    for number in range(1, 6):
        segment(store, 3, number, answer(2 * number), answer(2 * number + 1))
    assert look(store).count == 10
    kept(store)
    assert segments(store) == [] and look(store).count == 10
    (shard,) = shards(store)
    rows = tables.read(store, tables.Table("responses", (shard,)))
    assert rows["key"].to_pylist() == [key(number) for number in range(2, 12)]


def test_a_crash_between_the_record_and_the_segments_leaves_doubles_that_do_no_harm(store):
    kept(store, answer("a"), answer("b"))
    segment(store, 1, 1, answer("a"), answer("b"))
    assert look(store).get(key("a")) == answer("a") and look(store).count == 2
    kept(store, answer("c"))
    assert segments(store) == [] and look(store).count == 3
    assert sum(shard.rows for shard in shards(store)) == 3


def test_segments_that_pile_up_are_moved_while_others_come(store, monkeypatch):
    monkeypatch.setattr(responses, "PILE", 4)
    monkeypatch.setattr(responses, "FLUSH_ANSWERS", 8)
    names = range(400)

    async def add():
        most = 0
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened:
                for at in range(0, 400, 8):
                    await asyncio.gather(*(opened.add(answer(n)) for n in names[at : at + 8]))
                    most = max(most, len(segments(store)))
                    assert all(opened.get(key(n)) == answer(n) for n in names[: at + 8 : 7])
        return most

    assert asyncio.run(add()) < 30
    view = look(store)
    assert [view.get(key(n)) for n in names] == [answer(n) for n in names]


def test_many_small_shards_become_one_and_keep_the_order(store, monkeypatch):
    monkeypatch.setattr(responses, "SMALL_SHARDS", 5)
    for name in range(5):
        kept(store, answer(name))
    assert len(shards(store)) == 5
    kept(store, answer(5))
    (one,) = shards(store)
    rows = tables.read(store, tables.Table("responses", (one,)))
    assert rows["key"].to_pylist() == [key(name) for name in range(6)]


class Full(FolderStore):
    """A folder whose disk is full for segments."""

    def put(self, key, data, **conditions):
        if key.startswith(SEGMENTS):
            raise StoreError("the disk is full: free space")
        return super().put(key, data, **conditions)


def test_an_answer_that_can_not_be_stored_is_no_answer(store):
    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(Full(store.uri), held) as opened:
                adding = (opened.add(answer(name)) for name in "abc")
                found = await asyncio.gather(*adding, return_exceptions=True)
                assert opened.get(key("a")) is None
                return [str(one) for one in found]

    assert asyncio.run(add()) == ["the disk is full: free space"] * 3
    assert look(store).count == 0


class Unsure(FolderStore):
    """A folder behind a connection that breaks after each third record and at each deletion."""

    def put(self, key, data, **conditions):
        etag = super().put(key, data, **conditions)
        if key.startswith(responses.RECORDS) and int(key.split("/")[-1][:8]) % 3 == 1:
            raise Outage("the connection keeps breaking: check the network")
        return etag

    def delete(self, key):
        raise Outage("the connection keeps breaking: check the network")


def test_a_record_that_was_written_though_it_seemed_not_holds_nobody_up(store, monkeypatch):
    monkeypatch.setattr(responses, "PILE", 2)
    monkeypatch.setattr(responses, "FLUSH_ANSWERS", 4)

    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(Unsure(store.uri), held) as opened:
                for at in range(0, 80, 4):
                    await asyncio.gather(*(opened.add(answer(n)) for n in range(at, at + 4)))
                    assert all(opened.get(key(n)) == answer(n) for n in range(at + 4))
                return len(opened._segments)

    assert asyncio.run(add()) < 12
    kept(store)
    assert segments(store) == [] and look(store).count == 80
    assert sum(shard.rows for shard in shards(store)) == 80


def test_who_lost_the_lease_stores_nothing(store):
    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened:
                held.lost = True
                await opened.add(answer("a"))

    with pytest.raises(PairmillError, match="another build may have it; run this one again"):
        asyncio.run(add())
    assert segments(store) == []


def test_a_build_that_fails_keeps_what_it_was_told(store, monkeypatch):
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 60.0)

    async def add():
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held) as opened, asyncio.TaskGroup() as group:
                group.create_task(opened.add(answer("a")))
                await asyncio.sleep(0.01)
                raise KeyError("something else")

    with pytest.raises(ExceptionGroup):
        asyncio.run(add())
    assert len(segments(store)) == 1 and look(store).get(key("a")) == answer("a")


def test_words_that_are_no_unicode_are_kept_as_they_can_be(store):
    (stored,) = kept(store, answer("a", "half \ud83d a smile\u2028\x00"))
    assert stored.text == "half ? a smile\u2028\x00"
    assert look(store).get(key("a")) == stored


def test_where_nothing_is_known_nothing_is_made_up(store):
    bare = answer("a", "")._replace(
        finish_reason=None, input_tokens=None, output_tokens=None, cost=None, images=()
    )
    kept(store, bare)
    assert look(store).get(key("a")) == bare


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_segment_is_told_and_its_other_answers_can_be_saved(store, harm):
    segment(store, 1, 1, *(answer(name) for name in "abc"))
    (name,) = segments(store)
    data = store.get(name)
    at = data.index(b'"text":"yes"') + 9
    harmed = {
        "flip": data[:at] + b"n" + data[at + 1 :],
        "cut": data[: len(data) // 2],
        "empty": b"",
    }
    store.put(name, harmed[harm])
    for use in (look, kept):
        with pytest.raises(DamagedSegment, match=r"paid answers in responses/.* can't be read"):
            use(store)
    count, found = responses.damaged(store)
    assert count == 1 and list(found) == [name] and found[name].endswith("can't be read")
    left = responses.salvage(store, name)
    assert left == {"flip": 2, "cut": 1, "empty": 0}[harm] == look(store).count
    assert responses.damaged(store) == (left > 0, {})


def test_a_segment_of_a_newer_pairmill_is_left_alone(store):
    segment(store, 1, 1, answer("a"))
    (name,) = segments(store)
    head, line = store.get(name).splitlines()
    store.put(name, json.dumps(json.loads(head) | {"format": 2}).encode() + b"\n" + line)
    with pytest.raises(PairmillError, match="has format 2, this Pairmill reads 1"):
        look(store)


def test_what_a_view_knows_is_not_read_again(tmp_path):
    store = NotingStore(str(tmp_path / "store"))
    kept(store, answer("a"))
    kept(store, answer("b"))
    before = look(store)
    assert [before.get(key(name)) for name in "ab"] == [answer("a"), answer("b")]
    kept(store, answer("c"))

    async def ask(before):
        READS.clear()
        with lease.hold(store, responses.LEASE) as held:
            async with open_responses(store, held, before) as opened:
                assert [opened.get(key(name)) for name in "abc"] == [answer(n) for n in "abc"]
        return len({name for name in READS if name.startswith("data/")})

    assert asyncio.run(ask(before)) == 1
    assert asyncio.run(ask(None)) == 3


def test_rows_of_a_large_shard_are_read_by_groups(store, monkeypatch):
    monkeypatch.setattr(answer_index, "WHOLE", 0)
    monkeypatch.setattr(answer_index, "CACHE_BYTES", 1 << 12)
    monkeypatch.setattr(answer_index, "BLOCKS", 2)
    monkeypatch.setitem(tables.GROUPS, "responses", 100)
    kept(store, *map(answer, range(1000)))
    view = look(store)
    assert [view.get(key(n)) for n in range(1000)] == [answer(n) for n in range(1000)]

    async def find():
        found = await asyncio.gather(*(view.find(key(n)) for n in range(1002, 0, -7)))
        return [one.key for one in found if one]

    assert asyncio.run(find()) == [key(n) for n in range(1002, 0, -7) if n < 1000]


def test_answers_about_two_images_are_found_by_them(store):
    kept(store, answer("a"), answer("b", images=("i2", "i1")), answer("c", images=("i1", "i3")))
    segment(store, 9, 1, answer("d"))
    found = [stored.key for stored in look(store).about(["i1", "i2"])]
    assert found == [key("a"), key("b"), key("d")]


def test_a_lost_record_of_the_table_loses_no_answer(store):
    kept(store, answer("a"), answer("b", images=("i3",)))
    kept(store, answer("c"))
    for stat in list(store.list(responses.RECORDS)):
        store.delete(stat.key)
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=[gone.keyed("i3")])
    tables.write(store, "captions", [{"caption_id": "c", "text": "no answer"}])
    assert responses.rescue(store, tombstones.load(store)) == 2
    view = look(store)
    assert [view.get(key(name)) for name in "abc"] == [answer("a"), None, answer("c")]


@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_a_damaged_shard_says_what_it_costs(store, whole, monkeypatch):
    monkeypatch.setattr(answer_index, "WHOLE", whole)
    kept(store, answer("a"))
    (shard,) = shards(store)
    data = bytearray(store.get(tables.shard_key(shard.sha256)))
    data[data.index(key("a").encode()[:9]) if whole else data.index(b"yes")] ^= 1
    store.put(tables.shard_key(shard.sha256), bytes(data))
    with pytest.raises(tables.Damaged, match="which are then paid for again"):
        look(store).get(key("a"))
