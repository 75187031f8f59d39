"""Snapshot: which files are images, which are captions, and which are neither."""

import pytest

from infra import tables
from infra.errors import ConfigError, PairmillError
from tests.conftest import make_build
from tests.corpora import fill, jsonl, listed, parquet, rows

# The stage looks at names alone, so any bytes do for a picture.
PICTURES = {"a.jpg": b"1", "b.PNG": b"2", "sub/c.webp": b"3"}


def fates(build, snap) -> dict[str, str]:
    """The kind of each source and the rule of everything else."""
    kinds = {row["key"]: row["kind"] for row in rows(build, snap.listing)}
    return kinds | {row["id"]: row["rule"] for row in rows(build, snap.drops)}


def captions(build, snap) -> list[tuple[str, str, str | None]]:
    found = rows(build, snap.file_captions)
    return sorted((row["key"], row["caption"], row["licence"]) for row in found)


def test_an_empty_corpus_is_empty_tables(build):
    snap = listed(build)
    assert [table.rows for table in snap] == [0, 0, 0, 0]
    assert rows(build, snap.listing) == []


def test_every_file_has_a_kind_or_a_fate(build):
    fill(build, PICTURES)
    fill(
        build,
        {
            "00000.tar": b"t",
            "00000.parquet": b"of img2dataset",
            "00000_stats.json": b"{}",
            "images.parquet": b"p",
            "noextension": b"?",
            ".hidden": b"?",
            "notes.md": b"words",
            "a.txt": b"a cat",
            "a.json": b"{}",
            "d.txt": b"of no picture",
            "noextension.txt": b"a dog",
            "x.tar.gz": b"z",
            "old.jxl": b"not read yet",
        },
    )
    assert fates(build, listed(build)) == {
        "a.jpg": "loose",
        "b.PNG": "loose",
        "sub/c.webp": "loose",
        "00000.tar": "tar",
        "00000.parquet": "metadata",
        "00000_stats.json": "metadata",
        "images.parquet": "parquet",
        "noextension": "loose",
        ".hidden": "loose",
        "notes.md": "ignored",
        "a.txt": "metadata",
        "a.json": "metadata",
        "d.txt": "ignored",
        "noextension.txt": "metadata",
        "x.tar.gz": "ignored",
        "old.jxl": "loose",
    }


def test_sidecars_belong_to_every_picture_of_that_name_whatever_its_case(build):
    fill(build, {"a.jpg": b"1", "a.png": b"2", "B.Jpg": b"3", "a.txt": b"x", "B.json": b"{}"})
    snap = listed(build)
    assert {row["key"]: row["sidecars"] for row in rows(build, snap.listing)} == {
        "B.Jpg": ["B.json"],
        "a.jpg": ["a.txt"],
        "a.png": ["a.txt"],
    }
    assert [row["rule"] for row in rows(build, snap.drops)] == ["metadata", "metadata"]


def test_a_changed_sidecar_makes_its_image_look_changed(build):
    def stamp() -> str:
        return rows(build, listed(build).listing)[0]["stamp"]

    fill(build, {"a.jpg": b"1"})
    seen = [stamp()]
    for text in ("a cat", "a dog"):
        fill(build, {"a.txt": text})
        seen.append(stamp())
    build.corpus.delete("a.txt")
    assert stamp() == seen[0] and len(set(seen)) == 3


CSV = "file_name,caption,licence\na.jpg,a cat,CC0\nb.PNG,b cat,\nsub/c.webp,,MIT\ngone.jpg,x,\n"
FOUND = [("a.jpg", "a cat", "CC0"), ("b.PNG", "b cat", None), ("sub/c.webp", "", "MIT")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("captions.csv", CSV),
        ("metadata.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        (
            "metadata.jsonl",
            jsonl(
                {"file_name": "a.jpg", "text": "a cat", "license": "CC0"},
                {"file_name": "b.PNG", "text": " b cat "},
                {"file_name": "sub/c.webp", "text": None, "license": "MIT"},
                {"file_name": "gone.jpg", "text": "x"},
                {"file_name": 17, "text": "x"},
                {"file_name": "\ud800.jpg", "text": "x"},
                {"file_name": "../../etc/passwd", "text": "x"},
            ),
        ),
        (
            "captions.parquet",
            parquet(
                {
                    "file_name": ["a.jpg", "b.PNG", "sub/c.webp", "gone.jpg", None],
                    "caption": ["a cat", "b cat", "", "x", "x"],
                    "licence": ["CC0", None, "MIT", None, None],
                }
            ),
        ),
    ],
)
def test_captions_are_found_in_files_of_the_usual_names(name, data, build):
    fill(build, PICTURES)
    fill(build, {name: data})
    snap = listed(build)
    assert captions(build, snap) == FOUND
    assert fates(build, snap)[name] == "metadata"


