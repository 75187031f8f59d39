"""Likelihoods of given answers in process: how many a second, by the rows of a pass.

    PYTHONPATH=. python benchmarks/bench_likelihoods.py [--vision MODEL] [--text MODEL]

The nine likelihoods of each sample that LLaVAR-2's scores take, for pictures drawn on the spot and
answers of 3 to 40 words. On a CPU every answer is alone in its pass, whatever `rows` allows; on a
GPU no bit should hang on companions, and this says whether one did. Without models of your own they
are tiny, with random weights, and the time is that of calling them.
"""

import argparse
import io
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from infra import difficulty
from infra.difficulty import Given
from infra.local_mllm import LocalModel, Shown, load
from infra.local_probes import Likelihood, log_probs
from tests import tiny_mllms
from tests.pictures import scene

WORDS = ("red", "leaf", "table", "sign", "open", "daily", "green", "card", "number", "twelve")


def samples(count: int, side: int) -> Iterator[tuple[Shown, dict[str, difficulty.Ratio]]]:
    """A picture and the ratios of a pair of turns about it."""
    draw = random.Random(0)
    for at in range(count):
        buffer = io.BytesIO()
        scene(side, side * 3 // 4, at).save(buffer, "JPEG")
        turns = (" ".join(draw.choices(WORDS, k=n)) for n in (8, draw.randint(3, 8), 8, 40))
        yield Shown("", buffer.getvalue()), difficulty.ratios(*turns)


def scored(local: LocalModel, asked: list[tuple[Given, Shown]]) -> tuple[float, list[bytes]]:
    """Answers a second, and their bits."""
    supplied = [difficulty.supplied(given, shown) for given, shown in asked]
    log_probs(local, supplied[:2])
    start = time.perf_counter()
    found = log_probs(local, supplied)
    spent = time.perf_counter() - start
    return len(asked) / spent, [f.nll.tobytes() for f in found if isinstance(f, Likelihood)]


def measured(models: Mapping[str, str], count: int, side: int, seed: int = 0) -> None:
    pairs = list(samples(count, side))
    for reader, name in models.items():
        given = {g: shown for shown, found in pairs for ratio in found.values() for g in ratio}
        asked = [(g, shown) for g, shown in given.items() if g.reader == reader]
        for rows in (1, 4, 8, 16):
            local = LocalModel(name=name, batch_size=rows)
            speed, bits = scored(local, asked)
            mixed = random.Random(seed).sample(range(len(asked)), len(asked))
            _, again = scored(local, [asked[at] for at in mixed])
            same = all(again[to] == bits[at] for to, at in enumerate(mixed))
            about = f"{load(local).device:5} {speed:10.1f} a second"
            print(f"{reader:7} {rows:3} rows  {about}  bits {'the same' if same else 'OTHER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", help="default: a tiny LLaVA")
    parser.add_argument("--text", help="default: a tiny Llama")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--side", type=int, default=640, help="width of the pictures, pixels")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"text": "blind", "vision": "llava"}
        models = {
            reader: getattr(options, reader) or str(tiny_mllms.KINDS[kind](Path(folder) / kind))
            for reader, kind in tiny.items()
        }
        measured(models, options.samples, options.side)


if __name__ == "__main__":
    main()
