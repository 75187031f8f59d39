"""Object storage: a local folder or S3, behind one interface that behaves the same on both.

The two differ in one thing only: a folder cannot hold both `a` and `a/b`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import ConfigError, PairmillError

log = logging.getLogger(__name__)

# A folder keeps its lock and half-written files here; no key may name it, on any store.
HIDDEN = ".pairmill.tmp"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class StoreError(PairmillError):
    """Storage did not do what was asked."""


class NotFound(StoreError):
    """No object has this key."""


class Conflict(StoreError):
    """The condition of a write does not hold."""


class Outage(StoreError):
    """Storage failed in a way that may pass: asking again later is worth it."""


class Unsupported(StoreError):
    """The server knows the request but does not implement it."""


class Location(BaseModel):
    """Where a corpus or a store lies. Secrets come from the environment or a profile, never here.

    Errors hide the input, since a misplaced key could be a secret.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    uri: str = Field(
        description="A folder (`data/images`, `file:///data`) or `s3://bucket/prefix`."
    )
    endpoint: str | None = Field(
        default=None, description="URL of an S3-compatible server; without it, Amazon S3."
    )
    region: str | None = Field(
        default=None, description="Region of the bucket; without it, the AWS configuration's."
    )
    profile: str | None = Field(
        default=None, description="Profile of the AWS configuration that holds the credentials."
    )
    anonymous: bool = Field(
        default=False, description="Send unsigned requests, as for a public bucket."
    )


class Stat(NamedTuple):
    """One object: size in bytes, mtime in seconds since 1970, etag opaque."""

    key: str
    size: int
    etag: str
    mtime: float


class Store(Protocol):
    """Objects under one root. Safe to share between threads and to pickle."""

    @property
    def uri(self) -> str:
        """The root, without secrets."""
        ...

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, ascending by the key's code points.

        Raises NotFound where a folder is missing, StoreError where it cannot be read.
        """
        ...

    def head(self, key: str) -> Stat:
        """Facts about one object. Raises NotFound."""
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """`content[start : start + length]`, as a slice does it: past the end is empty.

        Raises NotFound; StoreError when the body still comes truncated after retries.
        """
        ...

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Write one object whole and return its etag.

        Raises Conflict, and changes nothing, if `if_absent` finds the key taken or the current
        etag is not `if_match`. On S3 an etag names content: A, B, A matches A's etag again.
        """
        ...

    def upload(self, key: str, path: Path) -> None:
        """Write a file of any size, in parts where the store has them."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine."""
        ...


def open_store(location: Location) -> Store:
    """The store at a location; touches neither disk nor network.

    Raises ConfigError for a URI or endpoint that is malformed or carries credentials.
    """
    scheme, rest = _split(location.uri)
    if scheme == "s3":
        from infra.s3 import S3Store

        _check_endpoint(location.endpoint)
        _warn_of_plain_http(location.endpoint)
        bucket, prefix = _bucket_and_prefix(rest)
        return S3Store(location, bucket, prefix)
    from infra.folder import FolderStore

    return FolderStore(str(_folder(scheme, rest)))


def listed(store: Store, prefix: str = "") -> list[Stat]:
    """Objects whose key starts with `prefix`; none where a folder has not been made yet."""
    try:
        return list(store.list(prefix))
    except NotFound:
        return []


def overlaps(a: Location, b: Location) -> bool:
    """Whether one location lies inside the other, symbolic links resolved.

    Raises ConfigError as `open_store` does.
    """
    (scheme_a, rest_a), (scheme_b, rest_b) = _split(a.uri), _split(b.uri)
    if (scheme_a == "s3") != (scheme_b == "s3"):
        return False
    if scheme_a != "s3":
        one, two = _folder(scheme_a, rest_a), _folder(scheme_b, rest_b)
        return one.is_relative_to(two) or two.is_relative_to(one)
    _check_endpoint(a.endpoint)
    _check_endpoint(b.endpoint)
    (bucket_a, prefix_a), (bucket_b, prefix_b) = map(_bucket_and_prefix, (rest_a, rest_b))
    if (_server(a.endpoint), bucket_a) != (_server(b.endpoint), bucket_b):
        return False
    return prefix_a.startswith(prefix_b) or prefix_b.startswith(prefix_a)


def probe_conditional_writes(store: Store, writers: int = 16) -> bool:
    """Whether conditional writes hold: of many racing creators one wins, a stale etag is refused.

    Some S3 servers answer 200 and overwrite. Leaves nothing behind.
    """
    key = f"probe/{uuid4().hex}"
    try:
        return _one_creator_wins(store, key, writers) and _stale_etag_is_refused(store, key)
    except Unsupported:
        return False
    finally:
        store.delete(key)


def legal_key(key: str) -> bool:
    """Whether a key is Unicode text without NUL that stays below a root and shows all segments."""
    if re.search(r"[\0\ud800-\udfff]", key):
        return False
    return not any(segment in ("", ".", "..", HIDDEN) for segment in key.split("/"))


