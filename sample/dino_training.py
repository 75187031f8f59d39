"""Trains a small image encoder without captions, by self-distillation (DINO, arXiv:2104.14294).

The student must say of any crop what its own running average, the teacher, says of another crop of
the same picture. Centring is by Sinkhorn-Knopp (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193),
which keeps so few pictures from collapsing onto one prototype. A contrastive term between student
and teacher (MoCo v3, arXiv:2104.02057) is added, since it learns sooner and the epochs are few.
"""

import copy
import math
import time
from collections.abc import Callable

import timm
import torch
from augment import GLOBAL_CROP, LOCAL_CROP, MEAN, STD, augment, normalise
from openclipart import Picture
from torch import Tensor, nn
from torch.nn import functional
from training import epoch_order, make_optimizer, move_average, warm_cosine

IMAGE_SIZE = 96
FEATURES = 320
MODEL_ARGS = {"layers": [1, 1, 1, 1], "channels": [40, 80, 160, FEATURES]}
CONFIG = {
    "architecture": "resnet18",
    "num_classes": 0,
    "num_features": FEATURES,
    "global_pool": "avg",
    "model_args": MODEL_ARGS,
    "pretrained_cfg": {
        "architecture": "resnet18",
        "tag": "pairmill_dino",
        "custom_load": False,
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "num_classes": 0,
        "pool_size": [3, 3],
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "cc0-1.0",
    },
}

# Learning at a lower resolution than the features are read at is cheaper and, as objects look
# larger in crops, not worse (arXiv:1906.06423).
GLOBAL_SIZE, LOCAL_SIZE, LOCAL_CROPS = 64, 40, 1
BATCH = 192
STARS_PER_EPOCH = 250
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
PROTOTYPES = 512
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
CONTRAST_TEMPERATURE = 0.15
FIRST_DECAY = 0.99
EPOCHS = 32


class Head(nn.Module):
    """Maps features (n, FEATURES) to unit vectors (n, 128) and their cosines with prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES, 768),
            nn.BatchNorm1d(768),
            nn.GELU(),
            nn.Linear(768, 768),
            nn.BatchNorm1d(768),
            nn.GELU(),
            nn.Linear(768, 128),
        )
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 128))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        points = functional.normalize(self.mlp(features), dim=1)
        return points, points @ functional.normalize(self.prototypes, dim=1).T


class Encoder(nn.Module):
    """A backbone with its training-only head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = new_backbone()
        self.head = Head()

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features = self.backbone(views)
        return self.head(features.float())


def new_backbone() -> nn.Module:
    """The architecture with random weights."""
    model = timm.create_model(CONFIG["architecture"], num_classes=0, **MODEL_ARGS)
    return model.to(memory_format=torch.channels_last)


