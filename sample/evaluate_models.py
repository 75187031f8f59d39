"""Measures the two models on pictures that neither has seen, and how fast they run."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clip_training import IMAGE_SIZE, both_recalls
from dino_training import agreements, features_of, new_backbone, pixel_vectors
from model_files import load_clip, load_dino, to_pixels
from openclipart import Picture, read_corpus, separate
from torch import Tensor

BATCH = 64


def cpu_milliseconds(forward: Callable[[Tensor], Tensor], rounds: int = 12) -> float:
    """CPU time per picture of the fastest of some batches, on one thread in float32."""
    views = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE).to(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        forward(views)
        for _ in range(rounds):
            started = time.process_time()
            forward(views)
            times.append(time.process_time() - started)
    return 1000 * min(times) / BATCH


def speed(forward: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """CPU time a picture, and the rate that two otherwise idle cores would reach with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    milliseconds = cpu_milliseconds(forward)
    torch.set_num_threads(threads)
    return {
        "cpu_ms_per_image": round(milliseconds, 3),
        "images_per_second_two_cores": round(2000 / milliseconds),
    }


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(score, 4) for name, score in scores.items()}


def score_clip(folder: Path, unseen: list[Picture], pixels: Tensor) -> dict:
    """Caption-to-image recall@10 with the chance level, and the image tower's speed."""
    model = load_clip(folder)
    titled = [p.title for p in unseen if p.title]
    return {
        "pictures": len(unseen),
        "recall_at_10": rounded(both_recalls(model, unseen, pixels)),
        "chance": round(10 / len(unseen), 4),
        "queries": {"full_text": len(unseen), "title": len(titled)},
        "distinct_titles": len(set(titled)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tower": speed(model.encode_image),
    }


def score_dino(folder: Path, unseen: list[Picture], pixels: Tensor) -> dict:
    """Folder agreement of nearest neighbours against random weights and raw pixels, and speed."""
    model = load_dino(folder)
    torch.manual_seed(0)
    return {
        "pictures": len(unseen),
        "nearest_neighbour_agreement": {
            "dino": rounded(agreements(features_of(model, pixels), unseen)),
            "random_weights": rounded(agreements(features_of(new_backbone(), pixels), unseen)),
            "raw_pixels": rounded(agreements(pixel_vectors(pixels), unseen)),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tower": speed(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder with the WebDataset tars")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    _, unseen = separate(list(read_corpus(arguments.corpus)))
    pixels = to_pixels(unseen, IMAGE_SIZE)
    scores = {
        "clip": score_clip(arguments.models / "clip", unseen, pixels),
        "dino": score_dino(arguments.models / "dino", unseen, pixels),
    }
    text = json.dumps(scores, indent=2)
    (arguments.models / "scores.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
