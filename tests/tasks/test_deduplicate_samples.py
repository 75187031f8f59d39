"""A sample is a duplicate where picture and text both collide: one alone is not enough."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import samples, tables
from infra.schema import SCHEMAS
from infra.simhash import simhash
from tasks.deduplicate_samples import SampleDedupParams, deduplicate_samples
from tests.tasks.examples import new_build, put, rows

LOOKS = {"informative": True, "dhash": 0, "thumbnail": b"", "contrast": 0, "sharpness": 0,
         "entropy": 0, "rule": None, "detail": None}  # fmt: skip
CAT, DOG = "What is the cat on the left doing?", "How many dogs can be seen in the yard?"


def found(build, given_rows, pictures, params=None):
    """Survivors and {duplicate: (survivor, distance)}.

    given_rows: (sample_id, image_id, instruction); pictures: image_id -> pHash, or
    (pHash, informative, width).
    """
    frame = pl.DataFrame(given_rows, ["sample_id", "image_id", "instruction"], orient="row")
    facts = {n: f if isinstance(f, tuple) else (f, True, 9) for n, f in pictures.items()}
    looks = [
        LOOKS | {"image_id": n, "phash": p, "informative": i} for n, (p, i, _) in facts.items()
    ]
    images = [(name, width, 9) for name, (_, _, width) in facts.items()]
    given_table = samples.write(build.store, frame)
    result = deduplicate_samples(
        build, given_table, put(build, "headers", "image_id width height", images),
        tables.write(build.store, "looks", looks), params or SampleDedupParams(),
    )  # fmt: skip
    drops = {row["id"]: (row["detail"], row["value"]) for row in rows(build, result.drops)}
    return [row["sample_id"] for row in rows(build, result.samples)], drops


def test_the_truth_table(build):
    given_rows = [
        ("a", "1", CAT), ("b", "2", CAT), ("c", "3", CAT), ("d", "2", DOG), ("e", "3", DOG),
    ]  # fmt: skip
    # Pictures 1 and 2 have one hash; 3 has another.
    kept, drops = found(build, given_rows, {"1": 5, "2": 5, "3": 77})
    assert kept == ["a", "c", "d", "e"]
    assert drops == {"b": ("a", 0)}


@pytest.mark.parametrize(("radius", "kept"), [(0, 3), (2, 2), (3, 1)])
def test_pictures_may_differ_by_so_many_bits(build, radius, kept):
    given_rows = [("a", "1", CAT), ("b", "2", CAT), ("c", "3", CAT)]
    pictures = {"1": 0b0, "2": 0b11, "3": 0b11100}  # 2, 3 and 5 bits apart
    found_, drops = found(
        build, given_rows, pictures, SampleDedupParams(image_radius=radius, text_radius=0)
    )
    assert len(found_) == kept
    assert all(distance <= radius for _, distance in drops.values())


@pytest.mark.parametrize(("short_of", "kept"), [(1, 2), (0, 1)])
def test_texts_may_differ_by_so_many_bits(build, short_of, kept):
    one, other = "what is in the box on the table", "what is in the box on the table now"
    apart = (simhash(one) ^ simhash(other)).bit_count()
    params = SampleDedupParams(text_radius=apart - short_of)
    assert len(found(build, [("a", "1", one), ("b", "1", other)], {"1": 5}, params)[0]) == kept


def test_case_and_punctuation_do_not_matter(build):
    kept, _ = found(build, [("a", "1", CAT), ("b", "1", CAT.upper() + "!")], {"1": 5})
    assert kept == ["a"]


def test_the_picture_with_more_pixels_stays(build):
    given_rows = [("a", "1", CAT), ("b", "2", CAT)]
    kept, drops = found(build, given_rows, {"1": (5, True, 9), "2": (5, True, 10)})
    assert (kept, drops) == (["b"], {"a": ("b", 0)})


def test_hashes_that_say_nothing_only_match_the_same_picture(build):
    given_rows = [("a", "0" * 63 + "1", CAT), ("b", "f" * 64, CAT), ("c", "f" * 64, CAT)]
    pictures = {"0" * 63 + "1": (5, False, 9), "f" * 64: (5, False, 9)}
    kept, drops = found(build, given_rows, pictures, SampleDedupParams(image_radius=3))
    assert (kept, drops) == (["a", "b"], {"c": ("b", 0)})


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([CAT, DOG, "", "x"])), max_size=12),
    st.integers(0, 3),
)
def test_it_is_the_recursion_of_the_docstring(tmp_path_factory, pairs, radius):
    given_rows = [(f"{at:02}", str(phash), text) for at, (phash, text) in enumerate(pairs)]
    kept: list[tuple[str, int, str]] = []
    for name, phash, text in given_rows:
        if not any(
            (int(phash) ^ other).bit_count() <= radius and text == said for _, other, said in kept
        ):
            kept.append((name, int(phash), text))
    build = new_build(tmp_path_factory.mktemp("build"))
    pictures = {str(phash): phash for phash, _ in pairs}
    params = SampleDedupParams(image_radius=radius)
    survivors, drops = found(build, given_rows, pictures, params) if pairs else ([], {})
    assert survivors == [name for name, _, _ in kept]
    assert len(survivors) + len(drops) == len(given_rows)


def test_no_samples_are_no_duplicates(build):
    frame = pl.DataFrame(schema={**samples.BASE, "instruction": pl.String})
    empty = [tables.write(build.store, name, SCHEMAS[name].empty_table()) for name in ("looks",)]
    result = deduplicate_samples(
        build, samples.write(build.store, frame), put(build, "headers", "", []), *empty,
        SampleDedupParams(),
    )  # fmt: skip
    assert (result.samples.rows, result.drops.rows) == (0, 0)
