"""Corpora: where bytes are, and that nothing a container holds is lost without a word."""

import io
import tarfile

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import corpus
from infra.corpus import Bounds, RangeFile, Source
from infra.store import Location, NotFound, open_store
from tests import pictures
from tests.corpora import member, parquet, tar

JPEG = pictures.jpeg(16, 16)
PNG = pictures.png(16, 16)


class CountingStore:
    """A store that notes which ranges were read."""

    def __init__(self, store):
        self.store, self.reads, self.uri = store, [], store.uri

    def get(self, key, start=0, length=None):
        data = self.store.get(key, start, length)
        self.reads.append((start, len(data)))
        return data

    def head(self, key):
        return self.store.head(key)


@pytest.fixture
def store(tmp_path):
    return CountingStore(open_store(Location(uri=str(tmp_path))))


def put(store, key: str, data: bytes) -> Source:
    kinds = {".tar": "tar", ".parquet": "parquet"}
    stamp = store.store.put(key, data)
    return Source(key, kinds.get(corpus.extension(key), "loose"), stamp, len(data))


def items(store, *sources: Source, bounds: Bounds | None = None) -> list[tuple]:
    """(member, rule, bytes of an image or captions) of what is read."""
    found = corpus.read(store, sources, bounds or Bounds())
    return [(i.source.member, i.rule, i.data or i.text.captions) for i in found]


# Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("00001.jpg", "00001"),
        ("./00001.seg.json", "./00001"),
        ("/abs/../a.b/c.tar.gz", "/abs/../a.b/c"),
        ("a.jpg@1024", "a"),
        ("._a.jpg", "._a.jpg"),
        ("plain", "plain"),
    ],
)
def test_the_members_of_a_sample_share_the_name_up_to_its_first_dot(name, stem):
    assert corpus.sample_stem(name) == stem


def test_an_extension_is_lower_case_and_ignores_a_repeat_mark():
    names = ["a.JPG", "a.jpg@512", "a", ".jpg", "x.y/a", "a.tar.gz"]
    assert [corpus.extension(name) for name in names] == [".jpg", ".jpg", "", "", "", ".gz"]


def test_first_bytes_tell_pictures_of_every_kind_we_read():
    for name, make in pictures.READABLE.items():
        assert corpus.looks_like_image(make()[: corpus.HEAD]), name
    for head in (b"", b"BMX bikes", b"#!/bin/sh", b"\x89PN", b"RIFF0000WAVE", b"<svg"):
        assert not corpus.looks_like_image(head)


def test_the_first_object_of_an_image_is_where_its_bytes_are():
    objects = pl.DataFrame(
        {
            "key": ["b.jpg", "a.tar", "a.tar", "c.parquet", "d.txt"],
            "member": [None, "2.jpg", "1.jpg", "00000003", None],
            "stamp": ["s"] * 5,
            "offset": [None, 512, 2048, 3, None],
            "size": [9, 9, 9, 8, 7],
            "image_id": ["x", "x", "x", "y", None],
        }
    )
    assert corpus.sources(objects) == {
        "x": Source("a.tar", "tar", "s", 9, (), "1.jpg", 2048),
        "y": Source("c.parquet", "parquet", "s", 8, (), "00000003", 3),
    }


# Loose ---------------------------------------------------------------------------------------


def test_a_loose_image_comes_with_its_sidecars(store):
    source = put(store, "a.jpg", JPEG)
    put(store, "a.txt", b"a cat")
    put(store, "a.json", b'{"caption": "b cat"}')
    source = source._replace(sidecars=("a.txt", "a.json", "gone.txt"))
    assert items(store, source) == [
        (None, None, JPEG),
        (None, "sidecar", ("a cat",)),
        (None, "sidecar", ("b cat",)),
    ]


