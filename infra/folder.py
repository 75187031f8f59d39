"""The embedded object store: a folder, with S3's semantics and conditional writes.

A symbolic link to a regular file inside the folder is that file. Every other link, and every
fifo, socket or device, is listed with size 0 and not found by `get`: seen, never followed.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from infra.store import (
    HIDDEN,
    Conflict,
    NotFound,
    Outage,
    Stat,
    StoreError,
    check_condition,
    check_new_key,
    check_range,
    legal_key,
)

STALE_TEMP_S = 86_400

# A byte that is not UTF-8 becomes a private-use character (MirBSD's OPTU encoding), because a
# lone surrogate could be neither hashed nor written to Parquet.
_TO_KEY = {0xDC00 + byte: 0xEF00 + byte for byte in range(0x80, 0x100)}
_TO_NAME = {character: surrogate for surrogate, character in _TO_KEY.items()}

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, or move the store to a larger disk",
    errno.EDQUOT: "the disk quota is used up: free space, or raise the quota",
    errno.EACCES: "permission denied: give this user access, or choose another folder",
    errno.EPERM: "operation not permitted: give this user access, or choose another folder",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another folder",
    errno.ENOTDIR: "a file is where a folder is needed: move that file, or choose another folder",
    errno.EISDIR: "a folder is where an object is to be: remove that folder, or rename the object",
    errno.ENAMETOOLONG: "the path is too long for this file system: shorten the folder's path",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "input/output error: check the disk",
    errno.ENOLCK: "this file system has no locks: mount it with locks, or choose a local folder",
}
# A file system of the network that may come back.
_PASSING = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EAGAIN, errno.EBUSY)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class FolderStore:
    """Objects as files below `uri`, an absolute path without symbolic links."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """See `Store.list`; reads one directory at a time."""
        with _explained(self.uri):
            if not stat.S_ISDIR(self._root_stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder")
            folder = prefix[: prefix.rfind("/") + 1]
            pending = _entries(self, folder, prefix) if self._is_plain(folder) else []
            while pending:
                key = pending.pop()
                if key.endswith("/"):
                    pending += _entries(self, key, prefix)
                elif found := self._listed(key):
                    yield found

    def head(self, key: str) -> Stat:
        """See `Store.head`."""
        with _explained(f"{self.uri}/{key}"):
            return _stat(key, self._find(key)[1])

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        check_range(start, length)
        with _explained(f"{self.uri}/{key}"):
            path, _ = self._find(key)
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    return file.read(-1 if length is None else length)
            except FileNotFoundError as error:
                raise self._not_found(key) from error

    def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """See `Store.put`; durable when it returns."""
        check_condition(if_absent, if_match)
        with self._staged(key) as file:
            file.write(data)
            return self._commit(key, file, if_absent, if_match)

    def upload(self, key: str, path: Path) -> None:
        """See `Store.upload`."""
        with _explained(path):
            source = path.open("rb")
        with source, self._staged(key) as file:
            shutil.copyfileobj(source, file, 1 << 20)
            self._commit(key, file, False, None)

    def delete(self, key: str) -> None:
        """See `Store.delete`; folders left empty go too, as S3 has none."""
        check_new_key(key)
        path = self.path(key)
        with _explained(path):
            if not self._is_plain(key[: key.rfind("/") + 1]) or not os.path.lexists(path):
                return
            if path.is_dir() and not path.is_symlink():
                return
            with self._lock():
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    for parent in path.parents[: key.count("/")]:
                        parent.rmdir()

    def path(self, key: str) -> Path:
        """The file that holds an object, whether it exists or not."""
        return Path(self.uri, _name_of(key))

    def _root_stat(self) -> os.stat_result:
        try:
            return Path(self.uri).stat()
        except FileNotFoundError as error:
            raise NotFound(
                f"folder {self.uri} does not exist: correct the uri, or create the folder"
            ) from error

    def _not_found(self, key: str) -> NotFound:
        return NotFound(f"{self.uri} has no object {key!r}: check the key, or list the store again")

    def _is_plain(self, folder: str) -> bool:
        """Whether `folder` (a key up to a slash) is a directory reached through no link."""
        if not folder:
            return True
        if not legal_key(folder[:-1]):
            return False
        path = self.path(folder[:-1])
        return path.is_dir() and os.path.realpath(path) == str(path)

    def _listed(self, key: str) -> Stat | None:
        try:
            info = self.path(key).lstat()
        except FileNotFoundError:
            return None
        if stat.S_ISREG(info.st_mode):
            return _stat(key, info)
        try:
            return _stat(key, self._find(key)[1])
        except NotFound:
            return _stat(key, info)._replace(size=0)

    def _find(self, key: str) -> tuple[Path, os.stat_result]:
        if not legal_key(key):
            raise self._not_found(key)
        path = self.path(key)
        try:
            real = Path(os.path.realpath(path, strict=True))
            info = real.stat()
        except OSError as error:
            if error.errno not in _NO_SUCH_FILE:
                raise
            raise self._not_found(key) from error
        if real != path and not (
            os.path.realpath(path.parent) == str(path.parent) and real.is_relative_to(self.uri)
        ):
            raise NotFound(
                f"{path} is a link out of the folder or through a linked folder, which is not "
                "followed: copy the file to where the link is"
            )
        if not stat.S_ISREG(info.st_mode):
            raise self._not_found(key)
        return real, info

    @contextmanager
    def _staged(self, key: str) -> Iterator[BinaryIO]:
        check_new_key(key)
        with _explained(f"{self.uri}/{key}"):
            temp = _area(self.uri) / uuid4().hex
            try:
                with temp.open("xb") as file:
                    yield file
            finally:
                temp.unlink(missing_ok=True)

    def _commit(self, key: str, file: BinaryIO, if_absent: bool, if_match: str | None) -> str:
        file.flush()
        os.fsync(file.fileno())
        path = self.path(key)
        with self._lock():
            if os.path.realpath(path.parent) != str(path.parent):
                raise StoreError(f"{path.parent} is reached through a link: write to a real folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder")
            etag = _replace(path, file, if_absent, if_match)
            # Opened under the lock: whoever deletes this object removes its empty folder as well.
            directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return etag

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # Held for a few system calls, never while data is written.
        with (_area(self.uri) / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _area(root: str) -> Path:
    area = Path(root, HIDDEN)
    if not area.is_dir():
        area.mkdir(parents=True, exist_ok=True)
    _sweep(area)
    return area


@functools.cache
def _sweep(area: Path) -> None:
    # Once a process: what a killed writer left half-written.
    for temp in area.iterdir():
        with suppress(FileNotFoundError):
            if temp.name != "lock" and temp.stat().st_mtime < time.time() - STALE_TEMP_S:
                temp.unlink()


def _entries(store: FolderStore, folder: str, prefix: str) -> list[str]:
    # Descending, to be popped. A directory sorts as its keys do, with its slash: "a.b" < "a/b".
    keys = []
    with suppress(FileNotFoundError), os.scandir(store.path(folder)) as entries:
        for entry in entries:
            slash = "/" if entry.is_dir(follow_symlinks=False) else ""
            key = folder + _key_of(entry.name) + slash
            wanted = key.startswith(prefix) or (slash and prefix.startswith(key))
            if wanted and entry.name != HIDDEN:
                keys.append(key)
    return sorted(keys, reverse=True)


def _replace(path: Path, file: BinaryIO, if_absent: bool, if_match: str | None) -> str:
    temp = Path(file.name)
    if if_absent:
        return _create(path, temp)
    info = os.fstat(file.fileno())
    with suppress(FileNotFoundError):
        old = path.lstat()
        if if_match == _etag(old):
            if_match = None
        if info.st_mtime_ns <= old.st_mtime_ns:
            # Two writes in one tick of the clock must not end in the same etag.
            os.utime(temp, ns=(info.st_atime_ns, old.st_mtime_ns + 1))
            info = temp.stat()
    if if_match is not None:
        raise Conflict(f"{path} has changed since it was read: read it again and retry")
    temp.replace(path)
    return _etag(info)


def _create(path: Path, temp: Path) -> str:
    etag = _etag(temp.stat())
    taken = Conflict(f"{path} exists already: read it, or choose another key")
    try:
        os.link(temp, path)
    except FileExistsError:
        raise taken from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # The lock is held, so between cooperating processes this is as good.
        if os.path.lexists(path):
            raise taken from error
        temp.replace(path)
    return etag


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}-{info.st_ino:x}"


def _stat(key: str, info: os.stat_result) -> Stat:
    return Stat(key, info.st_size, _etag(info), info.st_mtime)


def _key_of(name: str) -> str:
    """A file name as part of a key; one-to-one, also for names that are not UTF-8."""
    if name.isascii():
        return name
    name = re.sub(
        "[\uef80-\uefff]", lambda found: found[0].encode().decode("ascii", "surrogateescape"), name
    )
    return name.translate(_TO_KEY)


def _name_of(key: str) -> str:
    if key.isascii():
        return key
    raw = key.translate(_TO_NAME).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "surrogateescape")


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror}: check the file system")
        failure = Outage if error.errno in _PASSING else StoreError
        raise failure(f"{error.filename or path}: {remedy}") from error
