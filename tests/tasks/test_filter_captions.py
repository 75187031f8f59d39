"""Which images stay for their captions: four ways to rank or cut, and who is never asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import logsumexp

from infra.errors import ConfigError
from tasks.filter_captions import ClipScoreParams, check_model, filter_captions
from tasks.score_captions import score_captions, scoring_params
from tests.tasks.examples import angle, new_build, put, put_vectors, rows, tuples

SCORED = [("a", "ca", 300), ("b", "cb", 200), ("c", "cc", 200), ("d", "cd", 100), ("e", None, None)]


def apply(build, aligned, params, vectors=None, texts=None, survivors=None):
    """Every image survives deduplication unless `survivors` says otherwise."""
    survivors = survivors or {image: image for image, *_ in aligned}
    inputs = (
        put(build, "aligned", "image_id caption_id clip_score", aligned),
        put(build, "survivors", "image_id survivor_id", list(survivors.items())),
    )
    embedded = (
        put_vectors(build, "image_id", vectors or {}),
        put_vectors(build, "caption_id", texts or {}),
    )
    values = score_captions(build, *inputs, *embedded, scoring_params(params)).values
    return filter_captions(build, *inputs, values, params)


def kept(build, filtered):
    return [row["image_id"] for row in rows(build, filtered.eligible)]


def facts(build, filtered):
    found = [(row["name"], row["value"]) for row in rows(build, filtered.facts)]
    assert found[0][0] == "cut"
    assert {name for name, _ in found[1:]} <= {"value"}
    return found[0][1], [value for _, value in found[1:]]


@pytest.mark.parametrize(
    ("params", "stay", "cut"),
    [
        ({"keep": "all"}, "abcde", 100),
        ({"keep": "absolute", "threshold": 0.0002}, "abce", 200),
        ({"keep": "absolute", "threshold": 0.00020001}, "ae", 201),
        ({"keep": "absolute", "threshold": -1}, "abcde", -1_000_000),
        ({"keep": "top_fraction", "fraction": 0.25}, "ae", 300),
        # Two of four are wanted, and the third has the score of the second.
        ({"keep": "top_fraction", "fraction": 0.5}, "abce", 200),
        ({"keep": "top_fraction", "fraction": 0.01}, "ae", 300),
        ({"keep": "top_fraction", "fraction": 1}, "abcde", 100),
    ],
)
def test_what_stays(build, params, stay, cut):
    filtered = apply(build, SCORED, ClipScoreParams(**params))
    assert kept(build, filtered) == list(stay)
    assert facts(build, filtered) == (cut, [300, 200, 200, 100])


def test_a_drop_says_who_and_by_which_value(build):
    filtered = apply(build, SCORED, ClipScoreParams(keep="absolute", threshold=0.00025))
    assert tuples(build, filtered.drops) == [
        ("image", "b", "filter_captions", "low_clip_score", 200, "absolute"),
        ("image", "c", "filter_captions", "low_clip_score", 200, "absolute"),
        ("image", "d", "filter_captions", "low_clip_score", 100, "absolute"),
    ]
    assert tuples(build, filtered.eligible) == [("a", "ca", 300), ("e", None, None)]


def test_a_fraction_is_not_rounded_up_by_the_error_of_floats(build):
    aligned = [(f"i{n:02}", f"c{n:02}", n) for n in range(100)]
    filtered = apply(build, aligned, ClipScoreParams(keep="top_fraction", fraction=0.07))
    assert kept(build, filtered) == [f"i{n}" for n in range(93, 100)]


def test_duplicates_are_neither_kept_nor_dropped_nor_counted(build):
    filtered = apply(
        build,
        [("a", "ca", 300), ("b", "cb", 200), ("c", "cc", 100)],
        ClipScoreParams(keep="top_fraction", fraction=0.5),
        survivors={"a": "b", "b": "b", "c": "c"},
    )
    assert kept(build, filtered) == ["b"]
    assert [drop["id"] for drop in rows(build, filtered.drops)] == ["c"]
    assert facts(build, filtered) == (200, [200, 100])


@pytest.mark.parametrize("keep", ["all", "absolute", "top_fraction", "neg_clip_loss"])
def test_a_corpus_without_captions_passes_whole(build, keep):
    params = ClipScoreParams(keep=keep, threshold=0.5)
    filtered = apply(build, [("a", None, None), ("b", None, None)], params)
    assert kept(build, filtered) == ["a", "b"]
    assert filtered.drops.rows == 0
    empty = apply(build, [], params)
    assert (empty.eligible.rows, empty.drops.rows) == (0, 0)


def neg_clip_loss(images, captions, aligned, references, temperature):
    """The definition, from scores as integers: cos - tau / 2 * (log mean exp + log mean exp)."""

    def scores(a, b):
        a, b = np.array(a, np.float16).astype(float), np.array(b, np.float16).astype(float)
        product = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        return np.rint(product * 1e6) / 1e6

    own = [(images[i], captions[c]) for i, c, _ in sorted(aligned)]
    pictures, texts = ([pair[side] for pair in own] for side in (0, 1))
    table = scores(pictures, texts)
    n = min(references, len(own))
    per_image = logsumexp(table[:, :n] / temperature, axis=1) - np.log(n)
    per_caption = logsumexp(table[:n] / temperature, axis=0) - np.log(n)
    return 1e6 * (np.diag(table) - temperature / 2 * (per_image + per_caption))


@given(
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.sampled_from([1, 5, 2048]),
    st.sampled_from([0.01, 0.07, 1.0]),
    st.sampled_from([0.0, 3.0]),
)
@settings(max_examples=25, deadline=None)
def test_neg_clip_loss_is_that_of_the_paper(
    tmp_path_factory, seed, n, references, temperature, gap
):
    """`gap` sets images and captions apart: real models give them cosines of 0.1 to 0.35."""
    rng = np.random.default_rng(seed)
    images = {f"i{k:02}": [gap, 0, *rng.standard_normal(6) / 3] for k in range(n)}
    captions = {f"c{k:02}": [0, gap, *rng.standard_normal(6) / 3] for k in range(n)}
    aligned = [(i, f"c{rng.integers(n):02}", 0) for i in images]
    build = new_build(tmp_path_factory.mktemp("loss"))
    expected = neg_clip_loss(images, captions, aligned, references, temperature)
    true_scores = [
        (i, c, round(s))
        for (i, c, _), s in zip(
            aligned,
            [1e6 * _cosine(images[i], captions[c]) for i, c, _ in aligned],
            strict=True,
        )
    ]
    params = ClipScoreParams(references=references, temperature=temperature)
    _, values = facts(build, apply(build, true_scores, params, images, captions))
    np.testing.assert_allclose(values, expected, atol=1)


def _cosine(a, b):
    a, b = np.array(a, np.float16).astype(float), np.array(b, np.float16).astype(float)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_caption_shared_by_many_pictures_ranks_below_a_specific_one(build):
    """All cosines are 0.28 at most, as with real models; each picture has the one of its own."""
    shared = {f"icon{n}": [1.0, 0, 0, 0] for n in range(6)}
    images = shared | {"moon": [0, 0, 1.0, 0]}
    captions = {"an icon": [0.28, 0, 0, 0.96], "the moon": [0, 0, 0.28, 0.96]}
    aligned = [(name, "an icon", 280_000) for name in shared] + [("moon", "the moon", 280_000)]
    by_score = apply(build, aligned, ClipScoreParams(keep="top_fraction", fraction=0.1))
    assert kept(build, by_score) == sorted(images), "equal scores are told apart by nothing"
    by_loss = apply(build, aligned, ClipScoreParams(fraction=0.1), images, captions)
    assert kept(build, by_loss) == ["moon"]


@given(st.randoms(), st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=15, deadline=None)
def test_the_cut_is_a_function_of_the_set(tmp_path_factory, shuffler, fraction):
    images = {f"i{n}": angle(10 * n) for n in range(9)}
    captions = {f"c{n}": angle(10 * n + n * n) for n in range(9)}
    aligned = [(f"i{n}", f"c{n}", round(1e6 * _cosine(angle(0), angle(n * n)))) for n in range(9)]
    outcomes = []
    for _ in range(2):
        shuffler.shuffle(aligned)
        shuffled = [dict(shuffler.sample(sorted(d.items()), 9)) for d in (images, captions)]
        build = new_build(tmp_path_factory.mktemp("set"))
        filtered = apply(build, aligned, ClipScoreParams(fraction=fraction), *shuffled)
        outcomes.append([tuples(build, table) for table in filtered])
    assert outcomes[0] == outcomes[1]


def test_neg_clip_loss_counts_its_similarities_once(build):
    images, captions = {"a": angle(0), "b": angle(90)}, {"x": angle(10)}
    aligned = [("a", "x", 984_808), ("b", "x", 173_648)]
    for _ in range(2):
        apply(build, aligned, ClipScoreParams(), images, captions)
    assert build.work["similarities_computed"] == 2 * 2 + 1 * 2


def test_absolute_needs_its_threshold():
    with pytest.raises(ValidationError, match=r"clip_score.threshold, for example 0.28"):
        ClipScoreParams(keep="absolute")


@pytest.mark.parametrize("keep", ["neg_clip_loss", "top_fraction"])
def test_a_pinned_cut_takes_the_place_of_the_fraction(build, keep):
    images, captions = {"a": angle(0), "b": angle(90)}, {"x": angle(10)}
    aligned = [("a", "x", 984_808), ("b", "x", 173_648)]
    calibrated = apply(build, aligned, ClipScoreParams(keep=keep, fraction=0.5), images, captions)
    cut, _ = facts(build, calibrated)
    pinned = ClipScoreParams(keep=keep, cut=cut / 1e6)
    again = apply(build, aligned, pinned, images, captions)
    assert [tuples(build, t) for t in again] == [tuples(build, t) for t in calibrated]


@pytest.mark.parametrize("keep", ["absolute", "all"])
def test_a_cut_is_not_pinned_where_there_is_none(keep):
    with pytest.raises(ValidationError, match=rf"keep: {keep} has no clip_score\.cut"):
        ClipScoreParams(keep=keep, threshold=0.3, cut=0.1)


def test_a_model_without_a_text_tower_is_a_config_mistake():
    check_model("clip", {"clip": None})
    with pytest.raises(ConfigError, match=r"'dino', which has no text tower; use one of \['clip'"):
        check_model("dino", {"clip": None})