def test_a_sidecar_of_megabytes_is_not_read_to_its_end(store):
    source = put(store, "a.jpg", JPEG)._replace(sidecars=("a.txt",))
    put(store, "a.txt", "é".encode() * 3_000_000)
    found = list(corpus.read(store, [source], Bounds()))[1]
    assert found.text.refused == "caption_too_long"
    assert max(length for _, length in store.reads) <= corpus.MAX_TEXT + 1


def test_a_file_without_extension_is_an_image_by_its_first_bytes(store):
    sources = [put(store, "photo", PNG), put(store, "README", b"words")]
    assert items(store, *sources) == [(None, None, PNG), (None, "ignored", ())]


def test_a_file_over_the_bound_is_not_read(store):
    bounds = Bounds(max_bytes=100)
    sources = [put(store, "a.jpg", JPEG), put(store, "photo", JPEG), put(store, "data", b"x" * 200)]
    assert [rule for _, rule, _ in items(store, *sources, bounds=bounds)] == [
        "too_large",
        "too_large",
        "ignored",
    ]
    assert max(length for _, length in store.reads) == corpus.HEAD


def test_what_is_gone_has_vanished(store):
    absent = [Source(f"a.{kind}", "loose", "s", 9) for kind in ("jpg", "png")]
    absent += [Source("a.tar", "tar", "s", 9), Source("a.parquet", "parquet", "s", 9)]
    absent += [Source("a.tar", "tar", "s", 9, (), name, 0) for name in ("a.jpg", "a.txt")]
    absent += [Source("a.parquet", "parquet", "s", 9, (), "00000000", 0)]
    assert [rule for _, rule, _ in items(store, *absent)] == ["vanished"] * 7
    for source in (absent[0], absent[-1]):
        with pytest.raises(NotFound):
            corpus.fetch(store, source)


# Tars ----------------------------------------------------------------------------------------


def test_a_tar_is_read_in_one_pass_of_large_ranges(store):
    members = [(f"{n:05d}.jpg", JPEG) for n in range(500)]
    source = put(store, "a.tar", tar(members))
    found = items(store, source)
    assert [name for name, _, _ in found] == [name for name, _ in members]
    assert all(rule is None and data == JPEG for _, rule, data in found)
    assert sum(length for _, length in store.reads) < 1.1 * source.size
    assert len(store.reads) <= 2


def test_its_index_reads_headers_and_names_the_same_members(store):
    big = b"\xff\xd8\xff" + bytes(300_000)
    source = put(store, "a.tar", tar([("a.jpg", big), ("a.txt", b"a"), ("d", b""), ("a.jpg", big)]))
    index = corpus.index_tar(store, source)
    assert sum(length for _, length in store.reads) < source.size / 2
    assert [s.kind for s in index] == ["tar", "tar", "other", "tar"]
    assert items(store, *index) == items(store, source)
    assert corpus.fetch(store, index[3]) == big


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read(format, store):
    names = ["日本/猫.jpg", "a" * 90 + ".jpg"]
    names += ["long/" * 40 + "b.jpg"] if format != tarfile.USTAR_FORMAT else []
    source = put(store, "a.tar", tar([(name, JPEG) for name in names], format))
    assert items(store, source) == [(name, None, JPEG) for name in names]
    assert items(store, *corpus.index_tar(store, source)) == items(store, source)


def test_hostile_names_are_data(store):
    names = ["/etc/passwd.jpg", "../../x.jpg", "C:\\x.jpg", "a\nb.jpg", "./-rf.jpg"]
    source = put(store, "a.tar", tar([(name, JPEG) for name in names]))
    assert [name for name, _, _ in items(store, source)] == names


def test_a_name_that_is_not_utf_8_can_be_stored(store):
    data = tar([("caf\udce9.jpg", JPEG)], tarfile.GNU_FORMAT)
    ((name, rule, _),) = items(store, put(store, "a.tar", data))
    assert (name, rule) == ("caf\\xe9.jpg", None)
    assert name.encode()


