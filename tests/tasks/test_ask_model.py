"""One question about every sample, to a real server: columns, flaws, what waits, what is paid."""

import hashlib
import json
from dataclasses import replace
from typing import Literal

import pytest
from pydantic import BaseModel

from infra.build import WouldRun
from infra.mllm import Endpoint
from infra.pictures import View
from tasks import ask_model as stage
from tasks.ask_model import Asking, ModelParams, Question, ask_model
from tests import pictures
from tests.conftest import make_build
from tests.corpora import fill
from tests.mllm_server import MllmServer, digests, said
from tests.tasks.examples import put, rows
from tests.tasks.tables_of_samples import samples_of

COLUMNS = "sample_id image_id question level view"


class Reply(BaseModel):
    answer: str
    right: bool
    score: float
    kind: Literal["fact", "opinion"]
    parts: list[dict[str, str]]


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A folder of prompts with one question, and how to write it anew."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "enclosed.jinja").write_text((stage.PROMPTS / "enclosed.jinja").read_text())
    monkeypatch.setattr(stage, "PROMPTS", folder)
    monkeypatch.setattr(stage._templates.loader, "searchpath", [str(folder)])

    def write(user):
        text = "{% block system %}Be brief.{% endblock %}{% block user %}" + user + "{% endblock %}"
        (folder / "ask.jinja").write_text(text)
        stage._templates.cache.clear()

    write('{% include "enclosed.jinja" %}Level {{ level }}: answer.')
    yield write
    stage._templates.cache.clear()


@pytest.fixture
def asked(tmp_path, pool, prompts):
    """Asks about samples of two pictures."""
    build = make_build(tmp_path / "build", pool)
    data = {name: pictures.jpeg(64, 48, n) for n, name in enumerate("ab")}
    fill(build, {f"{name}.jpg": part for name, part in data.items()})
    ids = {name: hashlib.sha256(part).hexdigest() for name, part in data.items()}
    objects = put(build, "objects", "key member stamp offset size image_id",
                  [(f"{n}.jpg", None, "s", None, len(data[n]), ids[n]) for n in "ab"])  # fmt: skip

    def run(server, given, on_flaw="drop", **model):
        question = Question("ask", Reply, {"view": "detail", "image_id": ""}, ["question"],
                            ["level"], on_flaw)  # fmt: skip
        endpoint = Endpoint(url=server.url, model="m", backoff_s=0.01, attempts=2)
        params = Asking(question, ModelParams(endpoint=endpoint, max_pixels=4_096, **model))
        named = [(s, ids[i], q, level, view and View(ids[i], view).name)
                 for s, i, q, level, view in given]  # fmt: skip
        table = samples_of(build, named, COLUMNS)
        found = ask_model(build, table, objects, params)
        kept = {row["sample_id"]: row for row in rows(build, found.samples)}
        lost = {row["id"]: (row["rule"], row["detail"]) for row in rows(build, found.drops)}
        return kept, lost, {row["sample_id"]: row for row in rows(build, found.asked)}

    run.build = build
    return run


GIVEN = [
    ("1", "a", "What?", 1, (0, 0, 32, 48)),
    ("2", "b", "Why?", 2, None),
    ("3", "b", None, 3, None),
]


def test_fields_of_the_answer_become_columns(asked):
    with MllmServer() as server:
        kept, lost, keys = asked(server, GIVEN)
    assert (sorted(kept), lost) == (["1", "2", "3"], {})
    row = kept["1"]
    assert isinstance(row["answer"], str) and isinstance(row["right"], bool)
    assert row["score"] in [n * 1_000_000 for n in range(1, 6)] and row["kind"] in (
        "fact",
        "opinion",
    )
    assert isinstance(json.loads(row["parts"]), list)
    assert (row["question"], row["level"]) == ("What?", 1)
    assert all(len(keys[name]["requests"]) == 1 for name in "123")


def test_what_is_shown_is_what_the_columns_name(asked):
    with MllmServer() as server:
        asked(server, GIVEN)
        by_level = {said(r).partition("Level ")[2][0]: r for r in server.requests}
    assert [len(digests(by_level[level])) for level in "123"] == [2, 1, 1]
    assert digests(by_level["2"]) == digests(by_level["3"]) != digests(by_level["1"])[1:]
    assert "Why?" in said(by_level["2"]) and "<<<question" not in said(by_level["3"])


def test_a_row_more_asks_once_more_and_a_changed_prompt_everything(asked, prompts):
    with MllmServer() as server:
        asked(server, GIVEN[:2])
        first, _, _ = asked(server, GIVEN[:2])
        assert server.counts.total() == 2
        more, _, _ = asked(server, GIVEN)
        assert server.counts.total() == 3 and {n: more[n] for n in first} == first
        prompts("Another: {{ level }}")
        asked(server, GIVEN)
        assert server.counts.total() == 6


def test_samples_that_ask_the_same_pay_once(asked):
    with MllmServer() as server:
        kept, _, _ = asked(server, [(str(n), "a", "What?", 1, None) for n in range(12)])
        assert server.counts.total() == 1
    assert len({row["answer"] for row in kept.values()}) == 1


@pytest.mark.parametrize("behaviour", ["refusal", "not json", "empty", "truncated", "wrong schema"])
def test_a_flawed_answer_is_a_drop_or_nulls(asked, behaviour):
    def rule(request):
        return behaviour if "Level 2" in said(request) else "good"

    with MllmServer(rule=rule) as server:
        kept, lost, _ = asked(server, GIVEN)
        assert sorted(kept) == ["1", "3"] and list(lost) == ["2"]
        assert lost["2"][1] == "ask"
        kept, lost, _ = asked(server, GIVEN, on_flaw="null")
    assert lost == {} and kept["2"]["answer"] is None and kept["1"]["answer"]


def test_what_the_budget_does_not_cover_waits(asked):
    with MllmServer() as server:
        kept, lost, _ = asked(server, GIVEN, on_flaw="null", budget={"calls": 2})
        assert len(kept) == 2 and [rule for rule, _ in lost.values()] == ["over_budget"]
        kept, lost, _ = asked(server, GIVEN, on_flaw="null")
        assert (len(kept), lost, server.counts.total()) == (3, {}, 3)


def test_no_samples_ask_nothing_and_keep_the_columns(asked):
    with MllmServer() as server:
        kept, lost, _ = asked(server, [])
        assert (kept, lost, server.counts.total()) == ({}, {}, 0)


def test_a_plan_asks_nothing(asked):
    planning = replace(asked.build, planning=True)
    given = samples_of(planning, [("1", "i")], "sample_id image_id")
    objects = put(planning, "objects", "key member image_id", [])
    with MllmServer() as server, pytest.raises(WouldRun):
        model = ModelParams(endpoint=Endpoint(url=server.url, model="m"))
        ask_model(planning, given, objects, Asking(Question("ask", Reply, {}), model))
