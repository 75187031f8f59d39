"""Writes and reads the two models in the folder layouts that open_clip and timm load by themselves.

Weights are float16 on disk; both loaders build a float32 model and cast on loading.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from openclipart import Picture, decode_on_white
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn


def squash(picture: Picture, size: int) -> Image.Image:
    """Resizes to a square, whatever the proportions were."""
    return decode_on_white(picture.data).resize((size, size), Image.Resampling.BICUBIC)


def to_pixels(pictures: list[Picture], size: int) -> Tensor:
    """Decodes into one uint8 tensor (n, 3, size, size)."""
    rows = [np.asarray(squash(picture, size)) for picture in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Casts floating weights to float16 in plain memory order; counters stay integers."""
    return {
        name: (t.half() if t.is_floating_point() else t).contiguous().clone()
        for name, t in state.items()
    }


def write_weights(model: nn.Module, path: Path) -> None:
    save_file(to_half(model.state_dict()), path)
    path.chmod(0o644)  # safetensors leaves files to their owner alone


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_clip(model: nn.Module, model_config: dict, preprocess: dict, folder: Path) -> None:
    """Writes what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads."""
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", config)
    write_weights(model, folder / "open_clip_model.safetensors")


def write_dino(model: nn.Module, config: dict, folder: Path) -> None:
    """Writes what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    write_json(folder / "config.json", config)
    write_weights(model, folder / "model.safetensors")


def load_clip(folder: Path) -> nn.Module:
    model = open_clip.create_model(f"local-dir:{folder.resolve()}", precision="fp32")
    return model.eval().to(memory_format=torch.channels_last)


def load_dino(folder: Path) -> nn.Module:
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True, num_classes=0)
    return model.eval().to(memory_format=torch.channels_last)


def write_keys(pictures: list[Picture], path: Path) -> None:
    """One key a line, gzip without a time stamp so that equal lists are equal files."""
    text = "".join(f"{picture.key}\n" for picture in pictures)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
