"""Of several captions an image uses the one that fits best."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import PairmillError
from tasks.align_captions import AlignParams, align_captions
from tests.tasks.examples import angle, cosine, new_build, put, put_vectors, tuples

EAST, NORTH, NORTH_EAST, WEST = angle(0), angle(90), angle(45), angle(180)


def align(build, image_captions, vectors, texts):
    images = put(build, "images", "image_id", [(image,) for image in vectors])
    aligned = align_captions(
        build,
        images,
        put(build, "image_captions", "image_id caption_id", image_captions),
        put_vectors(build, "image_id", vectors),
        put_vectors(build, "caption_id", texts),
        AlignParams(),
    )
    return tuples(build, aligned.aligned)


def test_the_best_caption_wins_and_among_equals_the_least_id(build):
    found = align(
        build,
        [
            *[("tree", "far"), ("tree", "near"), ("tree", "opposite")],
            *[("bush", "twin"), ("bush", "near"), ("bush", "far")],
        ],
        vectors={"tree": EAST, "bush": EAST, "mute": NORTH},
        texts={"near": NORTH_EAST, "far": NORTH, "twin": NORTH_EAST, "opposite": WEST},
    )
    assert found == [
        ("bush", "near", 707107),
        ("mute", None, None),
        ("tree", "near", 707107),
    ]


def test_a_lone_caption_is_used_however_badly_it_fits(build):
    found = align(build, [("a", "no")], {"a": EAST}, {"no": WEST})
    assert found == [("a", "no", -1_000_000)]


def test_without_captions_every_image_stays_without_one(build):
    assert align(build, [], {"b": EAST, "a": EAST}, {}) == [("a", None, None), ("b", None, None)]


def test_an_empty_corpus_aligns_to_nothing(build):
    assert align(build, [], {}, {}) == []


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (("b", "x"), "1 of 2 ids have no vector in table vectors"),
        (("a", "y"), "1 of 2 ids have no vector in table texts"),
    ],
)
def test_no_image_is_scored_by_the_vector_of_another(build, link, message):
    with pytest.raises(PairmillError, match=message):
        align(build, [("a", "x"), link], {"a": EAST, "c": WEST}, {"x": EAST, "z": WEST})


def test_each_score_is_counted_once_and_an_unchanged_corpus_costs_nothing(build):
    for _ in range(2):
        align(build, [("a", "x"), ("b", "x"), ("b", "y")], {"a": EAST, "b": NORTH}, {
            "x": EAST, "y": NORTH_EAST,
        })  # fmt: skip
    assert build.work["similarities_computed"] == 3


@given(st.integers(0, 2**32), st.randoms())
@settings(max_examples=10, deadline=None)
def test_a_score_is_the_rounded_cosine_in_any_order_of_rows(tmp_path_factory, seed, shuffler):
    rng = np.random.default_rng(seed)
    vectors = {f"i{i}": rng.standard_normal(8) / 3 for i in range(4)}
    texts = {f"c{i}": rng.standard_normal(8) / 3 for i in range(5)}
    links = [(image, text) for image in vectors for text in texts]
    shuffler.shuffle(links)
    found = align(new_build(tmp_path_factory.mktemp("align")), links, vectors, texts)
    expected = []
    for image in vectors:
        scores = {c: round(cosine(vectors[image], texts[c]) * 1e6) for c in texts}
        best = min(texts, key=lambda c: (-scores[c], c))
        expected.append((image, best, scores[best]))
    assert found == expected
