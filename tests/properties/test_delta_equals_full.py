"""Random histories of a bucket: after every night the digest is that of a build from nothing.

Families of near-duplicates, scores that tie, captions that are shared and change, survivors that
leave, a cut that moves. `make soak` walks longer ones.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.worlds import World, config_of, make_world, new_build, run, seen

FAMILIES, MEMBERS, LONERS, FLAT, CAPTIONS = 5, 4, 22, 3, 14
COUNT = FAMILIES * MEMBERS + LONERS + FLAT


@cache
def world() -> World:
    """Vectors of small whole numbers, so that scores tie; families share a look, hardly changed."""
    rng = np.random.default_rng(7)
    base = rng.integers(0, 255, (FAMILIES + LONERS, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    family = np.array([*np.arange(FAMILIES).repeat(MEMBERS), *range(FAMILIES, len(base))])
    noise = rng.integers(-2, 3, (len(family), 16, 16, 3))
    thumbnails = [*np.clip(base[family] + noise, 0, 255), *np.full((FLAT, 16, 16, 3), 255)]
    phash = rng.integers(0, 2**63, len(base) + FLAT, np.uint64)
    hashes = [*phash[family] ^ (1 << rng.integers(0, 63, len(family), np.uint64)), *phash[-FLAT:]]

    def vectors(count: int) -> np.ndarray:
        drawn = rng.integers(-1, 3, (count, 4))
        drawn[:, 0] = np.where(drawn.any(axis=1), drawn[:, 0], 1)
        return drawn.astype(np.float16)

    sizes = {"width": rng.choice([64, 128], COUNT), "bytes": rng.integers(900, 905, COUNT)}
    words = ["red", "blue", "big", "small", "boat", "house", "tree"]
    return make_world(
        pl.DataFrame({**sizes, "height": sizes["width"]}),
        {
            "phash": np.array(hashes, np.uint64),
            "thumbnail": [np.asarray(t, np.uint8).tobytes() for t in thumbnails],
        },
        [f"a {words[i % 7]} {words[(i + i // 7 + 1) % 7]}" for i in range(CAPTIONS)],
        {"clip": vectors(COUNT), "dino": vectors(COUNT)},
        {"clip": vectors(CAPTIONS)},
    )


SECTIONS = {"neighbours": {"k": 5}, "split": {"validation": 0.3}}
PAIRS = {"targets": 2, "negatives": 3, "direction": "one"}
NEGATIVES = st.sampled_from(["unrelated", "retrieved"])
IMAGE, CAPTION = st.integers(0, COUNT - 1), st.integers(0, CAPTIONS - 1)
KEY = st.integers(0, 39).map("{:02}.png".format)


class Nights(RuleBasedStateMachine):
    """A bucket of keys that name images, what their captions are, and a store that goes on."""

    dedup = "hash"

    @initialize(seed=st.integers(0, 99), source=NEGATIVES)
    def first(self, seed: int, source: str) -> None:
        rng = np.random.default_rng(seed)
        self.folder = Path(tempfile.mkdtemp())
        self.bucket = {f"{i:02}.png": int(rng.integers(COUNT)) for i in range(30)}
        self.captions = {i: {int(rng.integers(CAPTIONS))} for i in range(COUNT) if i % 5}
        self.fraction, self.negatives_from = 0.9, source
        self.build()

    @rule(key=KEY, image=IMAGE)
    def put(self, key: str, image: int) -> None:
        self.bucket[key] = image

    @rule(key=KEY)
    def remove(self, key: str) -> None:
        self.bucket.pop(key, None)

    @rule(key=KEY, to=KEY)
    def rename(self, key: str, to: str) -> None:
        if key in self.bucket:
            self.bucket[to] = self.bucket.pop(key)

    @rule(image=IMAGE)
    def remove_everywhere(self, image: int) -> None:
        self.bucket = {key: other for key, other in self.bucket.items() if other != image}

    @rule(image=IMAGE, captions=st.sets(CAPTION, max_size=2))
    def describe(self, image: int, captions: set[int]) -> None:
        self.captions[image] = captions

    @rule(fraction=st.sampled_from([0.5, 0.8, 0.9, 1.0]))
    def move_the_cut(self, fraction: float) -> None:
        self.fraction = fraction

    @rule(source=NEGATIVES)
    def draw_negatives_from(self, source: str) -> None:
        self.negatives_from = source

    @rule()
    def build(self) -> None:
        whole = self.folder / "whole"
        found, full = self.run(self.folder / "nights"), self.run(whole)
        shutil.rmtree(whole)
        assert found == full

    def run(self, folder: Path) -> str:
        ids, texts = world().ids, world().captions["caption_id"].to_list()
        images = {"key": pl.String, "image_id": pl.String}
        links = {"image_id": pl.String, "caption_id": pl.String}
        objects = [(key, ids[image]) for key, image in self.bucket.items()]
        linked = [(ids[i], texts[c]) for i, some in self.captions.items() for c in sorted(some)]
        config = config_of(
            dedup={"near": self.dedup, "model": "dino", "cosine": 0.9},
            clip_score={"fraction": self.fraction, "references": 8},
            **SECTIONS,
            pairs={**PAIRS, "negatives_from": self.negatives_from},
        )
        build = new_build(folder)
        described = seen(
            build,
            world(),
            pl.DataFrame(objects, images, orient="row"),
            pl.DataFrame(linked, links, orient="row"),
        )
        return run(build, config, described)[0]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.build()
            shutil.rmtree(self.folder)


class NightsByCosine(Nights):
    """The same with near-duplicates by vectors, in which most scores tie."""

    dedup = "cosine"


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
FOUND = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink a history takes minutes


@pytest.mark.parametrize("machine", [Nights, NightsByCosine])
def test_delta_equals_full(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=4, stateful_step_count=8, phases=FOUND, **QUIET)
    )


@pytest.mark.soak
@pytest.mark.parametrize("machine", [Nights, NightsByCosine])
def test_delta_equals_full_over_long_histories(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=150, stateful_step_count=50, **QUIET)
    )


def test_the_world_has_families_ties_and_flat_pictures():
    """Else the histories above would show little."""
    machine = Nights()
    machine.first(0, "unrelated")
    machine.bucket = {f"{i:02}": i for i in range(COUNT)}
    ids = world().ids
    build = new_build(machine.folder / "all")
    objects = pl.DataFrame({"key": ids, "image_id": ids})
    linked = pl.DataFrame(
        {"image_id": ids, "caption_id": (world().captions["caption_id"].to_list() * 4)[:COUNT]}
    )
    _, found = run(build, config_of(**SECTIONS, pairs=PAIRS), seen(build, world(), objects, linked))
    dropped = found.deduplicate.drops.rows
    assert dropped >= FAMILIES * (MEMBERS - 1) - 2
    assert found.mine_pairs.pairs.rows > 20 and found.make_records.records.rows > 5
    machine.teardown()
