"""One interface: what holds for a folder holds for S3, and for a server that is nearly S3."""

import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import ConfigError
from infra.store import (
    Conflict,
    Location,
    NotFound,
    Store,
    StoreError,
    open_store,
    overlaps,
    probe_conditional_writes,
)

# What rclone does not do: it overwrites and answers 200, whatever the condition.
CONDITIONAL = (
    "create_only",
    "stale_etag",
    "etag_of_an_absent",
    "update_is_lost",
    "the_probe_finds",
)


@pytest.fixture(params=["folder", "s3", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "rclone" and any(name in request.node.name for name in CONDITIONAL):
        pytest.skip("rclone keeps no conditional writes")
    if request.param == "folder":
        (tmp_path / "store").mkdir()
        return open_store(Location(uri=str(tmp_path / "store")))
    server = {"s3": "moto_endpoint", "rclone": "shared_rclone_endpoint"}[request.param]
    endpoint = request.getfixturevalue(server)
    return open_store(Location(uri=f"s3://corpus/{uuid.uuid4().hex}", endpoint=endpoint))


def keys(store: Store, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


# What both stores do


def test_put_get_head_list_delete(store: Store) -> None:
    etag = store.put("images/cat.png", b"meow")
    assert store.get("images/cat.png") == b"meow"
    [listed] = store.list()
    assert listed.key == "images/cat.png"
    assert (listed.size, listed.etag) == (4, etag)
    head = store.head("images/cat.png")
    assert head[:3] == listed[:3]
    assert head.mtime == pytest.approx(listed.mtime, abs=1)
    store.delete("images/cat.png")
    store.delete("images/cat.png")
    assert keys(store) == []


def test_ranges_are_slices(store: Store) -> None:
    store.put("ten", b"0123456789")
    store.put("empty", b"")
    assert store.get("ten", 3) == b"3456789"
    assert store.get("ten", 3, 2) == b"34"
    assert store.get("ten", 0, 1) == b"0"
    assert store.get("ten", 8, 100) == b"89"
    assert store.get("ten", 10) == store.get("ten", 99, 5) == b""
    assert store.get("ten", 3, 0) == b""
    assert store.get("empty") == store.get("empty", 0, 9) == store.get("empty", 4) == b""
    with pytest.raises(ValueError, match="negative"):
        store.get("ten", -1)
    with pytest.raises(ValueError, match="negative"):
        store.get("ten", 0, -1)


@pytest.mark.parametrize("key", ["absent", "here/absent", "here", "no/such/folder", "file/below"])
def test_an_absent_object_is_not_found(store: Store, key: str) -> None:
    store.put("here/x", b"")
    store.put("file", b"")
    for read in (store.get, store.head, lambda key: store.get(key, 5, 0)):
        with pytest.raises(NotFound, match="has no object"):
            read(key)


def test_list_ascends_by_code_points_of_the_whole_key(store: Store) -> None:
    ascending = ["B", "a-b", "a.b", "a/a", "a/b.c", "a/b/c", "a0", "z", "é", "\uffee", "\U0001f600"]
    for name in reversed(ascending):
        store.put(name, b"x")
    assert keys(store) == ascending


def test_a_prefix_is_a_string_not_a_folder(store: Store) -> None:
    for name in ["images/a", "images/b/c", "images.csv", "img", "z"]:
        store.put(name, b"x")
    assert keys(store, "im") == ["images.csv", "images/a", "images/b/c", "img"]
    assert keys(store, "images") == ["images.csv", "images/a", "images/b/c"]
    assert keys(store, "images/") == ["images/a", "images/b/c"]
    assert keys(store, "images/b") == ["images/b/c"]
    assert keys(store, "z") == ["z"]
    assert keys(store, "none/") == keys(store, "../") == keys(store, "//") == []


def test_many_objects_are_listed_over_pages(store: Store) -> None:
    names = [f"{i:04d}" for i in range(1005)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: store.put(f"many/{name}", b""), names))
    assert keys(store, "many/") == [f"many/{name}" for name in names]


def test_create_only_fails_on_a_taken_key(store: Store) -> None:
    store.put("latest", b"first", if_absent=True)
    with pytest.raises(Conflict, match="latest exists"):
        store.put("latest", b"second", if_absent=True)
    assert store.get("latest") == b"first"


def test_a_stale_etag_is_a_conflict(store: Store) -> None:
    first = store.put("latest", b"1")
    second = store.put("latest", b"2", if_match=first)
    with pytest.raises(Conflict, match="latest"):
        store.put("latest", b"3", if_match=first)
    assert store.get("latest") == b"2"
    assert store.head("latest").etag == second != first


def test_an_etag_of_an_absent_object_is_a_conflict(store: Store) -> None:
    with pytest.raises(Conflict):
        store.put("absent", b"1", if_match="0123")
    with pytest.raises(NotFound):
        store.get("absent")


def test_two_conditions_at_once_are_a_mistake(store: Store) -> None:
    with pytest.raises(ValueError, match="exclude"):
        store.put("x", b"", if_absent=True, if_match="1")


def test_no_update_is_lost_when_writers_race(store: Store) -> None:
    store.put("counter", b"0")

    def add(times: int) -> None:
        while times:
            etag, value = store.head("counter").etag, int(store.get("counter"))
            try:
                store.put("counter", str(value + 1).encode(), if_match=etag)
            except Conflict:
                continue
            times -= 1

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, [5] * 4))
    assert store.get("counter") == b"20"


