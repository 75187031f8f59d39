"""What only a model in process can tell: how likely it finds a given answer, and where it looked.

Functions over a shard, as `infra.local_mllm.generate`; results are numpy arrays.
"""

import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from infra.errors import ConfigError, PairmillError
from infra.local_mllm import (
    EDGE,
    Loaded,
    LocalModel,
    Prompt,
    encode,
    in_batches,
    limit,
    load,
    misfits,
    response,
    said,
    write,
)
from infra.local_passes import SCORED, Row, Shape, answered, in_passes, joined, shape_of
from infra.mllm import Response

# Heads by layer, both counted from 0; an empty sequence is all heads of that layer.
Heads = Mapping[int, Sequence[int]]
EPSILON = 1e-6  # of the RMS norm of hidden states, as SD-RPN's code


class Supplied(NamedTuple):
    """An answer that somebody gave to a prompt; without a prompt, the text by itself."""

    prompt: Prompt | None
    answer: str


class Likelihood(NamedTuple):
    """Negative log-likelihood of an answer's tokens, in nats.

    `nll` is float32[tokens]; `tokens` int64[tokens] are their ids. A text by itself in a tokenizer
    without a token for the beginning has no score for its first token, which is left out.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over tokens, as float64; nan where there is none."""
        return float(self.nll.mean(dtype=np.float64)) if len(self.nll) else float("nan")


class Looks(NamedTuple):
    """Where a model looked while it wrote its answer.

    `rows[name]` is float32[steps, visual tokens]: for each generated token that was fed back, the
    softmax weights onto the visual tokens, averaged over the heads of that name. They are taken
    over the whole sequence, so a row sums to less than 1. The prompt's own pass is no step:
    steps = generated tokens - 1. `grids` are (height, width) of each picture in visual tokens,
    which follow each other row by row. A prompt that the model has no room for has no rows.
    `strength`, float32[visual tokens], is what was asked of `Hidden` states, else None.
    """

    response: Response
    rows: dict[str, np.ndarray]
    grids: tuple[tuple[int, int], ...]
    strength: np.ndarray | None = None


class Hidden(NamedTuple):
    """Hidden states as a text layer reads them at the prompt's own pass, one number a token: their
    L2 norm, or with `dims` the largest magnitude in those after RMS normalisation.
    """

    layer: int
    dims: tuple[int, ...] = ()


class Apart(NamedTuple):
    """Where each head looked by itself, float32[layers, heads, visual tokens], the mean over steps;
    None where there was no step, or no room for the prompt.
    """

    rows: np.ndarray | None
    grids: tuple[tuple[int, int], ...]


# Likelihood ----------------------------------------------------------------------------------

LEAST_KEPT = 256  # tokens whose logits are kept, if there are so many: fewer shapes


class TooLong(NamedTuple):
    """The tokens of a prompt with its answer, where the model's context takes fewer."""

    tokens: int


def log_probs(local: LocalModel, supplied: Sequence[Supplied]) -> list[Likelihood | TooLong]:
    """How unlikely the model finds each token of supplied answers, in their order.

    The answer stands where the chat template puts what an assistant said, and only its own tokens
    are scored: neither the prompt's nor the end of the turn. White space around it is left out.

    The shape of the pass that scores an answer is a function of it, its prompt and `batch_size`;
    others of that shape fill the pass, and copies where they are too few. On a CPU a pass has one
    row, so that no bit hangs on companions; where a GPU has too little memory, passes are cut.
    """
    loaded = load(local)
    found: dict[int, Likelihood | TooLong] = {}

    def rows() -> Iterator[tuple[int, Shape, Row]]:
        row_of = rows_of(loaded)
        for at, item in enumerate(supplied):
            row = row_of(item)
            if not row.answer:
                found[at] = _likelihood([], [])
            elif row.length > loaded.context:
                found[at] = TooLong(row.length)
            else:
                kept = max(LEAST_KEPT, 1 << len(row.answer).bit_length())
                yield at, shape_of(loaded, row, loaded.context, kept, SCORED), row

    with loaded.busy:
        found |= in_passes(loaded, rows(), partial(_pass, loaded))
    return [found[at] for at in range(len(supplied))]


