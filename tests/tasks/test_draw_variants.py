"""Numbers drawn by hash: even, stable, and the same for samples that share what is drawn for."""

from collections import Counter

from tasks.draw_variants import Draws, draw_variants
from tests.tasks.examples import rows
from tests.tasks.tables_of_samples import samples_of

DRAWS = Draws({"whole": "image_id", "part": "sample_id"}, 10)


def drawn(build, count, draws=DRAWS):
    given = samples_of(build, [(f"s{n}", f"i{n // 4}") for n in range(count)], "sample_id image_id")
    return {
        row["sample_id"]: row for row in rows(build, draw_variants(build, given, draws).samples)
    }


def test_samples_of_an_image_share_what_is_drawn_for_the_image(build):
    found = drawn(build, 40)
    assert len({(row["image_id"], row["whole"]) for row in found.values()}) == 10
    assert len({(row["image_id"], row["part"]) for row in found.values()}) > 10


def test_every_number_is_drawn_about_as_often(build):
    counts = Counter(row["part"] for row in drawn(build, 2_000).values())
    assert set(counts) == set(range(10))
    # A tenth each: four standard deviations of a binomial are 54.
    assert all(abs(count - 200) < 54 for count in counts.values())


def test_a_draw_depends_on_seed_and_name_and_on_nothing_else(build):
    few, many = drawn(build, 8), drawn(build, 16)
    assert all(many[name] == row for name, row in few.items())
    other = drawn(build, 16, DRAWS._replace(seed=1))
    assert [r["part"] for r in other.values()] != [r["part"] for r in many.values()]
