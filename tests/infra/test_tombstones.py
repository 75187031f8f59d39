"""Tombstones: keyed hashes only, sealed, added to and released; damage stops whoever reads them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import tombstones
from infra.captions import caption_id
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.store import NotFound

IMAGE = "ab" * 32
NAMES = st.sampled_from("abcdef")


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path / "store"))


def hashes(gone, *texts):
    return [gone.keyed(text) for text in texts]


def files(store):
    return [s.key for s in store.list(tombstones.PREFIX) if s.key != tombstones.SECRET]


def test_a_store_without_tombstones_hides_nothing(store):
    gone = tombstones.load(store)
    assert not gone and gone.digest == "" and not gone.has_image(IMAGE)
    with pytest.raises(NotFound):
        list(store.list())


def test_what_is_written_names_nobody(store):
    gone = tombstones.open_for_writing(store)
    place = gone.place("a.tar", "b.jpg", "stamp")
    assert tombstones.add(
        store,
        gone,
        images=hashes(gone, IMAGE),
        names=hashes(gone, "a.tar::b.jpg"),
        captions=hashes(gone, caption_id("a cat")),
        objects={place: gone.keyed(IMAGE)},
    )
    (name,) = files(store)
    said = store.get(name).decode()
    assert not any(text in said for text in (IMAGE, "a.tar", "b.jpg", "a cat", caption_id("a cat")))
    found = tombstones.load(store)
    assert found and found.has_image(IMAGE) and not found.has_image("cd" * 32)
    assert found.objects == {place: gone.keyed(IMAGE)}
    kinds = {t: found.found(t) for t in (IMAGE, "a.tar::b.jpg", "a cat", caption_id("a cat"), "a")}
    assert [*kinds.values()] == ["image", "name", "caption", "caption", None]


def test_another_store_has_another_secret(store, tmp_path):
    one = tombstones.open_for_writing(store)
    other = tombstones.open_for_writing(FolderStore(str(tmp_path / "other")))
    assert one.keyed(IMAGE) != other.keyed(IMAGE)
    assert tombstones.open_for_writing(store).secret == one.secret


def test_adding_twice_writes_once(store):
    gone = tombstones.open_for_writing(store)
    assert tombstones.add(store, gone, images=hashes(gone, IMAGE))
    gone = tombstones.load(store)
    assert not tombstones.add(store, gone, images=hashes(gone, IMAGE))
    assert len(files(store)) == 1


def test_a_name_is_released_until_it_is_forgotten_again(store):
    gone = tombstones.open_for_writing(store)
    (name,) = hashes(gone, "a.jpg")
    tombstones.add(store, gone, images=hashes(gone, IMAGE), names=[name])
    tombstones.add(store, tombstones.load(store), released=[name, "never forgotten"])
    released = tombstones.load(store)
    assert released.names == frozenset() and released.has_image(IMAGE)
    tombstones.add(store, released, names=[name])
    assert tombstones.load(store).names == {name}


def test_the_digest_tells_what_is_forgotten_not_where_it_was_met(store):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=hashes(gone, IMAGE))
    first = tombstones.load(store)
    tombstones.add(store, first, names=hashes(gone, "x"), objects={"p": first.keyed(IMAGE)})
    second = tombstones.load(store)
    assert second.digest == first.digest and second.state != first.state
    tombstones.add(store, second, objects={"q": None})
    assert tombstones.load(store).digest != first.digest


DAMAGE = {
    "empty": lambda body: b"",
    "half": lambda body: body[: len(body) // 2],
    "no JSON object": lambda body: b"[1]",
    "a hash less": lambda body: body.replace(b"images", b"imagez"),
    "an edited list": lambda body: json.dumps({**json.loads(body), "images": []}).encode(),
    "no seal": lambda body: json.dumps({k: v for k, v in json.loads(body).items() if k != "seal"})
    .encode(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_stops_everything(damage, store):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=hashes(gone, IMAGE))
    (name,) = files(store)
    store.put(name, damage(store.get(name)))
    with pytest.raises(PairmillError, match="damaged"):
        tombstones.load(store)


def test_a_lost_or_replaced_secret_stops_everything(store):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=hashes(gone, IMAGE))
    for secret, said in ((b"00" * 32, "another secret"), (b"short", "damaged")):
        store.put(tombstones.SECRET, secret)
        with pytest.raises(PairmillError, match=said):
            tombstones.load(store)
    store.delete(tombstones.SECRET)
    with pytest.raises(PairmillError, match="is missing"):
        tombstones.load(store)


def test_a_newer_format_and_a_strange_file_say_so(store):
    gone = tombstones.open_for_writing(store)
    tombstones.add(store, gone, images=hashes(gone, IMAGE))
    (name,) = files(store)
    body = store.get(name)
    store.put(name, body.replace(b'"format":1', b'"format":2'))
    with pytest.raises(PairmillError, match="format 2"):
        tombstones.load(store)
    store.put(name, body)
    store.put(f"{tombstones.PREFIX}notes.txt", b"")
    with pytest.raises(PairmillError, match="no tombstone file"):
        tombstones.load(store)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sets(NAMES, min_size=1)), max_size=8))
def test_names_are_those_forgotten_and_not_released_since(tmp_path_factory, steps):
    store = FolderStore(str(tmp_path_factory.mktemp("walk")))
    expected: set[str] = set()
    for is_release, texts in steps:
        gone = tombstones.open_for_writing(store)
        names = set(hashes(gone, *texts))
        if is_release:
            tombstones.add(store, gone, released=names)
            expected -= names
        else:
            tombstones.add(store, gone, names=names)
            expected |= names
        assert tombstones.load(store).names == expected
