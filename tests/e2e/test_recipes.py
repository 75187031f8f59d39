"""What every recipe keeps, each over the same small bucket: delta equals full, nothing is asked or
computed twice, a changed prompt redoes its question alone, a threshold none, money ends it midway.

The main job, `megapairs`, has tests of its own: tests/properties, tests/e2e/test_nights.py.
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from jinja2 import FileSystemLoader

import flows.recipe
from flows.absent import verify_absent
from flows.config import load_config, open_build
from flows.forget import Options, forget
from flows.recipe import build_recipe, discover
from infra.folder import FolderStore
from tasks import ask_model
from tests import mllm_answers, pictures
from tests.faults.night import no_report
from tests.mllm_server import MllmServer, digests, said
from tests.reading import pictures as seen_in
from tests.recipes import EMBEDDERS, SAMPLE, write_config

RECIPES = {recipe.name: recipe for recipe in discover() if recipe.stages}
ASKED = sorted(RECIPES.keys() - {"roi_labels"})  # whose model is only watched, in process
# What a build counts of its work beside what it asks an endpoint for.
WORK = (
    "images_decoded", "images_embedded", "texts_written", "maps_made", "regions_drawn",
    "answers_scored",
)  # fmt: skip


def rows(*columns: str) -> dict[str, Any]:
    named = {name: name for name in ("image", *columns)}
    return {"files": ["records.jsonl"], "format": "rows", "columns": named}


HEADS = {"grounding": {1: [0]}, "sink": {1: [1]}}


@dataclass
class Case:
    """A recipe's config, settings that let other samples through, what it counts of the work of a
    model in process, its questions, and how its model is asked.
    """

    config: dict[str, Any]
    other: dict[str, Any]
    in_process: str | None = None
    questions: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)


def cases(tiny: dict[str, Path]) -> dict[str, Case]:
    """By name; thresholds are such that some samples pass and some do not."""
    looking = {"name": str(SAMPLE / "models/looking"), "device": "cpu", "batch_size": 4}
    qwen = {"name": str(tiny["qwen"]), "device": "cpu", "max_pixels": 4096}
    lax = {f"{name}_least": 1 for name in ("solvability", "clarity", "hallucination", "nonsense")}
    return {
        "recap": Case({}, {"least_characters": 44}, questions=("caption",)),
        "oasis": Case(
            {"prefix": {"local": qwen, "least_tokens": 4, "most_tokens": 12},
             "filter": {**lax, "sum_least": 4}},
            {"filter": {**lax, "sum_least": 7}},
            "texts_written",
            ("extract", "nonsense", "hallucination", "solvability", "clarity", "answer"),
        ),
        "honeypipe": Case(
            {"records": rows("instruction", "response"),
             "reasons": {"both_sources": ["records"]}}, {"filter": {"max_aspect": 1.35}},
            questions=("screen", "short", "long", "fidelity"),
        ),
        "llavar2": Case(
            {"records": rows("caption"), "filter": {"mifd_max": 9.0, "ffd_max": 9.0}, "pairs": 2,
             "difficulty": {"text": {"name": str(tiny["blind"])},
                            "vision": {"name": str(tiny["llava"])}}},
            {"filter": {"mifd_max": 1.05, "ffd_max": 9.0}},
            "answers_scored",
            ("read", "caption", "pairs"),
        ),
        "regions": Case(
            {"records": rows("box", "class_name"), "models": EMBEDDERS,
             "filter": {"class_rank": 3}},
            {"filter": {"class_rank": 3, "clip_keep": 0.4}},
            "images_embedded",
            ("whole", "region", "around"),
        ),
        "roi_labels": Case(
            {"records": rows("instruction"), "questions": {"otherwise": "natural"},
             "model": {"max_tokens": 128, "local": looking},
             "attention": {"heads": {"natural": HEADS}, "square_pixels": 112 * 112},
             "labels": {"largest": 0.9, "weakest": 0}},
            {"labels": {"largest": 0.1, "weakest": 0}},
            "maps_made",
        ),
        "crop_gap": Case(
            {"records": rows("question", "answer", "boxes"),
             "ladder": {"budgets": [128, 32, 8], "patch": 8, "min_tokens": 200},
             "crops": {"tokens": 128, "patch": 8}},
            {"selection": {"hard_pool": "flag"}},
            questions=("answer", "answer_with_part"),
            model={"max_pixels": 100_000},
        ),
    }  # fmt: skip


# A bucket ------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A picture drawn by a seed, and what is recorded of it."""

    seed: int
    colours: tuple[str, ...] = ("red", "blue")

    def data(self) -> bytes:
        """PNG of one of two shapes; that of a negative seed is hardly another picture."""
        picture = pictures.scene(160 + 10 * (self.seed % 2), 120, abs(self.seed))
        if self.seed < 0:
            picture.paste((0, 0, 0), (0, 0, 4, 4))
        return pictures.encode(picture, "PNG")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Records whose columns serve every recipe."""
        return [
            {"image": name, "instruction": f"Where is the {colour} one?", "response": f"it, {name}",
             "question": f"What is {colour} in {name}?", "answer": "right",
             "caption": f"Something {colour}", "class_name": ("leaf", "moon", "card")[at],
             "box": [5 + at, 5, 85, 70], "boxes": [[5 + at, 5, 85, 70]]}
            for at, colour in enumerate(self.colours)
        ]  # fmt: skip


def write_bucket(folder: Path, bucket: Mapping[str, Shown]) -> Path:
    """Pictures by name, with their records; others go."""
    folder.mkdir(exist_ok=True)
    made = {name: shown.data() for name, shown in bucket.items()}
    lines = [json.dumps(line) for name, shown in bucket.items() for line in shown.lines(name)]
    made["records.jsonl"] = "\n".join(lines).encode()
    for path in folder.iterdir():
        if path.name not in made:
            path.unlink()
    for name, data in made.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    return folder


# The sixth is a near-duplicate of the first.
BEFORE = {f"{n}.png": Shown(seed) for n, seed in enumerate((1, 2, 3, 4, 5, -1))}
AFTER = {
    # 0.png is gone, and its near-duplicate no longer one.
    "1.png": Shown(20),  # replaced
    "2.png": Shown(3, ("red", "blue", "green")),  # one more record
    "3 renamed.png": Shown(4),
    **{"4.png": Shown(5), "4 again.png": Shown(5)},  # a second name
    "5.png": Shown(-1),
    "6.png": Shown(7),  # new
}
NEW = 2  # pictures that were not there before


# A server whose answers hang on what is shown, and not on how it is asked ---------------------


def answer(request: dict[str, Any]) -> mllm_answers.Reply:
    schema = request["response_format"]["json_schema"]["schema"]
    texts = re.findall(r"(?s)<<<\w+ \w+\n.*?\n>>>\w+ \w+", said(request))
    if "said" in schema["properties"]:
        return mllm_answers.completion(request, json.dumps({"said": look(request, texts)}))
    seed = "".join(digests(request)) + "\n".join(texts)
    value = mllm_answers.of_schema(schema, schema, seed)
    return mllm_answers.completion(request, json.dumps(value))


def look(request: dict[str, Any], texts: list[str]) -> str:
    """Right where a picture is as large as its question wants, or a part is shown that helps."""
    first, *part = seen_in(request)
    draw = hashlib.sha256("".join(texts).encode()).digest()[0]
    if part:
        is_noise = np.abs(np.diff(np.asarray(part[0], int), axis=1)).mean() > 40
        return "wrong" if is_noise else "right"
    least = (0, 1_000, 3_000, 9_000, 50_000)[draw % 5]
    return "right" if first.width * first.height >= least else "wrong"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The server's answers; no reports, which take a third of so small a build; and models on one
    core, since tiny ones are no faster on more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mllm_answers.BEHAVIOURS, "unworded", answer)
        patch.setattr(flows.recipe, "render_samples", no_report)
        yield
    torch.set_num_threads(threads)


def server() -> MllmServer:
    return MllmServer(rule=lambda request: "unworded")


# Builds --------------------------------------------------------------------------------------


@dataclass
class World:
    """A recipe, and the full build of the bucket as it is in the end."""

    name: str
    case: Case
    folder: Path
    corpus: Path
    full: dict[str, Any]
    paid: Counter[str]

    def run(self, folder: Path, corpus: Path, server: MllmServer, **changed: Any) -> dict[str, Any]:
        """Build a bucket into `folder/store`; what came of it, `work` as it was counted."""
        model = {**self.case.model, **changed.pop("model", {})}
        sections: dict[str, Any] = {**self.case.config, **changed}
        asked = server if self.name in ASKED else None
        if asked:
            sections["model"] = model
        folder.mkdir(exist_ok=True)
        config = load_config(write_config(folder, self.name, corpus, asked, **sections))
        with open_build(config) as opened:
            result = build_recipe(opened, RECIPES[self.name], config)
            return {**result, "work": Counter(opened.work)}

    def again(self, folder: Path, server: MllmServer, **changed: Any) -> dict[str, Any]:
        """The same bucket once more, in a copy of the store of the full build."""
        if not (folder / "store").exists():
            shutil.copytree(self.folder / "store", folder / "store")
        return self.run(folder, self.corpus, server, **changed)


@pytest.fixture(scope="module", params=sorted(RECIPES))
def world(request, tiny_mllms, tmp_path_factory) -> World:
    base = tmp_path_factory.mktemp(request.param)
    corpus = write_bucket(base / "corpus", AFTER)
    case = cases(tiny_mllms)[request.param]
    found = World(request.param, case, base / "full", corpus, {}, Counter())
    with server() as asked:
        found.full = found.run(found.folder, corpus, asked)
        found.paid = asked.paid
    assert not found.full["waiting"] and found.full["records"] > 0
    return found


def test_delta_equals_full_and_costs_what_it_touches(world, tmp_path):
    with server() as asked:
        corpus = write_bucket(tmp_path / "corpus", BEFORE)
        first = world.run(tmp_path, corpus, asked)
        known = set(asked.paid)
        delta = world.run(tmp_path, write_bucket(corpus, AFTER), asked)
        assert (delta["digest"], delta["records"]) == (world.full["digest"], world.full["records"])
        assert delta["digest"] != first["digest"]
        # Of what a full build asks, what was not asked before; and each question once.
        assert set(asked.paid) - known == set(world.paid) - known
        assert set(asked.paid.values()) <= {1}
        assert delta["work"]["images_decoded"] == NEW
        if name := world.case.in_process:
            assert 0 < delta["work"][name] < world.full["work"][name]
        # Back to where it was: everything is known.
        paid = asked.paid.copy()
        back = world.run(tmp_path, write_bucket(corpus, BEFORE), asked)
        assert (back["digest"], asked.paid) == (first["digest"], paid)
        assert not {*WORK}.intersection(+back["work"])


def test_a_second_run_does_no_work(world, tmp_path):
    with server() as asked:
        again = world.again(tmp_path, asked)
        assert asked.counts.total() == 0
    assert (again["fresh"], again["digest"]) == (False, world.full["digest"])
    assert +again["work"] == {"objects_listed": len(AFTER) + 1}


@pytest.mark.parametrize("world", ASKED, indirect=True, scope="module")
def test_a_changed_prompt_asks_its_own_question_alone(world, tmp_path, monkeypatch):
    """What is answered is the same, so nothing after it is asked anew."""
    folder = tmp_path / "prompts"
    shutil.copytree(ask_model.PROMPTS, folder)
    monkeypatch.setattr(ask_model, "PROMPTS", folder)
    monkeypatch.setattr(ask_model._templates, "loader", FileSystemLoader(folder))
    questions = {name: cost["calls"] for name, cost in world.full["cost"].items()}
    assert questions.keys() == {*world.case.questions}
    for name in questions:
        path = folder / world.name / f"{name}.jinja"
        text, mark, rest = path.read_text().rpartition("{% endblock %}")
        path.write_text(f"{text}Take care.\n{mark}{rest}")
        with server() as asked:
            again = world.again(tmp_path, asked)
            assert all("Take care." in said(request) for request in asked.requests)
        assert {name: cost["calls"] for name, cost in again["cost"].items()} == {
            name: questions[name]
        }
        assert again["digest"] == world.full["digest"]
        assert not {*WORK}.intersection(+again["work"])


def test_another_threshold_asks_nothing(world, tmp_path):
    with server() as asked:
        other = world.again(tmp_path, asked, **world.case.other)
        assert asked.counts.total() == 0
    assert 0 < other["records"] != world.full["records"]
    assert not {*WORK}.intersection(+other["work"])


@pytest.mark.parametrize("world", ASKED, indirect=True, scope="module")
def test_money_ends_a_build_and_the_next_one_ends_where_a_full_one_does(world, tmp_path):
    calls = world.paid.total() // 2
    with server() as asked:
        part = world.run(tmp_path, world.corpus, asked, model={"budget": {"calls": calls}})
        assert asked.counts.total() == calls
        assert sum(part["waiting"].values()) > 0
        manifest = json.loads(Path(part["manifest"]).read_text())
        assert manifest["partial"] == part["waiting"]
        whole = world.run(tmp_path, world.corpus, asked)
    assert set(asked.paid.values()) <= {1}
    assert (whole["waiting"], whole["digest"]) == ({}, world.full["digest"])
    assert not json.loads(Path(whole["manifest"]).read_text())["partial"]


def test_what_is_forgotten_is_nowhere_after_the_next_night(world, tmp_path):
    shutil.copytree(world.folder / "store", tmp_path / "store")
    store = FolderStore(str(tmp_path / "store"))
    image = hashlib.sha256(AFTER["2.png"].data()).hexdigest()
    list(forget(store, [image], None, Options(exact=True, purge=True)))
    with server() as asked:
        after = world.again(tmp_path, asked)
    *_, read, out_of_reach = verify_absent(store)  # raises where anything is left
    assert "1 forgotten images" in read and out_of_reach.startswith("out of reach")
    assert not +Counter({name: after["work"][name] for name in WORK})
    records = pl.read_parquet(Path(after["manifest"]).parent / "records/*.parquet")
    assert records.height > 0 and image not in records["image_id"]


def changed(bucket: Mapping[str, Shown], draw: random.Random) -> dict[str, Shown]:
    """A bucket after a day: pictures come, go, are replaced, renamed, recorded anew."""
    found = dict(bucket)
    for _ in range(draw.randint(1, 4)):
        name, other = draw.choice(sorted(found)), f"{draw.randrange(9)}.png"
        colours = tuple(draw.sample(("red", "blue", "green"), draw.randint(1, 3)))
        drawn = Shown(draw.choice((-3, -2, -1, *range(1, 9))), colours)
        days = (
            {**found, other: drawn},
            {**found, name: found[name]._replace(colours=colours)},
            {**{k: v for k, v in found.items() if k != name}, other: found[name]},
            {k: v for k, v in found.items() if k != name or len(found) < 3},
        )
        found = draw.choice(days)
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_delta_equals_full_over_random_histories(world, tmp_path, capsys):
    """Nights with other thresholds, and money that ends midway, are among them."""
    seed = int(os.environ.get("PAIRMILL_SOAK_SEED", time.time_ns() % 1_000_000))
    draw, bucket = random.Random(seed), dict(BEFORE)
    with capsys.disabled():
        print(f"\nhistories of {world.name}, seed {seed} (PAIRMILL_SOAK_SEED)")
    with server() as asked:
        for _ in range(12):
            corpus = write_bucket(tmp_path / "corpus", bucket)
            sections = world.case.other if draw.random() < 0.25 else {}
            if world.name in ASKED and draw.random() < 0.3:
                spent = {"budget": {"calls": draw.randint(1, 30)}}
                world.run(tmp_path / "nights", corpus, asked, model=spent, **sections)
            night = world.run(tmp_path / "nights", corpus, asked, **sections)
            whole = world.run(tmp_path / "whole", corpus, asked, **sections)
            shutil.rmtree(tmp_path / "whole")
            assert (night["digest"], night["waiting"]) == (whole["digest"], {}), bucket
            bucket = changed(bucket, draw)
