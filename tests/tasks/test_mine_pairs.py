"""Pairs from lists: one example by hand, then the rules once more, slowly, on random corpora."""

import hashlib
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import PairmillError
from infra.neighbours import ONE
from tasks.mine_pairs import MiningParams, band_bounds, mine_pairs, pair_id
from tests.tasks.examples import angle, cosine, new_build, put, put_vectors, rows

LOOK, TEXT = ("clip", "image"), ("clip", "caption")


class Corpus(NamedTuple):
    """Vectors by id, and the caption of each image that has one."""

    images: dict
    captions: dict
    texts: dict

    def space(self, of):
        """Vectors by image of one space."""
        if of == "image":
            return self.images
        return {image: self.texts[caption] for image, caption in self.captions.items()}


def score(a, b):
    return round(1e6 * cosine(a, b))


def lists_of(vectors, k):
    """{image: [(score, neighbour)]}, best first, ties by id."""
    return {
        image: sorted(
            ((score(vector, vectors[other]), other) for other in vectors if other != image),
            key=lambda item: (-item[0], item[1]),
        )[:k]
        for image, vector in sorted(vectors.items())
    }


def mine(build, corpus, spaces, k=50, shuffle=list, eligible=None, **params):
    """`spaces`: name -> (model, of, unit, low, high); lists are made here, by brute force."""
    captions = (eligible or corpus).captions
    members, lists = {}, {}
    for name, (_, of, *_) in spaces.items():
        found = lists_of(corpus.space(of), k)
        row = {image: n for n, image in enumerate(found)}
        members[name] = put(build, "members", "image_id", [(image,) for image in found])
        table = [
            (row[image], [row[other] for _, other in line], [s for s, _ in line])
            for image, line in found.items()
        ]
        lists[name] = put(build, "lists", "row neighbours scores", table)
    listed = [(image, captions.get(image), 0) for image in shuffle(list(corpus.images))]
    return mine_pairs(
        build,
        put(build, "eligible", "image_id caption_id clip_score", listed),
        *(members, lists),
        {"clip": put_vectors(build, "image_id", dict(shuffle(list(corpus.images.items()))))},
        {"clip": put_vectors(build, "caption_id", dict(shuffle(list(corpus.texts.items()))))},
        MiningParams(spaces=spaces, **params),
    )


def pairs_of(build, mined, query=None):
    """{target: row} of one query, or {(query, target): row}."""
    found = {(row["query"], row["target"]): row for row in rows(build, mined.pairs)}
    return found if query is None else {t: row for (q, t), row in found.items() if q == query}


def facts_of(build, mined):
    return {row["name"]: row["value"] for row in rows(build, mined.facts)}


# By hand -------------------------------------------------------------------------------------

#            look: angle, cosine with q        text: angle, cosine with q
PLANE = {
    "q": (0, 0),
    "a": (10, 40),  # 0.985 nearly the same    0.766 in the band
    "b": (25, 0),  #  0.906 in the band        1.000 the same caption
    "c": (35, 100),  # 0.819 in the band      -0.174 below
    "d": (60, 50),  # 0.500 below              0.643 in the band
    "e": (90, 80),  # 0.000 below              0.174 below
    "f": (120, None),  # -0.500 below          no caption
}
EXAMPLE = Corpus(
    images={image: angle(look) for image, (look, _) in PLANE.items()},
    captions={image: f"caption {image}" for image, (_, text) in PLANE.items() if text is not None},
    texts={f"caption {i}": angle(text) for i, (_, text) in PLANE.items() if text is not None},
)
BANDS = {"look": (*LOOK, "cosine", 0.8, 0.95), "text": (*TEXT, "cosine", 0.5, 0.9)}


