"""How much a question and a picture help a model to an answer: the scores of LLaVAR-2.

Hybrid-Instruct, arXiv 2412.16364; IFD after Cherry LLM, arXiv 2308.12032. Every score is a ratio of
mean negative log-likelihoods of the answer's tokens, as in the released code, not of perplexities.
"""

from typing import Literal, NamedTuple

from infra.local_mllm import Prompt, Shown
from infra.local_probes import Supplied

MILLION = 1_000_000
Reader = Literal["text", "vision"]


class Given(NamedTuple):
    """An answer, and what comes before it: turns of user and assistant, or nothing, and a picture.

    `reader` says by which of two models it is scored: one of text, or one that sees.
    """

    reader: Reader
    answer: str
    turns: tuple[str, ...] = ()
    sees: bool = False


class Ratio(NamedTuple):
    """What is likened to what: NLL of the numerator over NLL of the denominator."""

    numerator: Given
    denominator: Given


def instruction_difficulty(question: str, answer: str) -> Ratio:
    """IFD = NLL(a | q) / NLL(a), by a model of text; the picture is not shown.

    Above 1 the question makes the answer less likely: the two don't belong together.
    """
    return Ratio(Given("text", answer, (question,)), Given("text", answer))


def visual_difficulty(question: str, answer: str) -> Ratio:
    """VFD = NLL(a | v, q) / NLL(a | q): how much the picture helps."""
    return Ratio(Given("vision", answer, (question,), True), Given("vision", answer, (question,)))


def follow_up_difficulty(q_e: str, a_e: str, q_s: str, a_s: str) -> Ratio:
    """FFD = NLL(a_s | v, q_e, a_e, q_s) / NLL(a_s | v, q_s).

    Above 1 the first answer makes its own explanation less likely: the two contradict each other.
    """
    after = Given("vision", a_s, (q_e, a_e, q_s), True)
    return Ratio(after, Given("vision", a_s, (q_s,), True))


def ratios(q_e: str, a_e: str, q_s: str, a_s: str) -> dict[str, Ratio]:
    """All scores of a pair of turns by their names, but for mIFD, the product of IFD and VFD.

    By one and the same model mIFD would be NLL(a | v, q) / NLL(a).
    """
    return {
        "ifd_e": instruction_difficulty(q_e, a_e),
        "ifd_s": instruction_difficulty(q_s, a_s),
        "vfd_e": visual_difficulty(q_e, a_e),
        "vfd_s": visual_difficulty(q_s, a_s),
        "ffd": follow_up_difficulty(q_e, a_e, q_s, a_s),
    }


def supplied(given: Given, picture: Shown | None) -> Supplied:
    """An answer as it is put to a model; the picture is shown where it is part of what is given."""
    if not given.turns:
        return Supplied(None, given.answer)
    shown = (picture,) if given.sees and picture else ()
    roles = ("assistant", "user") * len(given.turns)
    talk = tuple(zip(roles, given.turns[1:], strict=False))
    return Supplied(Prompt("", "", shown, given.turns[0], talk), given.answer)


def product(*nats: tuple[int | None, int | None]) -> int | None:
    """The product of (numerator, denominator), in millionths, rounded once; None where one lacks.

    A denominator of 0 says that the model was certain without any help: there is no ratio.
    """
    above, below = 1, 1
    for numerator, denominator in nats:
        if numerator is None or not denominator:
            return None
        above, below = above * numerator, below * denominator
    return (2 * MILLION * above + below) // (2 * below)
