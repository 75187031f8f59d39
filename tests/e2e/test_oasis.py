"""Oasis, whole: a tiny model really goes on after each picture; a scripted one reads what it wrote.

What is asked of the scripted one hangs on texts alone, so what must come of them is counted here
once more.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config, open_build
from flows.oasis import RECIPE, Extracted
from flows.recipe import build_recipe
from infra import pictures
from infra.canonical import digest
from infra.local_mllm import LocalModel, Prompt, Sampling, Shown
from infra.local_passes import continue_from
from tests import mllm_answers, trainers
from tests.mllm_server import MllmServer, digests, said
from tests.recipes import write_config

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = 24
GRADES = ("nonsense", "hallucination", "solvability", "clarity")
SCALE = {
    "nonsense": (5, 5, 5, 5, 5, 4),
    "hallucination": (5, 5, 5, 5, 4, 1),
    "solvability": (5, 5, 4, 4, 3, 2),
    "clarity": (5, 4, 4, 4, 3, "[[5]]"),  # the last one is no grade
}


def draw(*texts: str) -> int:
    return hashlib.sha256("|".join(texts).encode()).digest()[0]


def instruction_in(text: str) -> str | None:
    """What the scripted model finds in what the tiny one wrote; it begins as `Instruction` does."""
    return f"Is truth in {draw(text):03d} {digest(text)[:8]}?" if draw(text) % 5 else None


def grade(name: str, instruction: str):
    return SCALE[name][draw(name, instruction) % 6]


def text_of(request, name: str) -> str:
    [found] = re.findall(rf"<<<{name} \w+\n(.*)\n>>>{name}", said(request))
    return found


def kind(request) -> str:
    """The first field of the answer that a request asks for."""
    return next(iter(request["response_format"]["json_schema"]["schema"]["properties"]))


def answer(request):
    field = kind(request)
    if field == "found":
        found = instruction_in(text_of(request, "continuation"))
        if found is None:
            return {"found": "none", "instruction": ""}
        return {"found": "instruction", "instruction": f"Instruction: {found}"}
    asked = text_of(request, "instruction")
    return {field: f"About {asked}" if field == "response" else grade(field, asked)}


@pytest.fixture
def server(monkeypatch):
    reply = lambda request: mllm_answers.completion(request, json.dumps(answer(request)))  # noqa: E731
    monkeypatch.setitem(mllm_answers.BEHAVIOURS, "reading", reply)
    with MllmServer(rule=lambda request: "reading") as running:
        yield running


@pytest.fixture
def corpus(few, tmp_path):
    """Pictures and no captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    chosen = sorted(p for p in few.rglob("*") if p.suffix in (".png", ".jpg"))[:PICTURES]
    for at, path in enumerate(chosen):
        shutil.copy(path, folder / f"{at:02d}{path.suffix}")
    return folder


@pytest.fixture
def local(tiny_mllms):
    return {"name": str(tiny_mllms["qwen"]), "device": "cpu", "max_pixels": 4096}


@pytest.fixture
def oasis(corpus, local, server, tmp_path):
    """Runs the recipe; how many questions of each kind it asked is in `asked`."""

    def run(prefix=None, **changed):
        shape = {"local": local, "least_tokens": 6, "most_tokens": 24, **(prefix or {})}
        path = write_config(tmp_path, "oasis", corpus, server, prefix=shape, **changed)
        before = len(server.requests)
        config = load_config(path)
        with open_build(config) as opened:
            result = {**build_recipe(opened, RECIPE, config), "work": dict(opened.work)}
        result["asked"] = Counter(map(kind, server.requests[before:]))
        return result

    return run


def records(result):
    return pl.read_parquet(Path(result["manifest"]).parent / "records/*.parquet")


def yields(result):
    rows = json.loads(Path(result["manifest"]).read_text())["yields"]
    return {name: (left, lost) for name, left, lost in rows}


