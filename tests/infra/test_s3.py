"""What is particular to S3: faults on the way, refusals, rivals, foreign keys."""

import socket
import threading
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from infra.errors import ConfigError
from infra.folder import FolderStore
from infra.s3 import S3Store
from infra.store import (
    Conflict,
    Location,
    Outage,
    Store,
    StoreError,
    Unsupported,
    open_store,
    probe_conditional_writes,
)
from tests.infra.conftest import FaultServer, free_port


def keys(store: Store, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


def s3(endpoint: str, bucket: str = "corpus", prefix: str = "", attempts: int = 3) -> S3Store:
    location = Location(uri=f"s3://{bucket}/{prefix}", endpoint=endpoint, region="us-east-1")
    store = open_store(location)
    assert isinstance(store, S3Store)
    return replace(store, attempts=attempts)


def refusal(code: str, message: str = "because") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


OBJECT = {"ETag": '"1"', "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}


def test_rclone_ignores_conditions_and_the_probe_says_so(
    rclone_endpoint: str, tmp_path: Path
) -> None:
    store = s3(rclone_endpoint, prefix="kept", attempts=8)
    assert not probe_conditional_writes(replace(store, prefix="probed/"))
    # On the disk: after a race rclone may go on listing what it has deleted.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for key in ["a/b", "a.b", "c", "a/c/d"]:
        store.put(key, b"x")
    assert keys(store) == ["a.b", "a/b", "a/c/d", "c"]
    assert store.get("a/b", 0, 5) == b"x"


def test_a_server_that_implements_no_conditions_fails_the_probe(fault_server: FaultServer) -> None:
    refused = (501, refusal("NotImplemented"), {}, None)
    fault_server.script = [refused]
    fault_server.always = {"DELETE": (204, b"", {}, None)}
    assert not probe_conditional_writes(s3(fault_server.endpoint, attempts=1))
    assert fault_server.requests[-1][0] == "DELETE"
    with pytest.raises(Unsupported):
        s3(fault_server.endpoint).put("a", b"", if_match="0")


def test_foreign_keys_and_folder_markers(moto_endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=moto_endpoint, region_name="us-east-1")
    for key in ["odd/", "odd/sub/", "odd//x", "odd/../y", "odd/."]:
        client.put_object(Bucket="corpus", Key=key, Body=b"" if key.endswith("/") else b"z")
    store = s3(moto_endpoint, prefix="odd")
    assert keys(store) == [".", "../y", "/x"]
    assert [store.get(key) for key in keys(store)] == [b"z"] * 3


def test_a_public_bucket_is_read_without_credentials(
    moto_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=moto_endpoint, region_name="us-east-1")
    client.put_object(Bucket="corpus", Key="public/a", Body=b"1", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    location = Location(uri="s3://corpus/public", endpoint=moto_endpoint, anonymous=True)
    assert open_store(location).get("a") == b"1"


def test_a_truncated_body_is_read_again(fault_server: FaultServer) -> None:
    broken = (200, b"0123456789", OBJECT, "truncate")
    fault_server.script = [broken, broken, (200, b"0123456789", OBJECT, None)]
    assert s3(fault_server.endpoint).get("a") == b"0123456789"
    assert len(fault_server.requests) == 3


def test_a_body_that_stays_truncated_is_an_error(fault_server: FaultServer) -> None:
    fault_server.script = [(200, b"0123456789", OBJECT, "truncate")]
    with pytest.raises(StoreError, match=r"\(a\): the body keeps coming truncated"):
        s3(fault_server.endpoint, attempts=2).get("a")
    assert len(fault_server.requests) == 2


def test_a_server_that_ignores_ranges(fault_server: FaultServer) -> None:
    fault_server.script = [(200, b"0123456789", OBJECT, None)]
    assert s3(fault_server.endpoint).get("a", 2, 3) == b"234"
    assert fault_server.requests[0][2]["Range"] == "bytes=2-4"


@pytest.mark.parametrize(
    "fault", [(503, refusal("SlowDown"), {}, None), (200, b"", {}, "reset")], ids=["503", "reset"]
)
def test_passing_faults_are_retried(
    fault_server: FaultServer, fault: tuple[int, bytes, dict[str, str], str | None]
) -> None:
    fault_server.script = [fault, (200, b"fine", OBJECT, None)]
    assert s3(fault_server.endpoint).get("a") == b"fine"
    assert len(fault_server.requests) == 2


def test_no_checksum_trailers_are_sent(fault_server: FaultServer) -> None:
    fault_server.script = [(200, b"", OBJECT, None)]
    s3(fault_server.endpoint).put("a", b"1")
    headers = " ".join(fault_server.requests[0][2]).lower()
    assert "checksum" not in headers
    assert "trailer" not in headers


def test_a_lost_answer_does_not_lose_the_write(fault_server: FaultServer) -> None:
    # The first attempt is written, but its answer is lost; the retry meets its own write.
    store = s3(fault_server.endpoint)
    taken = (412, refusal("PreconditionFailed"), {}, None)
    fault_server.script = [(200, b"", {}, "reset"), taken, (200, b"", OBJECT, None)]
    answer = threading.Thread(target=_echo_writer, args=(fault_server,))
    answer.start()
    assert store.put("a", b"1", if_absent=True) == "1"
    answer.join()


def _echo_writer(server: FaultServer) -> None:
    while not server.requests:
        pass
    writer = server.requests[0][2]["x-amz-meta-pairmill-write"]
    server.script[-1] = (200, b"", OBJECT | {"x-amz-meta-pairmill-write": writer}, None)


def test_a_rivals_write_is_a_conflict_after_a_lost_answer(fault_server: FaultServer) -> None:
    taken = (412, refusal("PreconditionFailed"), {}, None)
    rival = (200, b"", OBJECT | {"x-amz-meta-pairmill-write": "rival"}, None)
    fault_server.script = [(200, b"", {}, "reset"), taken, rival]
    with pytest.raises(Conflict):
        s3(fault_server.endpoint).put("a", b"1", if_absent=True)


def test_a_write_under_way_is_waited_for_then_a_conflict(fault_server: FaultServer) -> None:
    busy = (409, refusal("ConditionalRequestConflict"), {}, None)
    fault_server.script = [busy, busy, (200, b"", OBJECT, None)]
    assert s3(fault_server.endpoint).put("a", b"1", if_match="0") == "1"
    fault_server.script = [busy]
    with pytest.raises(Conflict, match="being written by others"):
        s3(fault_server.endpoint).put("a", b"1", if_match="0")


def test_a_missing_bucket_is_one_line_in_every_call(moto_endpoint: str, tmp_path: Path) -> None:
    store = s3(moto_endpoint, bucket="no-such-bucket")
    (tmp_path / "x").write_bytes(b"")
    for call in (
        lambda: list(store.list()),
        lambda: store.get("a"),
        lambda: store.head("a"),
        lambda: store.put("a", b""),
        lambda: store.put("a", b"", if_absent=True),
        lambda: store.put("a", b"", if_match="0"),
        lambda: store.upload("a", tmp_path / "x"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreError, match="bucket does not exist: correct the uri") as caught:
            call()
        assert type(caught.value) is StoreError
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "InvalidAccessKeyId", "does not know the access key: check the access key"),
        (403, "SignatureDoesNotMatch", "secret does not fit the access key: check"),
        (403, "AccessDenied", "access denied: allow s3:ListBucket"),
        (400, "ExpiredToken", "expired: log in again"),
        (403, "RequestTimeTooSkewed", "clock differs from the server's: set the clock"),
        (400, "AuthorizationHeaderMalformed", "another region: set 'region'"),
        (301, "PermanentRedirect", "another region: set 'region'"),
        (301, "301", "the server redirects: check 'endpoint'"),
        (507, "XMinioStorageFull", "disk is full: free space"),
        (503, "SlowDown", "overloaded: run again later"),
        (418, "Teapot", "short and stout: check the server's documentation for Teapot"),
    ],
)
def test_a_refusal_is_one_line_with_its_remedy(
    fault_server: FaultServer, status: int, code: str, remedy: str
) -> None:
    fault_server.script = [(status, refusal(code, "short\nand stout"), {}, None)]
    store = s3(fault_server.endpoint, attempts=1)
    for call in (lambda: list(store.list()), lambda: store.head("a"), lambda: store.put("a", b"")):
        with pytest.raises(StoreError, match=remedy) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, Outage) == (status in (500, 503))


