"""Crops against texts by CLIP, recomputed by hand with the sample's model."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from infra import images, models
from infra.models import ModelParams
from infra.pictures import View
from infra.tables import Table
from tasks.score_crops import ScoreParams, Scoring, classes, score_crops, sentences
from tests.corpora import fill
from tests.tasks.examples import put, rows
from tests.tasks.tables_of_samples import samples_of

CLIP = ModelParams(library="open_clip", name=str(Path(__file__).parents[2] / "sample/models/clip"))
COLUMNS = "sample_id image_id region caption class_name"


def picture():
    """A red disc on the left, a blue square on the right."""
    image = Image.new("RGB", (400, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 180, 180), fill="red")
    draw.rectangle((220, 20, 380, 180), fill="blue")
    data = io.BytesIO()
    image.save(data, "PNG")
    return image, data.getvalue()


@pytest.fixture
def scored(build):
    image, data = picture()
    fill(build, {"a.png": data})
    name = hashlib.sha256(data).hexdigest()
    objects = put(build, "objects", "key member stamp offset size image_id",
                  [("a.png", None, "s", None, len(data), name)])  # fmt: skip
    vectors = Table("numerics")

    def run(given, **params):
        table = samples_of(
            build,
            [(s, name, crop and View(name, crop).name, *said) for s, crop, *said in given], COLUMNS
        )  # fmt: skip
        scoring = Scoring("region", "caption", "class_name", ScoreParams(**params), CLIP, "cpu")
        found = score_crops(build, table, objects, vectors, scoring)
        return {row["sample_id"]: row for row in rows(build, found.samples)}, found

    run.image = image
    return run


def by_hand(image, crop, text):
    """rint(10^6 cos) of a crop and a text, by the model itself."""
    model = models.load(CLIP, "cpu")
    size, mode, interpolation, fill_, _ = model.facts.geometry
    pixels = images.fit(image.crop(crop), size, mode, interpolation, fill_)
    a = model.embed_images(pixels[None])[0].astype(float)
    b = model.embed_texts([text])[0].astype(float)
    return round(1e6 * float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


LEFT, RIGHT = (0, 0, 200, 200), (200, 0, 400, 200)


def test_a_score_is_the_cosine_of_crop_and_text(scored):
    found, _ = scored(
        [("1", LEFT, "a red circle", "circle"), ("2", RIGHT, "a red circle", "square")]
    )
    assert found["1"]["clip_score"] == pytest.approx(
        by_hand(scored.image, LEFT, "a red circle"), abs=1
    )
    assert found["2"]["clip_score"] == pytest.approx(
        by_hand(scored.image, RIGHT, "a red circle"), abs=1
    )


def test_of_a_long_caption_the_sentences_are_scored(scored):
    text = "A red circle. It lies on white!\nNothing else is near it"
    assert sentences(text, "mean") == [
        "A red circle.",
        "It lies on white!",
        "Nothing else is near it",
    ]
    assert sentences(text, "first") == ["A red circle."]
    assert sentences("  \n ", "mean") == []
    mean = scored([("1", LEFT, text, "x")])[0]["1"]["clip_score"]
    each = [by_hand(scored.image, LEFT, part) for part in sentences(text, "mean")]
    assert mean == pytest.approx(sum(each) / 3, abs=2)
    first = scored([("1", LEFT, text, "x")], over="first")[0]["1"]["clip_score"]
    assert first == pytest.approx(each[0], abs=1)


def test_a_class_is_ranked_among_the_others(scored):
    names = ["circle", "square", "tree", "flag"]
    given = [(name, LEFT, "a thing", name) for name in names]
    found, _ = scored(given)
    scores = {n: by_hand(scored.image, LEFT, f"a photo of a {n}") for n in names}
    order = sorted(names, key=lambda n: -scores[n])
    assert {n: found[n]["class_rank"] for n in names} == {n: order.index(n) + 1 for n in names}


def test_classes_are_drawn_by_hash_and_hold_the_own_one_first():
    labels = [f"c{n}" for n in range(50)]
    scoring = Scoring("r", "t", "c", ScoreParams(classes=20), CLIP)
    drawn = classes("s", "c7", labels, scoring)
    assert drawn[0] == "c7" and len(drawn) == len(set(drawn)) == 20
    assert drawn == classes("s", "c7", labels[::-1], scoring) != classes("t", "c7", labels, scoring)
    assert classes("s", None, labels, scoring) == []


def test_without_a_view_a_text_or_a_class_there_is_null(scored):
    found, _ = scored([
        ("1", LEFT, "a circle", "circle"), ("2", None, "a circle", "circle"),
        ("3", LEFT, None, None),
    ])  # fmt: skip
    assert found["2"]["clip_score"] is None and found["2"]["class_rank"] is None
    assert found["3"]["clip_score"] is None and found["3"]["class_rank"] is None
    assert found["1"]["class_rank"] == 1
    assert scored([])[0] == {}


def test_more_samples_cost_what_is_new_and_give_what_a_first_run_gives(scored, monkeypatch, build):
    import tasks.score_crops as stage

    one = ("1", LEFT, "a red circle.", "circle")
    two = ("2", RIGHT, "a blue square.", "square")
    scored([one])
    embedded = []
    inner = stage.embed_views
    monkeypatch.setattr(
        stage, "embed_views", lambda place, shard: embedded.extend(shard) or inner(place, shard)
    )
    grown, tables_ = scored([one, two])
    assert [View.of(name).crop for name, _ in embedded] == [RIGHT]
    for stat in list(build.store.list("ledger/score_crops/")):
        build.store.delete(stat.key)
    afresh, others = scored([one, two])
    assert grown == afresh and tables_.samples == others.samples
