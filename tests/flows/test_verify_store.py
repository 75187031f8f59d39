"""Damaged stores: what is wrong is told, and a repair costs only the work that was lost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.verify_store import Damaged, named, verify_store
from infra import pins
from infra.errors import PairmillError
from infra.store import Location, Store, open_store
from tests.faults.buckets import build_here, config, content, fill, published
from tests.faults.night import no_report


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two nights, half of it in a tar, and the store they left."""
    base = tmp_path_factory.mktemp("built")
    fill(base / "corpus", 0, 24)
    shutil.make_archive(str(base / "some"), "tar", base / "corpus" / "images")
    fill(base / "corpus", 24, 36)
    build(base / "corpus", base / "store")
    shutil.move(base / "some.tar", base / "corpus" / "some.tar")
    build(base / "corpus", base / "store")
    return base


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Iterator[None]:
    """The charts of a report take half of a small night."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.build.render", no_report)
        yield


def build(corpus: Path, store: Path) -> dict[str, Any]:
    return build_here(config(corpus, store))


@pytest.fixture
def store(built: Path) -> Store:
    """A copy of the store, in the place of the first."""
    copy = built / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(built / "store", copy)
    return open_store(Location(uri=str(copy)))


def shards(store: Store, prefix: str) -> list[str]:
    """Shards that the records below a prefix name."""
    bodies = (json.loads(store.get(stat.key)) for stat in store.list(f"ledger/{prefix}"))
    return sorted({key for body in bodies for key in named(body)})


def repaired(built: Path, store: Store) -> tuple[list[str], dict[str, Any]]:
    """What a repair says, and the result of a build after it, which is as one of a new store."""
    with pytest.raises(Damaged, match=r"`pairmill verify-store --repair` removes"):
        list(verify_store(store))
    said = list(verify_store(store, repair=True))
    assert list(verify_store(store))[-1].endswith("nothing damaged or missing")
    result = build(built / "corpus", Path(store.uri))
    fresh = open_store(Location(uri=str(built / "store")))
    assert content(published(store)) == content(published(fresh))
    assert list(verify_store(store))[-1].endswith("nothing damaged or missing")
    return said, result


def test_a_store_in_order_says_so(store):
    [said] = verify_store(store)
    assert said.endswith("objects checked, nothing damaged or missing")


def flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def test_a_damaged_shard_of_a_stage_redoes_that_stage(built, store):
    key = shards(store, "deduplicate/")[0]
    flip(store, key)
    said, result = repaired(built, store)
    assert said[0] == f"damaged object   {key}, named by deduplicate"
    assert result["work"]["images_decoded"] == 0


@pytest.mark.parametrize("harm", [flip, lambda store, key: store.delete(key)], ids=["bit", "gone"])
@pytest.mark.parametrize("kind", ["headers", "looks", "vectors", "texts", "objects"])
def test_a_lost_shard_of_a_growing_table_costs_its_images_only(built, store, kind, harm):
    [first, *others] = shards(store, f"describe/{kind}/")
    harm(store, first)
    _, result = repaired(built, store)
    decoded = result["work"]["images_decoded"]
    assert decoded < 36 if others else decoded <= 36
    if kind in ("texts", "objects"):
        assert decoded == 0


def test_a_build_on_a_damaged_store_names_stage_shard_and_remedy(built, store):
    key = shards(store, "describe/looks/")[0]
    flip(store, key)
    with pytest.raises(PairmillError) as caught:
        build(built / "corpus", Path(store.uri))
    assert str(caught.value) == (
        f"describe: shard {key[8:20]} of table looks-{{}} is damaged in {store.uri}; "
        "`pairmill verify-store --repair` removes what names it, and the next run makes it anew"
    ).format(str(caught.value).split("looks-")[1].split()[0])


@pytest.mark.parametrize("body", [b"", b"{", b"[1]"])
@pytest.mark.parametrize("stage", ["describe/vectors/", "find_neighbours/", "snapshot/"])
def test_damaged_records_are_removed(built, store, stage, body):
    paths = [stat.key for stat in store.list(f"ledger/{stage}")]
    for path in paths:
        store.put(path, body)
    with pytest.raises(PairmillError, match=r"is damaged; `pairmill verify-store"):
        build(built / "corpus", Path(store.uri))
    said, _ = repaired(built, store)
    assert said[: len(paths)] == [f"damaged record   {path}" for path in paths]


def test_everything_lost_is_found_out_again(built, store):
    for stat in list(store.list("data/")):
        store.delete(stat.key)
    repaired(built, store)


def test_a_store_of_a_newer_pairmill_is_left_alone(store):
    path = next(stat.key for stat in store.list("ledger/deduplicate/"))
    store.put(path, b'{"format":2,"tables":{}}')
    with pytest.raises(PairmillError, match="use the Pairmill that wrote the store"):
        list(verify_store(store, repair=True))


def test_a_store_in_which_a_build_is_at_work_is_not_repaired(store):
    flip(store, shards(store, "deduplicate/")[0])
    with pins.hold(store), pytest.raises(PairmillError, match="a build is at work"):
        list(verify_store(store, repair=True))


def test_an_empty_store_is_in_order(tmp_path):
    assert list(verify_store(open_store(Location(uri=str(tmp_path / "none"))))) == [
        "0 objects checked, nothing damaged or missing"
    ]