def test_the_probe_finds_that_conditions_hold_and_cleans_up(store: Store) -> None:
    assert probe_conditional_writes(store)
    assert keys(store) == []


@pytest.mark.parametrize(
    "key",
    [
        *["", "/a", "a/", "a//b", ".", "a/..", "../a", "a/./b", "a\0b", "a\nb", "\ud800", "\ueffe"],
        *["x" * 256, "x/" * 500 + "x", ".pairmill.tmp/lock", "a/.pairmill.tmp"],
    ],
)
def test_an_illegal_key_is_never_written_nor_found(
    store: Store, key: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(StoreError, match="key"):
        store.put(key, b"x")
    with pytest.raises(StoreError, match="key"):
        store.upload(key, Path(__file__))
    # rclone refuses to be asked.
    absent = StoreError if "rclone" in request.node.name else NotFound
    with pytest.raises(absent):
        store.get(key)
    with pytest.raises(absent):
        store.head(key)


def test_upload_in_parts(store: Store, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 17
    (tmp_path / "big").write_bytes(data)
    store.upload("tars/big.tar", tmp_path / "big")
    assert store.get("tars/big.tar", (16 << 20) - 3, 9) == data[(16 << 20) - 3 :][:9]
    assert store.head("tars/big.tar").size == len(data)
    with pytest.raises(StoreError, match="absent"):
        store.upload("x", tmp_path / "absent")


def test_a_store_is_pickled_without_its_connections(store: Store) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"


def test_a_store_is_shared_by_threads(store: Store) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: store.put(f"t/{i}", str(i).encode()), range(64)))
        assert list(threads.map(lambda i: int(store.get(f"t/{i}")), range(64))) == list(range(64))


SEGMENTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/").filter(
        lambda c: not 0xEF80 <= ord(c) <= 0xEFFF
    ),
    min_size=1,
    max_size=12,
).filter(lambda s: s not in (".", ".."))


# On a folder a file cannot also be a folder: their names end differently.
KEYS = st.builds(
    lambda folders, name: "".join(f"{folder}.d/" for folder in folders) + f"{name}.x",
    st.lists(SEGMENTS, max_size=2),
    SEGMENTS,
)


