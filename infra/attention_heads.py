"""Heads whose attention shows what an answer is about, and heads that show sinks, by model.

As listed in the released code of SD-RPN (arXiv 2509.16944) and of its successor Q-Zoom, for
questions about scenes (`natural`) and about text in pictures (`textual`). They count from 0.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Mode = Literal["natural", "textual"]
ALL: tuple[int, ...] = ()  # all heads of a layer
MIDDLE = 0.45  # of the depth; our own choice where a model is not listed


class Chosen(NamedTuple):
    """Heads by layer, for `infra.local_probes.attention`; `listed` says whether by their source.

    A cell is a sink from `threshold` on, in the mean attention of the heads of `sink`.
    """

    grounding: Mapping[int, Sequence[int]]
    sink: Mapping[int, Sequence[int]]
    threshold: float
    listed: bool


Heads = Mapping[int, Sequence[int]]
# Dimensions of hidden states in which sinks stand out, of the Llama 2 in each (the code of SD-RPN,
# after github.com/seilk/VisAttnSink).
_SINK_DIMS = {"llava-1.5-7b": (2533, 1415), "llava-1.5-13b": (2100, 4743)}
_LLAVA, _QWEN = 1e-3, 1e-2
# Beginning of the name, questions, grounding heads, sink heads, threshold of sinks.
_LISTED: tuple[tuple[str, tuple[Mode, ...], Heads, Heads, float], ...] = (
    ("llava-1.5-7b", ("natural", "textual"), {14: (13, 24, 26)}, {2: ALL}, _LLAVA),
    (
        *("llava-1.5-13b", ("natural", "textual")),
        *({13: (21, 23, 26), 15: (2,), 16: (2, 21, 30)}, {16: (17, 22)}, _LLAVA),
    ),
    ("qwen2.5-vl-3b", ("textual",), {20: (1, 4), 22: (14,)}, {}, _QWEN),
    ("qwen2.5-vl-3b", ("natural",), {21: (9, 11), 22: (0, 7)}, {8: (1, 13)}, _QWEN),
    ("qwen2.5-vl-7b", ("textual",), {22: (1, 4), 23: (6, 11)}, {}, _QWEN),
    ("qwen2.5-vl-7b", ("natural",), {16: (1, 7, 17), 19: (17, 20)}, {9: (4, 22)}, _QWEN),
    ("qwen3-vl-4b", ("textual",), {19: (24, 27), 24: (21, 23)}, {24: (6, 10)}, _QWEN),
    ("qwen3-vl-4b", ("natural",), {20: (15, 21, 23), 21: (8, 10, 11)}, {20: (1, 24)}, _QWEN),
    ("qwen3-vl-8b", ("textual",), {19: (24, 26, 27), 24: (21, 22, 23)}, {24: (1, 2)}, _QWEN),
    ("qwen3-vl-8b", ("natural",), {20: (15, 21, 23), 21: (8, 10, 11)}, {21: (7,)}, _QWEN),
)  # fmt: skip


def sink_dims(model: str) -> tuple[int, ...]:
    """Dimensions in which the sinks of a model stand out; none where they are not listed."""
    return next(
        (dims for listed, dims in _SINK_DIMS.items() if _name(model).startswith(listed)), ()
    )


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def heads_of(model: str, mode: Mode, layers: int) -> Chosen:
    """The heads of a model, by its name on the hub or that of its folder.

    For a model that is not listed: all heads of one middle layer, as in the paper's general form,
    and no sinks.
    """
    name = _name(model)
    for listed, modes, grounding, sink, threshold in _LISTED:
        if name.startswith(listed) and mode in modes:
            return Chosen(grounding, sink, threshold, True)
    return Chosen({round(MIDDLE * layers): ALL}, {}, _QWEN, False)
