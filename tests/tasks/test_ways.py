"""The stages that carry samples from way to way: mapping, routing, joining, composing."""

import polars as pl
import pytest

from infra import samples
from infra.errors import PairmillError
from tasks.compose_texts import Composition, compose_texts
from tasks.join_samples import join_samples
from tasks.map_values import ValueMap, map_values
from tasks.route_samples import Route, route_samples
from tests.tasks.examples import rows


def sampled(build, **columns):
    count = len(next(iter(columns.values())))
    names = list("abcdefgh"[:count])
    frame = pl.DataFrame({"sample_id": names, "image_id": names, **columns})
    return samples.write(build.store, frame)


def ids(build, table):
    return [row["sample_id"] for row in rows(build, table)]


def test_values_are_mapped_by_the_first_pattern_that_fits(build):
    given = sampled(build, source=["ocr_street", "ocr", "chart", "else", None])
    params = ValueMap("source", "domain", (("ocr", "OCR"), ("ocr*", "Scene"), ("chart", "Chart")))
    found = map_values(build, given, params)
    assert [row["domain"] for row in rows(build, found.samples)] == ["Scene", "OCR", "Chart"]
    assert [(r["id"], r["rule"], r["detail"]) for r in rows(build, found.drops)] == [
        ("d", "unmapped", "else"),
        ("e", "unmapped", None),
    ]
    others = map_values(build, given, params._replace(other="General"))
    assert [row["domain"] for row in rows(build, others.samples)][3:] == ["General"] * 2


@pytest.mark.parametrize(
    ("values", "taken"),
    [((True,), ["a"]), ((False,), ["b"]), ((None,), ["c"]), ((True, None), ["a", "c"]), ((), [])],
)
def test_samples_are_parted_by_values(build, values, taken):
    given = sampled(build, agrees=[True, False, None])
    found = route_samples(build, given, Route("agrees", values))
    assert ids(build, found.samples) == taken
    assert ids(build, found.others) == [name for name in "abc" if name not in taken]
    assert not found.drops.rows


def test_ways_meet_with_their_paths(build):
    one = sampled(build, source=["x", "x"])
    far = join_samples(build, {"far": route_samples(build, one, Route("source", ("x",))).samples})
    given = samples.write(build.store, pl.DataFrame({"sample_id": ["z"], "image_id": ["z"]}))
    met = join_samples(build, {"near": given, "home": far.samples})
    assert [(r["sample_id"], r["path"], r["source"]) for r in rows(build, met.samples)] == [
        ("a", ["far", "home"], "x"),
        ("b", ["far", "home"], "x"),
        ("z", ["near"], None),
    ]
    silent = join_samples(build, {"_unsaid": given})
    assert rows(build, silent.samples)[0]["path"] == []


def test_no_sample_comes_by_two_ways(build):
    given = sampled(build, source=["x"])
    with pytest.raises(PairmillError, match="sample a came by two of the ways one, other"):
        join_samples(build, {"one": given, "other": given})


def test_texts_are_composed_from_the_row_as_it_came(build):
    given = sampled(build, old=["{new}", None], new=["b", "c"], gone=["d", "e"])
    texts = {"old": "{new}", "new": "{old}", "kind": "plain", "both": "<{old}>\n{gone}"}
    found = compose_texts(build, given, Composition(texts, ("gone",)))
    assert [
        (r["old"], r["new"], r["kind"], r["both"], "gone" in r) for r in rows(build, found.samples)
    ] == [("b", "{new}", "plain", "<{new}>\nd", False), ("c", None, "plain", None, False)]
