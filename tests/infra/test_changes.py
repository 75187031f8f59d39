"""Differences of two versions: each row that differs, with the one reason that is told."""

from typing import Any

import polars as pl
import pytest

from infra import changes
from infra.changes import Side

BAND = {"space": "look", "low": 700, "high": 900}


def fate(
    level: str, name: str, said: str, value: Any = None, detail: Any = None, image: Any = None
):
    image = name if level == "image" else image
    return {
        "level": level, "id": name, "fate": said, "stage": "s", "rule": None, "value": value,
        "detail": detail, "image_id": image,
    }  # fmt: skip


def pair(name: str, score: int = 800, rank: int = 1, negatives: str = "a") -> dict[str, Any]:
    query, target = name.split(">")
    tie = {"space": "look", "score": score, "rank": rank, "in_band": True}
    return {
        "pair_id": name, "query": query, "target": target, "ties": [tie],
        "negatives": list(negatives),
    }  # fmt: skip


def version(
    fates: list[dict[str, Any]],
    pairs: list[dict[str, Any]] | None = None,
    labelled: dict[str, str] | None = None,
    band: dict[str, Any] | None = None,
    cut: int | None = 0,
    **config: Any,
) -> Side:
    """A side of literal rows; `labelled` gives pairs their instruction, and so their record."""
    pairs, labelled = pairs or [], labelled or {}
    rows = [*fates]
    rows += [
        fate("pair", p["pair_id"], "published" if p["pair_id"] in labelled else "no_caption")
        for p in pairs
    ]
    records = [
        {**p, "instructions": [labelled[p["pair_id"]]], "split": "train"}
        for p in pairs
        if p["pair_id"] in labelled
    ]
    manifest = {
        "version": 1, "config": {"dedup": {}, "pairs": {}, **config}, "bands": [band or BAND],
        "clip_score_cut": cut,
    }  # fmt: skip
    kinds = {"value": pl.Int64, "detail": pl.String, "image_id": pl.String, "rule": pl.String}
    schema = {name: kinds.get(name, pl.String) for name in fate("object", "", "")}
    return changes.side(
        manifest,
        pl.DataFrame(rows, schema=schema),
        pl.DataFrame(records),
        pl.DataFrame(pairs) if pairs else None,
    )


def said(old: Side, new: Side, level: str) -> list[tuple[Any, ...]]:
    rows = changes.between(old, new).filter(pl.col("level") == level)
    return list(rows.select("id", "change", "reason", "other").iter_rows())


def images(*rows: tuple[Any, ...], **more: Any) -> Side:
    return version([fate("image", *row) for row in rows], **more)


DUPLICATE = ("a", "near_duplicate", 3, "x")


@pytest.mark.parametrize(
    ("old", "new", "reason", "other"),
    [
        ([], [("a", "unpaired")], "arrived", None),
        ([("a", "unpaired")], [], "left the corpus", None),
        ([("a", "unpaired")], [("a", "paired")], "in a record now", None),
        ([("a", "paired")], [("a", "unpaired")], "in no record any more", None),
        (
            [("a", "paired")], [DUPLICATE, ("x", "paired")],
            "near-duplicate of an image that arrived", "x",
        ),
        (
            [("a", "paired"), ("x", "near_duplicate", 3, "a")], [DUPLICATE, ("x", "paired")],
            "its own survivor changed", "x",
        ),
        (
            [("a", "paired"), ("x", "paired")], [DUPLICATE, ("x", "paired")],
            "near-duplicate of an image that comes first now", "x",
        ),
        (
            [DUPLICATE, ("x", "paired")], [("a", "unpaired")],
            "the image it duplicates left", "x",
        ),
        (
            [DUPLICATE, ("x", "paired")],
            [("a", "near_duplicate", 3, "y"), ("y", "paired")],
            "another survivor: the old one left", "y",
        ),
        (
            [DUPLICATE, ("x", "paired")],
            [("a", "near_duplicate", 2, "y"), ("y", "paired"), ("x", "near_duplicate", 2, "y")],
            "another survivor: it arrived", "y",
        ),
        ([("a", "unpaired")], [("a", "low_clip_score", -7)], "its caption fits worse", None),
        ([("a", "unpaired")], [("a", "low_clip_score", 7)], "the caption cut moved", None),
        ([("a", "low_clip_score", 15)], [("a", "unpaired")], "the caption cut moved", None),
        ([("a", "low_clip_score", -7)], [("a", "unpaired")], "its caption fits better", None),
        (
            [("a", "low_clip_score", -7)], [("a", "low_clip_score", -8)],
            "its caption's fit moved", None,
        ),
        ([("a", "too_small", 9)], [("a", "unpaired")], "too_small became unpaired", None),
    ],
)  # fmt: skip
def test_what_became_of_an_image(old, new, reason, other) -> None:
    found = said(images(*old), images(*new, cut=10), "image")
    assert [(row[2], row[3]) for row in found if row[0] == "a"] == [(reason, other)]


