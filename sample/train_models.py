"""Trains the sample's two small models from scratch on Open Clip Art, on a few CPU cores.

Neither sees a picture of the sample bucket or of the held-out slice, nor a copy of one.
"""

import argparse
from functools import partial
from pathlib import Path

import clip_training
import dino_training
import torch
from clip_training import both_recalls, train_clip
from dino_training import agreements, features_of, train_dino
from model_files import load_clip, to_pixels, write_clip, write_dino, write_keys
from openclipart import read_corpus, separate

# Pictures are decoded once, a little larger than the models see them, and cropped from there.
STORED_SIZE = 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder with the WebDataset tars")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--only", choices=("clip", "dino"), help="train one of the two")
    parser.add_argument("--clip-start", type=Path, help="weights after the first round: skip it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    trainable, unseen = separate(list(read_corpus(arguments.corpus)))
    write_keys(trainable, arguments.out / "training_keys.txt.gz")
    pixels = to_pixels(trainable, STORED_SIZE)
    unseen_pixels = to_pixels(unseen, clip_training.IMAGE_SIZE)
    if arguments.only != "dino":
        start = load_clip(arguments.clip_start) if arguments.clip_start else None
        rounds = clip_training.ROUNDS[1:] if start else clip_training.ROUNDS
        recalls = partial(both_recalls, pictures=unseen, pixels=unseen_pixels)
        clip = train_clip(trainable, pixels, recalls, rounds, start)
        config, preprocess = clip_training.MODEL_CONFIG, clip_training.PREPROCESS_CONFIG
        write_clip(clip, config, preprocess, arguments.out / "clip")
    if arguments.only != "clip":
        dino = train_dino(
            trainable, pixels, lambda b: agreements(features_of(b, unseen_pixels), unseen)
        )
        write_dino(dino, dino_training.CONFIG, arguments.out / "dino")


if __name__ == "__main__":
    main()
