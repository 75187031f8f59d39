"""Fixtures for every test that runs stages: a build on two folders, and two tiny real models."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from infra.build import Build
from infra.cluster import ClusterParams, Pool, open_pool
from infra.models import ModelParams
from infra.store import Location, open_store

# CI tries the same examples every time; everybody else helps to find new ones.
# Machines are busy, and an example that takes long is no failure.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

SIZE, BATCH = 32, 8
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TIMM_ARGS = {"img_size": SIZE, "embed_dim": 32, "depth": 1, "num_heads": 2}


def write_clip(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A tiny CLIP with random weights, as a folder that open_clip loads."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    network = open_clip.CLIP(**{**CLIP, **config})
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    text = json.dumps({"model_cfg": {**CLIP, **config}, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_timm(folder: Path, seed: int = 0, name: str = "test_vit", **args: Any) -> Path:
    """A tiny network with random weights, as a folder that timm loads."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    args = args or (TIMM_ARGS if name == "test_vit" else {})
    network = timm.create_model(name, pretrained=False, num_classes=0, **args)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": name,
        "num_classes": 0,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm(tmp_path_factory.mktemp("models") / "dino")


@pytest.fixture(scope="session")
def tiny_mllms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models: two that see, of two families, and one that does not."""
    from tests import tiny_mllms

    folder = tmp_path_factory.mktemp("mllms")
    return {name: write(folder / name) for name, write in tiny_mllms.KINDS.items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one core: for models as tiny as these, the others only get in each other's way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(clip_folder: Path, timm_folder: Path) -> dict[str, ModelParams]:
    """Both kinds of model, loaded by the path that real ones take."""
    return {
        "clip": ModelParams(library="open_clip", name=str(clip_folder), batch=BATCH),
        "dino": ModelParams(library="timm", name=str(timm_folder), batch=BATCH),
    }


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with open_pool(ClusterParams(kind="threads", workers=2)) as threads:
        yield threads


@pytest.fixture
def build(tmp_path: Path, pool: Pool) -> Build:
    """A build on an empty corpus and an empty store, both folders, with a pool of threads."""
    return make_build(tmp_path, pool)


def make_build(folder: Path, pool: Pool, **more: Any) -> Build:
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    places = [open_store(Location(uri=str(folder / name))) for name in ("corpus", "store")]
    return Build(*places, pool, **more)
