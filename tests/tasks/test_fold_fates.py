"""Every way in which an object, an image or a pair can end, and sums that don't add up."""

from collections import Counter

import pytest

from infra.errors import PairmillError
from tasks.fold_fates import OBJECT_FATES, fold_fates
from tests.tasks.examples import put, rows

# (key, member, image_id, rule): what describing found, captions and all.
OBJECTS = [
    ("query.jpg", None, "query", None),
    ("target.jpg", None, "target", None),
    ("z/copy of target.jpg", None, "target", None),
    ("alone.jpg", None, "alone", None),
    ("thumb.png", None, "near", None),
    ("mismatch.jpg", None, "low", None),
    ("tiny.gif", None, "tiny", None),
    ("photos.tar", "broken.jpg", "broken", None),
    ("photos.tar", "broken again.jpg", "broken", None),
    ("photos.tar", "caption.txt", None, "metadata"),
    ("gone.jpg", None, None, "vanished"),
    ("bomb.png", None, None, "too_large"),
    ("killer.jpg", None, None, "crashed_decoder"),
]
# (image_id, key, member) of those that decode: the first object by key stands for its image.
IMAGES = [
    ("query", "query.jpg", None),
    ("target", "target.jpg", None),
    ("alone", "alone.jpg", None),
    ("near", "thumb.png", None),
    ("low", "mismatch.jpg", None),
]
DROPS = [
    ("object", "captions.csv", "snapshot", "metadata", None, None),
    ("object", "notes.doc", "snapshot", "ignored", None, None),
    ("object", "photos.tar::caption.txt", "describe", "metadata", None, None),
    ("object", "gone.jpg", "describe", "vanished", None, None),
    ("object", "bomb.png", "describe", "too_large", None, "60000 x 60000"),
    ("object", "killer.jpg", "describe", "crashed_decoder", None, "killed 2 workers"),
    ("image", "broken", "describe", "unreadable", None, "truncated"),
    ("image", "tiny", "describe", "too_small", 1, None),
    ("image", "near", "deduplicate", "near_duplicate", 3, "query"),
    ("image", "low", "filter_captions", "low_clip_score", -5, "neg_clip_loss"),
    ("pair", "target>query", "mine_pairs", "reverse_kept", None, "query>target"),
    ("pair", "target>alone", "label_pairs", "no_difference", None, None),
]
PAIRS = [("query>target", "query", "target"), ("target>alone", "target", "alone")]
LABELS = [("query>target",)]


def fold(build, objects=OBJECTS, images=IMAGES, pairs=PAIRS, labels=LABELS, drops=DROPS):
    half = len(drops) // 2
    columns = "level id stage rule value detail"
    return rows(
        build,
        fold_fates(
            build,
            put(build, "objects", "key member image_id rule", objects),
            put(build, "images", "image_id key member", images),
            put(build, "pairs", "pair_id query target", pairs),
            put(build, "labels", "pair_id", labels),
            {
                name: put(build, "drops", columns, part)
                for name, part in (("one", drops[:half]), ("two", drops[half:]), ("none", []))
            },
        ).fates,
    )


def test_every_object_has_its_fate(build):
    fates = fold(build)
    found = {
        row["id"]: (row["fate"], row["stage"], row["value"], row["detail"], row["image_id"])
        for row in fates
        if row["level"] == "object"
    }
    assert found == {
        "captions.csv": ("metadata", "snapshot", None, None, None),
        "notes.doc": ("ignored", "snapshot", None, None, None),
        "photos.tar::caption.txt": ("metadata", "describe", None, None, None),
        "gone.jpg": ("vanished", "describe", None, None, None),
        "bomb.png": ("too_large", "describe", None, "60000 x 60000", None),
        "killer.jpg": ("crashed_decoder", "describe", None, "killed 2 workers", None),
        "photos.tar::broken.jpg": ("unreadable", "describe", None, "truncated", "broken"),
        "photos.tar::broken again.jpg": ("unreadable", "describe", None, "truncated", "broken"),
        "tiny.gif": ("too_small", "describe", 1, None, "tiny"),
        "thumb.png": ("near_duplicate", "deduplicate", 3, "query", "near"),
        "mismatch.jpg": ("low_clip_score", "filter_captions", -5, "neg_clip_loss", "low"),
        "alone.jpg": ("unpaired", "publish", None, None, "alone"),
        "query.jpg": ("paired", "publish", None, None, "query"),
        "target.jpg": ("paired", "publish", None, None, "target"),
        "z/copy of target.jpg": ("exact_duplicate", "describe", None, "target.jpg", "target"),
    }
    assert {fate for fate, *_ in found.values()} <= set(OBJECT_FATES)


