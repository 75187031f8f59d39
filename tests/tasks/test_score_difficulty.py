"""Difficulty over samples: ratios by plain forward passes, kept by content and models."""

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import BaseModel

from infra import samples
from infra.local_mllm import LocalModel, Shown, load
from infra.local_probes import Supplied, log_probs
from infra.pictures import shrink
from tasks import score_difficulty as stage_file
from tasks.ask_model import Asking, ModelParams, Question
from tasks.score_difficulty import DifficultyParams, Scoring, meaning, score_difficulty
from tests.corpora import described, fill
from tests.infra.test_difficulty import nll
from tests.infra.test_local_mllm import jpeg
from tests.tasks.examples import rows

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = [
    ("What does it say?", "Open daily", "How do you know?", "It is written on the green table."),
    ("Which number?", "112", "Where?", "A yellow moon stands next to it."),
    ("Who?", "Zoe", "Why?", "Because."),
    ("Who?", "Zoe", "Why?", " "),
]


@pytest.fixture
def objects(build):
    fill(build, {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    return described(build).objects


@pytest.fixture
def models(tiny_mllms):
    text, vision = (LocalModel(name=str(tiny_mllms[k]), device="cpu") for k in ("blind", "llava"))
    return DifficultyParams(text=text, vision=vision, max_pixels=4096)


def given(build, objects, turns):
    images = sorted(row["image_id"] for row in rows(build, objects))
    frame = pl.DataFrame(turns, ["q_e", "a_e", "q_s", "a_s"], orient="row").with_columns(
        pl.Series("sample_id", [f"s{at}" for at in range(len(turns))]),
        pl.Series("image_id", [images[at % 2] for at in range(len(turns))]),
    )
    return samples.write(build.store, frame)


def scored(build, objects, models, turns=TURNS):
    before = build.work["answers_scored"]
    found = score_difficulty(build, given(build, objects, turns), objects, Scoring(models))
    return rows(build, found.samples), build.work["answers_scored"] - before


def by_text(local: LocalModel, question: str | None, answer: str) -> float:
    """Mean NLL of an answer by one plain pass of the model of text."""
    loaded = load(local)
    start = [loaded.tokenizer.bos_token_id]
    if question:
        start = loaded.tokenizer(f"[user] {question}\n[assistant] ").input_ids
    ids = loaded.tokenizer(answer, add_special_tokens=False).input_ids
    with torch.inference_mode():
        scores = loaded.network(torch.tensor([[*start, *ids]])).logits[0].log_softmax(-1)
    return -np.mean([scores[len(start) + at - 1, t].item() for at, t in enumerate(ids)])


def test_scores_are_those_of_plain_forward_passes(build, objects, models):
    found, _ = scored(build, objects, models, TURNS[:2])
    data = {row["image_id"]: build.corpus.get(row["key"]) for row in rows(build, objects)}
    for row in found:
        q_e, a_e, q_s, a_s = (row[name] for name in ("q_e", "a_e", "q_s", "a_s"))
        shown = (Shown("", shrink(data[row["image_id"]], models.max_pixels)),)

        def sees(pictures, turns, answer):
            return nll(models.vision, pictures, turns, answer)

        wanted = {
            "ifd_e": (by_text(models.text, q_e, a_e), by_text(models.text, None, a_e)),
            "ifd_s": (by_text(models.text, q_s, a_s), by_text(models.text, None, a_s)),
            "vfd_e": (sees(shown, [q_e], a_e), sees((), [q_e], a_e)),
            "vfd_s": (sees(shown, [q_s], a_s), sees((), [q_s], a_s)),
            "ffd": (sees(shown, [q_e, a_e, q_s], a_s), sees(shown, [q_s], a_s)),
        }
        for name, pair in wanted.items():
            assert row[f"{name}_nll"] == pytest.approx([1e6 * side for side in pair], abs=200)
            assert row[name] == pytest.approx(1e6 * pair[0] / pair[1], abs=200)
        for side in ("e", "s"):
            product = row[f"ifd_{side}"] * row[f"vfd_{side}"] / 1e6
            assert row[f"mifd_{side}"] == pytest.approx(product, abs=2)
        assert row["mifd"] == max(row["mifd_e"], row["mifd_s"])


def test_an_answer_without_a_token_has_no_scores(build, objects, models):
    found, _ = scored(build, objects, models)
    assert [row["mifd"] is None for row in found] == [False, False, False, True]
    assert found[3]["ffd"] is None and found[3]["vfd_s_nll"] == [None, None]
    assert found[3]["mifd_e"] is not None


def test_what_was_scored_is_kept_by_its_content(build, objects, models):
    first, computed = scored(build, objects, models, TURNS[:2])
    assert computed == 2 * 9
    more, computed = scored(build, objects, models, TURNS[:3])
    assert computed == 9 and more[:2] == first
    # Other samples of the same picture with the same turns.
    moved, computed = scored(build, objects, models, [TURNS[2], TURNS[1], TURNS[0]])
    assert computed == 0
    assert [row["ffd"] for row in moved] == [row["ffd"] for row in more[::-1]]
    # The same turns about the other picture: only what is shown is new.
    swapped, computed = scored(build, objects, models, [TURNS[1], TURNS[0]])
    assert computed == 2 * 3
    assert [row["ifd_s"] for row in swapped] == [row["ifd_s"] for row in first[::-1]]
    assert [row["vfd_s"] for row in swapped] != [row["vfd_s"] for row in first[::-1]]
    other = models.model_copy(update={"max_pixels": 2048})
    assert scored(build, objects, other, TURNS[:3])[1] == 3 * 9


def test_no_answer_is_scored_twice_after_the_same(build, objects, models, monkeypatch):
    """Every pass of both models is seen; what is a row of several is there as a copy only."""
    monkeypatch.setattr(stage_file, "SHARD", 1 << 20)
    asked: list[tuple[str, Supplied]] = []

    def counted(local, supplied):
        asked.extend((local.name, item) for item in supplied)
        return log_probs(local, supplied)

    monkeypatch.setattr(stage_file, "log_probs", counted)
    same = ("Who?", "Zoe", "Why?", "Because.")
    scored(build, objects, models, [*TURNS[:2], same, same, same])
    # Nine of each; of the last three two are about one picture, and the other shows another.
    assert len(asked) == 9 + 9 + 9 + 3
    assert len(set(map(repr, asked))) == len(asked)


def test_a_sample_too_long_for_a_model_is_dropped(build, objects, models):
    """A letter that stands in no word of the tokenizer's corpus is a token, however many follow."""
    context = load(models.vision).context

    def tried(*lengths):
        turns = [TURNS[0], *(("Who?", "Zoe", "Why?", "z" * length) for length in lengths)]
        found = score_difficulty(build, given(build, objects, turns), objects, Scoring(models))
        drops = {row["id"]: row for row in rows(build, found.drops)}
        return [row["sample_id"] for row in rows(build, found.samples)], drops

    kept, drops = tried(context + 7)
    assert kept == ["s0"]
    room = context + 7 - (drops["s1"]["value"] - context)
    kept, drops = tried(room, room + 1)
    assert kept == ["s0", "s1"]
    # The longest of the nine has picture, both questions and both answers.
    assert [(d["rule"], d["value"], d["detail"]) for d in drops.values()] == [
        ("over_context", context + 1, "ffd")
    ]


def test_after_a_kill_only_what_has_no_receipt_is_scored(build, objects, models, monkeypatch):
    monkeypatch.setattr(stage_file, "SHARD", 1)
    done: list[Supplied] = []

    def scoring(deadly):
        def killed(local, supplied):
            if supplied[0].answer == deadly:
                raise KeyboardInterrupt
            done.extend(supplied)
            return log_probs(local, supplied)

        return killed

    monkeypatch.setattr(stage_file, "log_probs", scoring(TURNS[1][3]))
    with pytest.raises(KeyboardInterrupt):
        scored(build, objects, models, TURNS[:3])
    before = len(done)
    monkeypatch.setattr(stage_file, "log_probs", scoring(None))
    found, _ = scored(build, objects, models, TURNS[:3])
    assert 0 < before < len(done) == 3 * 9
    assert [row["ffd"] is None for row in found] == [False] * 3


def test_receipts_of_another_version_are_not_used(build, objects, models, monkeypatch):
    def again():
        """As after a kill before the stage's own record was written."""
        for stat in list(build.store.list("ledger/score_difficulty/")):
            if "/receipts/" not in stat.key:
                build.store.delete(stat.key)
        return scored(build, objects, models, TURNS[:1])

    first, asked = scored(build, objects, models, TURNS[:1])
    assert asked == 9
    assert again() == (first, 0)
    monkeypatch.setattr(stage_file, "VERSION", stage_file.VERSION + 1)
    assert again() == (first, 9)


def test_other_weights_are_other_scores_and_places_are_no_matter(build, models, tiny_mllms):
    pinned = Scoring(models).pinned(build)
    assert meaning(pinned)["text"].startswith("blind@")
    other = models.model_copy(update={"vision": LocalModel(name=str(tiny_mllms["qwen"]))})
    assert meaning(Scoring(other).pinned(build))["vision"] != meaning(pinned)["vision"]


def test_questions_to_a_model_in_process_are_those_to_its_weights(build, models):
    asking = Asking(Question("recap/caption", BaseModel, {}), ModelParams(local=models.vision))
    assert asking.pinned(build).model.model.startswith("llava@")
