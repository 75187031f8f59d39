"""Round trip with a tiny real CLIP: who is preferred follows from its vectors."""

import numpy as np
import pytest

from infra import features, models, neighbours, tables
from infra.fusing import fuse
from infra.tables import Table
from tasks.round_trip import RoundTripping, round_trip
from tests.conftest import make_build
from tests.tasks.examples import put, rows

SAID = "Make it green"
OTHER = "The same at night, seen from above"
QUERY = [1.0] + [0.0] * 15


@pytest.fixture
def clip(models):
    return models["clip"]


@pytest.fixture(scope="session")
def spoken(clip_folder):
    """The vectors of two instructions, by the same model."""
    from infra.models import ModelParams

    params = ModelParams(library="open_clip", name=str(clip_folder), batch=8)
    model = models.load(params, "cpu")
    return dict(zip((SAID, OTHER), model.embed_texts([SAID, OTHER]), strict=True))


class World:
    """A query, the target that one instruction leads to, and a negative that the other does."""

    def __init__(self, build, clip, spoken):
        self.build, self.clip = build, clip
        query = np.array([QUERY], np.float16)
        vectors = {"q": QUERY, "far": [-x for x in QUERY]}
        for name, text in (("t", SAID), ("n", OTHER)):
            vectors[name] = fuse(query, spoken[text][None], 0.5)[0].tolist()
        matrix = np.array(list(vectors.values()), np.float16)
        shards = tables.write(
            build.store, "vectors", tables.vector_rows("image_id", vectors, matrix)
        )
        self.vectors = Table("vectors-of-clip", shards.shards)
        self.matrix = dict(zip(vectors, matrix, strict=True))

    def run(self, labels, negatives=("q", "n", "far"), **changed):
        pairs = put(
            self.build, "pairs", "pair_id query target negatives",
            [(name, "q", "t", list(negatives)) for name, _ in labels],
        )  # fmt: skip
        written = put(self.build, "labels", "pair_id instructions", labels)
        params = RoundTripping(
            **{"mode": "drop", "weight": 0.5, "needed": 1, "model": self.clip, "device": "cpu"}
            | changed
        )
        texts = Table("texts-of-clip")
        return round_trip(self.build, pairs, written, self.vectors, texts, params)


@pytest.fixture
def world(build, clip, spoken):
    return World(build, clip, spoken)


def test_instructions_that_lead_elsewhere_go_and_pairs_without_one_are_dropped(world):
    found = world.run([("p1", [SAID, OTHER]), ("p2", [OTHER]), ("p3", [SAID])])
    labels = {row["pair_id"]: row["instructions"] for row in rows(world.build, found.labels)}
    assert labels == {"p1": [SAID], "p3": [SAID]}
    (drop,) = rows(world.build, found.drops)
    assert (drop["id"], drop["rule"], drop["detail"]) == (
        "p2", "target_not_preferred_in_space", "0 of 1",
    )  # fmt: skip
    facts = {row["name"]: row["value"] for row in rows(world.build, found.facts)}
    assert (facts["pairs"], facts["instructions"], facts["preferred"]) == (3, 4, 2)
    assert facts["chance"] == 4 * 333_333
    margins = [row["target"] - row["negative"] for row in rows(world.build, found.preferences)]
    assert facts["margin"] == sum(margins)


def test_scores_are_those_of_the_vectors(world, spoken):
    found = world.run([("p1", [SAID])])
    (row,) = rows(world.build, found.preferences)
    fused = fuse(world.matrix["q"][None], spoken[SAID][None], 0.5)
    scored = {n: int(neighbours.scores(fused, world.matrix[n][None])[0]) for n in ("t", "n", "far")}
    assert row["target"] == scored["t"] > 999_000
    assert row["negative"] == max(scored["n"], scored["far"])


def test_a_report_drops_nothing(world):
    found = world.run([("p1", [SAID, OTHER]), ("p2", [OTHER])], mode="report")
    assert [row["pair_id"] for row in rows(world.build, found.labels)] == ["p1", "p2"]
    assert found.drops.rows == 0
    assert found.preferences.rows == 3


def test_more_instructions_may_be_needed(world):
    found = world.run([("p1", [SAID, OTHER])], needed=2)
    assert [row["detail"] for row in rows(world.build, found.drops)] == ["1 of 2"]


def test_a_pair_without_negatives_but_the_query_passes(world):
    found = world.run([("p2", [OTHER])], negatives=["q"])
    assert found.labels.rows == 1
    assert found.preferences.rows == 0


def test_the_query_alone_decides_where_it_has_all_the_weight(world):
    found = world.run([("p1", [SAID, OTHER])], weight=1.0, mode="report")
    one, other = rows(world.build, found.preferences)
    assert one["target"] == other["target"]


def test_only_new_instructions_are_embedded(world, monkeypatch):
    world.run([("p1", [SAID]), ("p2", [OTHER])])
    embedded = []
    embed = features.embed_texts
    monkeypatch.setattr(
        features, "embed_texts", lambda place, texts: embedded.append(texts) or embed(place, texts)
    )
    found = world.run([("p1", [SAID]), ("p2", [OTHER, SAID])])
    assert embedded == [(SAID,)]
    assert found.preferences.rows == 3
    embedded.clear()
    assert world.run([("p1", [SAID]), ("p2", [OTHER, SAID])]) == found
    assert embedded == []


def test_other_negatives_are_another_question(world):
    first = world.run([("p1", [SAID])])
    second = world.run([("p1", [SAID])], negatives=["q", "far"])
    one, other = (rows(world.build, found.preferences)[0] for found in (first, second))
    assert other["negative"] < one["negative"]


def test_where_the_rows_come_from_shows_not_in_them(world, tmp_path, pool, clip, spoken):
    labels = [("p1", [SAID, OTHER]), ("p2", [OTHER])]
    world.run(labels[:1])
    updated = world.run(labels)
    fresh = World(make_build(tmp_path / "fresh", pool), clip, spoken).run(labels)
    assert updated == fresh