def test_a_changed_relation_is_told_as_such() -> None:
    old = images(("a", "paired"), ("x", "paired"), dedup={"radius": 2})
    new = images(DUPLICATE, ("x", "paired"), dedup={"radius": 4})
    assert said(old, new, "image") == [("a", "changed", "near-duplicate since dedup changed", "x")]


def objects(*rows: tuple[str, str, Any]) -> Side:
    kept = [fate("object", name, said, image=image) for name, said, image in rows]
    ids = {image for _, _, image in rows if image}
    return version([*kept, *(fate("image", image, "unpaired") for image in ids)])


def test_objects_that_come_go_and_are_renamed() -> None:
    old = objects(
        ("gone", "unpaired", "1"), ("kept", "unpaired", "2"), ("old name", "unpaired", "3"),
        ("bytes", "unpaired", "4"), ("copy", "exact_duplicate", "2"), ("note", "ignored", None),
    )  # fmt: skip
    new = objects(
        ("new", "unpaired", "9"), ("kept", "unpaired", "2"), ("new name", "unpaired", "3"),
        ("bytes", "unpaired", "5"), ("more", "exact_duplicate", "2"), ("note", "metadata", None),
        ("third", "exact_duplicate", "5"),
    )  # fmt: skip
    assert [row[:3] for row in said(old, new, "object")] == [
        ("bytes", "changed", "new bytes under its name"),
        ("copy", "removed", "renamed: its old name"),
        ("gone", "removed", "left the corpus"),
        ("more", "added", "renamed: its new name"),
        ("new", "added", "arrived"),
        ("new name", "added", "renamed: its new name"),
        ("note", "changed", "ignored became metadata"),
        ("old name", "removed", "renamed: its old name"),
        ("third", "added", "arrived"),
    ]


def test_a_forgotten_object_is_told_without_its_name() -> None:
    old, new = objects(("a.png", "unpaired", "1")), objects(("5f0c", "forgotten", None))
    assert said(old, new, "object") == [
        ("5f0c", "added", "forgotten", None),
        ("a.png", "removed", "left the corpus or was forgotten", None),
    ]


def test_a_forgotten_image_did_not_arrive() -> None:
    old, new = images(("a", "unpaired")), images(("5f0c", "forgotten"))
    assert [row[2] for row in said(old, new, "image")] == [
        "forgotten",
        "left the corpus or was forgotten",
    ]


ALIVE = [fate("image", name, "unpaired") for name in "ab"]
NARROW = {**BAND, "low": 810}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (version(ALIVE[:1]), version(ALIVE, [pair("a>b")]), "an image of it arrived"),
        (version(ALIVE, [pair("a>b")]), version(ALIVE[:1]), "an image of it left the corpus"),
        (
            version([ALIVE[0], fate("image", "b", "low_clip_score", 1)]),
            version(ALIVE, [pair("a>b")]),
            "an image of it was dropped before",
        ),
        (
            version(ALIVE, [pair("a>b")]),
            version([ALIVE[0], fate("image", "b", "near_duplicate", 1, "a")]),
            "an image of it is dropped now",
        ),
        (version(ALIVE, band=NARROW), version(ALIVE, [pair("a>b")]), "a band moved"),
        (version(ALIVE, [pair("a>b")]), version(ALIVE, band=NARROW), "a band moved"),
        (
            version(ALIVE, [pair("a>b")]), version(ALIVE, neighbours={"k": 9}),
            "settings of neighbours changed",
        ),
        (version(ALIVE), version(ALIVE, [pair("a>b")]), "it ranks before others now"),
        (version(ALIVE, [pair("a>b")]), version(ALIVE), "others rank before it now"),
        (
            version(ALIVE, [pair("a>b")]), version(ALIVE, [pair("a>b")], {"a>b": "Make it red"}),
            "labelled now",
        ),
        (
            version(ALIVE, [pair("a>b")], {"a>b": "Make it red"}), version(ALIVE, [pair("a>b")]),
            "no label any more",
        ),
        (
            version(ALIVE, [pair("a>b")]), version(ALIVE, [pair("a>b", rank=2)]),
            "its scores or ranks moved",
        ),
        (
            version(ALIVE, [pair("a>b")]), version(ALIVE, [pair("a>b", negatives="ac")]),
            "its negatives changed",
        ),
    ],
)  # fmt: skip
def test_what_became_of_a_pair(old, new, reason) -> None:
    assert [row[2] for row in said(old, new, "pair")] == [reason]


