"""The line-up, against a real server: false negatives, targets that are not found, and counts."""

import json

import pytest

from infra import responses
from tasks.line_up import LiningUp, in_hash_order, line_up
from tests.judges import Corpus, enclosed, judge, line_ups
from tests.mllm_server import BEHAVIOURS, MllmServer, completion, digests, said
from tests.tasks.examples import put, rows

# Picture 0 is the query of all, 1 the target of all; the other ones are hard negatives.
NEGATIVES = {"p1": [2, 3, 4], "p2": [3, 5], "p3": [4, 6, 7, 8], "p4": [], "p5": [2, 9]}
FALSE, HALF, BETTER = 3, 4, 9


@pytest.fixture
def corpus(build):
    return Corpus(build, 10)


@pytest.fixture(autouse=True)
def sound(monkeypatch, corpus):
    """To it picture 3 fits as well as the target, 4 partly, and 9 better than the target."""

    def decide(digest):
        return {1: "fits", FALSE: "fits", HALF: "partly", BETTER: "fits"}.get(
            corpus.place(digest), "no"
        )

    def best(candidates):
        places = {corpus.place(digest): digest for digest in candidates}
        return places.get(BETTER) or places.get(1)

    monkeypatch.setitem(BEHAVIOURS, "judge", line_ups(decide, best))


def run(
    corpus, url, negatives=NEGATIVES, share=1.0, instructions=("Make it red", "Red"), **changed
):
    ids = corpus.ids
    ties = [{"space": "dino", "score": 700_000, "rank": 1, "in_band": True},
            {"space": "text", "score": 899_999, "rank": 2, "in_band": True},
            {"space": "clip", "score": 1, "rank": 2, "in_band": False}]  # fmt: skip
    pairs = put(
        corpus.build, "pairs", "pair_id query target ties negatives",
        [(name, ids[0], ids[1], ties, [ids[0], *(ids[n] for n in others)])
         for name, others in negatives.items()],
    )  # fmt: skip
    bands = put(
        corpus.build, "bands", "space low high",
        [("dino", 600_000, 899_999), ("text", 600_000, 899_999), ("clip", 0, 10)],
    )  # fmt: skip
    labels = corpus.labels([(name, list(instructions)) for name in negatives])
    params = {"most": 4, "false_negatives": "drop", "unjudged": "drop"} | changed
    lining = LiningUp(judge=judge(url), share=share, **params)
    return line_up(
        corpus.build, pairs, labels, bands, corpus.eligible, corpus.objects, lining
    )  # fmt: skip


def negatives(corpus, found):
    return {
        row["pair_id"]: [corpus.ids.index(image) for image in row["negatives"]]
        for row in rows(corpus.build, found.pairs)
    }


def dropped(corpus, found):
    return [(row["id"], row["rule"], row["detail"]) for row in rows(corpus.build, found.drops)]


def facts(corpus, found):
    return {row["name"]: row["value"] for row in rows(corpus.build, found.facts)}


def test_false_negatives_leave_and_a_target_that_is_not_the_best_drops_its_pair(corpus):
    with MllmServer(rule=lambda _: "judge") as server:
        found = run(corpus, server.url)
    assert negatives(corpus, found) == {
        "p1": [0, 2, 4], "p2": [0, 5], "p3": [0, 4, 6, 7, 8], "p4": [0], "p5": [0, 2],
    }  # fmt: skip
    assert dropped(corpus, found) == [("p5", "target_not_preferred", "a negative")]
    assert [row["pair_id"] for row in rows(corpus.build, found.labels)] == ["p1", "p2", "p3", "p4"]
    assert rows(corpus.build, found.positives) == []
    assert server.calls == 4  # p4 has nothing to be lined up with


def test_false_negatives_may_become_positives(corpus):
    with MllmServer(rule=lambda _: "judge") as server:
        found = run(corpus, server.url, false_negatives="positives")
        more = [(row["pair_id"], corpus.ids.index(row["image_id"]))
                for row in rows(corpus.build, found.positives)]  # fmt: skip
        assert more == [("p1", FALSE), ("p2", FALSE), ("p5", BETTER)]
        assert negatives(corpus, found)["p2"] == [0, 5]
        asked = server.calls
        run(corpus, server.url)
        assert server.calls == asked


def test_the_judge_sees_the_query_then_the_candidates_in_an_order_of_their_hashes(corpus):
    with MllmServer(rule=lambda _: "judge") as server:
        found = run(corpus, server.url, {"p3": NEGATIVES["p3"]}, most=3)
    (request,) = server.requests
    source, *candidates = (corpus.place(digest) for digest in digests(request))
    assert source == 0
    assert sorted(candidates) == [1, 4, 6, 7]  # three of the four hard negatives, the first ones
    order = in_hash_order("p3", [corpus.ids[at] for at in (1, 4, 6, 7)])
    assert [corpus.ids[at] for at in candidates] == list(order)
    assert enclosed(request) == {"1": "Make it red", "2": "Red"}
    told = said(request)
    assert all(f"Candidate {letter}:" in told for letter in "ABCD") and "Candidate E:" not in told
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["best"]["enum"] == ["A", "B", "C", "D", "none"]
    row = rows(corpus.build, found.line_ups)[0]
    stored = responses.look(corpus.build.store).get(row["requests"][0])
    assert stored.stage == "line_up" and len(stored.images) >= 5