def test_targets_are_taken_in_turn_over_the_spaces(build):
    def targets(most, spaces):
        mined = mine(build, EXAMPLE, spaces, targets=most)
        return sorted(pairs_of(build, mined, "q"))

    backwards = dict(reversed(BANDS.items()))
    assert targets(1, BANDS) == ["b"], "the best look in the band"
    assert targets(1, backwards) == ["a"], "the best text in the band"
    assert targets(2, BANDS) == ["a", "b"]
    assert targets(3, BANDS) == ["a", "b", "c"]
    assert targets(3, backwards) == ["a", "b", "d"]
    assert targets(9, BANDS) == ["a", "b", "c", "d"]


def test_a_pair_carries_scores_and_ranks_of_all_spaces(build):
    found = pairs_of(build, mine(build, EXAMPLE, BANDS, targets=9))
    look, text = (EXAMPLE.space(of) for _, of, *_ in BANDS.values())
    assert found["q", "b"]["ties"] == [
        {"space": "look", "score": score(look["q"], look["b"]), "rank": 2, "in_band": True},
        {"space": "text", "score": 1_000_000, "rank": 1, "in_band": False},
    ]
    assert found["q", "a"]["ties"] == [
        {"space": "look", "score": score(look["q"], look["a"]), "rank": 1, "in_band": False},
        {"space": "text", "score": score(text["q"], text["a"]), "rank": 2, "in_band": True},
    ]
    assert found["f", "e"]["ties"] == [
        {"space": "look", "score": score(look["f"], look["e"]), "rank": 1, "in_band": True},
    ], "an image without a caption has no tie in text"


def test_negatives_are_related_to_neither_query_nor_target(build):
    found = pairs_of(build, mine(build, EXAMPLE, BANDS, targets=9), "q")
    negatives = {target: row["negatives"] for target, row in found.items()}
    assert negatives == {
        "b": ["q", "e", "f"],
        # e is outside the bands of q, and inside the text band of a, c and d.
        "a": ["q", "f"],
        "c": ["q", "f"],
        # f is at 60 degrees from d: below the band of looks; it has no caption to compare.
        "d": ["q", "f"],
    }


def test_retrieved_negatives_are_the_other_images_in_the_bands(build):
    mined = mine(build, EXAMPLE, BANDS, targets=2, negatives_from="retrieved")
    assert {target: row["negatives"] for target, row in pairs_of(build, mined, "q").items()} == {
        # The retrieved set of q: b, a, c, d. Only two of it become targets.
        "b": ["q", "a", "c", "d"],
        "a": ["q", "b", "c", "d"],
    }
    few = mine(build, EXAMPLE, BANDS, targets=9, negatives=3, negatives_from="retrieved")
    assert {target: row["negatives"] for target, row in pairs_of(build, few, "q").items()} == {
        "b": ["q", "a", "c"],
        "a": ["q", "b", "c"],
        "c": ["q", "b", "a"],
        "d": ["q", "b", "a"],
    }


def test_retrieved_negatives_are_compared_with_no_target(build):
    """b and c are twins: each is the other's false negative, and that is MegaPairs' way."""
    images = {"q": angle(0), "b": angle(30), "c": angle(31)}
    spaces = {"look": (*LOOK, "cosine", 0.8, 0.9)}
    mined = mine(build, Corpus(images, {}, {}), spaces, negatives_from="retrieved")
    assert pairs_of(build, mined)["q", "b"]["negatives"] == ["q", "c"]
    assert pairs_of(build, mine(build, Corpus(images, {}, {}), spaces))["q", "b"]["negatives"] == [
        "q"
    ]


@pytest.mark.parametrize(("most", "b"), [(1, ["q"]), (2, ["q", "e"]), (3, ["q", "e", "f"])])
def test_the_query_is_the_first_of_at_most_h_negatives(build, most, b):
    mined = mine(build, EXAMPLE, BANDS, targets=9, negatives=most)
    assert pairs_of(build, mined)["q", "b"]["negatives"] == b
    assert all(1 <= len(row["negatives"]) <= most for row in rows(build, mined.pairs))
    short = sum(len(row["negatives"]) < most for row in rows(build, mined.pairs))
    assert facts_of(build, mined)["pairs_with_too_few_negatives"] == short