def rows_of(loaded: Loaded) -> Callable[[Supplied], Row]:
    """What makes rows of supplied answers."""
    import torch

    lead = _lead(loaded)

    def within(item: Supplied) -> Row:
        assert item.prompt is not None
        answer = item.answer.strip()
        tokens = _within(loaded, lead + answer) if answer else []
        return Row(encode(loaded, [item.prompt]), tokens)

    def bare(item: Supplied) -> Row:
        """A beginning-of-text token, or the first token of the text, stands for the prompt."""
        bos, answer = loaded.tokenizer.bos_token_id, _ids(loaded, item.answer.strip())
        start, rest = ([bos], answer) if bos is not None else (answer[:1], answer[1:])
        ids = torch.tensor([start], dtype=torch.int64, device=loaded.device)
        return Row({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rest)

    return lambda item: within(item) if item.prompt else bare(item)


def _lead(loaded: Loaded) -> str:
    """What the chat template puts between its generation prompt and an answer: a blank, or nothing.

    A model writes it as part of its first token, so it is scored with that.
    """
    talk: list[dict[str, Any]] = [{"role": "user", "content": said("x", loaded.sees)}]
    answered = [*talk, {"role": "assistant", "content": said(EDGE, loaded.sees)}]
    render = partial(loaded.processor.apply_chat_template, tokenize=False)
    before, whole = render(talk, add_generation_prompt=True), render(answered).partition(EDGE)[0]
    lead = whole.removeprefix(before)
    return lead if whole.startswith(before) and lead.isspace() else ""


def _within(loaded: Loaded, text: str) -> list[int]:
    """Tokens of a text that is not at the beginning, where some tokenizers would add a blank."""
    found = loaded.tokenizer(
        f"\n{text}",
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > 1]


def _ids(loaded: Loaded, text: str) -> list[int]:
    """Tokens of a text in which nothing is special."""
    ids = loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [int(token) for token in ids]


def _pass(loaded: Loaded, shape: Shape, rows: Sequence[Row]) -> list[Likelihood]:
    """One forward pass over rows padded on the left."""
    import torch

    inputs = joined(loaded, rows, shape.width)
    if not hasattr(getattr(loaded.network, "model", None), "get_rope_index"):
        # Models that place pictures in two dimensions find positions by themselves.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    logits = _forward(loaded, inputs, shape.tail)
    found = []
    for row, scores in zip(rows, logits, strict=True):
        # The position before a token predicts it; the last one predicts nothing that is here.
        target = torch.tensor(row.answer, dtype=torch.int64, device=scores.device)
        predicted = scores[-len(row.answer) - 1 : -1].float()
        nll = torch.nn.functional.cross_entropy(predicted, target, reduction="none")
        found.append(_likelihood(nll.cpu().numpy(), row.answer))
    return found


def _forward(loaded: Loaded, inputs: dict[str, Any], kept: int) -> Any:
    """Logits of the last positions; all of them where a model can't be asked for fewer."""
    takes = inspect.signature(loaded.network.forward).parameters
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in takes else {}
    return loaded.network(**inputs, **fewer, use_cache=False).logits


def _likelihood(nll: Any, ids: Sequence[int]) -> Likelihood:
    return Likelihood(np.asarray(nll, np.float32), np.asarray(ids, np.int64))


# Attention -----------------------------------------------------------------------------------


def attention(
    local: LocalModel,
    heads: Mapping[str, Heads],
    prompts: Iterable[Prompt],
    hidden: Hidden | None = None,
) -> list[Looks]:
    """Answers, and for each its attention to the visual tokens, averaged as `heads` say by name.

    With `hidden` also what these say of the visual tokens. As with `log_probs` no bit of a prompt's
    looks hangs on its companions; prompts are taken as they are needed. Raises PairmillError for
    layers, heads or dimensions that the model does not have, and for pictures whose visual tokens
    form no grid.
    """
    loaded = load(local)
    _check_heads(loaded, heads)
    _check_hidden(loaded, hidden)
    none = {name: np.zeros((0, 0), np.float32) for name in heads}
    with loaded.busy, _watching(loaded), _reading(loaded, hidden):
        return answered(
            loaded,
            prompts,
            encode,
            partial(_looks, loaded, heads),
            lambda answer: Looks(answer, none, ()),
        )


def heads_apart(local: LocalModel, prompts: Sequence[Prompt]) -> list[Apart]:
    """Where every head of every layer looked while the model answered, prompt by prompt.

    One prompt at a time, so that it depends on no companion. Raises PairmillError for pictures
    whose visual tokens form no grid.
    """
    loaded = load(local)

    def part(some: Sequence[Prompt]) -> list[Apart]:
        return [_apart(loaded, prompt) for prompt in some]

    with loaded.busy, _watching(loaded):
        return in_batches(loaded, prompts, part)


def _apart(loaded: Loaded, prompt: Prompt) -> Apart:
    inputs = encode(loaded, [prompt])
    if any(misfits(loaded, [prompt], inputs)):
        return Apart(None, ())
    visual = inputs["input_ids"] == loaded.network.config.image_token_id
    (grids,) = _grids(loaded, inputs, [prompt], visual.sum(1).tolist())
    _watch.columns, _watch.apart = visual[0].nonzero()[:, 0], {}
    steps = write(loaded, [prompt], inputs).sequences.shape[1] - inputs["input_ids"].shape[1] - 1
    sums = [total.cpu().numpy() for _, total in sorted(_watch.apart.items())]
    _check_watched(loaded, bool(sums), steps)
    return Apart(np.stack(sums) / np.float32(steps) if sums else None, grids)


def _looks(
    loaded: Loaded, heads: Mapping[str, Heads], prompts: Sequence[Prompt], inputs: dict[str, Any]
) -> list[Looks]:
    start = inputs["input_ids"].shape[1]
    written, steps = watched(loaded, heads, prompts, inputs)
    visual = inputs["input_ids"] == loaded.network.config.image_token_id
    grids = _grids(loaded, inputs, prompts, visual.sum(1).tolist())
    found = []
    for at, prompt in enumerate(prompts):
        length = int(inputs["attention_mask"][at].sum())
        tokens = written[at, start:].tolist()
        answer = response(loaded, tokens, length, limit(loaded, prompt))
        used = max(0, (answer.usage or {})["output"] - 1)
        columns = visual[at].nonzero()[:, 0]
        rows = {name: _columns(steps[name][:used], at, columns) for name in heads}
        strong = None if _watch.strength is None else _watch.strength[at, columns].cpu().numpy()
        found.append(Looks(answer, rows, grids[at], strong))
    return found


def _columns(steps: Sequence[Any], row: int, columns: Any) -> np.ndarray:
    kept = [step[row, columns].cpu().numpy() for step in steps]
    return np.stack(kept) if kept else np.zeros((0, len(columns)), np.float32)


def watched(
    loaded: Loaded, heads: Mapping[str, Heads], prompts: Sequence[Prompt], inputs: dict[str, Any]
) -> tuple[Any, dict[str, list[Any]]]:
    """Prompts with their answers as tokens, and the mean attention of each step, by name.

    A step is float32[prompts, tokens so far], and each of its rows sums to 1. To be called within
    `attention` only.
    """
    _watch.heads, _watch.sums = heads, {name: {} for name in heads}
    written = write(loaded, prompts, inputs).sequences
    count = loaded.network.config.get_text_config().num_attention_heads
    steps = {}
    for name, layers in heads.items():
        used = sum(len(chosen) or count for chosen in layers.values())
        steps[name] = [total / used for _, total in sorted(_watch.sums[name].items())]
    _check_watched(loaded, all(steps.values()), written.shape[1] - inputs["input_ids"].shape[1] - 1)
    return written, steps


def _check_watched(loaded: Loaded, is_watched: bool, steps: int) -> None:
    if steps > 0 and not is_watched:
        raise PairmillError(
            f"models: the attention of {loaded.local.name!r} can't be watched: its architecture"
            " does not use the attention interface of transformers; use another model"
        )


class _Watch(threading.local):
    """Sums over heads, by name and length of the sequence, of the generation of this thread; sums
    over steps, by layer, of every head onto some columns; strengths of hidden states.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.heads: Mapping[str, Heads] = {}
        self.sums: dict[str, dict[int, Any]] = {}
        self.columns: Any = None
        self.apart: dict[int, Any] = {}
        self.strength: Any = None


_watch = _Watch()


@contextmanager
def _watching(loaded: Loaded) -> Iterator[None]:
    """While it lasts, the text layers of a model attend by `_attend`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("pairmill", _attend)
    AttentionMaskInterface.register("pairmill", eager_mask)
    before = loaded.network.config.get_text_config()._attn_implementation
    loaded.network.set_attn_implementation({"text_config": "pairmill"})
    try:
        yield
    finally:
        loaded.network.set_attn_implementation({"text_config": before})
        _watch.clear()


@contextmanager
def _reading(loaded: Loaded, hidden: Hidden | None) -> Iterator[None]:
    """While it lasts, strengths are taken of what a text layer reads of a prompt."""
    if hidden is None:
        yield
        return

    def keep(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states = given[0] if given else named["hidden_states"]
        if states.shape[1] > 1:
            _watch.strength = _strength(states, hidden.dims)

    layer = loaded.network.get_decoder().layers[hidden.layer]
    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _strength(states: Any, dims: Sequence[int]) -> Any:
    """One number a token of [prompts, tokens, dimensions]; see `Hidden`."""
    states = states.float()
    if not dims:
        return states.norm(dim=-1)
    scale = (states.square().mean(-1) + EPSILON).rsqrt()
    return states[..., list(dims)].abs().amax(-1) * scale


def _attend(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any
) -> tuple[Any, None]:
    """Plain attention for a generated token, whose weights are kept; a fast one for the prompt.

    So weights of the prompt, whose number grows with the square of its length, never exist.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1:
        found: tuple[Any, None] = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, **more
        )
        return found
    if any(more.get(name) is not None for name in ("softcap", "s_aux")):
        raise PairmillError("models: attention with soft caps or sinks can't be watched")
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    weights = scores.float().softmax(-1)
    _keep(module.layer_idx, weights[:, :, 0])
    result = weights.to(query.dtype) @ value.repeat_interleave(groups, 1)
    return result.transpose(1, 2).contiguous(), None


def _keep(layer: int, weights: Any) -> None:
    """Add a layer's weights, [prompts, heads, tokens], to the sums that it is part of."""
    length = weights.shape[2]
    for name, layers in _watch.heads.items():
        if layer in layers:
            chosen = weights[:, list(layers[layer])] if layers[layer] else weights
            sums = _watch.sums[name]
            sums[length] = sums.get(length, 0) + chosen.sum(1)
    if _watch.columns is not None:
        _watch.apart[layer] = _watch.apart.get(layer, 0) + weights[0][:, _watch.columns]


def _check_heads(loaded: Loaded, heads: Mapping[str, Heads]) -> None:
    text = loaded.network.config.get_text_config()
    layers, count = text.num_hidden_layers, text.num_attention_heads
    for name, chosen in heads.items():
        beyond = [layer for layer in chosen if not 0 <= layer < layers]
        beyond += [head for some in chosen.values() for head in some if not 0 <= head < count]
        if beyond or not chosen:
            raise ConfigError(
                f"heads.{name}: {loaded.local.name!r} has layers 0 to {layers - 1} with heads 0 to"
                f" {count - 1}; name some of them"
            )


def _check_hidden(loaded: Loaded, hidden: Hidden | None) -> None:
    text = loaded.network.config.get_text_config()
    layers, wide = text.num_hidden_layers, text.hidden_size
    if hidden and not (0 <= hidden.layer < layers and all(0 <= d < wide for d in hidden.dims)):
        raise ConfigError(
            f"sinks: {loaded.local.name!r} has layers 0 to {layers - 1} with dimensions 0 to"
            f" {wide - 1}; name some of them"
        )


def _grids(
    loaded: Loaded, inputs: dict[str, Any], prompts: Sequence[Prompt], visual: Sequence[int]
) -> list[tuple[tuple[int, int], ...]]:
    """Height and width in visual tokens of the pictures of each prompt."""
    if "image_grid_thw" in inputs:
        merge = loaded.processor.image_processor.merge_size
        shapes = iter([(h // merge, w // merge) for _, h, w in inputs["image_grid_thw"].tolist()])
        grids = [tuple(next(shapes) for _ in prompt.pictures) for prompt in prompts]
    else:
        sides = [
            math.isqrt(n // max(1, len(p.pictures))) for n, p in zip(visual, prompts, strict=True)
        ]
        grids = [((side, side),) * len(p.pictures) for side, p in zip(sides, prompts, strict=True)]
    for shapes_here, count in zip(grids, visual, strict=True):
        if sum(height * width for height, width in shapes_here) != count:
            raise PairmillError(
                f"models: {loaded.local.name!r} makes {count} visual tokens of {len(shapes_here)}"
                " pictures, which is no grid of them; use a model with one token to a place"
            )
    return grids
