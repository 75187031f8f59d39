"""The ledger: finished work is found again under its key, and under no other."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import BaseModel, ConfigDict

from infra import tables
from infra.build import WouldRun
from infra.errors import PairmillError
from infra.ledger import Ledger, check_format, family, stage
from infra.store import Location, NotFound, open_store
from infra.tables import Table


class Params(BaseModel):
    model_config = ConfigDict(frozen=True)

    factor: int = 2
    note: str = ""


class Doubled(NamedTuple):
    members: Table
    more: dict[str, Table]


RUNS: list[int] = []


def _double(build, members: Table, params: Params) -> Doubled:
    RUNS.append(params.factor)
    rows = tables.read(build.store, members).to_pylist() * params.factor
    table = tables.write(build.store, "members", rows)
    return Doubled(table, {"same": table})


def make(version: int = 1, **options):
    meaning = options.pop("meaning", lambda params: {"factor": params.factor})
    return stage(version, {"members": ["image_id"]}, meaning, **options)(_double)


@pytest.fixture(autouse=True)
def _no_runs():
    RUNS.clear()


def members(build, *ids: str, shard_rows: int = 10) -> Table:
    rows = [{"image_id": image_id} for image_id in ids]
    return tables.write(build.store, "members", rows, shard_rows)


def test_the_same_work_is_done_once(build):
    double = make()
    first = double(build, members(build, "a", "b"), Params())
    assert double(build, members(build, "a", "b"), params=Params()) == first
    assert RUNS == [2]
    assert (double.stage, double.version, double.reads) == ("_double", 1, {"members": ["image_id"]})


def test_neither_order_nor_shards_nor_idle_parameters_make_it_new(build):
    double = make()
    first = double(build, members(build, "a", "b", "c"), Params())
    again = double(build, members(build, "c", "a", "b", shard_rows=1), Params(note="other"))
    assert again == first and RUNS == [2]


def test_rows_parameters_and_version_do(build):
    make()(build, members(build, "a"), Params())
    make()(build, members(build, "b"), Params())
    make()(build, members(build, "a"), Params(factor=3))
    make(version=2)(build, members(build, "a"), Params())
    assert RUNS == [2, 2, 3, 2]


class Model(BaseModel):
    """Parameters of which only the build knows what they mean."""

    name: str
    digest: str = ""

    def pinned(self, build) -> "Model":
        data = build.store.get(self.name).decode()
        return self.model_copy(update={"digest": data})


class WithModel(Params):
    model: Model | None = None


def test_what_only_the_build_knows_of_a_parameter_is_part_of_its_key(build):
    meaning = {"meaning": lambda params: params}
    params, ids = WithModel(model=Model(name="weights")), members(build, "a")
    for content in (b"one", b"two", b"one"):
        build.store.put("weights", content)
        make(**meaning)(build, ids, params)
    assert len(RUNS) == 2
    assert params.model.digest == ""
    make(**meaning)(build, ids, WithModel())
    assert len(RUNS) == 3


def test_a_result_that_is_not_final_is_returned_and_not_recorded(build):
    double = make(is_final=lambda outputs, build: False)
    double(build, members(build, "a"), Params())
    double(build, members(build, "a"), Params())
    assert RUNS == [2, 2]


def _told_before(build, members: Table, params: Params, before: Doubled | None = None) -> Doubled:
    BEFORE.append(before and tables.read(build.store, before.members)["image_id"].to_pylist())
    return Doubled(tables.write(build.store, "members", tables.read(build.store, members)), {})


BEFORE: list[list[str] | None] = []
update = stage(
    1,
    {"members": ["image_id"]},
    lambda params: params.factor,
    starts_from=("members", "image_id"),
)(_told_before)


def test_a_stage_starts_from_the_likest_set_of_its_family(build):
    BEFORE.clear()
    for ids in ("abcdef", "uvwxyz", "abcdeg"):
        update(build, members(build, *ids), Params())
    update(build, members(build, *"abcdeg"), Params(factor=3))
    assert [None, list("abcdef"), list("abcdef"), None] == BEFORE


def test_work_on_vectors_of_another_kind_is_not_started_from(build):
    BEFORE.clear()

    def of_vectors(
        build, members: Table, vectors: Table, params: Params, before: Doubled | None = None
    ) -> Doubled:
        return _told_before(build, members, params, before)

    search = stage(
        1, {"members": ["image_id"], "vectors": []}, starts_from=("members", "image_id")
    )(of_vectors)
    for kind in ("clip", "dino", "clip"):
        some = members(build, "a", *([] if BEFORE else "b"))
        search(build, some, Table(f"vectors-{kind}"), Params())
    assert BEFORE == [None, None, ["a", "b"]]


def test_a_damaged_state_is_not_started_from(build):
    BEFORE.clear()
    done = update(build, members(build, *"abc", shard_rows=1), Params())
    Path(build.store.uri, tables.shard_key(done.members.shards[0].sha256)).unlink()
    update(build, members(build, *"abd"), Params())
    assert BEFORE == [None, None]


def test_what_is_not_final_is_started_from(build):
    BEFORE.clear()
    partial = stage(
        2,
        {"members": ["image_id"]},
        starts_from=("members", "image_id"),
        is_final=lambda outputs, build: False,
    )(_told_before)
    partial(build, members(build, "a"), Params())
    partial(build, members(build, "a"), Params())
    assert BEFORE == [None, ["a"]]


def test_a_record_says_what_it_was_made_of(build):
    update(build, members(build, "a", "b"), Params())
    [stat] = build.store.list("ledger/_told_before/")
    record = json.loads(build.store.get(stat.key))
    assert (record["sketch"], record["params"], record["version"]) == (["a", "b"], 2, 1)
    assert record["inputs"] == {
        "members": tables.digest(build.store, members(build, "b", "a"), ["image_id"])
    }


def test_a_stage_that_fails_leaves_no_record(build):
    failing = stage(1, {"members": ["image_id"]}, lambda params: params.factor)(_fails)
    for _ in range(2):
        with pytest.raises(OSError, match="once more"):
            failing(build, members(build, "a"), Params())
    assert RUNS == [0, 0]


def _fails(build, members: Table, params: Params) -> Doubled:
    RUNS.append(0)
    raise OSError("once more")


def test_a_planning_build_stops_before_the_work(build):
    plan = type(build)(build.corpus, build.store, build.pool, planning=True)
    with pytest.raises(WouldRun) as caught:
        make()(plan, members(build, "a"), Params())
    assert caught.value.stage == "_double" and RUNS == []
    make()(build, members(build, "a"), Params())
    make()(plan, members(build, "a"), Params())
    assert RUNS == [2]


def test_a_family_has_the_name_the_version_and_the_parameters():
    names = [
        family("search", 1, {"k": 5}),
        family("mine", 1, {"k": 5}),
        family("search", 2, {"k": 5}),
        family("search", 1, {"k": 6}),
        family("search", 1, {"k": 5.0}),
    ]
    assert len(set(names)) == len(names)
    assert family("search", 1, {"b": 0.5, "a": 1}) == family("search", 1, {"a": 1, "b": 0.5})


# Records -------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(open_store(Location(uri=str(tmp_path / "store"))))


def test_a_record_is_found_under_its_key(ledger):
    assert ledger.find("search", "fam", "key") is None
    ledger.write("search", "fam", "key", {"tables": {}})
    assert ledger.find("search", "fam", "key") == {"format": 1, "tables": {}}
    assert ledger.find("search", "other", "key") is None


def test_the_record_of_the_highest_number_is_the_newest_whatever_the_clock_says(ledger):
    assert ledger.newest("search", "fam") == (0, [])
    for n in (2, 10, 9, 0):
        ledger.write("search", "fam", f"{n:08d}-x", {"n": n})
    ledger.write("search", "fam/receipts", "00000099-x", {"n": 99})
    ledger.write("search", "family", "00000098-x", {"n": 98})
    assert ledger.newest("search", "fam") == (10, [{"format": 1, "n": 10}])
    ledger.write("search", "fam", "00000010-y", {"n": 10})
    assert len(ledger.newest("search", "fam")[1]) == 2


def test_a_record_of_floats_is_refused(ledger):
    with pytest.raises(TypeError, match="float"):
        ledger.write("search", "fam", "key", {"score": 0.5})


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1]", b"3"])
def test_a_damaged_record_says_what_to_do(data, ledger):
    ledger.store.put("ledger/search/fam/key.json", data)
    with pytest.raises(PairmillError, match=r"key\.json .*is damaged; .*verify-store"):
        ledger.find("search", "fam", "key")


def test_a_record_of_a_later_format_is_refused(ledger):
    ledger.store.put("ledger/search/fam/key.json", b'{"format": 2}')
    with pytest.raises(PairmillError, match="has format 2, this Pairmill reads 1"):
        ledger.find("search", "fam", "key")


def test_a_store_is_marked_once_with_its_format(ledger):
    check_format(ledger.store, write=False)
    with pytest.raises(NotFound):
        ledger.store.get("pairmill.json")
    for _ in range(2):
        check_format(ledger.store, write=True)
    assert ledger.store.get("pairmill.json") == b'{"format":1}'


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (b'{"format":2}', r"made by another Pairmill \(format 2, this one reads 1\)"),
        (b"", r"pairmill\.json in .* is damaged"),
        (b"[]", "is damaged"),
    ],
)
def test_a_store_of_another_format_is_refused(mark, said, ledger):
    ledger.store.put("pairmill.json", mark)
    with pytest.raises(PairmillError, match=said):
        check_format(ledger.store, write=True)