def test_negatives_are_sought_down_the_whole_list(build):
    """Fifty near copies of the query, all close to the target, come before the first good one."""
    images = {f"copy{n:02}": angle(0.02 * n) for n in range(50)}
    images |= {"query": angle(0), "target": angle(30), "other": angle(170)}
    spaces = {"look": (*LOOK, "cosine", 0.85, 0.9)}
    mined = mine(build, Corpus(images, {}, {}), spaces, negatives=2, k=60)
    assert pairs_of(build, mined)["query", "target"]["negatives"] == ["query", "other"]


def test_a_negative_that_a_short_list_hides_in_the_band_is_not_one(build):
    """With k = 2 the text list of q is its twins; that `near` is in its band shows in no list."""
    looks = {"q": 0, "near": -5, "t": 30, "twin1": 100, "twin2": 120}
    texts = {"q": 0, "near": 40, "t": 130, "twin1": 10, "twin2": 12}
    corpus = Corpus(
        images={image: angle(degrees) for image, degrees in looks.items()},
        captions={image: image for image in looks},
        texts={image: angle(degrees) for image, degrees in texts.items()},
    )
    spaces = {"look": (*LOOK, "cosine", 0.85, 0.9), "text": (*TEXT, "cosine", 0.6, 0.8)}
    mined = mine(build, corpus, spaces, k=2)
    assert pairs_of(build, mined)["q", "t"]["negatives"] == ["q", "twin1", "twin2"]


def test_an_image_without_a_vector_is_an_error(build):
    images = {"a": angle(0), "lost": angle(30), "z": angle(150)}
    corpus = Corpus(images, {"a": "a", "z": "z"}, {"a": angle(0), "z": angle(10)})
    spaces = {"look": (*LOOK, "cosine", 0.8, 0.9), "text": (*TEXT, "cosine", 0.1, 0.2)}
    eligible = corpus._replace(captions=corpus.captions | {"lost": "not embedded"})
    with pytest.raises(PairmillError, match="1 of 3 ids have no vector in table texts"):
        mine(build, corpus, spaces, eligible=eligible)


# Bands ---------------------------------------------------------------------------------------


def test_both_ends_of_a_band_are_in_it(build):
    """Scores with q: a 0.6, b 0.8, c 0.96."""
    images = {"q": (1, 0), "a": (3, 4), "b": (4, -3), "c": (0.96, 0.28)}
    c = score(images["q"], images["c"])

    def targets(low, high):
        spaces = {"look": (*LOOK, "cosine", low, high)}
        mined = mine(build, Corpus(images, {}, {}), spaces, targets=9)
        return sorted(pairs_of(build, mined, "q"))

    assert targets(0.6, c / 1e6) == ["a", "b", "c"]
    assert targets(0.600001, (c - 1) / 1e6) == ["b"]


def test_cosine_bands_are_what_they_say_whatever_the_corpus():
    assert band_bounds(np.array([], int), "cosine", 0.8, 0.96) == (800_000, 960_000)
    assert band_bounds(np.array([5]), "cosine", -0.29, 0.57) == (-290_000, 570_000)


def test_quantile_bands_are_scores_of_the_corpus_in_any_order():
    scores = np.array([50, 10, 30, 20, 40, 60, 70, 80, 90, 100, 0])
    assert band_bounds(scores, "quantile", 0.5, 0.9) == (50, 90)
    assert band_bounds(scores[::-1], "quantile", 0.55, 0.99) == (50, 90)
    assert band_bounds(scores, "quantile", 0.0, 1.0) == (0, 100)
    assert band_bounds(np.array([7]), "quantile", 0.5, 0.9) == (7, 7)


def test_identical_vectors_are_left_out_of_quantiles():
    """Captions shared by hundreds: nine of ten scores are those of equal captions."""
    scores = np.array([10, 20, 30, 40] + [ONE] * 36)
    assert band_bounds(scores, "quantile", 0.5, 0.99) == (20, 30)


