"""From one sample to several: lists split, ways branched, origins named."""

import json

import polars as pl
from pydantic import BaseModel

from infra import samples
from infra.canonical import digest
from tasks.branch_samples import Branch, branch_samples
from tasks.name_origins import Origins, name_origins
from tasks.split_answers import Splitting, split_answers
from tests.tasks.examples import rows


class Turn(BaseModel):
    q: str
    sure: float


def sampled(build, **columns):
    count = len(next(iter(columns.values())))
    names = list("abcdefgh"[:count])
    return samples.write(
        build.store, pl.DataFrame({"sample_id": names, "image_id": ["i"] * count, **columns})
    )


def test_each_member_is_a_sample_with_what_was_known_before(build):
    said = [
        json.dumps([{"q": "who?", "sure": 0.5}, {"q": "why?", "sure": 1}]),
        json.dumps([]),
        json.dumps([{"q": "who?", "sure": 1.0}, {"q": "who?", "sure": 1.0}]),
    ]
    found = split_answers(
        build, sampled(build, turns=said, ocr=["x", "y", "z"]), Splitting("turns", Turn)
    )
    got = [(r["split_from"], r["part"], r["q"], r["sure"], r["ocr"])
           for r in rows(build, found.samples)]  # fmt: skip
    assert sorted(got) == [
        ("a", 0, "who?", 500_000, "x"), ("a", 1, "why?", 1, "x"), ("c", 0, "who?", 1_000_000, "z")
    ]  # fmt: skip
    assert [(r["id"], r["rule"], r["value"]) for r in rows(build, found.drops)] == [
        ("a", "split", 2),
        ("b", "nothing_to_split", 0),
        ("c", "split", 2),
        ("c#1", "same_answer", None),
    ]


def test_lists_of_texts_split_too_and_ids_follow_from_the_content(build):
    given = sampled(build, words=[["one", "two"], ["one"], None])
    found = rows(build, split_answers(build, given, Splitting("words")).samples)
    assert sorted((r["split_from"], r["words"]) for r in found) == [
        ("a", "one"), ("a", "two"), ("b", "one")
    ]  # fmt: skip
    for row in found:
        content = {"of": row["split_from"], "words": row["words"]}
        assert row["sample_id"] == samples.sample_id("i", content)


def test_nothing_to_split_leaves_the_columns(build):
    given = sampled(build, turns=[None])
    found = rows(build, split_answers(build, given, Splitting("turns", Turn)).samples)
    assert found == []


def test_a_branch_has_names_of_its_own(build):
    given = sampled(build, ocr=["x", "y"])
    found = rows(build, branch_samples(build, given, Branch("pairs")).samples)
    assert {(r["of"], r["sample_id"], r["ocr"]) for r in found} == {
        ("a", digest(["a", "pairs"]), "x"),
        ("b", digest(["b", "pairs"]), "y"),
    }


def test_blank_texts_are_none_and_origins_say_so(build):
    given = sampled(build, caption=["a sign", " \n", None])
    params = Origins({"caption": ("human", "model"), "ocr": ("imported", "model")})
    found = rows(build, name_origins(build, given, params).samples)
    assert [(r["caption"], r["caption_origin"]) for r in found] == [
        ("a sign", "human"), (None, "model"), (None, "model")
    ]  # fmt: skip
    assert [(r["ocr"], r["ocr_origin"]) for r in found] == [(None, "model")] * 3
