"""Embedding models: open_clip and timm, by name, from a hub, a folder, a file or `s3://`.

Weights load from safetensors, or by torch with `weights_only=True`; remote code never runs.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from infra.canonical import digest
from infra.errors import ConfigError, PairmillError
from infra.store import Location, Store, open_store

# Raise it when pixels or text reach a model in another way than before.
VERSION = 1
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model")


class ModelParams(BaseModel):
    """One embedding model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    library: Literal["open_clip", "timm"] = Field(description="Who builds the model.")
    name: str = Field(
        description="`ViT-L-14`, `vit_base_patch14_dinov2.lvd142m`, `hf-hub:owner/repository`, "
        "a folder, or `s3://bucket/folder`."
    )
    weights: str | None = Field(
        None, description="open_clip tag (`openai`), or a weights file, local or `s3://`."
    )
    image_size: int | None = Field(
        None,
        ge=16,
        le=2048,
        description="Side in pixels; empty: the model's own. DINOv2's 518 "
        "costs six times its price at 224.",
    )
    batch: int = Field(64, ge=1, le=8192, description="Images in a forward pass, padded to that.")


class Geometry(NamedTuple):
    """How a decoded picture becomes the square that a model takes."""

    size: int
    mode: str
    interpolation: str
    fill: int
    crop_pct: float


class ModelFacts(NamedTuple):
    """What the driver must know of a model without loading it."""

    geometry: Geometry
    dim: int
    weights: str
    has_text: bool

    def numerics(self, params: ModelParams, device: str, short_side: int) -> str:
        """Name of the vectors it gives: equal numerics, comparable vectors.

        `short_side` is the scale pictures are decoded at, that of the largest model.
        """
        return digest(
            {
                "version": VERSION,
                "library": params.library,
                "weights": self.weights,
                "geometry": [str(value) for value in self.geometry],
                "dtype": DTYPES[device],
                "batch": params.batch,
                "decoded": short_side,
            }
        )[:20]


class Model(NamedTuple):
    """A loaded model on its device."""

    params: ModelParams
    facts: ModelFacts
    network: Any
    tokenizer: Any
    mean: Any
    std: Any
    device: str

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors, float16[n, dim], of pixels, uint8[n, size, size, 3], n <= batch.

        Runs on a batch padded to its fixed size, so that a picture's vector does not depend on
        how many others came with it.
        """
        import torch

        batch = torch.from_numpy(_padded(pixels, self.params.batch)).to(self.device)
        batch = batch.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        batch = ((batch - self.mean) / self.std).to(_dtype(self.device))
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            encode = self.network.encode_image if self.facts.has_text else self.network
            return _unit(encode(batch))[: len(pixels)]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float16[n, dim], of at most `batch` texts, cut to the model's context."""
        import torch

        tokens = _padded(self.tokenizer(list(texts)).numpy(), self.params.batch)
        with torch.inference_mode():
            vectors = self.network.encode_text(torch.from_numpy(tokens).to(self.device))
        return _unit(vectors)[: len(texts)]


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(batch)
    if missing <= 0:
        return np.ascontiguousarray(batch)
    return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])


def _unit(vectors: Any) -> np.ndarray:
    vectors = vectors.float()
    norms = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (vectors / norms).to("cpu").numpy().astype(np.float16)


def _dtype(device: str) -> Any:
    import torch

    return getattr(torch, DTYPES[device])


def choose_device(device: str) -> str:
    """`auto` is cuda where the machine has an NVIDIA device, else cpu."""
    if device != "auto":
        return device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@lru_cache(maxsize=4)