@pytest.mark.parametrize("scores", [[], [ONE], [ONE] * 9])
def test_where_only_identical_vectors_are_left_the_band_is_empty(scores):
    assert band_bounds(np.array(scores, int), "quantile", 0.5, 0.99) == (ONE, ONE - 1)


def test_lists_that_end_in_or_above_the_band_are_counted(build):
    """a, b, e and d are above each other's band, but a and d, which are in it; c is far off."""
    degrees = {"a": 0, "b": 2, "c": 40, "d": 4, "e": 3}
    images = {image: angle(d) for image, d in degrees.items()}
    spaces = {"look": (*LOOK, "cosine", 0.8, 0.998)}

    def counts(k):
        (band,) = rows(build, mine(build, Corpus(images, {}, {}), spaces, k=k).bands)
        return band["scores"], band["truncated"], band["crowded"]

    assert counts(k=1) == (5, 1, 4)
    assert counts(k=2) == (10, 0, 4)
    assert counts(k=3) == (15, 2, 2)
    # All others are listed: nothing can be missing.
    assert counts(k=4) == counts(k=50) == (20, 0, 0)


# Direction -----------------------------------------------------------------------------------


def test_direction_one_keeps_the_lesser_id_and_says_what_it_dropped(build):
    both = pairs_of(build, mine(build, EXAMPLE, BANDS, targets=9))
    mined = mine(build, EXAMPLE, BANDS, targets=9, direction="one")
    one = pairs_of(build, mined)
    reverses = {pair: (pair[1], pair[0]) for pair in both}
    assert set(one) == {
        pair
        for pair, reverse in reverses.items()
        if reverse not in both or pair_id(*pair) < pair_id(*reverse)
    }
    drops = sorted(rows(build, mined.drops), key=lambda drop: drop["id"])
    assert drops == [
        {
            "level": "pair",
            "id": pair_id(*pair),
            "stage": "mine_pairs",
            "rule": "reverse_kept",
            "value": None,
            "detail": pair_id(*reverses[pair]),
        }
        for pair in sorted(set(both) - set(one), key=lambda pair: pair_id(*pair))
    ]
    few = sum(len(row["negatives"]) < 5 for row in one.values())
    expected = {"pairs": len(one), "pairs_with_too_few_negatives": few}
    assert facts_of(build, mined) == expected


def test_a_pair_is_named_by_its_two_images_in_order():
    assert pair_id("a", "b") == hashlib.sha256(b"a>b").hexdigest() != pair_id("b", "a")


# Small and odd corpora -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [{}, {"a": (1, 0)}, {"a": (1, 0), "b": (1, 0), "c": (1, 0)}],
    ids=["none", "one", "all identical"],
)
@pytest.mark.parametrize("unit", ["cosine", "quantile"])
def test_corpora_without_pairs(build, images, unit):
    spaces = {"look": (*LOOK, unit, 0.7, 0.99), "text": (*TEXT, unit, 0.7, 0.99)}
    mined = mine(build, Corpus(images, {}, {}), spaces)
    assert (mined.pairs.rows, mined.drops.rows) == (0, 0)
    assert facts_of(build, mined) == {"pairs": 0, "pairs_with_too_few_negatives": 0}
    assert [band["truncated"] for band in rows(build, mined.bands)] == [0, 0]


# The rules once more -------------------------------------------------------------------------


