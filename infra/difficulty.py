"""How much a question and a picture help a model to an answer: the scores of LLaVAR-2.

Hybrid-Instruct, arXiv 2412.16364; IFD after Cherry LLM, arXiv 2308.12032. Every score is a ratio of
mean negative log-likelihoods of the answer's tokens, as in the released code, not of perplexities.
"""

from collections.abc import Sequence
from typing import NamedTuple

from infra.local_mllm import LocalModel, Prompt, Shown
from infra.local_probes import Supplied, log_probs


class Question(NamedTuple):
    """A question about pictures, and the answer that somebody gave."""

    pictures: tuple[Shown, ...]
    question: str
    answer: str


class FollowUp(NamedTuple):
    """A question that is answered from the picture, and one whose answer explains that answer."""

    first: Question
    question: str
    answer: str


class Ratio(NamedTuple):
    """Mean negative log-likelihoods in nats, and how one stands to the other.

    Either is nan where the answer has no token to score, and so is the value.
    """

    numerator: float
    denominator: float

    @property
    def value(self) -> float:
        """nan also where the denominator is 0: the model was certain without any help."""
        return self.numerator / self.denominator if self.denominator else float("nan")


def instruction_difficulty(local: LocalModel, asked: Sequence[Question]) -> list[Ratio]:
    """IFD = NLL(a | q) / NLL(a), by a model of text; pictures are not shown.

    Above 1 the question makes the answer less likely: the two don't belong together.
    """
    return _ratios(local, [(_given((), a), Supplied(None, a.answer)) for a in asked])


def visual_difficulty(local: LocalModel, asked: Sequence[Question]) -> list[Ratio]:
    """VFD = NLL(a | v, q) / NLL(a | q): how much the pictures help."""
    return _ratios(local, [(_given(a.pictures, a), _given((), a)) for a in asked])


def follow_up_difficulty(local: LocalModel, asked: Sequence[FollowUp]) -> list[Ratio]:
    """FFD = NLL(a_s | v, q_e, a_e, q_s) / NLL(a_s | v, q_s).

    Above 1 the first answer makes its own explanation less likely: the two contradict each other.
    """
    return _ratios(local, [(_after(pair), _alone(pair)) for pair in asked])


def multimodal_difficulty(instruction: Ratio, visual: Ratio) -> float:
    """mIFD = VFD * IFD. By one and the same model it would be NLL(a | v, q) / NLL(a)."""
    return visual.value * instruction.value


def _given(pictures: tuple[Shown, ...], asked: Question) -> Supplied:
    return Supplied(Prompt("", "", pictures, asked.question), asked.answer)


def _after(pair: FollowUp) -> Supplied:
    turns = (("assistant", pair.first.answer), ("user", pair.question))
    return Supplied(Prompt("", "", pair.first.pictures, pair.first.question, turns), pair.answer)


def _alone(pair: FollowUp) -> Supplied:
    return Supplied(Prompt("", "", pair.first.pictures, pair.question), pair.answer)


def _ratios(local: LocalModel, pairs: Sequence[tuple[Supplied, Supplied]]) -> list[Ratio]:
    found = log_probs(local, [item for pair in pairs for item in pair])
    means = [likelihood.mean for likelihood in found]
    return [Ratio(*pair) for pair in zip(means[::2], means[1::2], strict=True)]
