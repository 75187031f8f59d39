"""A tiny LLaVA and a tiny Llama that are taught a small world on the spot, in seconds.

A picture is a coloured card on a dark or a light table, some of them too faded to tell. A pair of
turns asks for one of the two, and how that is known.
"""

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from infra import difficulty, local_passes, local_probes
from infra.local_mllm import LocalModel, Shown, load
from tests import tiny_mllms

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 40), "blue": (40, 60, 220),
           "yellow": (235, 220, 40)}  # fmt: skip
TABLES = {"dark": (15, 15, 15), "light": (235, 235, 235)}
QUESTIONS = ("Which colour has the card?", "Is the table dark or light?")
BECAUSE = ("The card is all {}.", "The table looks {}.")
FADED = 0.4
STEPS = {"text": 60, "vision": 220}
BATCH, RATE = 12, 6e-3


class Told(NamedTuple):
    """A picture, which of its two facts is asked for, and the turns about it."""

    shown: Shown
    asks: int
    turns: tuple[str, str, str, str]


def world(count: int, seed: int, faded: float = 0.0) -> Iterator[Told]:
    """So many pictures with their turns."""
    draw = random.Random(seed)
    for _ in range(count):
        facts = draw.choice(list(COLOURS)), draw.choice(list(TABLES))
        asks, noise = draw.randrange(2), np.random.default_rng(draw.getrandbits(32))
        pixels = np.full((56, 56, 3), 128)
        if draw.random() >= faded:
            pixels[:28], pixels[28:] = COLOURS[facts[0]], TABLES[facts[1]]
        pixels = (pixels + noise.integers(-40, 40, pixels.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        because = BECAUSE[asks].format(facts[asks])
        turns = (QUESTIONS[asks], facts[asks], "How do you know?", because)
        yield Told(Shown("", buffer.getvalue()), asks, turns)


def write(folder: Path) -> dict[str, LocalModel]:
    """Both models, taught whatever LLaVAR-2's scores ask of them."""
    writers = {"text": tiny_mllms.write_llama, "vision": tiny_mllms.write_llava}
    return {
        reader: taught(LocalModel(name=str(writer(folder / reader)), device="cpu"), reader)
        for reader, writer in writers.items()
    }


def taught(local: LocalModel, reader: str) -> LocalModel:
    """Train every weight of a model by AdamW, in batches of one kind: with a picture or without."""
    import torch

    torch.manual_seed(0)
    loaded, draw = load(local), random.Random(0)
    network = loaded.network.train().requires_grad_(True)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(0.25)  # they were made for noise that is loud
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.0)
    steps = STEPS[reader]
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    kinds = list(_lessons(loaded, reader).values())
    for _ in range(steps):
        rows = draw.sample(draw.choices(kinds, list(map(len, kinds)))[0], BATCH)
        _loss(loaded, rows).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        slower.step()
    network.eval().requires_grad_(False).save_pretrained(local.name)
    return local


def _lessons(loaded: Any, reader: str) -> Mapping[Any, list[Any]]:
    """Answers as rows of model inputs, as they are scored, by whether there is a picture."""
    row_of = local_probes.rows_of(loaded)
    found: dict[Any, list[Any]] = {}
    for told in world(100, seed=1, faded=FADED):
        for ratio in difficulty.ratios(*told.turns).values():
            for given in ratio:
                if given.reader == reader:
                    row = row_of(difficulty.supplied(given, told.shown))
                    found.setdefault(tuple(row.of_pictures), []).append(row)
    return found


def _loss(loaded: Any, rows: Sequence[Any]) -> Any:
    import torch

    inputs = local_passes.joined(loaded, rows, max(row.length for row in rows))
    logits = loaded.network(**inputs, use_cache=False).logits
    wanted = torch.full(logits.shape[:2], -100)
    for at, row in enumerate(rows):
        wanted[at, -len(row.answer) - 1 : -1] = torch.tensor(row.answer)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
