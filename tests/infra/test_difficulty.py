"""LLaVAR-2's scores: literal ratios, and NLLs from a forward pass of the test's own."""

import numpy as np
import pytest
import torch

from infra.difficulty import (
    Given,
    Ratio,
    follow_up_difficulty,
    instruction_difficulty,
    product,
    ratios,
    supplied,
    visual_difficulty,
)
from infra.local_mllm import LocalModel, Prompt, Shown, encode, load
from infra.local_probes import log_probs
from tests.infra.test_local_mllm import jpeg
from tests.infra.test_local_probes import by_hand

pytestmark = pytest.mark.usefixtures("one_thread")

SHOWN = Shown("", jpeg(1))
LEAF = ("What is it?", "A red leaf.")
WHY = ("How do you know?", "It has the shape of one, and a stem.")
TURNS = [LEAF, ("Which colour has the card?", "Blue"), WHY, ("Which letter?", "A")]


@pytest.fixture(params=["qwen", "llava"])
def local(request, tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms[request.param]), batch_size=4, device="cpu")


def means(local: LocalModel, ratio: Ratio) -> tuple[float, ...]:
    """Numerator and denominator as a model finds them."""
    return tuple(found.mean for found in log_probs(local, [supplied(g, SHOWN) for g in ratio]))


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


@pytest.mark.parametrize("turns", TURNS)
def test_instruction_difficulty_is_that_of_a_forward_pass_written_by_hand(tiny_mllms, turns):
    blind = LocalModel(name=str(tiny_mllms["blind"]), device="cpu")
    loaded = load(blind)
    state = {name: value.numpy() for name, value in loaded.network.state_dict().items()}
    question, answer = turns
    tokens = loaded.tokenizer(answer).input_ids

    def mean(start: list[int]) -> float:
        scores = by_hand(state, [*start, *tokens])
        return -np.mean([scores[len(start) + at - 1, t] for at, t in enumerate(tokens)])

    asked = loaded.tokenizer(f"[user] {question}\n[assistant] ").input_ids
    wanted = mean(asked), mean([loaded.tokenizer.bos_token_id])
    assert means(blind, instruction_difficulty(*turns)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("turns", TURNS)
def test_visual_difficulty_is_with_the_picture_over_without_it(local, turns):
    question, answer = turns
    wanted = nll(local, (SHOWN,), [question], answer), nll(local, (), [question], answer)
    assert means(local, visual_difficulty(*turns)) == pytest.approx(wanted, abs=1e-4)


def test_follow_up_difficulty_is_after_the_first_turn_over_without_it(local):
    after = nll(local, (SHOWN,), [*LEAF, WHY[0]], WHY[1])
    alone = nll(local, (SHOWN,), [WHY[0]], WHY[1])
    assert means(local, follow_up_difficulty(*LEAF, *WHY)) == pytest.approx(
        (after, alone), abs=1e-4
    )


def test_of_ten_likelihoods_nine_are_different():
    found = ratios(*LEAF, *WHY)
    assert len({given for ratio in found.values() for given in ratio}) == 9
    assert found["ffd"].denominator == found["vfd_s"].numerator
    assert found["vfd_e"].numerator == Given("vision", LEAF[1], LEAF[:1], True)


@pytest.mark.parametrize(
    ("pairs", "value"),
    [
        ([(1, 3)], 333_333),
        ([(2, 3)], 666_667),
        ([(5, 4)], 1_250_000),
        ([(1_000_000, 1_000_000)], 1_000_000),
        ([(3, 4), (1, 2)], 375_000),
        ([(2, 5), (1, 2)], 200_000),  # by one model the two factors cancel to 1 / 5
        ([(1, 0)], None),
        ([(None, 2)], None),
        ([(2, None), (1, 1)], None),
    ],
)
def test_products_are_exact_quotients_rounded_once(pairs, value):
    assert product(*pairs) == value


def test_an_answer_of_one_token_has_scores(local):
    one = visual_difficulty("Which letter?", "A")
    assert all(mean > 0 for mean in means(local, one))
    # By itself it has none where the tokenizer has no token for the beginning.
    _, bare = means(local, instruction_difficulty("Which letter?", "A"))
    assert np.isnan(bare) == (load(local).tokenizer.bos_token_id is None)