@given(st.dictionaries(KEYS, st.binary(max_size=9), max_size=8))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_legal_key_comes_back(store: Store, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        store.put(key, data)
    assert keys(store) == sorted(objects)
    for key, data in objects.items():
        assert store.get(key) == data
        assert store.head(key).size == len(data)
        store.delete(key)
    assert keys(store) == []


# Locations


@pytest.mark.parametrize(
    ("uri", "opened"),
    [
        ("/data/x/../y/", "/data/y"),
        ("file:///data/with%20space", "/data/with space"),
        ("file://localhost/data", "/data"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a b%20", "s3://bucket/a b%20"),
    ],
)
def test_uris(uri: str, opened: str) -> None:
    assert open_store(Location(uri=uri)).uri == opened


def test_a_bare_path_is_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_store(Location(uri="a/b?c@d")).uri == f"{tmp_path}/a/b?c@d"
    assert open_store(Location(uri="~/images")).uri == "/home/someone/images"


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("", "empty"),
        ("s3:/bucket", "'//'"),
        ("file:data", "'//'"),
        ("file://host/data", "host"),
        ("gs://bucket/x", "unknown scheme gs://"),
        ("https://user:hunter2@host/x", "unknown scheme https://"),
        ("s3://AKIA:hunter2@bucket/x", "credentials"),
        ("s3://AKIA:hunt/er2@bucket/x", "credentials"),
        ("file://user:hunter2@host/x", "credentials"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "query"),
        ("s3://", "bucket"),
        ("s3://b/x", "bucket"),
        ("s3://bucket/a//b", "segment"),
        ("s3://bucket/../b", "segment"),
    ],
)
def test_a_bad_uri_is_a_config_error_that_keeps_secrets(uri: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        open_store(Location(uri=uri))
    assert "hunt" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        *["localhost:9000", "ftp://host", "https://", "http://host:port"],
        *["https://me:hunter2@host", "https://host/?sig=hunter2"],
    ],
)
def test_a_bad_endpoint_is_a_config_error_that_keeps_secrets(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint") as caught:
        open_store(Location(uri="s3://bucket", endpoint=endpoint))
    assert "hunt" not in str(caught.value)
    with pytest.raises(ConfigError, match="endpoint"):
        overlaps(Location(uri="s3://bucket", endpoint=endpoint), Location(uri="s3://other"))


def test_plain_http_warns_beyond_loopback(caplog: pytest.LogCaptureFixture) -> None:
    open_store(Location(uri="s3://bucket", endpoint="http://127.0.0.1:9000"))
    assert caplog.messages == []
    open_store(Location(uri="s3://bucket", endpoint="http://minio:9000"))
    assert "http://minio is not encrypted" in caplog.text


def test_a_misplaced_secret_is_not_echoed() -> None:
    with pytest.raises(ValidationError) as caught:
        Location(uri="s3://bucket", secret_key="hunter2")  # type: ignore[call-arg]
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("/data", "/data", True),
        ("/data", "/data/out", True),
        ("/data/out", "file:///data", True),
        ("/data", "/database", False),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket", "s3://bucket/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "s3://other/a", False),
        ("/data", "s3://data", False),
    ],
)
def test_overlaps(a: str, b: str, expected: bool) -> None:
    assert overlaps(Location(uri=a), Location(uri=b)) is expected
    assert overlaps(Location(uri=b), Location(uri=a)) is expected


def test_overlaps_sees_through_links(tmp_path: Path) -> None:
    (tmp_path / "corpus/inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "corpus/inside")
    assert overlaps(
        Location(uri=str(tmp_path / "corpus")), Location(uri=str(tmp_path / "link/store"))
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("http://localhost:9000", "http://127.0.0.1:9000/", True),
        ("http://localhost:9000", "http://localhost:9001", False),
        (None, "https://s3.eu-west-1.amazonaws.com", True),
        (None, "https://minio.example", False),
        ("https://MINIO.example:443", "https://minio.example", True),
    ],
)
def test_one_bucket_name_on_two_servers_is_two_buckets(
    a: str | None, b: str | None, expected: bool
) -> None:
    corpus = Location(uri="s3://bucket/x", endpoint=a)
    assert overlaps(corpus, Location(uri="s3://bucket/x/y", endpoint=b)) is expected