class Slow:
    """The rules of mining as they are written down, one image at a time."""

    def __init__(self, corpus, spaces, k, targets, negatives, direction, negatives_from):
        self.negatives_from = negatives_from
        self.names = list(spaces)
        self.vectors = {name: corpus.space(of) for name, (_, of, *_) in spaces.items()}
        self.lists = {name: lists_of(self.vectors[name], k) for name in spaces}
        self.bands = {name: self.band(name, *rule[2:]) for name, rule in spaces.items()}
        found = {
            (query, target): self.row(query, target, negatives)
            for query in corpus.images
            for target in self.targets(query, targets)
        }
        self.pairs = {
            pair: row
            for pair, row in found.items()
            if direction == "both"
            or pair[::-1] not in found
            or pair_id(*pair) < pair_id(*pair[::-1])
        }

    def band(self, name, unit, low, high):
        if unit == "cosine":
            return round(low * 1e6), round(high * 1e6)
        scores = sorted(s for line in self.lists[name].values() for s, _ in line if s < ONE)
        if not scores:
            return ONE, ONE - 1
        return tuple(scores[int(q * (len(scores) - 1))] for q in (low, high))

    def in_band(self, name, a, b):
        return self.has(name, a, b) and self.below_top(name, self.score(name, a, b))

    def below_top(self, name, value):
        return self.bands[name][0] <= value <= self.bands[name][1]

    def has(self, name, a, b):
        return a in self.vectors[name] and b in self.vectors[name]

    def score(self, name, a, b):
        return score(self.vectors[name][a], self.vectors[name][b])

    def listed(self, name, image):
        return [other for _, other in self.lists[name].get(image, [])]

    def targets(self, query, most):
        waiting = {
            name: [other for other in self.listed(name, query) if self.in_band(name, query, other)]
            for name in self.names
        }
        chosen = []
        for name in cycle(self.names):
            if len(chosen) == most or not any(waiting.values()):
                return chosen
            waiting[name] = [other for other in waiting[name] if other not in chosen]
            if waiting[name]:
                chosen.append(waiting[name].pop(0))

    def row(self, query, target, most):
        ties = []
        for name in self.names:
            if self.has(name, query, target):
                value, listed = self.score(name, query, target), self.listed(name, query)
                rank = listed.index(target) + 1 if target in listed else None
                tie = {"space": name, "score": value, "rank": rank}
                ties.append(tie | {"in_band": self.below_top(name, value)})
        drawn = getattr(self, self.negatives_from)(query, target)
        return {"ties": ties, "negatives": [query, *drawn][:most]}

    def retrieved(self, query, target):
        return [other for other in self.targets(query, most=None) if other != target]

    def unrelated(self, query, target):
        return [other for other in self.candidates(query) if self.is_good(query, target, other)]

    def candidates(self, query):
        outside = [
            [other for other in self.listed(name, query) if not self.in_band(name, query, other)]
            for name in self.names
        ]
        longest = max(map(len, outside))
        in_turn = [line[n] for n in range(longest) for line in outside if n < len(line)]
        return list(dict.fromkeys(in_turn))

    def is_good(self, query, target, candidate):
        for name in self.names:
            if self.in_band(name, query, candidate):
                return False
            low, _ = self.bands[name]
            if self.has(name, target, candidate) and self.score(name, target, candidate) >= low:
                return False
        return candidate != target


