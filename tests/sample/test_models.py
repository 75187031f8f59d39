"""The sample bucket and its two models are complete, small, loadable and of some use."""

import csv
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

SAMPLE = Path(__file__).parents[2] / "sample"
BUCKET, MODELS = SAMPLE / "bucket", SAMPLE / "models"
CLIP, DINO = MODELS / "clip", MODELS / "dino"


def load_split_rule():
    """Imports the corpus module by its file: the sample's scripts are no installed package."""
    spec = importlib.util.spec_from_file_location("openclipart", SAMPLE / "openclipart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("openclipart", module)
    spec.loader.exec_module(module)
    return module


def rows() -> list[dict[str, str]]:
    with (BUCKET / "captions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def on_white(name: str) -> Image.Image:
    image = Image.open(BUCKET / name).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def stored_names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def clip_model():
    return open_clip.create_model_and_transforms(f"local-dir:{CLIP}", precision="fp32")


@pytest.fixture(scope="module")
def dino_model():
    return timm.create_model(f"local-dir:{DINO}", pretrained=True, num_classes=0).eval()


def described() -> list[dict[str, str]]:
    """Some rows whose words tell the picture apart: no generated stars, no shared captions."""
    captions = [row["caption"] for row in rows()]
    return [row for row in rows() if row["caption"] and captions.count(row["caption"]) == 1][::2]


def views(chosen: list[dict[str, str]], preprocess) -> Tensor:
    return torch.stack([preprocess(on_white(row["file_name"])) for row in chosen])


def test_sizes() -> None:
    assert size_of(BUCKET) <= 20_000_000
    embedders = [f for name in ("clip", "dino") for f in (MODELS / name).rglob("*.safetensors")]
    assert sum(f.stat().st_size for f in embedders) <= 25_000_000


def test_every_object_of_the_bucket_has_a_row_and_a_licence() -> None:
    listed = [row["file_name"] for row in rows()]
    files = [f for f in (BUCKET / "images").rglob("*") if f.is_file()]
    assert sorted(listed) == sorted(f.relative_to(BUCKET).as_posix() for f in files)
    assert len(listed) >= 1100
    assert all(name.isascii() for name in listed)
    assert {row["licence"] for row in rows()} == {"CC0-1.0"}
    assert any(not row["caption"] for row in rows()), "the dirt belongs to the sample"


def test_no_picture_of_the_bucket_was_trained_on() -> None:
    rule = load_split_rule()
    text = gzip.decompress((MODELS / "training_keys.txt.gz").read_bytes()).decode()
    trained = set(text.split())
    sampled = {Path(row["file_name"]).stem for row in rows()}
    assert trained and not trained & sampled
    assert {rule.split_of(key) for key in trained} == {"train"}
    assert {rule.split_of(key) for key in sampled} == {"sample"}


def test_clip_loads_whole(clip_model) -> None:
    model, _, preprocess = clip_model
    assert set(model.state_dict()) == stored_names(CLIP / "open_clip_model.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = json.loads((CLIP / "open_clip_config.json").read_text())
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    image = preprocess(Image.new("RGB", (300, 100), "white"))
    assert image.shape == (3, size, size)
    with torch.inference_mode():
        from_image = model.eval().encode_image(image[None])
        from_text = model.encode_text(tokenizer(["a bat"]))
    expected = (1, config["model_cfg"]["embed_dim"])
    assert from_image.shape == from_text.shape == expected


def test_dino_loads_whole(dino_model) -> None:
    assert set(dino_model.state_dict()) == stored_names(DINO / "model.safetensors")
    config = json.loads((DINO / "config.json").read_text())
    with torch.inference_mode():
        features = dino_model(torch.zeros(2, *config["pretrained_cfg"]["input_size"]))
    assert features.shape == (2, config["num_features"])
    assert config["num_features"] <= 320


def test_both_models_read_pictures_alike(clip_model, dino_model) -> None:
    data = timm.data.resolve_model_data_config(dino_model)
    image = on_white(rows()[0]["file_name"])
    assert torch.allclose(timm.data.create_transform(**data)(image), clip_model[2](image))


def test_clip_finds_pictures_by_their_words(clip_model) -> None:
    model, _, preprocess = clip_model
    chosen = described()[:200]
    texts = [f"{row['caption']} {row['keywords'].replace(';', ' ')}" for row in chosen]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    with torch.inference_mode():
        images = model.eval().encode_image(views(chosen, preprocess), normalize=True)
        scores = model.encode_text(tokenizer(texts), normalize=True) @ images.T
    found = (scores > scores.diagonal()[:, None]).sum(dim=1) < 10
    # Measured 0.37 without the file names that the scores' queries have; chance is 0.05.
    assert found.float().mean() > 0.3


def test_dino_finds_relatives_better_than_pixels(dino_model, clip_model) -> None:
    chosen = [row for row in rows() if "/stars/" not in row["file_name"]][::2]
    folders = [Path(row["file_name"]).parent for row in chosen]
    pixels = views(chosen, clip_model[2])
    with torch.inference_mode():
        features = dino_model(pixels)

    def agreement(vectors: Tensor) -> float:
        unit = functional.normalize(vectors, dim=1)
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(dim=1).tolist()
        return sum(folders[a] == folders[b] for a, b in enumerate(nearest)) / len(folders)

    flat = pixels.flatten(1)
    assert agreement(features) > 1.1 * agreement(flat - flat.mean(dim=0))
