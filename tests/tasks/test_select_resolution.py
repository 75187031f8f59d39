"""Which level of a ladder a sample gets, by scripted answers."""

import polars as pl
import pytest

from infra import samples, tables
from infra.build import Build
from tasks.ladder_views import Ladder, ladder_views
from tasks.match_answers import Matching, match_answers
from tasks.select_resolution import Choice, Selection, choose, select_resolution

LADDER = [768, 256, 64]
# Answers from the original down; the right one is "red".
SCRIPTS = {
    "at once": ["red", "blue", "blue", "green"],
    "halfway": ["red", "a red car", "blue", "blue"],
    "at last": ["red", "red", "Red.", "blue"],
    "never": ["red", "red", "red", "red"],
    "wrong": ["blue", "red", "red", "red"],
    "back": ["red", "blue", "red", "blue"],
    "silent": ["red", "red", None, None],
    "mute": [None, "red", "red", "red"],
}


@pytest.fixture
def script(build: Build):
    """Samples of the scripts, and what was said of them, as the stages before give them."""
    names = list(SCRIPTS)
    frame = pl.DataFrame(
        {
            "sample_id": names, "image_id": [f"{at:064x}" for at in range(len(names))],
            "question": ["Which colour?"] * len(names), "answer": ["red"] * len(names),
            "width": [1280] * len(names), "height": [960] * len(names),
            "said": [SCRIPTS[name][0] for name in names],
        }
    )  # fmt: skip
    told = samples.write(build.store, frame)
    full = match_answers(build, told, Matching(containment=True)).samples
    views = ladder_views(build, full, Ladder(budgets=LADDER)).views
    rows = tables.frame(build.store, views).filter(pl.col("right"))
    at = {tokens: number for number, tokens in enumerate([0, *LADDER])}
    said = [SCRIPTS[name][at[n]] for name, n in rows.select("sample", "tokens").iter_rows()]
    answers = samples.write(build.store, rows.with_columns(pl.Series("said", said, pl.String)))
    none = samples.write_drops(build.store, [])

    def select(params: Selection, unanswered=none):
        found = select_resolution(build, full, answers, unanswered, params)
        return tables.frame(build.store, found.samples), {
            row["id"]: (row["rule"], row["value"])
            for row in tables.read(build.store, found.drops).to_pylist()
        }

    return select


def test_the_first_level_at_which_the_answer_is_another(script):
    kept, drops = script(Selection())
    levels = dict(kept.select("sample_id", "global_tokens").iter_rows())
    assert levels == {"at once": 768, "halfway": 256, "at last": 64, "silent": 256}
    assert dict(kept.select("sample_id", "difficulty").iter_rows()) == {
        "at once": 3, "halfway": 2, "at last": 1, "silent": 2,
    }  # fmt: skip
    assert drops == {
        "never": ("never_diverges", None), "wrong": ("hard_pool", None),
        "back": ("non_monotone", 768), "mute": ("hard_pool", None),
    }  # fmt: skip
    once = kept.row(by_predicate=pl.col("sample_id") == "at once", named=True)
    assert once["global_view"] == f"{once['image_id']}#pixels={768 * 784}"
    assert (once["global_width"], once["global_height"]) == (896, 672)
    assert once["level_tokens"] == [0, *LADDER]
    assert once["level_answers"] == SCRIPTS["at once"]


def test_what_the_settings_keep(script):
    kept, drops = script(Selection(hard_pool="flag", non_monotone="keep"))
    assert set(drops) == {"never"}
    reasons = dict(kept.select("sample_id", "reason").iter_rows())
    assert reasons["wrong"] == reasons["mute"] == "original_wrong"
    assert reasons["back"] == "non_monotone"
    hard = kept.filter(pl.col("reason") == "original_wrong")
    assert hard["global_view"].null_count() == hard.height == 2
    # Below full resolution they were not asked.
    assert hard["level_answers"].to_list() == [[None], ["blue"]]
    assert hard["level_tokens"].to_list() == [[0], [0]]
    assert not {"said", "right"} & set(kept.columns)
    strict, _ = script(Selection(containment=False))
    levels = dict(strict.select("sample_id", "global_tokens").iter_rows())
    assert levels["halfway"] == 768  # "a red car" is not "red" any more


@pytest.mark.parametrize("rule", ["over_budget", "truncated"])
def test_a_level_without_an_answer_is_no_divergence(build, script, rule):
    rows = samples.drops([{"id": "at once@64", "rule": rule, "detail": "answer"}], "ask_model")
    kept, drops = script(Selection(), samples.write_drops(build.store, rows))
    assert drops["at once"] == (rule, None)
    assert "at once" not in kept["sample_id"]


@pytest.mark.parametrize(
    ("right", "agrees", "choice"),
    [
        (True, [False, False], Choice("selected", 0)),
        (True, [True, False], Choice("selected", 1)),
        (True, [True, True], Choice("never_diverges")),
        (True, [False, True], Choice("non_monotone", 0)),
        (True, [True, False, True], Choice("non_monotone", 1)),
        (False, [False, True], Choice("original_wrong")),
    ],
)
def test_sequences(right, agrees, choice):
    assert choose(right, agrees) == choice
