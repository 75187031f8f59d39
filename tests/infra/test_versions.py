"""Published versions as a reader finds them, whole, withdrawn and damaged."""

import pytest

from infra import versions
from infra.canonical import canonical
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.store import NotFound


@pytest.fixture
def store(tmp_path):
    store = FolderStore(str(tmp_path))
    for number in (1, 2, 3):
        manifest = {"dataset": "trees", "version": number, "digest": f"d{number}" * 8, "files": []}
        store.put(f"datasets/trees/v{number:06d}/manifest.json", canonical(manifest))
    entry = {"dataset": "trees", "version": 3, "digest": "d3" * 8, "config_digest": "c"}
    store.put("datasets/trees/latest.json", canonical(entry))
    store.put("datasets/trees/refused/report.html", b"")
    return store


def test_numbers_are_those_with_a_manifest(store):
    store.put("datasets/trees/v000004/claim", b"")
    store.put("datasets/trees/vulture/manifest.json", b"{}")
    assert versions.complete_numbers(store, "trees") == [1, 2, 3]
    assert versions.complete_numbers(store, "none") == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"version": "3"}'])
def test_a_damaged_pointer_is_a_clear_error(store, body):
    store.put("datasets/trees/latest.json", body)
    with pytest.raises(PairmillError, match=r"latest\.json in .* is damaged; delete it and run"):
        versions.read_latest(store, "trees")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"version": 1, "digest": "x"}'])
def test_a_damaged_manifest_is_a_clear_error(store, body):
    store.put("datasets/trees/v000002/manifest.json", body)
    with pytest.raises(PairmillError, match=r"the manifest of version 2 of 'trees' in .* is dam"):
        versions.find_version(store, "trees", "2")


def test_a_manifest_that_is_gone_is_a_clear_error(store):
    store.delete("datasets/trees/v000003/manifest.json")
    with pytest.raises(NotFound, match=r"version 3 of 'trees' in .* has no manifest; where"):
        versions.read_manifest(store, "trees", 3)


def test_a_withdrawn_version_is_named_as_such(store):
    store.delete("datasets/trees/v000002/manifest.json")
    body = canonical({"number": 2, "reason": "forgotten \x1b[31mimages"})
    store.put("datasets/trees/v000002/withdrawn.json", body)
    with pytest.raises(PairmillError, match="version 2 of 'trees' was withdrawn: forgotten images"):
        versions.find_version(store, "trees", "2")
    store.put("datasets/trees/v000002/withdrawn.json", b"{")
    with pytest.raises(PairmillError, match="was withdrawn: no reason given"):
        versions.find_version(store, "trees", "2")


def test_a_table_is_none_where_it_is_not_named_or_gone(store):
    shards = [["0" * 64, 1, 1]]
    manifest = {"tables": {"mine_pairs": {"pairs": {"name": "pairs", "shards": shards}}}}
    assert versions.table(store, manifest, "mine_pairs", "pairs") is None
    assert versions.table(store, manifest, "mine_pairs", "bands") is None
    assert versions.table(store, {}, "mine_pairs", "pairs") is None
