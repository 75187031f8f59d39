"""Every image's nearest others in each space, against a search that compares all pairs."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.tables import Table
from tasks.find_neighbours import (
    Band,
    NeighbourParams,
    Space,
    find_neighbours,
    search_params,
)
from tests.tasks.examples import angle, cosine, new_build, put, put_vectors, rows

IMAGE, CAPTION = Space(model="clip"), Space(model="clip", of="caption")


def find(build, images, captions=None, texts=None, spaces=None, k=50):
    """Lists by space and image: {space: {image: [(neighbour, score)]}}.

    `images` are vectors by id, `captions` the caption of each image that has one.
    """
    captions = captions or {}
    eligible = [(image, captions.get(image), None) for image in images]
    spaces = spaces or {"image": IMAGE}
    embedded = {
        "image": put_vectors(build, "image_id", images),
        "caption": put_vectors(build, "caption_id", texts or {}),
    }
    table = put(build, "eligible", "image_id caption_id clip_score", eligible)
    near = {
        name: find_neighbours(
            build, table, embedded[space.of], search_params(NeighbourParams(k=k), name, space)
        )
        for name, space in spaces.items()
    }
    return {name: _named(build, *near[name][:2]) for name in spaces}


def _named(build, members: Table, lists: Table):
    ids = [row["image_id"] for row in rows(build, members)]
    assert ids == sorted(ids)
    found = rows(build, lists)
    assert [row["row"] for row in found] == list(range(len(ids)))
    return {
        image: [(ids[n], s) for n, s in zip(row["neighbours"], row["scores"], strict=True)]
        for image, row in zip(ids, found, strict=True)
    }


def brute_force(vectors, k):
    lists = {}
    for image in vectors:
        scores = {i: round(1e6 * cosine(vectors[image], vectors[i])) for i in vectors if i != image}
        lists[image] = sorted(scores.items(), key=lambda other: (-other[1], other[0]))[:k]
    return lists


def test_the_nearest_come_first_and_k_of_them(build):
    images = {"a": (1, 0), "b": (3, 4), "c": (0, 1), "d": (-1, 0)}
    assert find(build, images, k=2)["image"] == {
        "a": [("b", 600_000), ("c", 0)],
        "b": [("c", 800_000), ("a", 600_000)],
        "c": [("b", 800_000), ("a", 0)],
        "d": [("c", 0), ("b", -600_000)],
    }


def test_equal_scores_are_ordered_by_id(build):
    images = {"d": (1, 0), "b": (0, 1), "c": (0, -1), "a": (0, 2)}
    assert find(build, images, k=2)["image"]["d"] == [("a", 0), ("b", 0)]


def test_captionless_images_are_in_image_spaces_only(build):
    spaces = {"image": IMAGE, "text": CAPTION}
    images = {"a": angle(0), "b": angle(60), "mute": angle(10)}
    captions, texts = {"a": "sky", "b": "sea"}, {"sky": (1, 0), "sea": (0, 1), "unused": (1, 1)}
    found = find(build, images, captions, texts, spaces)
    assert list(found["image"]) == ["a", "b", "mute"]
    assert found["text"] == {"a": [("b", 0)], "b": [("a", 0)]}


def test_a_caption_that_many_share_is_searched_once_and_stands_for_all_of_them(build):
    images = {f"i{n}": angle(n) for n in range(5)}
    captions = {"i0": "icon", "i1": "icon", "i2": "tree", "i3": "icon", "i4": "icon"}
    texts = {"icon": (1, 0), "tree": (0, 1)}
    found = find(build, images, captions, texts, {"text": CAPTION}, k=3)["text"]
    assert found["i1"] == [("i0", 1_000_000), ("i3", 1_000_000), ("i4", 1_000_000)]
    assert found["i2"] == [("i0", 0), ("i1", 0), ("i3", 0)]
    assert build.work["similarities_computed"] < 5 * 4


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({}, {}),
        ({"a": (1, 0)}, {"a": []}),
        ({"a": (1, 0), "b": (0, 1)}, {"a": [("b", 0)], "b": [("a", 0)]}),
        (
            {"a": (1, 0), "b": (1, 0), "c": (1, 0)},
            {
                "a": [("b", 1_000_000), ("c", 1_000_000)],
                "b": [("a", 1_000_000), ("c", 1_000_000)],
                "c": [("a", 1_000_000), ("b", 1_000_000)],
            },
        ),
    ],
    ids=["no image", "one image", "k larger than the corpus", "all identical"],
)
def test_small_corpora(build, images, expected):
    assert find(build, images, k=50)["image"] == expected


def test_a_corpus_without_captions_has_empty_text_spaces(build):
    found = find(build, {"a": (1, 0), "b": (0, 1)}, spaces={"image": IMAGE, "text": CAPTION})
    assert found == {"image": {"a": [("b", 0)], "b": [("a", 0)]}, "text": {}}


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_lists_are_those_of_brute_force_in_both_kinds_of_space(tmp_path_factory, seed, n, k, d):
    """Vectors of small integers: many are equal, opposite, or equally far."""
    rng = np.random.default_rng(seed)

    def vectors(prefix):
        drawn = rng.integers(-1, 3, (n, d))
        drawn[:, 0] = np.where(drawn.any(axis=1), drawn[:, 0], 1)
        order = rng.permutation(n)
        return {f"{prefix}{i:02}": tuple(drawn[i].tolist()) for i in order}

    images, texts = vectors("i"), vectors("c")
    captions = {i: f"c{rng.integers(n):02}" for i in images if rng.random() < 0.7}
    found = find(
        new_build(tmp_path_factory.mktemp("near")),
        *(images, captions, texts),
        spaces={"image": IMAGE, "text": CAPTION},
        k=k,
    )
    assert found["image"] == brute_force(images, k)
    assert found["text"] == brute_force({i: texts[c] for i, c in captions.items()}, k)


def test_a_moved_band_searches_nothing_again(build):
    images = {"a": angle(0), "b": angle(60)}
    find(build, images, spaces={"image": Space(model="clip", band=Band(low=0.1, high=0.2))})
    before = build.work["similarities_computed"]
    find(build, images, spaces={"image": Space(model="clip", band=Band(low=0.5, high=0.9))})
    assert build.work["similarities_computed"] == before > 0


@pytest.mark.parametrize(
    ("band", "mistake"),
    [
        ({"low": 0.9, "high": 0.9}, "band.low 0.9 must be below band.high 0.9"),
        ({"low": -0.5, "high": 0.9}, "band.low -0.5 is a quantile: between 0 and 1"),
        ({"low": 0.5, "high": 1.5}, "less than or equal to 1"),
        ({"unit": "cosine", "low": -2}, "greater than or equal to -1"),
    ],
)
def test_impossible_bands_are_refused(band, mistake):
    with pytest.raises(ValidationError, match=mistake):
        Band(**band)


def nights(build, steps, k):
    """The lists of the last of several nights, each a dictionary of vectors by image."""
    params = search_params(NeighbourParams(k=k), "image", IMAGE)
    for images in steps:
        rows = [(image, None, None) for image in images]
        table = put(build, "eligible", "image_id caption_id clip_score", rows)
        near = find_neighbours(build, table, put_vectors(build, "image_id", images), params)
    return _named(build, *near[:2])


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_history_ends_at_the_lists_of_its_set(tmp_path_factory, seed, k, d):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-1, 3, (60, d))
    drawn[:, 0] = np.where(drawn.any(axis=1), drawn[:, 0], 1)
    pool = {f"i{i:02}": tuple(row.tolist()) for i, row in enumerate(drawn)}
    steps = []
    for _ in range(4):
        chosen = rng.permutation(60)[: rng.integers(0, 61)]
        steps.append({f"i{i:02}": pool[f"i{i:02}"] for i in chosen.tolist()})
    for before, now in pairwise(steps):  # nights after which much is as it was
        now |= {image: vector for image, vector in before.items() if rng.random() < 0.9}
    build = new_build(tmp_path_factory.mktemp("near"))
    assert nights(build, steps, k) == brute_force(steps[-1], k)


def test_a_caption_that_changed_moves_its_image_to_another_vector(build):
    texts = {"sky": (1, 0), "sea": (0, 1), "sun": (1, 1)}
    images = {f"i{n}": angle(n) for n in range(4)}
    captions = {"i0": "sky", "i1": "sea", "i2": "sun", "i3": "sky"}
    for now in (captions, captions | {"i0": "sun"}, captions | {"i3": "sea", "i0": "sea"}):
        found = find(build, images, now, texts, {"text": CAPTION})["text"]
        assert found == brute_force({i: texts[c] for i, c in now.items()}, 50)


def test_a_night_costs_what_changed(build):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((420, 8))
    pool = {f"i{i:03}": tuple(vector) for i, vector in enumerate(vectors.tolist())}
    some = dict(list(pool.items())[:400])
    nights(build, [some], 10)
    whole = build.work.pop("similarities_computed")
    nights(build, [dict(list(pool.items())[4:404])], 10)
    assert build.work["similarities_computed"] < whole / 50
