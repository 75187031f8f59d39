"""Growing tables: ordered by number, freed of what is forgotten, compacted without a loss."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import growing, tables, tombstones
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.ledger import Ledger
from infra.tables import Table


@pytest.fixture
def ledger(tmp_path):
    return Ledger(FolderStore(str(tmp_path / "store")))


def header(image):
    return {"image_id": image, "bytes": 1, "format": "PNG", "width": 9, "height": 9, "frames": 1}


def add(ledger, *images, free_of=""):
    new = [tables.write(ledger.store, "headers", [header(image)]).shards[0] for image in images]
    return growing.append(ledger, growing.load(ledger, "headers", "fam"), new, free_of)


def held(ledger):
    table = growing.load(ledger, "headers", "fam").table
    return sorted(tables.read(ledger.store, table, ["image_id"])["image_id"].to_pylist())


def forget(store, *images, **more):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=[gone.keyed(image) for image in images], **more)
    return tombstones.load(store)


def records(ledger):
    return [stat.key for stat in ledger.store.list("ledger/describe/headers/")]


def test_a_table_grows_by_numbered_records(ledger):
    assert growing.load(ledger, "headers", "fam").table == Table("headers-fam")
    add(ledger, "a", "b")
    add(ledger, "c")
    assert held(ledger) == ["a", "b", "c"]
    assert [key.split("/")[-1][:8] for key in records(ledger)] == ["00000001", "00000002"]


def test_fewer_shards_under_a_higher_number_hold(ledger):
    before = add(ledger, "a", "b", "c")
    one = tables.write(ledger.store, "headers", [header("d")])
    growing.save(ledger, before, Table("headers-fam", one.shards), "")
    assert held(ledger) == ["d"]


def test_two_builds_that_append_at_once_both_keep_their_rows(ledger):
    before = add(ledger, "a")
    for image in ("b", "c"):
        (new,) = tables.write(ledger.store, "headers", [header(image)]).shards
        growing.append(ledger, before, [new], "")
    assert held(ledger) == ["a", "b", "c"]
    add(ledger, "d")
    assert held(ledger) == ["a", "b", "c", "d"] and len(records(ledger)) == 4


def test_a_build_that_was_overtaken_loses_rows_and_no_more(ledger):
    before = add(ledger, "a")
    add(ledger, "b")
    add(ledger, "c")
    (late,) = tables.write(ledger.store, "headers", [header("x")]).shards
    growing.append(ledger, before, [late], "")
    assert held(ledger) == ["a", "b", "c"]


def test_only_shards_with_forgotten_rows_are_rewritten(ledger):
    add(ledger, "a", "b", "c")
    gone = forget(ledger.store, "b")
    before = growing.load(ledger, "headers", "fam")
    table, removed = growing.clean(ledger.store, before, gone)
    assert removed == [] and set(table.shards) < set(before.table.shards)
    growing.save(ledger, before, table, gone.digest)
    assert held(ledger) == ["a", "c"]
    assert growing.load(ledger, "headers", "fam").free_of == gone.digest


def test_a_table_is_free_only_where_all_of_its_newest_records_are(ledger):
    gone = forget(ledger.store, "b")
    before = add(ledger, "a")
    growing.save(ledger, before, before.table, gone.digest)
    (new,) = tables.write(ledger.store, "headers", [header("b")]).shards
    growing.append(ledger, before, [new], "")
    assert growing.load(ledger, "headers", "fam").free_of == ""


def test_of_a_members_row_hashes_stay_and_of_a_loose_one_less(ledger):
    store = ledger.store
    rows = [
        {"key": key, "member": member, "stamp": "s", "image_id": image}
        for key, member, image in (("t.tar", "1.jpg", "i1"), ("t.tar", "2.jpg", "i2"))
    ] + [{"key": "a.jpg", "member": None, "stamp": "s", "image_id": "i1"}]
    table = tables.write(store, "objects", rows)
    grown = growing.Grown("objects", "fam", 1, Table("objects-fam", table.shards), "")
    gone = forget(store, "i1")
    left, removed = growing.clean(store, grown, gone)
    assert tables.read(store, left, ["member"])["member"].to_pylist() == ["2.jpg"]
    assert [(row["key"], row["id"]) for row in removed] == [
        ("t.tar", gone.keyed("t.tar::1.jpg")),
        (None, gone.keyed("a.jpg")),
    ]
    assert {row["image"] for row in removed} == {gone.keyed("i1")}


def test_vectors_of_captions_go_by_their_own_hashes(ledger):
    store = ledger.store
    rows = tables.vector_rows("caption_id", ["c1", "c2"], np.ones((2, 2)))
    table = Table("texts-fam", (tables.write_shard(store, rows),))
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=["x"], captions=[gone.keyed("c1")])
    grown = growing.Grown("texts", "fam", 1, table, "")
    left, _ = growing.clean(store, grown, tombstones.load(store))
    assert tables.read(store, left, ["caption_id"])["caption_id"].to_pylist() == ["c2"]


def test_compaction_waits_for_a_reason(ledger):
    add(ledger, "a", "b", "c", "d")
    grown = growing.load(ledger, "headers", "fam")
    live = pl.DataFrame({"image_id": ["a", "b"]})
    assert growing.compact(ledger.store, grown, live, 0.5, 9) == grown.table
    assert growing.compact(ledger.store, grown, None, 0.5, 9) == grown.table
    one = growing.compact(ledger.store, grown, live, 0.4, 9)
    assert tables.read(ledger.store, one)["image_id"].to_pylist() == ["a", "b"]
    joined = growing.compact(ledger.store, grown, None, 0.5, 3)
    assert (len(joined.shards), joined.rows) == (1, 4)


def test_where_all_rows_are_wanted_large_shards_stay_and_rows_keep_their_order(ledger, monkeypatch):
    for names in (["a"], ["b"], [f"large {n}" for n in range(200)], ["c"], ["d"]):
        rows = tables.write(ledger.store, "headers", [header(name) for name in names])
        growing.append(ledger, growing.load(ledger, "headers", "fam"), rows.shards, "")
    before = growing.load(ledger, "headers", "fam")
    monkeypatch.setattr(growing, "SMALL", before.table.shards[2].bytes)
    table = growing.compact(ledger.store, before, None, 1.0, 3)
    assert [shard.rows for shard in table.shards] == [2, 200, 2]
    assert table.shards[1] == before.table.shards[2]
    assert tables.read(ledger.store, table) == tables.read(ledger.store, before.table)


def test_of_responses_a_number_is_given_once_and_who_is_overtaken_learns_it(ledger):
    before = growing.load(ledger, "responses", "all")
    (mine,), (other,) = (
        tables.write(ledger.store, "responses", [{"key": key, "images": [], "captions": []}]).shards
        for key in ("mine", "other")
    )
    growing.append(ledger, before, [other], "")
    with pytest.raises(PairmillError, match="another process has changed the table of responses"):
        growing.append(ledger, before, [mine], "")
    after = growing.append(ledger, growing.load(ledger, "responses", "all"), [mine], "")
    assert after.table.shards == (other, mine)
    ledger.store.delete("ledger/describe/responses/all/00000001-only.json")  # as garbage
    with pytest.raises(PairmillError, match="nothing is lost, run this again"):
        growing.append(ledger, before, [mine], "")
    assert growing.load(ledger, "responses", "all") == after


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.sampled_from("abcdefgh"), min_size=1)),
        st.tuples(st.just("forget"), st.sampled_from("abcdefgh").map(lambda x: {x})),
        st.tuples(st.just("compact"), st.sets(st.sampled_from("abcdefgh"))),
        st.tuples(st.just("die"), st.sets(st.sampled_from("abcdefgh"))),
    ),
    max_size=10,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_neither_compaction_nor_a_death_in_it_loses_or_brings_back_anything(
    tmp_path_factory, steps
):
    ledger = Ledger(FolderStore(str(tmp_path_factory.mktemp("walk"))))
    expected: set[str] = set()
    gone: set[str] = set()
    for step, images in steps:
        tombs = tombstones.open_for_writing(ledger.store)
        if step == "add":
            add(ledger, *sorted(images - gone), free_of=tombs.digest)
            expected |= images - gone
        elif step == "forget":
            gone |= images
            tombs = forget(ledger.store, *images)
            before = growing.load(ledger, "headers", "fam")
            table, _ = growing.clean(ledger.store, before, tombs)
            growing.save(ledger, before, table, tombs.digest)
            expected -= images
        else:
            before = growing.load(ledger, "headers", "fam")
            live = pl.DataFrame({"image_id": sorted(images)}, {"image_id": pl.String})
            table = growing.compact(ledger.store, before, live, 0.01, 100)
            if step == "compact" and table != before.table:
                growing.save(ledger, before, table, before.free_of)
                expected &= images
        assert set(held(ledger)) == expected
