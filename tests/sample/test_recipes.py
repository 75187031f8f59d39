"""The sample's recipes: corpora that are made again as they were, and a config for each recipe."""

import runpy
from pathlib import Path

import pytest

from flows.recipe import discover

RECIPES = Path(__file__).parents[2] / "sample/recipes"
MAKER = runpy.run_path(str(RECIPES / "make_records.py"))


def test_every_recipe_has_a_sample_config():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {r.name for r in discover()}
    assert set(MAKER["recipes"]()) <= {r.name for r in discover()}


@pytest.mark.parametrize("recipe", MAKER["recipes"]())
def test_a_corpus_is_small_and_made_again_as_it_was(recipe, tmp_path):
    first = dict(MAKER["files"](recipe))
    assert sum(map(len, first.values())) < 20_000_000
    assert dict(MAKER["files"](recipe)) == first
    folder = MAKER["write"](recipe, tmp_path)
    stamps = {key: (folder / key).stat().st_mtime_ns for key in first}
    (folder / "left over").write_text("of an earlier one")
    MAKER["write"](recipe, tmp_path)
    assert {key: (folder / key).stat().st_mtime_ns for key in first} == stamps
    assert not (folder / "left over").exists()
