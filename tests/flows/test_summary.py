"""What a run says at its end."""

import io

from rich.console import Console

from flows.summary import outcome, show

PARTIAL = {
    "version": 1, "digest": "58b116fa2491" + 52 * "0", "fresh": True, "pairs": None,
    "samples": 12_500, "records": 2_000,
    "fates": {"metadata": 1, "paired": 0, "recorded": 5, "without_record": 2},
    "seconds": {"snapshot": 1.0}, "waiting": {"over_budget": 10_500}, "manifest": "a place",
    "report": None,
}  # fmt: skip


def test_samples_that_wait_are_told_in_one_line_however_narrow_the_place():
    told = io.StringIO()
    show(PARTIAL, Console(file=told, width=60))
    lines = told.getvalue().splitlines()
    assert lines[-2:] == [
        "published partial version 1 (58b116fa2491), 12500 samples, 2000 records; "
        "10,500 samples wait for the budget",
        "manifest  a place",
    ]
    fates = [line.split()[:2] for line in lines[1:5]]
    assert fates == [["1", "metadata"], ["5", "recorded"], ["2", "without_record"], ["8", "in"]]


def test_a_recipe_speaks_of_samples_where_there_are_none():
    empty = {**PARTIAL, "samples": 0, "records": 0, "waiting": {}}
    assert outcome(empty) == "published version 1 (58b116fa2491), 0 samples, 0 records"
    pairs = {name: value for name, value in empty.items() if name != "samples"} | {"pairs": 3}
    assert outcome(pairs) == "published version 1 (58b116fa2491), 3 pairs mined, 0 records"