def test_nothing_listens(aws_environment: pytest.MonkeyPatch) -> None:
    store = s3(f"http://127.0.0.1:{free_port()}", attempts=1)
    with pytest.raises(StoreError, match="nothing answers: check 'endpoint' and the network"):
        store.get("a")
    with pytest.raises(StoreError, match="nothing answers: check 'endpoint' and the network"):
        store.put("a", b"", if_absent=True)


def test_a_server_that_is_not_one(aws_environment: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        with pytest.raises(StoreError, match="check the network"):
            s3(f"http://127.0.0.1:{server.getsockname()[1]}", attempts=1).get("a")


def test_no_credentials(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    location = Location(uri="s3://corpus/none", endpoint=moto_endpoint, region="eu-west-1")
    with pytest.raises(StoreError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        list(open_store(location).list())


def test_an_unknown_profile_is_a_config_error(moto_endpoint: str) -> None:
    location = Location(uri="s3://corpus", endpoint=moto_endpoint, profile="nightly")
    with pytest.raises(ConfigError, match=r"nightly.*: correct 'profile'"):
        open_store(location).get("a")


def test_no_region_is_needed_with_an_endpoint(moto_endpoint: str) -> None:
    store = open_store(Location(uri="s3://corpus/regionless", endpoint=moto_endpoint))
    store.put("a", b"1")
    assert keys(store) == ["a"]


def test_stores_are_plain_values(tmp_path: Path) -> None:
    assert open_store(Location(uri=str(tmp_path))) == FolderStore(str(tmp_path))
    assert s3("http://127.0.0.1:1") == s3("http://127.0.0.1:1")
