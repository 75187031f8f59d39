"""Passes over a model in process whose shape each row decides alone.

So no bit of what comes of a row hangs on those that happened to share its pass.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from infra.local_mllm import (
    Encoder,
    Loaded,
    LocalModel,
    Prompt,
    Sampling,
    Shown,
    encode_prefix,
    in_batches,
    limit,
    load,
    misfits,
    responses,
)
from infra.mllm import Response

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Found = TypeVar("Found")

# Tokens of a pass, unless one row has more: beyond, a device gains little, and copies cost. Where
# answers are written a GPU reads all weights for each of their tokens, however few the rows. On a
# CPU a row has a pass of its own: its place among others there moved the last bit of 2 likelihoods
# in 2,400 (three rows of 80 tokens), since kernels take the edge of a matrix otherwise.
SCORED = {"cpu": 1, "cuda": 2_048}
WRITTEN = {"cpu": 1, "cuda": 65_536}
# What configs call the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Row(NamedTuple):
    """A prompt as model inputs of one row, and the tokens of an answer that was given to it."""

    inputs: dict[str, Any]
    answer: Sequence[int] = ()

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1]) + len(self.answer)

    @property
    def of_pictures(self) -> dict[str, Any]:
        """What does not run along the tokens."""
        shape = self.inputs["input_ids"].shape
        return {name: value for name, value in self.inputs.items() if value.shape != shape}


class Shape(NamedTuple):
    """The shape of a pass: rows, tokens of a row, whether some of them are padding (without any,
    kernels that take no mask are chosen), tokens at the end that are scored or are still to be
    written, pictures.
    """

    rows: int
    width: int
    is_padded: bool
    tail: int
    pictures: tuple[Any, ...]


def shape_of(loaded: Loaded, row: Row, room: int, tail: int, tokens: Mapping[str, int]) -> Shape:
    """The shape of the pass for a row: widths by steps of at most an eighth, `room` at most.

    What the integers beside the tokens say, such as grids of patches, decides shapes inside.
    """
    step = max(16, (1 << row.length.bit_length()) // 16)
    width = min(-(-row.length // step) * step, room)
    pictures = tuple(
        (name, *value.shape, *(() if value.is_floating_point() else value.flatten().tolist()))
        for name, value in row.of_pictures.items()
    )
    count = 1 if _mixes_rows(loaded) else tokens[loaded.device] // width
    rows = max(1, min(loaded.local.batch_size, count))
    return Shape(rows, width, width > row.length, tail, (*row.inputs, *pictures))


def _mixes_rows(loaded: Loaded) -> bool:
    """Whether a row's numbers hang on the others: an expert takes the tokens of all rows that are
    sent to it as one matrix, and LongRoPE (arXiv 2402.13753) turns by the longest row.
    """
    text = loaded.network.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(some for some in rope.values() if isinstance(some, dict))]  # by kind of layer
    has_experts = any(getattr(text, name, None) for name in EXPERTS)
    return has_experts or any(some.get("rope_type") == "longrope" for some in ropes)


def in_passes(
    loaded: Loaded,
    items: Iterable[tuple[Key, Shape, Item]],
    work: Callable[[Shape, Sequence[Item]], Sequence[Found]],
) -> dict[Key, Found]:
    """`work` over as many items of one shape as it has rows, copies of the last where others lack.

    Where a GPU has too little memory for a pass it is cut, and then has another shape.
    """
    found: dict[Key, Found] = {}
    waiting: dict[Shape, dict[Key, Item]] = {}

    def run(shape: Shape) -> None:
        group = waiting.pop(shape)
        given = list(group.values())
        filled = given + given[-1:] * (shape.rows - len(given))
        made = in_batches(loaded, filled, lambda some: [*work(shape, some)])
        found.update(zip(group, made, strict=False))

    for key, shape, item in items:
        group = waiting.setdefault(shape, {})
        group[key] = item
        if len(group) == shape.rows:
            run(shape)
    for shape in list(waiting):
        run(shape)
    return found


def joined(loaded: Loaded, rows: Sequence[Row], width: int) -> dict[str, Any]:
    """Model inputs of many rows, padded on the left, each with its answer at the end."""
    import torch

    pictures = {name: [row.inputs[name] for row in rows] for name in rows[0].of_pictures}
    inputs = {name: torch.cat(values) for name, values in pictures.items()}
    for name in rows[0].inputs.keys() - inputs.keys():
        fill = loaded.tokenizer.pad_token_id if name == "input_ids" else 0
        inputs[name] = torch.cat([_padded(row, name, width, fill) for row in rows])
    return inputs


def _padded(row: Row, name: str, width: int, fill: int) -> Any:
    """What runs along the tokens of a row: of the answer's, their ids, their presence, or 0."""
    import torch

    value = row.inputs[name]
    tails = {"input_ids": list(row.answer), "attention_mask": [1] * len(row.answer)}
    tail = tails.get(name, [0] * len(row.answer))
    whole = torch.cat([value, torch.tensor([tail], dtype=value.dtype, device=value.device)], 1)
    return torch.nn.functional.pad(whole, (width - row.length, 0), value=fill)


# Answers that are written --------------------------------------------------------------------


class Asked(NamedTuple):
    """A prompt, whose pictures are in its row."""

    prompt: Prompt
    row: Row


def answered(
    loaded: Loaded,
    prompts: Iterable[Prompt],
    encoder: Encoder,
    work: Callable[[Sequence[Prompt], dict[str, Any]], list[Found]],
    refused: Callable[[Response], Found],
) -> list[Found]:
    """`work` over prompts and their inputs, in passes; `refused` of those without room.

    A row that has ended goes on with padding until the last one has, so the cache of a step is as
    long as the pass is wide and the step is late, whoever else is there.
    """
    found: dict[int, Found] = {}

    def asked() -> Iterator[tuple[int, Shape, Asked]]:
        for at, prompt in enumerate(prompts):
            inputs = encoder(loaded, [prompt])
            (misfit,) = misfits(loaded, [prompt], inputs)
            if misfit:
                found[at] = refused(misfit)
                continue
            row, most = Row(inputs), limit(loaded, prompt)
            blank = tuple(Shown(name, b"") for name, _ in prompt.pictures)
            shape = shape_of(loaded, row, loaded.context - most, most, WRITTEN)
            yield at, shape, Asked(prompt._replace(pictures=blank), row)

    def part(shape: Shape, some: Sequence[Asked]) -> list[Found]:
        inputs = joined(loaded, [item.row for item in some], shape.width)
        return work([item.prompt for item in some], inputs)

    with loaded.busy:
        found |= in_passes(loaded, asked(), part)
    return [found[at] for at in sorted(found)]


def continue_from(
    local: LocalModel, prompts: Iterable[Prompt], sampling: Sampling | None = None
) -> list[Response]:
    """What the model writes after the pictures alone, as if it were the user. See encode_prefix.

    The probabilities it draws from are those of a pass whose shape the prompt alone decides.
    """
    loaded = load(local)

    def work(some: Sequence[Prompt], inputs: dict[str, Any]) -> list[Response]:
        return responses(loaded, some, inputs, sampling)

    return answered(loaded, prompts, encode_prefix, work, lambda answer: answer)
