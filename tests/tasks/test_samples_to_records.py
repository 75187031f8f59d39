"""The frame of every recipe: images taken, samples recorded, and one fate for each of all."""

import pytest

from infra.errors import PairmillError
from infra.tables import Table
from tasks.account_for_samples import account_for_samples
from tasks.record_samples import RecordParams, record_samples
from tasks.take_images import take_images
from tests.tasks.examples import put, rows
from tests.tasks.tables_of_samples import samples_of

DROPS = "level id stage rule value detail"


def test_every_image_is_a_sample_with_its_caption_of_least_id(build):
    images = put(build, "images", "image_id", [("a",), ("b",), ("c",)])
    named = put(build, "image_captions", "image_id caption_id",
                [("a", "2"), ("a", "1"), ("b", "2"), ("gone", "1")])  # fmt: skip
    captions = put(build, "captions", "caption_id text", [("1", "one"), ("2", "two")])
    taken = take_images(build, images, named, captions)
    assert [(r["sample_id"], r["image_id"], r["caption"]) for r in rows(build, taken.samples)] == [
        ("a", "a", "one"), ("b", "b", "two"), ("c", "c", None),
    ]  # fmt: skip


def test_no_image_is_no_sample(build):
    empty = [put(build, name, columns, []) for name, columns in (
        ("images", "image_id"), ("image_captions", "image_id caption_id"),
        ("captions", "caption_id text"))]  # fmt: skip
    assert take_images(build, *empty).samples.rows == 0


def recorded(build, count, validation):
    pictures = [(f"i{n}", f"{n}.jpg", None, "CC0-1.0" if n else None) for n in range(count)]
    images = put(build, "images", "image_id key member licence", pictures)
    given = samples_of(
        build, [(f"s{n}", f"i{n // 2}") for n in range(2 * count)], "sample_id image_id"
    )
    return rows(build, record_samples(build, given, images, RecordParams(validation)).records)


def test_a_record_says_where_its_picture_is_under_which_licence(build):
    first, *_, last = sorted(recorded(build, 3, 0), key=lambda row: row["sample_id"])
    assert (first["key"], first["licence"], first["split"]) == ("0.jpg", None, "train")
    assert (last["key"], last["licence"]) == ("2.jpg", "CC0-1.0")


def test_all_records_of_an_image_are_on_one_side_and_stay_there(build):
    few, many = (recorded(build, count, 2_000) for count in (100, 300))
    sides = {(row["image_id"], row["split"]) for row in many}
    assert len(sides) == 300 and {row["sample_id"] for row in few} <= {r["sample_id"] for r in many}
    assert {(row["image_id"], row["split"]) for row in few} <= sides
    share = sum(split == "validation" for _, split in sides) / 300
    assert 0.1 < share < 0.3  # four standard deviations about a fifth
    assert {row["split"] for row in recorded(build, 50, 0)} == {"train"}


@pytest.fixture
def accounted(build):
    """Fates of three pictures, one of which is broken, and of a file of records."""

    def run(records, *drops, usable=("a", "b"), seen=()):
        objects = put(build, "objects", "key member image_id",
                      [("a.jpg", None, "a"), ("copy.jpg", None, "a"), ("b.jpg", None, "b"),
                       ("c.jpg", None, "c")])  # fmt: skip
        images = put(build, "images", "image_id", [(name,) for name in usable])
        files = put(build, "files", "key stamp", [("r.json", "1")])
        gone = [("image", "c", "describe", "unreadable", None, None)]
        gone += [
            ("object", name, "snapshot", "no_image", None, None) for name in ("r.json", "x.md")
        ]
        lost = put(build, "drops", DROPS, gone)
        given = {"describe": lost} | {
            f"stage {at}": put(build, "drops", DROPS, rows_) for at, rows_ in enumerate(drops)
        }
        kept = samples_of(build, records, "sample_id image_id")
        ways = {"import": samples_of(build, seen, "sample_id image_id"), "kept": kept}
        found = account_for_samples(build, objects, images, files, ways, kept, given)
        fates = {(row["level"], row["id"]): row["fate"] for row in rows(build, found.fates)}
        return fates, [row["image_id"] for row in rows(build, found.eligible)]

    return run


def lost(*names, stage="s", rule="r"):
    return [("sample", name, stage, rule, None, None) for name in names]


def test_every_object_image_and_sample_has_one_fate(accounted):
    fates, eligible = accounted([("1", "a"), ("2", "a")], lost("3"), lost("4", rule="q"))
    assert fates == {
        ("sample", "1"): "recorded", ("sample", "2"): "recorded", ("sample", "3"): "r",
        ("sample", "4"): "q", ("image", "a"): "recorded", ("image", "b"): "without_record",
        ("image", "c"): "unreadable", ("object", "a.jpg"): "recorded",
        ("object", "copy.jpg"): "recorded", ("object", "b.jpg"): "without_record",
        ("object", "c.jpg"): "unreadable", ("object", "r.json"): "metadata",
        ("object", "x.md"): "no_image",
    }  # fmt: skip
    assert eligible == ["a", "b"]


def test_the_same_drop_told_twice_is_one(accounted):
    fates, _ = accounted([("1", "a")], lost("3"), lost("3"))
    assert fates["sample", "3"] == "r"


def test_without_records_everything_still_has_a_fate(accounted):
    fates, _ = accounted([])
    assert fates["image", "a"] == fates["image", "b"] == "without_record"


@pytest.mark.parametrize(
    ("records", "drops"),
    [
        ([("1", "a")], [lost("1")]),  # dropped and recorded
        ([], [lost("1"), lost("1", stage="t")]),  # dropped by two
        ([], [lost("1"), lost("1", rule="q")]),
    ],
)
def test_a_sample_with_two_fates_ends_the_build(accounted, records, drops):
    with pytest.raises(PairmillError, match="don't balance: 0 have none, 2 have several"):
        accounted(records, *drops)


def test_a_sample_that_is_nowhere_any_more_ends_the_build(accounted):
    seen = [("1", "a"), ("2", "a"), ("2@64", "a"), ("3", "b")]
    assert accounted([("1", "a")], lost("2", "3"), seen=seen)[0]["sample", "2"] == "r"
    with pytest.raises(PairmillError, match=r"don't balance: 1 have none, 0 have several \(3\)"):
        accounted([("1", "a")], lost("2"), seen=seen)


def test_an_image_that_nobody_knows_ends_the_build(accounted):
    with pytest.raises(PairmillError, match="don't balance: 1 have none"):
        accounted([], usable=("a",))


def test_an_empty_corpus_has_no_fates(build):
    empty = [Table(name) for name in ("objects", "images", "files")]
    kept = samples_of(build, [], "sample_id image_id")
    found = account_for_samples(build, *empty, {"kept": kept}, kept, {"none": Table("drops")})
    assert (found.fates.rows, found.eligible.rows) == (0, 0)
