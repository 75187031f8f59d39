"""What is particular to a folder: links, names, disks, processes."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.store import (
    Conflict,
    Location,
    NotFound,
    Store,
    StoreError,
    open_store,
)


def keys(store: Store, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


def test_a_missing_folder_is_named_for_reading_and_made_for_writing(tmp_path: Path) -> None:
    store = open_store(Location(uri=str(tmp_path / "new/store")))
    with pytest.raises(NotFound, match=r"folder .*/new/store does not exist: correct the uri"):
        list(store.list())
    with pytest.raises(NotFound):
        store.get("a")
    store.delete("a")
    assert not (tmp_path / "new").exists()
    store.put("a", b"1")
    assert keys(store) == ["a"]


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.tar").write_bytes(b"")
    store = open_store(Location(uri=str(tmp_path / "images.tar")))
    with pytest.raises(StoreError, match="a file is where a folder is needed"):
        list(store.list())
    with pytest.raises(StoreError, match="a file is where a folder is needed"):
        store.put("a", b"")


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = open_store(Location(uri=str(tmp_path)))
    assert keys(store) == ["a"]
    store.get("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_deleting_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = open_store(Location(uri=str(tmp_path)))
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert not (tmp_path / "a/b").exists()
    store.delete("a")
    assert keys(store) == ["a/d"]


def test_links_are_followed_to_files_inside_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "real/cat").write_bytes(b"meow")
    (root / "cat").symlink_to("real/cat")
    (root / "dangling").symlink_to("nowhere")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to("loop")
    (root / "secret").symlink_to(outside / "secret")
    (root / "shortcut").symlink_to("real")
    os.mkfifo(root / "pipe")
    store = open_store(Location(uri=str(root)))

    sizes = {found.key: found.size for found in store.list()}
    dead = ["dangling", "linked", "loop", "pipe", "secret", "shortcut"]
    assert sizes == {"cat": 4, "real/cat": 4} | dict.fromkeys(dead, 0)
    assert store.get("cat") == b"meow"
    for key in [*dead, "linked/secret", "shortcut/cat"]:
        with pytest.raises(NotFound):
            store.get(key)
    assert keys(store, "linked/") == keys(store, "shortcut/") == []
    with pytest.raises(StoreError, match="through a link"):
        store.put("linked/new/file", b"")
    store.delete("linked/secret")
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_link_is_replaced_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").write_bytes(b"untouched")
    (tmp_path / "root/a").symlink_to(tmp_path / "outside")
    store = open_store(Location(uri=str(tmp_path / "root")))
    with pytest.raises(Conflict):
        store.put("a", b"new", if_absent=True)
    store.put("a", b"new")
    assert (tmp_path / "outside").read_bytes() == b"untouched"
    assert store.get("a") == b"new"


def test_file_names_that_are_not_utf8_have_unicode_keys(tmp_path: Path) -> None:
    names = [b"caf\xe9", b"\xff\xfe", "caf\xe9".encode(), "\uef80".encode(), b"d\xe9/\xe9"]
    for name in names:
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name)
    store = open_store(Location(uri=str(tmp_path)))
    found = keys(store)
    assert len(set(found)) == len(names)
    assert found == sorted(found)
    assert "caf\uefe9" in found
    for key in found:
        key.encode()
    assert {store.get(key) for key in found} == set(names)
    assert keys(store, "d\uefe9/") == ["d\uefe9/\uefe9"]


@given(st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_name_has_a_key(tmp_path: Path, name: bytes) -> None:
    if name in (b".", b".."):
        return
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")
    store = open_store(Location(uri=str(folder)))
    [key] = keys(store)
    assert store.get(key) == b"x"
    assert key.encode().decode() == key


def test_fast_writes_never_share_an_etag(tmp_path: Path) -> None:
    store = open_store(Location(uri=str(tmp_path)))
    etags = [store.put("latest", b"%d" % (i % 2)) for i in range(50)]
    assert len(set(etags)) == 50


def test_a_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    store = open_store(Location(uri=str(tmp_path)))
    store.put("a", b"1")
    remains = tmp_path / ".pairmill.tmp/half-written"
    remains.write_bytes(b"half")
    os.utime(remains, (0, 0))
    assert keys(store) == ["a"]
    code = "import sys, infra.store as s; s.open_store(s.Location(uri=sys.argv[1])).put('b', b'2')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not remains.exists()
    assert keys(store) == ["a", "b"]


def test_racing_processes_have_one_winner(tmp_path: Path) -> None:
    code = (
        "import sys, infra.store as s\n"
        "store = s.open_store(s.Location(uri=sys.argv[1]))\n"
        "for i in range(50):\n"
        "    try: store.put(f'k{i}', sys.argv[2].encode(), if_absent=True); print(i)\n"
        "    except s.Conflict: pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    wins = [writer.communicate()[0].split() for writer in writers]
    store = open_store(Location(uri=str(tmp_path)))
    assert sorted(int(i) for won in wins for i in won) == list(range(50))
    for name, won in zip("ab", wins, strict=True):
        assert {store.get(f"k{i}") for i in won} <= {name.encode()}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, infra.store as s\n"
        "store = s.open_store(s.Location(uri=sys.argv[1]))\n"
        "try: store.put('a', bytes(1 << 20))\n"
        "except s.StoreError as error: print(type(error) is s.StoreError, error)\n"
        "print([found.key for found in store.list()])\n"
    )
    mounted = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "sh", str(tmp_path), sys.executable, code],
        capture_output=True,
        text=True,
    )
    if done.returncode and not done.stdout:
        pytest.skip(f"no private mount here: {done.stderr.strip()[-80:]}")
    message, listing = done.stdout.splitlines()
    assert message.startswith("True ") and "the disk is full: free space" in message
    assert listing == "[]"


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_permission_denied_is_one_line(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(mode)
    store = open_store(Location(uri=str(folder)))
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="permission denied: give this user access"):
            store.put("a", b"")
        if mode == 0:
            with pytest.raises(StoreError, match="permission denied: give this user access"):
                list(store.list())
    finally:
        os.seteuid(user)
        folder.chmod(0o700)
