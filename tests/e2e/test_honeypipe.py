"""HoneyPipe, whole: each record takes the way that what it says, and what is said of it, sends it.

The server knows the right answers, and says wrong things about some on purpose.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config, open_build
from flows.honeypipe import RECIPE
from flows.recipe import build_recipe
from flows.why import why
from infra.errors import PairmillError
from infra.store import Location, open_store
from infra.versions import find_version
from tests import mllm_answers, trainers
from tests.mllm_server import MllmServer, said
from tests.recipes import SAMPLE, write_config

sys.path.insert(0, str(SAMPLE / "recipes"))
import make_records

SETTINGS = {
    "records": {"files": ["records/*.json"], "format": "conversations"},
    "domains": {"counting": "Grounding & Counting", "signs": "OCR", "sums": "STEM"},
    "reasons": {"long_sources": ["sums"], "both_sources": ["counting"]},
}


def shown(request, name):
    """An untrusted text of a request; None where it was not shown."""
    found = re.search(rf"<<<{name} \w+\n(.*)\n>>>{name}", said(request))
    return found and found[1]


def answer(request):
    """What a model says that takes all for animals and four discs, and knows better in its own
    time; its judge takes every name for the same, and "a thing" for none.
    """
    fields = request["response_format"]["json_schema"]["schema"]["properties"]
    question = shown(request, "instruction_used") or shown(request, "instruction")
    if "related" in fields:
        related = "function problem" not in question
        return {"logical": True, "answerable": True, "related": related, "reason": "-"}
    if "agrees" in fields:
        return {"agrees": shown(request, "conclusion") != "a thing", "comparison": "-"}
    short, long = SAYS.get(question.partition("?")[0], ("", ""))
    if "think" in fields:
        return {"think": "<think>Hm.</think> Well.", "conclusion": long}
    return {"reasoning": "I see.", "conclusion": short}


QUESTIONS = ("screen.jinja", "short.jinja", "long.jinja", "fidelity.jinja")
SAYS = {
    "What is shown here": ("a thing", "another name"),
    "What kind of thing is this": ("(A) animal", "The answer is B."),
    "Is this an animal": ("Yes, of course.", "no"),
    "How many discs are there": ("4", "four"),
    "What is the result": ("", "42"),
    "Describe the drawing.": ("A sketch of it.", ""),
}


@pytest.fixture
def knowing(monkeypatch):
    """A server that answers as `answer` does."""
    reply = lambda request: mllm_answers.completion(request, json.dumps(answer(request)))  # noqa: E731
    monkeypatch.setitem(mllm_answers.BEHAVIOURS, "knowing", reply)
    with MllmServer(rule=lambda request: "knowing") as server:
        yield server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_records.write("honeypipe", tmp_path_factory.mktemp("honeypipe"))


@pytest.fixture
def honeypipe(corpus, tmp_path):
    def run(server, **changed):
        config = load_config(
            write_config(tmp_path, "honeypipe", corpus, server, **{**SETTINGS, **changed})
        )
        with open_build(config) as opened:
            return build_recipe(opened, RECIPE, config)

    return run


def asked(server):
    """How many questions of each kind were asked."""
    return Counter(
        request["response_format"]["json_schema"]["schema"]["title"] for request in server.requests
    )


def records(result):
    return pl.read_parquet(Path(result["manifest"]).parent / "records/*.parquet")


def yields(result):
    rows = json.loads(Path(result["manifest"]).read_text())["yields"]
    return {name: (left, lost) for name, left, lost in rows}


def test_every_branch_has_its_count(honeypipe, knowing, corpus):
    result = honeypipe(knowing)
    assert yields(result) == {
        "import": (71, {"malformed_record": 1, "no_such_image": 1}),  # one has no response
        "domain": (71, {}),
        "near-duplicates": (70, {"duplicate_pair": 1}),
        "rules": (68, {"extreme_aspect": 1, "repeated_text": 1}),
        "screen": (68, {}),
        "sound": (67, {"not_related": 1}),
        "to the bypass": (8, {}),  # signs
        "straight to the long loop": (6, {}),  # sums
        "short, answered": (53, {}),
        "short, to the judge": (23, {}),  # 22 names and a description
        "short, judged": (23, {}),
        "short, kept": (10, {}),  # the description, 8 animals, 4 discs
        "long as well": (1, {}),  # 4 discs
        "long, answered": (50, {}),
        "long, to the judge": (22, {}),
        "long, judged": (22, {}),
        "long, kept": (
            33,
            {"unfaithful": 17},
        ),  # 22 names, a building, 7 that are no animal, 2 sums, 4 discs again
    }
    assert result["records"] == 8 + 10 + 33
    assert asked(knowing) == {"Screened": 68, "Short": 53, "Long": 50, "Fidelity": 45}
    has_system = {
        (title, request["messages"][0]["role"] == "system")
        for request in knowing.requests
        for title in [request["response_format"]["json_schema"]["schema"]["title"]]
    }
    tokens = {r["max_tokens"] for r in knowing.requests if "Take your time." in said(r)}
    assert tokens == {4_096}
    assert has_system == {("Screened", True), ("Short", False), ("Long", False), ("Fidelity", True)}

    again = honeypipe(knowing)
    assert (again["fresh"], again["digest"]) == (False, result["digest"])
    assert knowing.counts.total() == 216
    _is_balanced(result)
    _says_why(result)
    _is_read_by_trainers(result, corpus)
    _tells_its_path(records(result))


def _is_balanced(result):
    """Every sample of 73 records, and the copy, has one fate."""
    fates = pl.read_parquet(Path(result["manifest"]).parent / "fates.parquet")
    of_samples = fates.filter(pl.col("level") == "sample")
    assert of_samples["id"].n_unique() == of_samples.height == 73 + 1
    counts = dict(of_samples["fate"].value_counts().iter_rows())
    assert counts.pop("recorded") == 51
    assert counts == {
        "no_such_image": 1, "duplicate_pair": 1, "extreme_aspect": 1, "malformed_record": 1,
        "repeated_text": 1, "not_related": 1, "unfaithful": 17,
    }  # fmt: skip
    for file in ("report.html", "README.md"):
        said = (Path(result["manifest"]).parent / file).read_text("utf-8")
        assert "73 samples came in, and 1 more was split or branched off them on the way" in said
        assert "Of 74 in all, 51 are records and 23 were dropped" in said


def _says_why(result):
    """The way of samples, in the words of `pairmill why`."""
    folder = Path(result["manifest"]).parent
    fates = pl.read_parquet(folder / "fates.parquet")
    store = open_store(Location(uri=str(folder.parents[2])))
    manifest = find_version(store, "honeypipe", "latest")

    def told(name):
        return [" ".join(line.split()) for line in why(store, manifest, name, 6)]

    def dropped(fate):
        return fates.filter(pl.col("fate") == fate, pl.col("level") == "sample").row(0, named=True)

    lines = told(dropped("unfaithful")["id"][:12])
    assert "fate unfaithful, decided by filter_samples" in lines
    assert {"at long, kept", "because agrees is False, not True"} <= {*lines}
    way = next(line for line in lines if line.startswith("way "))
    assert way.startswith("way import > domain > near-duplicates >")
    assert way.endswith("> long, kept (dropped)")
    prompts = [line.rpartition("/")[2] for line in lines if line.startswith("prompt ")]
    assert {"screen.jinja", "long.jinja"} <= {*prompts} <= {*QUESTIONS}
    assert any(line.startswith('{"think":') for line in lines)

    twin = dropped("duplicate_pair")
    lines = told(twin["id"])
    assert f"twin of {twin['detail'][:12]}: pHash differs in 0 of 64 bits" in lines
    assert "because response" in told(dropped("malformed_record")["id"])
    lines = told("drawn/copy.png")
    assert f"{twin['id'][:12]} duplicate_pair, deduplicate_samples" in lines
    place = next(line.split()[1] for line in told(twin["id"]) if line.startswith("from records/"))
    assert told(place)[0] == f"sample {twin['id']}"
    with pytest.raises(PairmillError, match="has no object, image or sample 'nothing'"):
        told("nothing")
    record = (
        pl.read_parquet(folder / "records/*.parquet").filter(cot_level="long").row(0, named=True)
    )
    lines = told(record["sample_id"])
    assert "record version 1, records/train.parquet, licence unknown" in lines
    assert f"instruction: {record['instruction']}" in lines


def _is_read_by_trainers(result, pictures):
    folder = Path(result["manifest"]).parent
    entries = trainers.llava_entries(folder / "llava/train.json", pictures)
    assert len(entries) == 51
    by_id = {entry["id"]: entry for entry in entries}
    for row in trainers.rows(folder / "records/*.parquet"):
        asked_, said_ = (turn["value"] for turn in by_id[row["sample_id"]]["conversations"])
        assert asked_ == f"<image>\n{row['instruction']}"
        assert said_ == row["response"]


def _tells_its_path(rows):
    def one(**values):
        found = rows.filter(**values)
        return found.select("path", "instruction", "response", "response_original").row(0)

    assert one(source="signs", response="OPEN") == (
        ["bypass"], "What does the sign say? Answer briefly.", "OPEN", "OPEN",
    )  # fmt: skip
    assert one(source="counting", cot_level="short") == (
        ["short, rule"], "How many discs are there?", "I see.\n\n4", "4",
    )  # fmt: skip
    assert one(source="counting", cot_level="long") == (
        ["short, rule", "long, rule"], "How many discs are there?",
        "<think>\nHm. Well.\n</think>\n\nfour", "4",
    )  # fmt: skip
    short, long = (rows.filter(source="counting", cot_level=level) for level in ("short", "long"))
    assert long["of"].to_list() == short["sample_id"].to_list()
    assert one(source="sums")[0] == ["long, rule"]
    assert one(source="naming")[0] == ["short, judge", "long, judge"]
    assert one(source="odd")[0] == ["short, judge"]
    assert rows.filter(source="naming")["answer_type"].unique().to_list() == ["fact"]


def test_a_judge_of_its_own_and_another_line_between_facts_and_descriptions(honeypipe, knowing):
    first = honeypipe(knowing)
    before = asked(knowing)
    # Every short answer is a description now, and the judge is told so.
    honeypipe(knowing, reasons={**SETTINGS["reasons"], "comparison": {"fact_words": 0}})
    assert asked(knowing) - before == {"Fidelity": 45}
    judge = {"endpoint": {"url": knowing.url, "model": "judge", "backoff_s": 0.01}}
    before = asked(knowing)
    judged = honeypipe(knowing, judge=judge)
    assert asked(knowing) - before == {"Fidelity": 45}
    assert judged["records"] == first["records"]
    manifest = json.loads(Path(judged["manifest"]).read_text())
    assert manifest["config"]["judge"]["model"] == "judge"
    assert knowing.url not in json.dumps(manifest)
