"""LLaVAR-2's scores by models that know something: what does not belong together scores higher.

The offline checks that a score is worth its name: answers swapped between pictures, questions
swapped, a first answer corrupted. With random weights none of it could be seen.
"""

import numpy as np
import pytest

from infra.difficulty import (
    Ratio,
    follow_up_difficulty,
    instruction_difficulty,
    supplied,
    visual_difficulty,
)
from infra.local_mllm import LocalModel, Shown
from infra.local_probes import log_probs
from tests import taught_mllms
from tests.taught_mllms import COLOURS, QUESTIONS, TABLES, Told, world

COUNT = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, LocalModel]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield taught_mllms.write(tmp_path_factory.mktemp("taught"))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cards() -> list[Told]:
    """Pictures that the models were not taught with."""
    return list(world(COUNT, seed=9))


def values(models: dict[str, LocalModel], asked: list[tuple[Ratio, Shown]]) -> np.ndarray:
    local = models[asked[0][0].numerator.reader]
    sides = [supplied(given, shown) for ratio, shown in asked for given in ratio]
    means = np.array([found.mean for found in log_probs(local, sides)])
    return means[::2] / means[1::2]


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """How often a wrong one scores higher than a right one."""
    above, level = wrong[:, None] > right, wrong[:, None] == right
    return float(above.mean() + level.mean() / 2)


def other(word: str) -> str:
    """Another answer to the same question."""
    words = list(COLOURS if word in COLOURS else TABLES)
    return words[(words.index(word) + 1) % len(words)]


def judged(name: str, right: np.ndarray, wrong: np.ndarray) -> None:
    found = auc(right, wrong)
    print(f"{name}: {right.mean():.2f} as it is, {wrong.mean():.2f} swapped, AUC {found:.2f}")
    assert wrong.mean() > right.mean()
    assert found > 0.7


def test_answers_of_other_pictures_raise_vfd(models, cards):
    right = [(visual_difficulty(*card.turns[:2]), card.shown) for card in cards]
    wrong = []
    for card in cards:
        swap = next(c for c in cards if c.asks == card.asks and c.turns[1] != card.turns[1])
        wrong.append((visual_difficulty(card.turns[0], swap.turns[1]), card.shown))
    judged("VFD", values(models, right), values(models, wrong))


def test_other_questions_raise_ifd(models, cards):
    right = [(instruction_difficulty(*card.turns[:2]), card.shown) for card in cards]
    wrong = [
        (instruction_difficulty(QUESTIONS[1 - card.asks], card.turns[1]), card.shown)
        for card in cards
    ]
    judged("IFD", values(models, right), values(models, wrong))


def test_a_false_first_answer_raises_ffd(models, cards):
    right = [(follow_up_difficulty(*card.turns), card.shown) for card in cards]
    wrong = []
    for card in cards:
        q_e, a_e, q_s, a_s = card.turns
        wrong.append((follow_up_difficulty(q_e, other(a_e), q_s, a_s), card.shown))
    judged("FFD", values(models, right), values(models, wrong))