def rejected(instruction: str) -> str | None:
    """The paper's rule, written out once more, and the fate of what fails it."""
    n, h, s, c = (grade(name, instruction) for name in GRADES)
    if not isinstance(c, int):
        return "wrong_schema"
    ways = {"nonsense": n < 5, "hallucination": h < 5, "not_solvable": s < 3, "unclear": c < 3,
            "low_sum": s + c < 7}  # fmt: skip
    return next((name for name, fails in ways.items() if fails), None)


def test_pictures_become_conversations_and_every_sample_has_its_fate(oasis, server, corpus):
    first = oasis()
    wrote = [text_of(r, "continuation") for r in server.requests if kind(r) == "found"]
    assert len(wrote) == PICTURES == first["work"]["texts_written"]
    found = [text for text in map(instruction_in, wrote) if text]
    fates = Counter(map(rejected, found))
    kept = fates.pop(None)
    unread = fates.pop("wrong_schema")
    assert min(kept, unread, PICTURES - len(found)) > 0
    seen = yields(first)
    assert seen["continue"] == (PICTURES, {})
    assert seen["instruction"] == (len(found), {"no_instruction": PICTURES - len(found)})
    assert seen["clarity"] == (len(found) - unread, {"wrong_schema": unread})
    assert seen["grades"] == (kept, dict(fates))
    assert seen["answer"] == (kept, {})
    for name in GRADES[:-1]:
        assert first["asked"][name] == len(found) == seen[name][0]
    assert first["asked"]["clarity"] == len(found) + unread  # each is asked to mend its answer once
    fate = pl.read_parquet(Path(first["manifest"]).parent / "fates.parquet")
    assert fate.filter(pl.col("level") == "sample")["fate"].value_counts().sort("fate").rows() == (
        sorted(
            {**fates, "recorded": kept, "wrong_schema": unread,
             "no_instruction": PICTURES - len(found)}.items()
        )
    )  # fmt: skip
    blind = {"found", "nonsense"}
    assert all(bool(digests(r)) != (kind(r) in blind) for r in server.requests)

    folder = Path(first["manifest"]).parent
    entries = trainers.llava_entries(folder / "llava/train.json", corpus)
    assert len(entries) == kept == first["records"]
    for entry in entries:
        human, gpt = entry["conversations"]
        assert human["value"].startswith("<image>\nIs truth in ")
        assert gpt["value"] == "About " + human["value"].removeprefix("<image>\n")

    again = oasis()
    assert (again["fresh"], again["digest"], again["asked"]) == (False, first["digest"], Counter())
    assert "texts_written" not in again["work"]
    assert str(corpus.parent) not in json.dumps(json.loads(Path(first["manifest"]).read_text()))


def test_a_text_is_what_the_model_alone_writes_after_that_picture(oasis, corpus, local):
    texts = {row["image_id"]: row for row in records(oasis()).iter_rows(named=True)}
    model = LocalModel(**local)
    for path in sorted(corpus.iterdir()):
        image = hashlib.sha256(path.read_bytes()).hexdigest()
        if row := texts.get(image):
            shown = pictures.shrink(path.read_bytes(), 4096)
            prompt = Prompt(digest([image, 0]), "", (Shown("", shown),), "", (), 24, 1.0)
            [alone] = continue_from(model, [prompt], Sampling(20, 1.0, 6))
            assert row["continuation"] == alone.text.strip()
            assert row["ended"] == (alone.finish_reason == "stop")
            assert 6 < alone.usage["output"] <= 24
    assert texts


def test_a_laxer_threshold_asks_for_the_answers_it_admits_and_nothing_else(oasis):
    first = oasis()
    laxer = oasis(filter={"hallucination_least": 1})
    more = laxer["records"] - first["records"]
    assert more > 0
    assert laxer["asked"] == {"response": more}
    stricter = oasis(filter={"sum_least": 9})
    assert stricter["records"] < first["records"] and not stricter["asked"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Instruction: introduce the structure.", "introduce the structure."),
        ("nutrition of this dish?", "nutrition of this dish?"),
        (" Instruction:Is it? ", "Is it?"),
    ],
)
def test_a_prefix_is_taken_off_and_not_its_letters(written, meant):
    assert Extracted(found="instruction", instruction=written).instruction == meant
