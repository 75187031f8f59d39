"""Filters of recipes: golden samples on their bounds and just beyond them."""

import itertools

import pytest

from tasks.filter_by_difficulty import DifficultyFilter, filter_by_difficulty
from tasks.filter_crops import CropFilter, Filtering, filter_crops
from tasks.filter_instructions import InstructionFilter, filter_instructions
from tests.tasks.examples import rows
from tests.tasks.tables_of_samples import samples_of

GRADES = "nonsense hallucination solvability clarity"


def kept_and_lost(build, found):
    """Ids that are kept, and (id, rule, value) of the others."""
    lost = [(row["id"], row["rule"], row["value"]) for row in rows(build, found.drops)]
    return [row["sample_id"] for row in rows(build, found.samples)], lost


def by_difficulty(build, *scored, **bounds):
    given = samples_of(build, [(name, "i", *scores) for name, *scores in scored],
                       "sample_id image_id mifd ffd")  # fmt: skip
    return kept_and_lost(build, filter_by_difficulty(build, given, DifficultyFilter(**bounds)))


def test_scores_on_a_threshold_stay_and_those_just_above_go(build):
    assert by_difficulty(
        build,
        ("a", 1_000_000, 900_000), ("b", 1_000_001, 900_000), ("c", 1_000_000, 900_001),
        ("d", None, 1), ("e", 1, None), ffd_max=0.9,
    ) == (
        ["a"],
        [("b", "high_mifd", 1_000_001), ("c", "high_ffd", 900_001), ("d", "unscored", None),
         ("e", "unscored", None)],
    )  # fmt: skip


def test_of_what_is_below_the_thresholds_the_hardest_share_stays(build):
    """Cherry LLM: first the ratios above 1 go, then the highest are taken of what is left."""
    pairs = [(name, mifd, 1) for name, mifd in zip("abcde", (100, 400, 300, 200, 9_000_000))]  # noqa: B905
    kept, lost = by_difficulty(build, *pairs, keep_top_quantile=0.5)
    assert kept == ["b", "c"]
    assert lost == [("a", "beyond_quantile", 100), ("d", "beyond_quantile", 200),
                    ("e", "high_mifd", 9_000_000)]  # fmt: skip


def test_of_all_grades_those_pass_that_oasis_keeps(build):
    """Solvability and clarity 3 at least and 7 together; hallucination and nonsense 5."""
    table = list(itertools.product(range(1, 6), repeat=4))
    given = samples_of(build, [(f"{at:03d}", "i", *row) for at, row in enumerate(table)],
                       f"sample_id image_id {GRADES}")  # fmt: skip
    found = filter_instructions(build, given, InstructionFilter())
    left = {tuple(row[name] for name in GRADES.split()) for row in rows(build, found.samples)}
    assert left == {
        (n, h, s, c)
        for n, h, s, c in table
        if s >= 3 and c >= 3 and s + c >= 7 and h == 5 and n == 5
    }
    assert len(left) == found.samples.rows == 8
    assert found.drops.rows == 625 - 8


@pytest.mark.parametrize(
    ("grades", "fate"),
    [
        ((4, 5, 5, 5), ("nonsense", 4)),
        ((5, 4, 5, 5), ("hallucination", 4)),
        ((5, 5, 2, 5), ("not_solvable", 2)),
        ((5, 5, 5, 2), ("unclear", 2)),
        ((5, 5, 3, 3), ("low_sum", 6)),
        ((1, 1, 1, 1), ("nonsense", 1)),
    ],
)
def test_the_first_grade_that_is_too_low_is_the_fate(build, grades, fate):
    given = samples_of(build, [("s", "i", *grades)], f"sample_id image_id {GRADES}")
    found = filter_instructions(build, given, InstructionFilter())
    assert kept_and_lost(build, found) == ([], [("s", *fate)])


CROPS = [  # id, class, rank, CLIP score, share that is copied
    ("a", "cat", 5, 200_000, 0),
    ("b", "cat", 6, 300_000, 0),
    ("c", "cat", 1, 199_999, 0),
    ("d", "dog", 1, 400_000, 500_000),
    ("e", "dog", 1, 400_000, 500_001),
    ("f", "dog", None, 250_000, 0),
]
CROP_COLUMNS = "sample_id image_id class_name class_rank clip_score said_copied"


def crops(build, **bounds):
    given = samples_of(build, [(name, "i", *rest) for name, *rest in CROPS], CROP_COLUMNS)
    found = filter_crops(build, given, Filtering(CropFilter(**bounds), "said", "class_name"))
    return kept_and_lost(build, found)


def test_crops_on_a_bound_stay_and_those_just_beyond_go(build):
    assert crops(build, clip_min=0.2, copy_max=0.5, clip_keep=1.0) == (
        ["a", "d", "f"],
        [("b", "unlike_its_class", 6), ("c", "low_clip_score", 199_999),
         ("e", "copies_the_whole", 500_001)],
    )  # fmt: skip


def test_each_class_has_its_share_of_what_the_bounds_leave(build):
    kept, lost = crops(build, clip_keep=0.5)
    assert kept == ["a", "d", "e"]
    assert lost == [("b", "unlike_its_class", 6), ("c", "beyond_quantile", 199_999),
                    ("f", "beyond_quantile", 250_000)]  # fmt: skip


def test_only_the_class_and_the_share_are_looked_at_unless_told_otherwise(build):
    assert crops(build, clip_keep=1.0) == (
        ["a", "c", "d", "e", "f"], [("b", "unlike_its_class", 6)]
    )  # fmt: skip