def test_a_space_that_is_new_or_no_more_is_no_obstacle() -> None:
    other = {**BAND, "space": "words"}
    one, two = version(ALIVE, [pair("a>b")]), version(ALIVE, [pair("a>b")], band=other)
    two = two._replace(
        pairs=two.pairs.with_columns(
            pl.col("ties").list.eval(
                pl.element().struct.with_fields(space=pl.lit("words"))  # type: ignore[arg-type]
            )
        )
    )
    for old, new in ((one, two), (two, one)):
        assert [row[2] for row in said(old, new, "pair")] == ["its scores or ranks moved"]
    gone = said(one, version(ALIVE, band=other), "pair")
    assert [row[2] for row in gone] == ["a space came or went"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ([], [("s", "recorded", None, None, "a")], "its image arrived"),
        ([], [("r#1", "no_such_image", None, "a.jpg")], "its record names no image that is there"),
        ([], [("r#1", "malformed_record")], "a new record, or another answer about an old one"),
        ([("s", "recorded", None, None, "a")], [], "its image left the corpus"),
        ([("s", "crowd")], [("s", "recorded")], "crowd became recorded"),
    ],
)
def test_what_became_of_a_sample(old, new, reason) -> None:
    sides = []
    for rows in (old, new):
        held = [fate("image", row[4], "recorded") for row in rows if row[4:]]
        side = version(held + [fate("sample", *row) for row in rows])
        manifest = {**side.manifest, "recipe": "recap"}
        sides.append(changes.side(manifest, side.fates, pl.DataFrame(), None))
    assert [row[2] for row in said(*sides, "sample")] == [reason]


def test_records_say_which_part_changed() -> None:
    pairs = [pair("a>b"), pair("b>a")]
    old = version(ALIVE, pairs, {"a>b": "Make it red", "b>a": "Make it blue"})
    new = version(ALIVE, [pair("a>b", rank=2), pairs[1]], {"a>b": "Make it green"})
    assert [row[:3] for row in said(old, new, "record")] == [
        ("a>b", "changed", "changed: label, ranks"),
        ("b>a", "removed", "no label any more"),
    ]


def test_equal_versions_differ_in_nothing() -> None:
    one = version(ALIVE, [pair("a>b")], {"a>b": "Make it red"})
    assert changes.between(one, one).height == 0
    empty = version([])
    assert changes.between(empty, empty).height == 0


def test_counts_go_by_level_and_frequency() -> None:
    old = objects(("a", "unpaired", "1"), ("b", "unpaired", "2"), ("c", "unpaired", "3"))
    found = changes.between(old, objects(("d", "unpaired", "4")))
    assert changes.counts(found)[:3] == [
        ("object", "added", "arrived", 1),
        ("object", "removed", "left the corpus", 3),
        ("image", "added", "arrived", 1),
    ]


def test_a_summary_names_settings_models_bands_and_no_id() -> None:
    old, new = images(("secret", "paired")), images(cut=5, band=NARROW)
    old.manifest.update(version=4, numerics={"vectors": {"clip": "vectors-1"}})  # type: ignore[attr-defined]
    new.manifest.update(numerics={"vectors": {"clip": "vectors-2"}}, config={"pairs": {"k": 1}})  # type: ignore[attr-defined]
    said = changes.summary(old.manifest, new.manifest, changes.between(old, new))
    assert said == {
        "version": 4,
        "config": [["dedup", {}, None], ["pairs.k", None, 1]],
        "models": ["clip"],
        "bands": [["look", 700, 900, 810, 900]],
        "cut": [0, 5],
        "changes": [["image", "removed", "left the corpus", 1]],
    }
    assert "secret" not in str(said)