def test_a_name_of_megabytes_is_cut(store):
    names = [f"{'n' * 3_000_000}{end}.jpg" for end in "ab"]
    found = items(store, put(store, "a.tar", tar([(name, JPEG) for name in names])))
    assert [rule for _, rule, _ in found] == ["ignored", "ignored"]
    assert len({name for name, _, _ in found}) == 2
    assert max(len(name) for name, _, _ in found) < 1_100


def test_repeated_names_are_told_apart_and_found_again(store):
    twice = [("a.jpg", JPEG), ("a.jpg", PNG), ("a.txt", b"one"), ("a.txt", b"two")]
    source = put(store, "a.tar", tar(twice))
    found = items(store, source)
    assert [data for _, _, data in found] == [JPEG, PNG, ("one",), ("two",)]
    assert len({name for name, _, _ in found}) == 4
    assert items(store, *corpus.index_tar(store, source)) == found


def test_what_is_no_plain_file_is_ignored_not_followed(store):
    odd = [
        (member("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (member("hard.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"), b""),
        (member("folder.jpg", type=tarfile.DIRTYPE), b""),
        (member("pipe.jpg", type=tarfile.FIFOTYPE), b""),
        ("notes.md", b"words"),
        ("a.jpg", JPEG),
    ]
    source = put(store, "a.tar", tar(odd))
    rules = [rule for _, rule, _ in items(store, source)]
    assert rules == ["ignored"] * 5 + [None]
    assert items(store, *corpus.index_tar(store, source)) == items(store, source)


def test_a_sparse_member_does_not_blow_up(store):
    headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": str(1 << 40)}
    sparse = member("bomb.jpg", pax_headers=headers)
    found = items(store, put(store, "a.tar", tar([(sparse, b"x" * 10), ("a.jpg", JPEG)])))
    assert [rule for _, rule, _ in found] == ["ignored", None]


def large(name: str, size: int) -> bytes:
    """A header that promises `size` bytes, and a file that ends there."""
    header = bytearray(member(name, size=0).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big", signed=True)
    if size < 0:
        header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [1 << 33, 1 << 62, 1 << 70, -512, -(1 << 40)])
@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a.bin"])
def test_an_absurd_size_in_a_header_ends_the_tar_with_a_word(name, size, store):
    data = tar([("first.jpg", JPEG)])[: 512 + 1024] + large(name, size)
    found = items(store, put(store, "a.tar", data))
    assert found[0][1] is None and found[-1][:2] == (None, "unreadable")
    assert all(
        rule in (None, "too_large", "ignored", "sidecar", "unreadable") for _, rule, _ in found
    )


def test_an_absurd_size_of_a_long_name_is_not_read(store):
    header = bytearray(large("././@LongLink", 1 << 40))
    header[156:157] = b"L"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    found = items(store, put(store, "a.tar", bytes(header) + bytes(2000)))
    assert [rule for _, rule, _ in found][-1] in ("unreadable", "ignored")


def cut_tar(share: float) -> bytes:
    data = tar([(f"{n}.jpg", JPEG) for n in range(9)])
    return data[: int(9 * (512 + -(-len(JPEG) // 512) * 512) * share)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda: cut_tar(0.5),
        lambda: cut_tar(0.95),
        lambda: cut_tar(1),
        lambda: cut_tar(0.95)[:-100],
        lambda: tar([("a.jpg", JPEG)]) + tar([("b.jpg", JPEG)]),
        lambda: pictures.scribbled(tar([("a.jpg", JPEG), ("b.jpg", JPEG)]), 512 + 1024 + 100, 60),
    ],
    ids=["half", "nearly", "no end mark", "in a header", "joined", "second header damaged"],
)
def test_a_damaged_tar_keeps_its_good_members_and_says_that_it_is_damaged(damage, store):
    assert -(-len(JPEG) // 512) * 512 == 1024
    found = items(store, put(store, "a.tar", damage()))
    assert len(found) >= 2
    assert [rule for _, rule, _ in found] == [None] * (len(found) - 1) + ["unreadable"]
    assert found[-1][0] is None


@pytest.mark.parametrize("data", [b"", b"not a tar", b"x" * 5000, JPEG])
def test_what_is_no_tar_is_unreadable(data, store):
    assert items(store, put(store, "a.tar", data)) == [(None, "unreadable", ())]


def test_an_empty_tar_is_ignored(store):
    assert items(store, put(store, "a.tar", tar([]))) == [(None, "ignored", ())]


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 4000), junk=st.binary(min_size=1, max_size=40))
def test_no_damage_raises(at, junk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    store = open_store(Location(uri=str(folder)))
    data = bytearray(tar([("a" * 120 + ".jpg", JPEG), ("b.txt", b"words"), ("c.jpg", JPEG)]))
    data[at : at + len(junk)] = junk
    source = Source("a.tar", "tar", store.put("a.tar", bytes(data)), len(data))
    for item in corpus.read(store, [source], Bounds()):
        assert item.rule in (None, "sidecar", "ignored", "unreadable", "too_large")


# Parquet -------------------------------------------------------------------------------------


def huggingface(images: list, path: str = "x.jpg") -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([None if i is None else {"bytes": i, "path": path} for i in images], kind)


def test_parquet_as_datasets_stores_images(store):
    data = parquet(
        {
            "image": huggingface([JPEG, None, PNG, b""]),
            "text": ["a", "b", "c", None],
            "license": ["CC0", None, "MIT", ""],
            "label": [1, 2, 3, 4],
        },
        row_group_size=2,
    )
    found = list(corpus.read(store, [put(store, "a.parquet", data)], Bounds()))
    assert [item.source.member for item in found] == [f"{n:08d}" for n in range(4)]
    assert [item.data for item in found] == [JPEG, b"", PNG, b""]
    assert [item.text.captions for item in found] == [("a",), ("b",), ("c",), ()]
    assert [item.text.licence for item in found] == ["CC0", None, "MIT", None]


def test_parquet_with_a_plain_binary_column_and_lists_of_captions(store):
    data = parquet({"jpg": [JPEG, PNG], "captions": [["a", "b"], None]})
    found = list(corpus.read(store, [put(store, "a.parquet", data)], Bounds()))
    assert [(item.data, item.text.captions) for item in found] == [(JPEG, ("a", "b")), (PNG, ())]


def test_the_image_column_is_the_one_named_so():
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"audio": kind, "image": kind, "png": pa.binary()})
    assert corpus.image_column(schema) == ("image", True)
    assert corpus.image_column(pa.schema({"x": kind})) == ("x", True)
    assert corpus.image_column(pa.schema({"x": pa.binary(), "img": pa.large_binary()})) == (
        "img",
        False,
    )
    assert corpus.image_column(pa.schema({"x": pa.binary(), "image": pa.string()})) is None


def test_captions_of_parquet_may_have_a_column_of_another_name(store):
    data = parquet({"image": huggingface([JPEG]), "alt": ["a cat"], "text": ["a dog"]})
    bounds = Bounds(columns=corpus.Columns("", "alt", None))
    (item,) = corpus.read(store, [put(store, "a.parquet", data)], bounds)
    assert item.text.captions == ("a cat",)


def test_one_caption_that_is_not_utf_8_spoils_no_other(store):
    bad = pa.array([b"ok", b"\xff"]).view(pa.string())
    data = parquet({"image": huggingface([JPEG, PNG]), "text": bad})
    found = list(corpus.read(store, [put(store, "a.parquet", data)], Bounds()))
    assert [(item.data, item.text.captions) for item in found] == [(JPEG, ("ok",)), (PNG, ())]
    assert found[1].text.refused == "caption_unreadable"


def test_parquet_larger_than_a_window_is_read_whole(store):
    # Arrow takes a short answer for the end of the file.
    images = [bytes([n]) * 150_000 for n in range(64)]
    data = parquet({"image": images, "text": [str(n) for n in range(64)]}, 10, compression="none")
    found = items(store, put(store, "a.parquet", data))
    assert [bytes(data) for _, _, data in found] == images


def test_rows_are_fetched_again_by_their_row_group(store):
    images = [bytes([n]) * 300_000 for n in range(40)]
    data = parquet({"image": images}, row_group_size=10, compression="none")
    source = put(store, "a.parquet", data)
    every = [i.source for i in corpus.read(store, [source], Bounds())]
    store.reads.clear()
    found = items(store, *[every[n] for n in (33, 2, 35)])
    assert [(name, data[:1]) for name, _, data in found] == [
        ("00000002", b"\x02"),
        ("00000033", b"\x21"),
        ("00000035", b"\x23"),
    ]
    assert sum(length for _, length in store.reads) < 0.7 * source.size
    assert corpus.fetch(store, every[7]) == images[7]


def test_rows_of_a_file_that_became_another_have_vanished(store):
    source = put(store, "a.parquet", parquet({"image": [JPEG, PNG]}))
    first, second = (i.source for i in corpus.read(store, [source], Bounds()))
    put(store, "a.parquet", parquet({"image": [JPEG]}))
    assert [rule for _, rule, _ in items(store, first, second)] == [None, "vanished"]
    put(store, "a.parquet", b"other")
    assert [rule for _, rule, _ in items(store, first, second)] == ["vanished"] * 2


def test_an_image_over_the_bound_is_too_large(store):
    source = put(store, "a.parquet", parquet({"image": [JPEG, b"x" * 9000]}))
    rules = [rule for _, rule, _ in items(store, source, bounds=Bounds(max_bytes=8000))]
    assert rules == [None, "too_large"]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "unreadable"),
        (b"not parquet" * 100, "unreadable"),
        (b"PAR1" + bytes(50) + b"PAR1", "unreadable"),
        (parquet({"image": huggingface([JPEG] * 9)})[:-20], "unreadable"),
        (parquet({"a": [1, 2]}), "ignored"),
        (parquet({"image": huggingface([])}), "ignored"),
    ],
)
def test_parquet_that_is_none_or_holds_no_images_is_a_fate(data, rule, store):
    assert [row[:2] for row in items(store, put(store, "a.parquet", data))] == [(None, rule)]