def test_every_image_and_pair_has_its_fate(build):
    found = {(row["level"], row["id"]): (row["fate"], row["rule"]) for row in fold(build)}
    assert {key: fate for key, fate in found.items() if key[0] != "object"} == {
        ("image", "query"): ("paired", None),
        ("image", "target"): ("paired", None),
        ("image", "alone"): ("unpaired", None),
        ("image", "near"): ("near_duplicate", "near_duplicate"),
        ("image", "low"): ("low_clip_score", "low_clip_score"),
        ("image", "tiny"): ("too_small", "too_small"),
        ("image", "broken"): ("unreadable", "unreadable"),
        ("pair", "query>target"): ("published", None),
        ("pair", "target>alone"): ("no_difference", "no_difference"),
        ("pair", "target>query"): ("reverse_kept", "reverse_kept"),
    }


def test_the_counts_add_up_and_rows_are_sorted(build):
    fates = fold(build)
    listed = len(OBJECTS) + len(["captions.csv", "notes.doc"])
    assert Counter(row["level"] for row in fates) == {"object": listed, "image": 7, "pair": 3}
    order = [(row["level"], row["id"]) for row in fates]
    assert order == sorted(order)


def test_an_image_is_unpaired_where_its_only_pair_has_no_label(build):
    drops = [*DROPS, ("pair", "query>target", "label_pairs", "refused", None, None)]
    found = fold(build, labels=[], drops=drops)
    fates = {row["id"]: row["fate"] for row in found if row["level"] == "image"}
    assert (fates["query"], fates["target"]) == ("unpaired", "unpaired")


def test_an_empty_corpus_balances(build):
    assert fold(build, [], [], [], [], []) == []


def without(rows, name):
    kept = [row for row in rows if name not in row]
    assert len(kept) == len(rows) - 1
    return kept


DOUBLE = {
    "object": ("object", "query.jpg", "describe", "vanished", None, None),
    "image": ("image", "low", "deduplicate", "near_duplicate", 1, "query"),
    "pair": ("pair", "query>target", "label_pairs", "refused", None, None),
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"drops": without(DROPS, "bomb.png")}, "15 objects .* 1 have none, 0 have two, 0 were"),
        ({"drops": without(DROPS, "tiny")}, "7 images .* 1 have none, 0 have two"),
        ({"drops": without(DROPS, "target>alone")}, "3 pairs .* 1 have none, 0 have two"),
        ({"drops": [*DROPS, DOUBLE["object"]]}, "objects .* 0 have none, 2 have two"),
        ({"drops": [*DROPS, DOUBLE["image"]]}, "images .* 0 have none, 2 have two"),
        ({"drops": [*DROPS, DOUBLE["pair"]]}, "pairs .* 0 have none, 2 have two"),
        ({"objects": [*OBJECTS, OBJECTS[3]]}, "objects .* 0 have none, 2 have two"),
        ({"images": without(IMAGES, "alone.jpg")}, "images .* 1 have none"),
        (
            {"drops": [*DROPS, ("image", "ghost", "describe", "unreadable", None, None)]},
            "images .* 1 were never listed",
        ),
        (
            {"drops": [*DROPS, ("object", "ghost.jpg", "describe", "vanished", None, None)]},
            "objects .* 1 were never listed",
        ),
        (
            {"drops": [*without(DROPS, "tiny"), ("image", "tiny", "describe", "odd", None, None)]},
            r"unknown fates \['odd'\]",
        ),
        (
            {"drops": [*DROPS, ("image", "query", "deduplicate", "near_duplicate", 0, "low")]},
            "1 were dropped and are in records all the same",
        ),
    ],
)
def test_what_does_not_balance_is_refused(build, change, complaint):
    with pytest.raises(PairmillError, match=complaint):
        fold(build, **change)