def test_an_image_may_have_several_captions_from_several_files(build):
    fill(build, PICTURES)
    fill(build, {"captions.csv": "file_name,caption\na.jpg,one\na.jpg,two\n"})
    fill(build, {"metadata.jsonl": jsonl({"file_name": "a.jpg", "captions": ["two", "three"]})})
    texts = [text for _, text, _ in captions(build, listed(build))]
    assert texts == ["one", "three", "two", "two"]


def test_a_name_is_sought_beside_its_file_and_then_from_the_root(build):
    fill(build, {"a.jpg": b"1", "set/a.jpg": b"2", "set/b.jpg": b"3", "c.jpg": b"4"})
    places = {"a.jpg": "beside", "./b.jpg": "dotted", "set/b.jpg": "whole", "c.jpg": "root"}
    lines = [f"{key},{text}\n" for key, text in {**places, "../a.jpg": "up"}.items()]
    fill(build, {"set/captions.csv": "file_name,caption\n" + "".join(lines)})
    assert captions(build, listed(build)) == [
        ("a.jpg", "up", None),
        ("c.jpg", "root", None),
        ("set/a.jpg", "beside", None),
        ("set/b.jpg", "dotted", None),
        ("set/b.jpg", "whole", None),
    ]


def test_files_and_columns_may_be_configured(build):
    fill(build, PICTURES)
    fill(build, {"labels.csv": "id,alt,rights\na.jpg,a cat,CC0\n", "captions.csv": CSV})
    snap = listed(
        build,
        captions=["labels.csv"],
        key_column="id",
        caption_column="alt",
        licence_column="rights",
    )
    assert captions(build, snap) == [("a.jpg", "a cat", "CC0")]
    assert fates(build, snap)["labels.csv"] == "metadata"
    assert fates(build, snap)["captions.csv"] == "ignored"


def test_a_file_of_the_usual_name_without_the_columns_is_ignored(build):
    fill(build, {"metadata.csv": "camera,lens\nx,y\n"})
    assert fates(build, listed(build)) == {"metadata.csv": "ignored"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"captions": ["none.csv"]}, r"names 'none\.csv', which the corpus does not hold"),
        ({"captions": ["labels.csv"]}, r"no rows with columns .*set corpus\.key_column"),
        ({"captions": ["labels.tsv"]}, r"labels\.tsv is no caption file"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(settings, said, build):
    fill(build, {**PICTURES, "labels.csv": "id,alt\na.jpg,x\n", "labels.tsv": "a\tb\n"})
    with pytest.raises(ConfigError, match=said):
        listed(build, **settings)


def test_a_broken_caption_file_says_its_line(build):
    fill(build, {"captions.csv": 'file_name,caption\na.jpg,fine\nb.jpg,"open\n'})
    with pytest.raises(PairmillError, match=r"captions\.csv, line 3: "):
        listed(build)


def test_captions_of_any_length_are_bounded(build):
    fill(build, PICTURES)
    fill(build, {"captions.csv": f"file_name,caption\na.jpg,{'x' * 100_000}\nb.PNG,short\n"})
    assert captions(build, listed(build)) == [("a.jpg", "", None), ("b.PNG", "short", None)]
    long = listed(build, max_caption_chars=100_000)
    assert [len(text) for _, text, _ in captions(build, long)] == [100_000, 5]


def test_an_unchanged_caption_file_is_not_read_again(build, monkeypatch):
    fill(build, PICTURES)
    fill(build, {"captions.csv": CSV})
    read, keys = type(build.corpus).get, []

    def noted(store, key, *more):
        keys.append(key)
        return read(store, key, *more)

    monkeypatch.setattr(type(build.corpus), "get", noted)
    first = listed(build)
    assert keys.count("captions.csv") == 1
    assert listed(build) == first and keys.count("captions.csv") == 1
    fill(build, {"captions.csv": CSV.replace("a cat", "a dog")})
    assert ("a.jpg", "a dog", "CC0") in captions(build, listed(build))


def test_the_same_files_are_the_same_tables_in_any_order(build, tmp_path, pool):
    fill(build, {**PICTURES, "captions.csv": CSV})
    other = make_build(tmp_path / "other", pool)
    fill(other, dict(reversed({**PICTURES, "captions.csv": CSV}.items())))
    for name in ("file_captions", "drops"):
        pair = [getattr(listed(one), name) for one in (build, other)]
        assert pair[0] == pair[1]
    keys = [tables.read(b.store, listed(b).listing, ["key"]).to_pylist() for b in (build, other)]
    assert keys[0] == keys[1]