def test_the_place_of_the_target_says_nothing():
    ids = [str(n) for n in range(5)]
    places = [in_hash_order(f"pair {n}", ids).index("0") for n in range(2_000)]
    assert all(abs(places.count(at) / 2_000 - 0.2) < 0.03 for at in range(5))
    assert in_hash_order("p", ids) == in_hash_order("p", ids[::-1])


def test_counts_by_space_and_third_of_its_band(corpus):
    with MllmServer(rule=lambda _: "judge") as server:
        found = facts(corpus, run(corpus, server.url))
    assert (found["pairs"], found["preferred"]) == (4, 3)
    assert (found["checked all"], found["fits all"], found["partly all"]) == (11, 3, 2)
    # dino: 700,000 of 600,000 to 899,999 is in the middle third; text lies in the high one.
    assert (found["checked dino middle"], found["fits dino middle"]) == (11, 3)
    assert (found["checked text high"], found["fits text high"]) == (11, 3)
    assert not [name for name in found if "clip" in name or "low" in name]
    assert sum(found[f"best {letter}"] for letter in "ABCDE" if f"best {letter}" in found) == 4
    assert sum(found[f"target {letter}"] for letter in "ABCDE" if f"target {letter}" in found) == 4
    assert found["target said fits"] == 4


@pytest.mark.parametrize(
    ("answer", "drop"),
    [
        ({"A": "no", "B": "no", "C": "no", "best": "none"}, ("target_not_preferred", "none")),
        ({"A": "fits", "B": "fits", "best": "A"}, ("unjudged", "wrong_schema")),
        ({"A": "fits", "B": "fits", "C": "no", "best": "D"}, ("unjudged", "wrong_schema")),
        ({"A": "fits", "B": "maybe", "C": "no", "best": "A"}, ("unjudged", "wrong_schema")),
        ({"A": "fits", "B": "no", "C": "no", "best": "a"}, ("unjudged", "wrong_schema")),
        ({"A": "fits", "B": "no", "C": "no", "D": "no", "best": "A"},
         ("unjudged", "wrong_schema")),
    ],
)  # fmt: skip
def test_letters_are_taken_as_they_stand(corpus, monkeypatch, answer, drop):
    monkeypatch.setitem(BEHAVIOURS, "told", lambda r: completion(r, json.dumps(answer)))
    with MllmServer(rule=lambda _: "told") as server:
        found = run(corpus, server.url, {"p2": NEGATIVES["p2"]})
    assert dropped(corpus, found) == [("p2", *drop)]


def test_who_always_says_the_first_letter_prefers_the_target_no_more_than_by_chance(
    corpus, monkeypatch
):
    def lazy(request):
        letters = "ABC"
        return completion(request, json.dumps(dict.fromkeys(letters, "fits") | {"best": "A"}))

    monkeypatch.setitem(BEHAVIOURS, "lazy", lazy)
    with MllmServer(rule=lambda _: "lazy") as server:
        found = facts(corpus, run(corpus, server.url, {f"p{n}": [2, 5] for n in range(120)}))
    assert found["best A"] == 120
    assert 25 <= found["preferred"] == found["target A"] <= 55


def test_no_answer_is_a_fate_or_no_objection(corpus):
    with MllmServer(rule=lambda _: "refusal") as server:
        found = run(corpus, server.url, {"p2": NEGATIVES["p2"]})
        assert dropped(corpus, found) == [("p2", "unjudged", "refused")]
        assert facts(corpus, found) == {"unjudged": 1}
        found = run(corpus, server.url, {"p2": NEGATIVES["p2"]}, unjudged="keep")
        assert dropped(corpus, found) == []
        assert negatives(corpus, found) == {"p2": [0, 3, 5]}
        assert server.calls == 1


def test_what_failed_is_asked_again_and_nothing_else(corpus):
    failing = {7}

    def rule(request):
        places = {corpus.place(digest) for digest in digests(request)}
        return "400" if places & failing else "judge"

    with MllmServer(rule=rule) as server:
        found = run(corpus, server.url)
        assert ("p3", "endpoint_error", None) in dropped(corpus, found)
        assert server.counts == {"judge": 3, "400": 1}
        failing.clear()
        found = run(corpus, server.url)
        assert dropped(corpus, found) == [("p5", "target_not_preferred", "a negative")]
        assert server.counts == {"judge": 4, "400": 1}
        run(corpus, server.url, NEGATIVES | {"p6": [5]})
        assert server.counts == {"judge": 5, "400": 1}
        run(corpus, server.url, instructions=["Make it blue"])
        assert server.counts == {"judge": 9, "400": 1}


def test_where_it_starts_from_does_not_show(corpus, tmp_path, pool):
    from tests.conftest import make_build

    with MllmServer(rule=lambda _: "judge") as server:
        run(corpus, server.url, {"p1": NEGATIVES["p1"]})
        updated = run(corpus, server.url)
        fresh = Corpus(make_build(tmp_path / "fresh", pool), 10)
        assert run(fresh, server.url) == updated


def test_pairs_outside_the_draw_pass(corpus):
    with MllmServer(rule=lambda _: "judge") as server:
        found = run(corpus, server.url, {f"p{n}": [BETTER] for n in range(12)}, share=0.5)
    lost = len(dropped(corpus, found))
    assert 0 < lost < 12
    assert found.labels.rows == 12 - lost