def test_damaged_pages_are_a_fate(store):
    data = bytearray(parquet({"image": [JPEG] * 200}, 50, compression="zstd"))
    for at in range(600, len(data) - 1500, 97):
        data[at] ^= 0xFF
    assert items(store, put(store, "a.parquet", bytes(data)))[-1][:2] == (None, "unreadable")


# Ranges --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, 120), st.integers(-1, 150)), max_size=8),
    window=st.integers(1, 60),
)
def test_a_range_file_reads_as_the_file_does(moves, window, tmp_path_factory):
    data = bytes(range(100))
    store = open_store(Location(uri=str(tmp_path_factory.mktemp("ranges"))))
    store.put("x", data)
    plain, ranged = io.BytesIO(data), RangeFile(store, "x", len(data), window)
    for at, size in moves:
        assert ranged.seek(at) == plain.seek(at)
        assert ranged.read(size) == plain.read(size)
        assert ranged.tell() == plain.tell()


def test_a_range_file_refuses_absurd_reads(store):
    put(store, "x", bytes(1000))
    file = RangeFile(store, "x", 1000, most=100)
    assert len(file.read(100)) == 100
    with pytest.raises(ValueError, match="asks for 900 bytes"):
        file.read()
    with pytest.raises(ValueError, match="no byte"):
        file.seek(-1)


def test_results_come_in_order_and_not_far_ahead():
    started = []

    def slow(n: int) -> int:
        started.append(n)
        return n

    found = corpus.ahead(slow, iter(range(100)), 4)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    assert max(started) <= 7
    assert list(found) == list(range(3, 100))
