"""Values of captions over any history, and what a night of changes costs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.score_captions import ScoringParams, score_captions
from tests.tasks.examples import new_build, put, put_vectors, tuples


def values(build, aligned, images, texts, params, survivors=None):
    """{image: value} of (image, caption, cosine) rows."""
    survivors = survivors or {image: image for image, *_ in aligned}
    scored = score_captions(
        build,
        put(build, "aligned", "image_id caption_id clip_score", aligned),
        put(build, "survivors", "image_id survivor_id", list(survivors.items())),
        put_vectors(build, "image_id", images),
        put_vectors(build, "caption_id", texts),
        params,
    )
    return dict(tuples(build, scored.values))


def world(rng, n=40, captions=15):
    """Vectors of small whole numbers, so that scores tie; captions are shared."""
    images = {f"i{k:02}": rng.integers(-2, 3, 4).tolist() for k in range(n)}
    texts = {f"c{k:02}": rng.integers(-2, 3, 4).tolist() for k in range(captions)}
    return images, texts


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 6, 100]), st.sampled_from([0.01, 0.1, 1.0]))
@settings(max_examples=25, deadline=None)
def test_any_history_ends_at_the_values_of_its_set(tmp_path_factory, seed, references, temperature):
    rng = np.random.default_rng(seed)
    images, texts = world(rng)
    params = ScoringParams(references=references, temperature=temperature)
    caption = {image: f"c{rng.integers(15):02}" for image in images}
    present = {image for image in images if rng.random() < 0.6}
    build = new_build(tmp_path_factory.mktemp("nights"))
    for _ in range(4):
        for image in rng.choice(sorted(images), 4, replace=False).tolist():
            present ^= {image}
        caption[sorted(images)[rng.integers(40)]] = f"c{rng.integers(15):02}"
        aligned = [(image, caption[image], 100) for image in sorted(present)]
        after = values(build, aligned, images, texts, params)
    other = new_build(tmp_path_factory.mktemp("whole"))
    assert after == values(other, aligned, images, texts, params)


def test_duplicates_and_images_without_a_caption_have_no_value(build):
    images, texts = world(np.random.default_rng(1))
    aligned = [("i00", "c00", 5), ("i01", "c01", 7), ("i02", None, None)]
    survivors = {"i00": "i00", "i01": "i00", "i02": "i02"}
    found = values(build, aligned, images, texts, ScoringParams(by="clip_score"), survivors)
    assert found == {"i00": 5}


def test_a_night_costs_what_changed(build):
    rng = np.random.default_rng(2)
    images = {f"i{k:03}": rng.standard_normal(8).tolist() for k in range(300)}
    texts = {f"c{k:03}": rng.standard_normal(8).tolist() for k in range(300)}
    rows = [(f"i{k:03}", f"c{k:03}", 0) for k in range(300)]
    values(build, rows[:299], images, texts, ScoringParams(references=100))
    whole = build.work.pop("similarities_computed")
    assert whole == 2 * 299 * 100
    # An image that is no reference: its own sums. One that is: a column of the others' as well.
    values(build, rows[:300], images, texts, ScoringParams(references=100))
    assert build.work.pop("similarities_computed") == 2 * 100
    values(build, rows[1:], images, texts, ScoringParams(references=100))
    assert build.work["similarities_computed"] < whole / 10


def test_a_reference_whose_vector_is_gone_does_not_stop_the_next_night(build, tmp_path):
    images, texts = world(np.random.default_rng(3))
    rows = [(f"i{k:02}", f"c{k % 15:02}", 0) for k in range(40)]
    params = ScoringParams(references=10)
    values(build, rows, images, texts, params)
    del images["i00"]
    found = values(build, rows[1:], images, texts, params)
    assert found == values(new_build(tmp_path / "whole"), rows[1:], images, texts, params)