def balanced(cosines: Tensor, rounds: int = 3) -> Tensor:
    """Sharpens (n, PROTOTYPES) into targets of row sum 1 that use all prototypes alike."""
    shares = torch.exp((cosines - cosines.max()) / TEACHER_TEMPERATURE)
    for _ in range(rounds):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def distance(log_shares: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of predicted with target shares of prototypes (n, PROTOTYPES)."""
    return -(target * log_shares).sum(dim=1).mean()


def contrast(points: Tensor, keys: Tensor) -> Tensor:
    """InfoNCE of student points with teacher keys (n, d) of the same pictures."""
    return functional.cross_entropy(points @ keys.T / CONTRAST_TEMPERATURE, torch.arange(len(keys)))


def self_distillation(student: Encoder, teacher: Encoder, pictures: Tensor) -> Tensor:
    """Loss of one batch: every student view against the teacher's other whole views."""
    whole = [augment(pictures, GLOBAL_SIZE, GLOBAL_CROP) for _ in range(2)]
    parts = [augment(pictures, LOCAL_SIZE, LOCAL_CROP) for _ in range(LOCAL_CROPS)]
    with torch.no_grad():
        keys, cosines = zip(*[teacher(view) for view in whole], strict=True)
        targets = balanced(torch.cat(cosines)).chunk(len(whole))
    losses = []
    for s, view in enumerate(whole + parts):
        points, cosine = student(view)
        log_shares = functional.log_softmax(cosine / STUDENT_TEMPERATURE, dim=1)
        others = [t for t in range(len(whole)) if t != s]
        losses += [distance(log_shares, targets[t]) + contrast(points, keys[t]) for t in others]
    return torch.stack(losses).mean()


@torch.inference_mode()
def features_of(backbone: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 (n, 3, size, size) -> unit vectors (n, d)."""
    backbone.eval()
    parts = [backbone(normalise(p)) for p in pictures.split(64)]
    return functional.normalize(torch.cat(parts).float(), dim=1)


def neighbour_agreement(
    vectors: Tensor, labels: list[str], images: list[str], asked: list[bool] | None = None
) -> float:
    """Share of unit vectors (n, d) whose nearest neighbour has the same label.

    Exact copies, rows of equal `images`, are no neighbours; with `asked`, only rows where it is
    true ask or answer.
    """
    rows = [i for i in range(len(labels)) if asked is None or asked[i]]
    chosen = vectors[rows]
    cosines = chosen @ chosen.T
    codes = {image: code for code, image in enumerate(sorted(set(images)))}
    code = torch.tensor([codes[images[i]] for i in rows])
    cosines[code[:, None] == code[None]] = -math.inf
    nearest = cosines.argmax(dim=1).tolist()
    return sum(labels[rows[a]] == labels[rows[b]] for a, b in enumerate(nearest)) / len(rows)


def agreements(vectors: Tensor, pictures: list[Picture]) -> dict[str, float]:
    """Agreement on the whole folder and on its first part, with and without generated stars."""
    images = [p.sha256 for p in pictures]
    folders = [p.folder for p in pictures]
    tops = [folder.split("/")[0] for folder in folders]
    no_star = [folder != "shapes/stars" for folder in folders]
    return {
        "folder": neighbour_agreement(vectors, folders, images),
        "top_folder": neighbour_agreement(vectors, tops, images),
        "folder_without_stars": neighbour_agreement(vectors, folders, images, no_star),
        "top_folder_without_stars": neighbour_agreement(vectors, tops, images, no_star),
    }


def pixel_vectors(pictures: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> unit vectors of pixels less the mean picture (n, 3 h w)."""
    flat = pictures.flatten(1).float()
    return functional.normalize(flat - flat.mean(dim=0), dim=1)


def train_dino(
    trainable: list[Picture],
    pixels: Tensor,
    report: Callable[[nn.Module], object],
    epochs: int = EPOCHS,
) -> nn.Module:
    """Returns the teacher's backbone; `report` is printed, never chosen by."""
    torch.manual_seed(2)
    is_star = torch.tensor([p.folder == "shapes/stars" for p in trainable])
    student = Encoder()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = make_optimizer(student, LEARNING_RATE, WEIGHT_DECAY)
    steps = epochs * (len(epoch_order(is_star, STARS_PER_EPOCH)) // BATCH)
    step, started = 0, time.monotonic()
    for epoch in range(epochs):
        student.train()
        teacher.train()
        total, batches = 0.0, 0
        for batch in epoch_order(is_star, STARS_PER_EPOCH).split(BATCH):
            if len(batch) < BATCH:
                continue
            share = warm_cosine(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share
            loss = self_distillation(student, teacher, pixels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            decay = 1 - (1 - FIRST_DECAY) * (share if step > steps // 20 else 1.0)
            move_average(teacher, student, decay)
            step, total, batches = step + 1, total + loss.item(), batches + 1
        line = f"dino epoch {epoch + 1} loss {total / batches:.3f}"
        if epoch % 5 == 4 or epoch + 1 == epochs:
            line += f" {report(teacher.backbone)}"
        print(f"{line} {time.monotonic() - started:.0f} s", flush=True)
    return teacher.backbone.eval()