@st.composite
def corpora(draw):
    """A few images on a coarse grid: many scores are equal, some 1, some captions shared."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 14))

    def vectors(prefix, count, d):
        drawn = rng.integers(-2, 3, (count, d))
        drawn[:, 0] = np.where(drawn.any(axis=1), drawn[:, 0], 1)
        return {f"{prefix}{i:02}": tuple(row) for i, row in enumerate(drawn.tolist())}

    images, texts = vectors("i", n, 3), vectors("c", max(1, n // 2), 2)
    captions = {i: f"c{rng.integers(len(texts)):02}" for i in images if rng.random() < 0.8}
    return Corpus(images, captions, texts)


@st.composite
def rules(draw):
    bands = st.sampled_from(
        [
            *[("quantile", 0.5, 0.9), ("quantile", 0.0, 1.0), ("quantile", 0.7, 0.99)],
            *[("cosine", 0.5, 0.96), ("cosine", -0.2, 0.5), ("cosine", 0.8, 1.0)],
        ]
    )
    named = {"look": LOOK, "text": TEXT, "again": LOOK}
    chosen = draw(st.lists(st.sampled_from(sorted(named)), min_size=1, unique=True))
    return {name: (*named[name], *draw(bands)) for name in chosen}


@given(
    corpora(),
    rules(),
    st.integers(1, 14),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["both", "one"]),
    st.sampled_from(["unrelated", "retrieved"]),
    st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_pairs_are_those_of_the_rules_in_any_order_of_rows(
    tmp_path_factory, corpus, spaces, k, targets, negatives, direction, source, shuffler
):
    build = new_build(tmp_path_factory.mktemp("mine"))
    params = {"targets": targets, "negatives": negatives, "direction": direction}
    params["negatives_from"] = source
    shuffle = lambda items: shuffler.sample(items, len(items))  # noqa: E731
    mined = mine(build, corpus, spaces, k, shuffle, **params)
    slow = Slow(corpus, spaces, k, **params)
    assert {b["space"]: (b["low"], b["high"]) for b in rows(build, mined.bands)} == slow.bands
    found = rows(build, mined.pairs)
    assert [row["pair_id"] for row in found] == sorted(row["pair_id"] for row in found)
    assert all(row["query"] != row["target"] for row in found)
    shown = {
        (row["query"], row["target"]): {"ties": row["ties"], "negatives": row["negatives"]}
        for row in found
    }
    assert shown == slow.pairs


# Nights --------------------------------------------------------------------------------------


def subset(corpus, images, captions):
    """The corpus of some images and their captions of today."""
    kept = {image: corpus.images[image] for image in sorted(images)}
    return Corpus(kept, {i: c for i, c in captions.items() if i in kept}, corpus.texts)


@given(
    st.integers(0, 2**32),
    rules(),
    st.integers(1, 14),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["both", "one"]),
    st.sampled_from(["unrelated", "retrieved"]),
)
@settings(max_examples=30, deadline=None)
def test_any_history_ends_at_the_pairs_of_its_set(
    tmp_path_factory, seed, spaces, k, targets, negatives, direction, source
):
    rng = np.random.default_rng(seed)
    drawn = np.column_stack([1 + rng.integers(0, 2, 30), rng.integers(-2, 3, (30, 2))])
    images = {f"i{i:02}": tuple(row) for i, row in enumerate(drawn.tolist())}
    texts = {f"c{i:02}": tuple(rng.integers(1, 4, 2).tolist()) for i in range(8)}
    captioned = {i: f"c{rng.integers(8):02}" for i in images if rng.random() < 0.8}
    pool = Corpus(images, captioned, texts)
    present = set(rng.choice(sorted(images), 20, replace=False).tolist())
    captions = dict(pool.captions)
    params = {"targets": targets, "negatives": negatives, "direction": direction}
    params["negatives_from"] = source
    build = new_build(tmp_path_factory.mktemp("nights"))
    for _ in range(4):
        for image in rng.choice(sorted(images), 3, replace=False).tolist():
            present ^= {image}
        captions[sorted(images)[rng.integers(30)]] = f"c{rng.integers(8):02}"
        corpus = subset(pool, present, captions)
        mined = mine(build, corpus, spaces, k, **params)
    slow = Slow(corpus, spaces, k, **params)
    shown = {
        (row["query"], row["target"]): {"ties": row["ties"], "negatives": row["negatives"]}
        for row in rows(build, mined.pairs)
    }
    assert shown == slow.pairs


@pytest.mark.parametrize("source", ["unrelated", "retrieved"])
def test_a_night_scores_what_changed(build, source):
    rng = np.random.default_rng(5)
    spaces = {"look": (*LOOK, "quantile", 0.6, 0.95), "text": (*TEXT, "quantile", 0.6, 0.95)}
    drawn = rng.standard_normal((2, 300, 6)).tolist()
    images = {f"i{i:03}": tuple(row) for i, row in enumerate(drawn[0])}
    texts = {f"c{i:03}": tuple(row) for i, row in enumerate(drawn[1])}
    corpus = Corpus(images, {image: f"c{image[1:]}" for image in images}, texts)
    mine(build, corpus, spaces, k=20, negatives_from=source)
    whole = build.work.pop("similarities_computed")
    left = subset(corpus, set(images) - {"i007"}, corpus.captions)
    mine(build, left, spaces, k=20, negatives_from=source)
    assert 0 < build.work["similarities_computed"] < whole / 5