def load(params: ModelParams, device: str) -> Model:
    """The model, loaded once per process.

    Raises ConfigError, in one line, where name or weights are not those of a model.
    """
    import torch

    build = {"open_clip": _open_clip, "timm": _timm}[params.library]
    try:
        network, tokenizer, mean, std, geometry = build(params, device)
    except PairmillError:
        raise
    except Exception as error:
        # Both libraries and the hub raise whatever they meet, down to bare KeyErrors.
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"models: {params.library} can't load {params.name!r}"
            + (f" with weights {params.weights!r}" if params.weights else "")
            + f": {cause}"
        ) from error
    network = network.eval().requires_grad_(False).to(device)
    network = network.to(memory_format=torch.channels_last)
    shape = torch.zeros(1, 3, geometry.size, geometry.size, device=device, dtype=_dtype(device))
    with torch.inference_mode():
        encode = network.encode_image if tokenizer else network
        dim = encode(shape).shape[-1]
    facts = ModelFacts(geometry, dim, _weights_digest(network), tokenizer is not None)
    shaped = [torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (mean, std)]
    return Model(params, facts, network, tokenizer, *shaped, device)


def _open_clip(params: ModelParams, device: str) -> tuple[Any, Any, Any, Any, Geometry]:
    import open_clip

    name = _source(params.name)
    weights = _file(params.weights)
    if weights is None and ":" not in name:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:6])
        raise ConfigError(f"models: open_clip {name!r} needs weights; it knows {tags or 'none'}")
    network = open_clip.create_model(
        name,
        pretrained=weights,
        precision={"cpu": "fp32", "cuda": "bf16"}[device],
        force_image_size=params.image_size,
        require_pretrained=True,
        weights_only=True,
    )
    prep = network.visual.preprocess_cfg
    size = prep["size"] if isinstance(prep["size"], int) else prep["size"][0]
    geometry = Geometry(
        size, prep["resize_mode"], prep["interpolation"], int(prep.get("fill_color", 0)), 1.0
    )
    return network, open_clip.get_tokenizer(name), prep["mean"], prep["std"], geometry


def _timm(params: ModelParams, device: str) -> tuple[Any, Any, Any, Any, Geometry]:
    import timm
    from timm.data import resolve_model_data_config

    size = {"img_size": params.image_size} if params.image_size else {}
    weights = _file(params.weights)
    overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    name = _source(params.name)
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, **size, **overlay)
    except TypeError:
        # Convolutional networks take any size and no argument for it.
        network = timm.create_model(name, pretrained=True, num_classes=0, **overlay)
    prep = resolve_model_data_config(network)
    side = params.image_size or prep["input_size"][-1]
    mode = {"center": "shortest", "squash": "squash", "border": "longest"}[prep["crop_mode"]]
    geometry = Geometry(side, mode, prep["interpolation"], 255, prep["crop_pct"])
    return network.to(_dtype(device)), None, prep["mean"], prep["std"], geometry


def _source(name: str) -> str:
    """A model name as the libraries take it: folders and s3:// become `local-dir:`."""
    if name.startswith("s3://"):
        return f"local-dir:{_download(name)}"
    return f"local-dir:{Path(name).resolve()}" if Path(name).is_dir() else name


def _file(weights: str | None) -> str | None:
    if weights and weights.startswith("s3://"):
        folder, _, name = weights.rpartition("/")
        return str(_download(folder, name) / name)
    return weights


def _download(uri: str, only: str | None = None) -> Path:
    """A folder of model files from a bucket, in the user's cache, whole or not at all."""
    store = open_store(Location(uri=uri))
    stats = [
        s
        for s in store.list()
        if "/" not in s.key and s.key.endswith(MODEL_FILES) and only in (None, s.key)
    ]
    if not stats:
        raise ConfigError(f"models: {uri} holds no model files; name the folder with the weights")
    name = digest([uri, [[s.key, s.etag, s.size] for s in stats]])[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pairmill" / "models"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            _fetch(store, [s.key for s in stats], Path(part) / name)
            try:
                (Path(part) / name).rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def _fetch(store: Store, keys: Sequence[str], folder: Path) -> None:
    folder.mkdir()
    for key in keys:
        size = store.head(key).size
        with (folder / Path(key).name).open("wb") as file:
            for start in range(0, size, 16 << 20):
                file.write(store.get(key, start, min(16 << 20, size - start)))


def _weights_digest(network: Any) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        total.update(flat.numpy().tobytes())
    return total.hexdigest()
