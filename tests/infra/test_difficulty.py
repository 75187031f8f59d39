"""LLaVAR-2's scores: literal ratios, and NLLs from a forward pass of the test's own."""

import math

import numpy as np
import pytest
import torch

from infra import difficulty
from infra.difficulty import (
    FollowUp,
    Question,
    Ratio,
    follow_up_difficulty,
    instruction_difficulty,
    multimodal_difficulty,
    visual_difficulty,
)
from infra.local_mllm import LocalModel, Prompt, encode, load
from infra.local_probes import Likelihood
from tests.infra.test_local_mllm import prompt
from tests.infra.test_local_probes import by_hand

pytestmark = pytest.mark.usefixtures("one_thread")

LEAF = Question(prompt(1).pictures, "What is it?", "A red leaf.")
CARD = Question(prompt(2).pictures, "Which colour has the card?", "Blue")


@pytest.fixture(params=["qwen", "llava"])
def local(request, tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms[request.param]), batch_size=4, device="cpu")


def nll(local: LocalModel, pictures, turns: list[str], answer: str) -> float:
    """Mean NLL of an answer after turns of user and assistant, by one plain pass, unbatched."""
    loaded = load(local)
    roles = ("assistant", "user") * 3
    talk = Prompt("", "", pictures, turns[0], tuple(zip(roles, turns[1:], strict=False)))
    inputs = encode(loaded, [talk._replace(turns=(*talk.turns, ("assistant", answer)))])
    tokens = inputs["input_ids"][0].tolist()
    stop = len(tokens) - 1 - tokens[::-1].index(loaded.tokenizer.eos_token_id)
    blank = " " if loaded.network.config.model_type == "llava" else ""
    count = len(loaded.tokenizer(blank + answer, add_special_tokens=False).input_ids)
    with torch.inference_mode():
        scores = loaded.network(**inputs).logits[0].log_softmax(-1)
    return -np.mean([scores[at - 1, tokens[at]].item() for at in range(stop - count, stop)])


def test_a_ratio_is_of_means_and_not_of_perplexities(monkeypatch):
    given = {"with": [1.0, 2.0, 3.0], "without": [4.0, 4.0], "none": [], "sure": [0.0]}

    def told(_, items):
        return [
            Likelihood(np.array(given[name], np.float32), np.arange(len(given[name])))
            for name in items
        ]

    monkeypatch.setattr(difficulty, "log_probs", told)
    pairs = [("with", "without"), ("with", "none"), ("with", "sure"), ("without", "with")]
    one, none, sure, hard = difficulty._ratios(None, pairs)
    assert (one.numerator, one.denominator, one.value) == (2.0, 4.0, 0.5)
    assert math.isnan(none.denominator) and math.isnan(none.value)
    assert sure.denominator == 0 and math.isnan(sure.value)
    assert hard.value == 2.0


def test_instruction_difficulty_is_that_of_a_forward_pass_written_by_hand(tiny_mllms):
    blind = LocalModel(name=str(tiny_mllms["blind"]), device="cpu")
    loaded = load(blind)
    state = {name: value.numpy() for name, value in loaded.network.state_dict().items()}
    for asked, found in zip([LEAF, CARD], instruction_difficulty(blind, [LEAF, CARD]), strict=True):
        answer = loaded.tokenizer(asked.answer).input_ids

        def mean(start: list[int], answer=answer) -> float:
            scores = by_hand(state, [*start, *answer])
            return -np.mean([scores[len(start) + at - 1, t] for at, t in enumerate(answer)])

        question = loaded.tokenizer(f"[user] {asked.question}\n[assistant] ").input_ids
        assert found.numerator == pytest.approx(mean(question), abs=1e-4)
        assert found.denominator == pytest.approx(mean([loaded.tokenizer.bos_token_id]), abs=1e-4)
        assert found.value == found.numerator / found.denominator


def test_visual_difficulty_is_with_the_picture_over_without_it(local):
    for asked, found in zip([LEAF, CARD], visual_difficulty(local, [LEAF, CARD]), strict=True):
        shown = nll(local, asked.pictures, [asked.question], asked.answer)
        hidden = nll(local, (), [asked.question], asked.answer)
        assert found == pytest.approx((shown, hidden), abs=1e-4)


def test_follow_up_difficulty_is_after_the_first_turn_over_without_it(local):
    pair = FollowUp(LEAF, "How do you know?", "It has the shape of one, and a stem.")
    (found,) = follow_up_difficulty(local, [pair])
    turns = [LEAF.question, LEAF.answer, pair.question]
    after = nll(local, LEAF.pictures, turns, pair.answer)
    alone = nll(local, LEAF.pictures, [pair.question], pair.answer)
    assert found == pytest.approx((after, alone), abs=1e-4)


def test_the_product_is_the_multimodal_score():
    assert multimodal_difficulty(Ratio(3.0, 4.0), Ratio(1.0, 2.0)) == 0.375
    # By one model the two factors cancel to NLL(a | v, q) / NLL(a).
    assert multimodal_difficulty(Ratio(2.0, 5.0), Ratio(1.0, 2.0)) == pytest.approx(1.0 / 5.0)


def test_an_answer_of_one_token_has_scores(local):
    (found,) = visual_difficulty(local, [LEAF._replace(answer="A")])
    assert found.value > 0
    (found,) = instruction_difficulty(local, [LEAF._replace(answer="A", pictures=())])
    has_bos = load(local).tokenizer.bos_token_id is not None
    assert math.isnan(found.value) != has_bos


def test_scores_come_in_the_order_of_the_questions(local):
    many = [LEAF, CARD, LEAF._replace(answer="No."), CARD._replace(question="Why?")]
    found = visual_difficulty(local, many)
    for asked, ratio in zip(many[::-1], visual_difficulty(local, many[::-1]), strict=True):
        assert ratio == pytest.approx(found[many.index(asked)], abs=1e-4)