def check_new_key(key: str) -> None:
    """Raise StoreError unless every store can write this key and list it back unchanged."""
    if not legal_key(key):
        raise StoreError(
            f"key {key!r} is refused: use segments between single slashes, none of them "
            f"empty, '.', '..' or {HIDDEN!r}, and no NUL or surrogate"
        )
    # U+EF80 to U+EFFF stand for the bytes of file names that are not UTF-8 (infra.folder).
    if re.search(r"[\x00-\x1f\x7f\uef80-\uefff]", key):
        raise StoreError(f"key {key!r} is refused: remove control and U+EF80 to U+EFFF characters")
    if len(key.encode()) > 900 or any(len(s.encode()) > 255 for s in key.split("/")):
        raise StoreError(f"key {key[:60]!r}... is too long: 900 bytes at most, 255 a segment")


def check_range(start: int, length: int | None) -> None:
    """Raise ValueError for a negative start or length, which no caller means."""
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"range {start}, {length} is negative")


def check_condition(if_absent: bool, if_match: str | None) -> None:
    """Raise ValueError for two conditions at once, which cannot both hold."""
    if if_absent and if_match is not None:
        raise ValueError("if_absent and if_match exclude each other")


def one_line(text: object) -> str:
    """Text of foreign origin, bounded and without line breaks, for an error message."""
    return " ".join(str(text).split())[:300]


def _split(uri: str) -> tuple[str, str]:
    # No message below repeats the URI: what is wrong with it may be a secret in it.
    if not uri.strip() or "\0" in uri:
        raise ConfigError("uri is empty or has a NUL: give a folder or s3://bucket/prefix")
    if re.match(r"(s3|file):(?!//)", uri, re.IGNORECASE):
        raise ConfigError("uri has a scheme without '//': write s3://bucket/prefix or file:///path")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not found:
        return "", uri
    scheme, rest = found[1].lower(), uri[found.end() :]
    if scheme not in ("s3", "file"):
        raise ConfigError(
            f"uri has the unknown scheme {scheme}://: use a folder, file:// or s3://bucket/prefix "
            "(an S3-compatible server's address goes into 'endpoint')"
        )
    if "@" in rest.partition("/")[0] or ":" in rest.partition("/")[0]:
        raise ConfigError(
            f"{scheme}:// uri carries credentials or a port: put credentials into the environment "
            "or an AWS profile, and the server's address into 'endpoint'"
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(f"{scheme}:// uri has a query or fragment: remove it, from '?' or '#' on")
    return scheme, rest


def _folder(scheme: str, rest: str) -> Path:
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise ConfigError("file:// uri names a host: write file:///absolute/path")
        return Path(unquote(slash + path)).resolve()
    try:
        return Path(rest).expanduser().resolve()
    except RuntimeError as error:
        raise ConfigError(f"folder {rest} cannot be resolved: {one_line(error)}") from error


def _bucket_and_prefix(rest: str) -> tuple[str, str]:
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        raise ConfigError("s3:// uri has no valid bucket name: write s3://bucket/prefix")
    prefix = prefix.removesuffix("/")
    if prefix and not legal_key(prefix):
        raise ConfigError("s3:// uri has an empty, '.' or '..' segment: write s3://bucket/a/b")
    return bucket, prefix and prefix + "/"


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint is None:
        return
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError("endpoint is not a URL: write https://host or https://host:port")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "endpoint carries credentials or a query: leave https://host:port, and put "
            "credentials into the environment or an AWS profile"
        )


def _warn_of_plain_http(endpoint: str | None) -> None:
    parts = urlsplit(endpoint or "")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        host = parts.hostname
        log.warning("endpoint http://%s is not encrypted: use https:// on a shared network", host)


def _server(endpoint: str | None) -> tuple[str, int | None] | None:
    parts = urlsplit(endpoint or "https://s3.amazonaws.com")
    host = (parts.hostname or "").rstrip(".")
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return None
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return ("localhost" if host in LOOPBACK else host), port


def _one_creator_wins(store: Store, key: str, writers: int) -> bool:
    barrier = Barrier(writers)

    def create(writer: int) -> bytes | None:
        data = f"writer {writer}".encode()
        barrier.wait()
        try:
            store.put(key, data, if_absent=True)
        except Conflict:
            return None
        return data

    with ThreadPoolExecutor(writers) as threads:
        winners = [data for data in threads.map(create, range(writers)) if data is not None]
    return len(winners) == 1 and store.get(key) == winners[0]


def _stale_etag_is_refused(store: Store, key: str) -> bool:
    stale = store.head(key).etag
    try:
        store.put(key, b"second", if_match=stale)
    except Conflict:
        return False
    try:
        store.put(key, b"third", if_match=stale)
    except Conflict:
        return store.get(key) == b"second"
    return False
