"""What a record says of a pair, and on which side of the split it falls."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import tables
from tasks.make_records import LARGEST, SplitParams, make_records, splits
from tests.tasks.examples import put, rows

TIE = {"space": "dino", "score": 900_000, "rank": 1, "in_band": True}

IMAGES = [
    ("ash", "a.jpg", None, "CC0 1.0"),
    ("oak", "trees.tar", "oak.png", "CC BY-SA 4.0"),
    ("elm", "e.jpg", None, "CC BY 4.0"),
    ("fir", "f.jpg", None, "who knows"),
]


def records_of(build, pairs, labels, survivors=(), eligible=None, positives=()):
    """Pairs are (pair_id, query, target); labels are (pair_id, instruction)."""
    eligible = eligible or [("ash", "c1"), ("oak", "c2"), ("elm", None), ("fir", None)]
    made = make_records(
        build,
        put(
            build,
            *("pairs", "pair_id query target ties negatives"),
            [(*pair, [TIE], [pair[1], "fir"]) for pair in pairs],
        ),
        put(
            build,
            *("labels", "pair_id instructions description labeller model prompt"),
            [(pair, [text], None, "captions", None, None) for pair, text in labels],
        ),
        put(build, "eligible", "image_id caption_id", eligible),
        put(build, "captions", "caption_id text", [("c1", "an ash"), ("c2", "an oak")]),
        put(
            build,
            *("images", "image_id key member bytes format width height licence"),
            [(i, key, member, 9, "JPEG", 8, 6, licence) for i, key, member, licence in IMAGES],
        ),
        put(
            build, "survivors", "image_id survivor_id", survivors or [(i[0], i[0]) for i in IMAGES]
        ),
        put(build, "positives", "pair_id image_id", positives),
        SplitParams(validation=0),
    )
    return made.records


def test_further_positives_are_part_of_a_record(build):
    pairs, labels = [("p1", "ash", "oak"), ("p2", "oak", "elm")], [("p1", "a"), ("p2", "b")]
    more = [("p1", "fir"), ("p1", "elm"), ("p9", "ash")]
    found = rows(build, records_of(build, pairs, labels, positives=more))
    assert [row["positives"] for row in found] == [["elm", "fir"], []]


def test_a_record_joins_what_is_known_of_both_images(build):
    table = records_of(build, [("p1", "ash", "oak")], [("p1", "with lobed leaves")])
    assert rows(build, table) == [
        {
            "pair_id": "p1",
            "query": "ash",
            "target": "oak",
            "instructions": ["with lobed leaves"],
            "description": None,
            "positives": [],
            "negatives": ["ash", "fir"],
            "ties": [TIE],
            "query_caption": "an ash",
            "target_caption": "an oak",
            "query_key": "a.jpg",
            "query_member": None,
            "target_key": "trees.tar",
            "target_member": "oak.png",
            "query_licence": "CC0 1.0",
            "target_licence": "CC BY-SA 4.0",
            "licence": "CC BY-SA 4.0",
            "labeller": "captions",
            "model": None,
            "split": "train",
        }
    ]


@pytest.mark.parametrize(
    ("query", "target", "licence"),
    [
        ("ash", "elm", "CC BY 4.0"),
        ("elm", "ash", "CC BY 4.0"),
        ("elm", "oak", "CC BY-SA 4.0"),
        ("oak", "fir", "who knows"),
        ("ash", "ash", "CC0 1.0"),
    ],
)
def test_the_licence_of_a_pair_is_the_stricter_one(build, query, target, licence):
    (row,) = rows(build, records_of(build, [("p", query, target)], [("p", "x")]))
    assert row["licence"] == licence


def test_an_image_without_a_caption_has_a_record_without_one(build):
    (row,) = rows(build, records_of(build, [("p", "elm", "ash")], [("p", "x")]))
    assert (row["query_caption"], row["target_caption"]) == (None, "an ash")


def test_only_labelled_pairs_are_records_sorted_by_id(build):
    pairs = [("p3", "ash", "oak"), ("p1", "oak", "ash"), ("p2", "elm", "ash")]
    table = records_of(build, pairs, [("p3", "x"), ("p1", "y")])
    assert [row["pair_id"] for row in rows(build, table)] == ["p1", "p3"]


def test_no_records_still_have_their_columns(build):
    full = records_of(build, [("p1", "ash", "oak")], [("p1", "x")])
    for none in (records_of(build, [], []), records_of(build, [("p1", "ash", "oak")], [])):
        assert none.rows == 0
        assert tables.read(build.store, none).schema.names == [*rows(build, full)[0]]


# Splits --------------------------------------------------------------------------------------


def test_a_pair_s_two_images_and_all_they_are_connected_with_are_on_one_side():
    for number in range(200):
        a, b, c, d = (f"{number} {name}" for name in "abcd")
        side = splits([(a, b), (c, b), (c, d)], {}, 0.5)
        assert len({side[image] for image in (a, b, c, d)}) == 1


def test_about_the_share_asked_for_is_held_out():
    edges = [(f"a{n}", f"b{n}") for n in range(5_000)]
    for share in (0.05, 0.2, 0.5):
        held_out = Counter(splits(edges, {}, share).values())["validation"]
        assert 0.85 * share < held_out / 10_000 < 1.15 * share
    assert set(splits(edges, {}, 0.0).values()) == {"train"}


def test_a_large_component_is_never_held_out():
    def sides(size):
        return {
            splits([(f"{n} hub", f"{n} {i}") for i in range(size - 1)], {}, 0.5)[f"{n} hub"]
            for n in range(40)
        }

    assert sides(LARGEST + 1) == {"train"}
    assert sides(LARGEST) == {"train", "validation"}


def test_a_duplicate_that_takes_the_place_of_its_survivor_stays_on_its_side():
    """First `big` survives for `small`; later `small` gains a caption, and survives for `big`."""
    for n in range(200):
        big, small, other = f"big{n}", f"small{n}", f"other{n}"
        before = splits([(big, other)], {big: big, small: big, other: other}, 0.5)
        after = splits([(other, small)], {big: small, small: small, other: other}, 0.5)
        assert before[other] == after[other] == after[small]


edge_lists = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=25)


@given(edge_lists, edge_lists, st.sampled_from([0.05, 0.5]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_component_keeps_its_side_whatever_grows_beside_it(edges, others, share, shuffler):
    edges = [(f"i{a}", f"i{b}") for a, b in edges]
    beside = [(f"o{a}", f"o{b}") for a, b in others]
    alone = splits(edges, {}, share)
    both = edges + beside
    shuffler.shuffle(both)
    together = splits(both, {f"o{n}": f"o{n + 1}" for n in range(25)}, share)
    assert {image: together[image] for image in alone} == alone
    assert all(together[a] == together[b] for a, b in both)


def test_growth_rarely_moves_a_component():
    """An image joins each of 1,000 pairs: few change sides, and no more than must."""
    draw = random.Random(4)
    names = [(f"{draw.random()}", f"{draw.random()}", f"{draw.random()}") for _ in range(1_000)]
    before = splits([(a, b) for a, b, _ in names], {}, 0.05)
    after = splits([edge for a, b, c in names for edge in ((a, b), (b, c))], {}, 0.05)
    assert sum(before[a] != after[a] for a, *_ in names) < 60
