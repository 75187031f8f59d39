"""Trains a small CLIP (arXiv:2103.00020) from scratch on pictures and words about them."""

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
from augment import (
    CLIP_AUGMENTATION,
    CLIP_AUGMENTATION_LATER,
    MEAN,
    STD,
    Augmentation,
    augment,
    normalise,
)
from openclipart import Picture, full_text, path_words
from torch import Tensor, nn
from torch.nn import functional
from training import epoch_order, make_optimizer, move_average, warm_cosine

IMAGE_SIZE = 96
EMBED_DIM = 192
CONTEXT_LENGTH = 40

MODEL_CONFIG = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {
        "timm_model_name": "mobilenetv4_conv_small",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "",
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 49408,
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS_CONFIG = {
    "mean": [MEAN] * 3,
    "std": [STD] * 3,
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "fill_color": 255,
}

WEIGHT_DECAY = 0.1
LARGEST_SCALE = 60.0
AVERAGE_DECAY = 0.998


@dataclass(frozen=True)
class Round:
    """One cosine of the learning rate; the next starts from the average (arXiv:1608.03983)."""

    epochs: int
    batch: int
    learning_rate: float
    augmentation: Augmentation
    stars: int  # of the near-identical generated ones, an epoch


ROUNDS = (
    Round(50, 192, 1.2e-3, CLIP_AUGMENTATION, 250),
    Round(32, 256, 8e-4, CLIP_AUGMENTATION_LATER, 500),
)


@dataclass(frozen=True)
class Words:
    """BPE tokens of what is said about a picture, word by word."""

    title: list[list[int]]
    keywords: list[list[int]]
    path: list[list[int]]
    title_is_common: bool


def split_words(pictures: list[Picture], tokenizer: open_clip.SimpleTokenizer) -> list[Words]:
    """Tokenises word by word, so that words can be left out without tokenising again."""
    encode = tokenizer.encode
    counts = Counter(p.title for p in pictures)
    return [
        Words(
            title=[encode(word) for word in p.title.split()],
            keywords=[encode(word) for word in p.keywords],
            path=[encode(word) for word in path_words(p.path).split()],
            title_is_common=counts[p.title] > 5,
        )
        for p in pictures
    ]


def some(words: list[list[int]], share: float, rng: random.Random) -> list[list[int]]:
    """Keeps each word with probability `share`, in order."""
    return [word for word in words if rng.random() < share]


def draw_text(words: Words, rng: random.Random) -> list[int]:
    """Draws one way of describing the picture: title, path words and keywords, or fewer of them."""
    draw = rng.random()
    if draw < 0.2 and words.title and not words.title_is_common:
        chosen = some(words.title, 0.9, rng)
    elif draw < 0.3:
        chosen = some(words.path, 0.8, rng) + some(words.keywords, 0.5, rng)
    else:
        title = some(words.title, 0.9, rng) if rng.random() < 0.85 else []
        chosen = title + some(words.path, 0.85, rng) + some(words.keywords, 0.75, rng)
    return [token for word in chosen or words.path for token in word]


def pad_tokens(texts: list[list[int]], tokenizer: open_clip.SimpleTokenizer) -> Tensor:
    """Adds start and end marks; returns (n, CONTEXT_LENGTH)."""
    tokens = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        kept = text[: CONTEXT_LENGTH - 2]
        full = [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]
        tokens[row, : len(full)] = torch.tensor(full)
    return tokens


def contrast(images: Tensor, texts: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE both ways over unit vectors (n, d); pairs saying the same are no negatives."""
    logits = scale * images @ texts.T
    same = (tokens[:, None] == tokens[None]).all(dim=2)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -math.inf)
    target = torch.arange(len(images))
    by_image = functional.cross_entropy(logits, target)
    return (by_image + functional.cross_entropy(logits.T, target)) / 2


def recall(images: Tensor, texts: Tensor, rows: Tensor, at: int = 10) -> float:
    """Share of texts (m, d) whose own picture, `rows` (m,) of (n, d), is in the first `at`."""
    scores = texts @ images.T
    own = scores.gather(1, rows[:, None])
    return ((scores > own).sum(dim=1) < at).float().mean().item()


@torch.inference_mode()
def embed_pictures(model: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 (n, 3, size, size) -> unit vectors (n, d)."""
    model.eval()
    parts = [model.encode_image(normalise(p), normalize=True) for p in pictures.split(64)]
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, CONTEXT_LENGTH) -> unit vectors (n, d)."""
    model.eval()
    return torch.cat([model.encode_text(t, normalize=True) for t in tokens.split(64)])


def both_recalls(model: nn.Module, pictures: list[Picture], pixels: Tensor) -> dict[str, float]:
    """Caption-to-image recall@10 by title, path words and keywords, and by title alone."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    images = embed_pictures(model, pixels)
    everything = embed_texts(model, tokenizer([full_text(p) for p in pictures]))
    titled = torch.tensor([i for i, p in enumerate(pictures) if p.title])
    titles = embed_texts(model, tokenizer([pictures[i].title for i in titled]))
    return {
        "full_text": recall(images, everything, torch.arange(len(pictures))),
        "title": recall(images, titles, titled),
    }


def train_epoch(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    this: Round,
    first_step: int,
) -> float:
    """Learns from (uint8 pictures, tokens) batches; returns the mean loss."""
    model.train()
    total = 0.0
    for step, (pictures, tokens) in enumerate(batches, start=first_step):
        for group in optimizer.param_groups:
            group["lr"] = this.learning_rate * warm_cosine(step, this.epochs * len(batches))
        views = augment(pictures, IMAGE_SIZE, this.augmentation)
        images, texts, scale = model(views, tokens)[:3]
        loss = contrast(images, texts, tokens, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        move_average(average, model, min(AVERAGE_DECAY, step / (step + 10)))
        total += loss.item()
    return total / len(batches)


def train_clip(
    trainable: list[Picture],
    pixels: Tensor,
    report: Callable[[nn.Module], object],
    rounds: Sequence[Round] = ROUNDS,
    start: nn.Module | None = None,
) -> nn.Module:
    """Returns the running average of the weights; `report` is printed, never chosen by."""
    torch.manual_seed(1)
    rng = random.Random(1)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    words = split_words(trainable, tokenizer)
    is_star = torch.tensor([p.folder == "shapes/stars" for p in trainable])
    average = start or open_clip.CLIP(**copy.deepcopy(MODEL_CONFIG))
    started = time.monotonic()
    for this in rounds:
        model = copy.deepcopy(average).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, this.learning_rate, WEIGHT_DECAY)
        for epoch in range(this.epochs):
            rows = epoch_order(is_star, this.stars).split(this.batch)[:-1]
            batches = [
                (pixels[b], pad_tokens([draw_text(words[i], rng) for i in b.tolist()], tokenizer))
                for b in rows
            ]
            first_step = epoch * len(batches)
            loss = train_epoch(model, average, optimizer, batches, this, first_step)
            line = f"clip epoch {epoch + 1} loss {loss:.3f}"
            if epoch % 10 == 9 or epoch + 1 == this.epochs:
                line += f" {report(average)}"
            print(f"{line} {time.monotonic() - started:.0f} s", flush=True)
    return average.eval()
