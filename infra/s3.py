"""Object storage on Amazon S3 and compatible servers, by boto3."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from urllib3.exceptions import HTTPError

from infra.errors import ConfigError, PairmillError
from infra.store import (
    Conflict,
    Location,
    NotFound,
    Outage,
    Stat,
    StoreError,
    Unsupported,
    check_condition,
    check_new_key,
    check_range,
    one_line,
)

CONNECTIONS = 64
CONNECT_SECONDS = 10
READ_SECONDS = 60
PART_BYTES = 16 << 20
# Marks whose write it is, so that a write whose answer was lost can be told from a rival's.
WRITER = "pairmill-write"

_BROKEN_BODY = (boto.IncompleteReadError, boto.ResponseStreamingError, boto.ReadTimeoutError)

_CREDENTIALS = "check the access key, the secret and 'profile'"
_REGION = "set 'region' to the bucket's region"
_REDIRECT = "the server redirects: check 'endpoint' (https, port) and 'region'"
_EXPIRED = "the credentials have expired: log in again or renew the session token"
_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist: correct the uri, or create the bucket",
    "AccessDenied": "access denied: allow s3:ListBucket, GetObject, PutObject and DeleteObject on "
    "it, or check 'profile' and 'anonymous'",
    "AllAccessDisabled": "access to the bucket is disabled: ask its owner",
    "AccountProblem": "the account is suspended: ask its owner",
    "InvalidAccessKeyId": f"the server does not know the access key: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret does not fit the access key: {_CREDENTIALS}",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "InvalidToken": f"the session token is not valid: {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's: set the clock (NTP)",
    "AuthorizationHeaderMalformed": f"the request was signed for another region: {_REGION}",
    "PermanentRedirect": f"the bucket is in another region: {_REGION}",
    "IllegalLocationConstraintException": f"the bucket is in another region: {_REGION}",
    "SlowDown": "the server is overloaded: run again later, or with fewer workers",
    "ServiceUnavailable": "the server is unavailable: run again later",
    "InternalError": "the server failed: run again later",
    "QuotaExceeded": "the bucket's quota is used up: free space, or raise the quota",
    "XMinioStorageFull": "the server's disk is full: free space",
    "InsufficientStorage": "the server's disk is full: free space",
    "EntityTooLarge": "the object is larger than the server allows: write smaller shards",
    "InvalidObjectState": "the object is archived: restore it from cold storage",
    "301": _REDIRECT,
    "302": _REDIRECT,
    "307": _REDIRECT,
    "308": _REDIRECT,
    "403": "access denied: check the credentials, 'profile' and 'anonymous'",
    "429": "the server is overloaded: run again later, or with fewer workers",
    "503": "the server is overloaded: run again later, or with fewer workers",
    "507": "the server's disk is full: free space",
}
_BREAKING = "the connection keeps breaking ({error}): check the network, then run again"
# Besides what has a status of 500 or more; a full disk (507) is no matter of time.
_PASSING = ("SlowDown", "RequestTimeout", "429")
# First match wins: the general classes come last.
_CLIENT_FAULTS: tuple[tuple[type[Exception], type[PairmillError], str], ...] = (
    (boto.ProfileNotFound, ConfigError, "{error}: correct 'profile', or add it to ~/.aws/config"),
    (boto.NoRegionError, ConfigError, "no region is known: set 'region'"),
    (boto.InvalidRegionError, ConfigError, "{error}: correct 'region'"),
    (boto.ConfigParseError, ConfigError, "{error}: correct the AWS configuration file"),
    (
        boto.NoCredentialsError,
        StoreError,
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or 'profile', "
        "or 'anonymous: true' for a public bucket",
    ),
    (boto.PartialCredentialsError, StoreError, f"{{error}}: {_CREDENTIALS}"),
    (boto.SSLError, StoreError, "{error}: check 'endpoint', or set AWS_CA_BUNDLE to its CA"),
    (boto.ProxyConnectionError, StoreError, "{error}: check HTTPS_PROXY and NO_PROXY"),
    (boto.EndpointConnectionError, Outage, "nothing answers: check 'endpoint' and the network"),
    (boto.ConnectTimeoutError, Outage, "nothing answers: check 'endpoint' and the network"),
    (boto.HTTPClientError, Outage, _BREAKING),
    (boto.BotoCoreError, StoreError, "{error}: check the AWS configuration"),
)


@dataclass(frozen=True)
class S3Store:
    """Objects of one bucket below `prefix`, which is empty or ends in a slash."""

    location: Location
    bucket: str
    prefix: str
    attempts: int = 8

    @property
    def uri(self) -> str:
        """The root, without secrets."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """See `Store.list`. Folder markers (empty objects, key ending in a slash) are left out.

        Raises StoreError for a server that lists keys out of order.
        """
        with self._explained(prefix):
            last = ""
            for page in self._pages(prefix):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self.prefix)
                    if entry["Size"] == 0 and (not key or key.endswith("/")):
                        continue
                    if key <= last:
                        raise StoreError(
                            f"{self._where()} lists {key!r} after {last!r}, out of order: use a "
                            "general-purpose bucket of a server that lists keys in byte order"
                        )
                    last = key
                    mtime = entry["LastModified"].timestamp()
                    yield Stat(key, entry["Size"], entry["ETag"].strip('"'), mtime)

    def head(self, key: str) -> Stat:
        """See `Store.head`."""
        with self._explained(key):
            try:
                found = self._call("head_object", **self._object(key))
            except boto.ClientError:
                # An answer to HEAD has no body; that to GET says what is wrong.
                found = self._call("get_object", **self._object(key))
                found["Body"].close()
        mtime = found["LastModified"].timestamp()
        return Stat(key, found["ContentLength"], found["ETag"].strip('"'), mtime)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`; a truncated body is read again from its start."""
        check_range(start, length)
        if length == 0:
            self.head(key)
            return b""
        end = "" if length is None else start + length - 1
        request = self._object(key)
        if start or length is not None:
            request["Range"] = f"bytes={start}-{end}"
        with self._explained(key):
            try:
                return self._retrying(_Truncated)(self._read, request, start, length)
            except _Truncated as error:
                raise Outage(
                    f"{self._where()} ({key}): the body keeps coming truncated "
                    f"({one_line(error)}): check the network, then run again"
                ) from error
            except boto.ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """See `Store.put`."""
        check_condition(if_absent, if_match)
        check_new_key(key)
        with self._explained(key):
            if if_absent:
                return self._put_if(key, data, {"IfNoneMatch": "*"})
            if if_match is not None:
                return self._put_if(key, data, {"IfMatch": f'"{if_match}"'})
            return self._put(key, data)

    def upload(self, key: str, path: Path) -> None:
        """See `Store.upload`. Parts of a killed upload stay until a lifecycle rule expires them."""
        check_new_key(key)
        config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        try:
            file = path.open("rb")
        except OSError as error:
            raise StoreError(f"{path} cannot be read to be uploaded: {error.strerror}") from error
        with file, self._explained(key):
            self._client().upload_fileobj(file, self.bucket, self.prefix + key, Config=config)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_new_key(key)
        with self._explained(key):
            self._call("delete_object", **self._object(key))

    def _client(self) -> Any:
        with _building:
            return _client(self.location, self.attempts, os.getpid())

    def _call(self, operation: str, **request: Any) -> Any:
        # Boto3 repeats requests, but not where an answer breaks off that it reads as a whole.
        call = getattr(self._client(), operation)
        return self._retrying(HTTPError)(call, **request)

    def _pages(self, prefix: str) -> Iterator[dict[str, Any]]:
        request = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            page = self._call("list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _object(self, key: str) -> dict[str, Any]:
        # Reading takes any key that a listing may give, also one that no folder could hold.
        if not key or any(0xD800 <= ord(character) <= 0xDFFF for character in key):
            raise NotFound(f"{self._where()} has no object {key!r}: check the key")
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _retrying(self, fault: type[Exception]) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(fault),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=0.1, max=10, jitter=0.3),
            reraise=True,
        )

    def _read(self, request: dict[str, Any], start: int, length: int | None) -> bytes:
        answer = self._call("get_object", **request)
        try:
            data: bytes = answer["Body"].read()
        except _BROKEN_BODY as error:
            raise _Truncated(error) from error
        finally:
            answer["Body"].close()
        if "Range" in request and "ContentRange" not in answer:
            return data[start : None if length is None else start + length]
        return data

    def _put(self, key: str, data: bytes, **more: Any) -> str:
        answer = self._call("put_object", **self._object(key), Body=data, **more)
        if "ETag" not in answer:
            raise StoreError(
                f"{self._where()}: the server answered a write of {key} without an ETag; "
                "use a server that speaks S3"
            )
        etag: str = answer["ETag"].strip('"')
        return etag

    def _put_if(self, key: str, data: bytes, condition: dict[str, str]) -> str:
        writer = uuid4().hex
        try:
            return self._retrying(_Busy)(self._attempt, key, data, condition, writer)
        except _Busy as error:
            raise Conflict(
                f"{self._where()}/{key} is being written by others: read it again and retry"
            ) from error

    def _attempt(self, key: str, data: bytes, condition: dict[str, str], writer: str) -> str:
        try:
            return self._put(key, data, Metadata={WRITER: writer}, **condition)
        except boto.ClientError as error:
            code, status = _code(error), _status(error)
            if code == "ConditionalRequestConflict" or (status == 409 and code == "409"):
                raise _Busy from error
            missed = status == 412 or (status == 404 and code != "NoSuchBucket")
            if not missed and status < 500:
                raise
            # A retry within boto3 may have met our own write, whose answer was lost.
            if etag := self._written_by(key, writer):
                return etag
            if missed:
                raise Conflict(
                    f"{self._where()}/{key} exists or has changed: read it again and retry"
                ) from error
            raise
        except (boto.HTTPClientError, HTTPError):
            if etag := self._written_by(key, writer):
                return etag
            raise

    def _written_by(self, key: str, writer: str) -> str | None:
        try:
            found = self._call("head_object", **self._object(key))
        except boto.ClientError as error:
            if _status(error) == 404:
                return None
            raise
        mine = found.get("Metadata", {}).get(WRITER) == writer
        return found["ETag"].strip('"') if mine else None

    def _where(self) -> str:
        at = f" at {self.location.endpoint}" if self.location.endpoint else ""
        return self.uri + at

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        where = f"{self._where()} ({key})" if key else self._where()
        try:
            yield
        except boto.ClientError as error:
            raise self._refusal(error, key, where) from error
        except HTTPError as error:
            raise Outage(f"{where}: {_BREAKING.format(error=one_line(error))}") from error
        except boto.BotoCoreError as error:
            for kind, failure, text in _CLIENT_FAULTS:
                if isinstance(error, kind):
                    message = text.format(error=one_line(error).rstrip("."))
                    raise failure(f"{where}: {message}") from error
            raise

    def _refusal(self, error: boto.ClientError, key: str, where: str) -> StoreError:
        code, status = _code(error), _status(error)
        if code == "NoSuchKey" or (status == 404 and code in ("404", "")):
            return NotFound(
                f"{self._where()} has no object {key!r}: check the key, or list the store again"
            )
        if status == 501 or code == "NotImplemented":
            return Unsupported(f"{where}: the server does not implement this: use another one")
        remedy = _REMEDIES.get(code) or _REMEDIES.get(str(status))
        if remedy is None:
            message = one_line(error.response.get("Error", {}).get("Message") or "no reason given")
            remedy = f"{message}: check the server's documentation for {code}"
        passing = (status >= 500 and status != 507) or code in _PASSING
        return (Outage if passing else StoreError)(f"{where}: {remedy} [{one_line(code)}]")


class _Truncated(Exception):
    """A body broke off."""


class _Busy(Exception):
    """Another conditional write to the key is under way (409)."""


_building = threading.Lock()


@functools.cache
def _client(location: Location, attempts: int, process: int) -> Any:
    # A client serves any number of threads, but no process that was forked after its making.
    session = boto3.session.Session(profile_name=location.profile, region_name=location.region)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
        signature_version=UNSIGNED if location.anonymous else None,
        s3={"addressing_style": "path" if location.endpoint else "auto"},
        # Many compatible servers refuse the CRC trailers that boto3 sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        tcp_keepalive=True,
    )
    client = session.client("s3", endpoint_url=location.endpoint, config=config)
    if location.endpoint:
        client.meta.events.register("before-call.s3.HeadBucket", _ask_no_region)
    return client


def _ask_no_region(**_: Any) -> None:
    # On a redirect without a region boto3 asks for the bucket's, again on each redirect of that
    # question, until the stack is full: as where a proxy redirects http to https.
    answer: Any = {"Error": {"Code": "301"}, "ResponseMetadata": {"HTTPHeaders": {}}}
    raise boto.ClientError(answer, "HeadBucket")


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
