"""Embedding models: open_clip and timm, by name, from a hub, a folder, a file or `s3://`.

Weights load from safetensors, or by torch with `weights_only=True`; remote code never runs.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from infra import model_files
from infra.canonical import digest, settings
from infra.errors import ConfigError, PairmillError

# Raise it when pixels or text reach a model in another way than before.
VERSION = 1
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Texts whose tokens tell one tokenizer from another.
CANARIES = ("A black-and-white photo, 1 of 2.", "ÜBER: naïve 東京 кот 😀", "a " * 300)


_LOADING = threading.Lock()


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
    architecture: str
    has_text: bool

    def numerics(self, params: ModelParams, device: str, decode: Sequence[int]) -> str:
        """Name of the vectors it gives: equal numerics, comparable vectors.

        `decode` is the decoder's version and the scale it decodes at, that of the largest model.
        """
        return digest(
            {
                "version": VERSION,
                "library": params.library,
                "weights": self.weights,
                "architecture": self.architecture,
                "geometry": [str(value) for value in self.geometry],
                "dtype": DTYPES[device],
                "batch": params.batch,
                "decode": list(decode),
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


def load(params: ModelParams, device: str) -> Model:
    """The model, loaded once per process and again when its files change.

    Raises ConfigError, in one line, where name or weights are not those of a model.
    """
    _check_weights(params)
    with _LOADING:
        return _load(params, device, files(params))


def files(params: ModelParams) -> tuple[tuple[str, int, str], ...]:
    """Name, size and time of a model's files in folders and buckets, to notice a replaced one."""
    places = filter(None, (params.name, params.weights))
    return tuple(stamp for place in places for stamp in model_files.stamps(place))


@lru_cache(maxsize=4)
def _load(params: ModelParams, device: str, _: tuple[tuple[str, int, str], ...]) -> Model:
    import torch

    build = {"open_clip": _open_clip, "timm": _timm}[params.library]
    try:
        network, tokenizer, mean, std, geometry, design = build(params, device)
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
    tokens = tokenizer(list(CANARIES)).tolist() if tokenizer else None
    architecture = digest(settings([design, list(mean), list(std), tokens]))[:20]
    facts = ModelFacts(geometry, dim, _weights_digest(network), architecture, tokenizer is not None)
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (mean, std))
    return Model(params, facts, network, tokenizer, mean, std, device)


# Network, tokenizer, mean, std, geometry, and the settings that make the architecture.
Parts = tuple[Any, Any, Any, Any, Geometry, Any]


def _open_clip(params: ModelParams, device: str) -> Parts:
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
    design = open_clip.get_model_config(name)
    return network, open_clip.get_tokenizer(name), prep["mean"], prep["std"], geometry, design


def _timm(params: ModelParams, device: str) -> Parts:
    import timm
    from timm.data import resolve_model_data_config

    size: dict[str, Any] = {"img_size": params.image_size} if params.image_size else {}
    weights = _file(params.weights)
    if weights and not Path(weights).is_file():
        raise ConfigError(f"models: there is no weights file {weights!r}; correct the path")
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    name = _source(params.name)
    with _nothing_missing(params.name):
        try:
            network: Any = timm.create_model(
                name, pretrained=True, num_classes=0, **size, **overlay
            )
        except TypeError:
            # Convolutional networks take any size and no argument for it.
            network = timm.create_model(name, pretrained=True, num_classes=0, **overlay)
    design = [
        network.pretrained_cfg["architecture"],
        str(getattr(network, "pretrained_model_args", None)),
    ]
    prep = resolve_model_data_config(network)
    side = params.image_size or prep["input_size"][-1]
    mode = {"center": "shortest", "squash": "squash", "border": "longest"}[prep["crop_mode"]]
    geometry = Geometry(side, mode, prep["interpolation"], 255, prep["crop_pct"])
    return network.to(_dtype(device)), None, prep["mean"], prep["std"], geometry, design


class _MissingKeys(logging.Handler):
    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Missing keys"):
            self.said = message


@contextmanager
def _nothing_missing(name: str) -> Iterator[None]:
    """Without a classifier, timm leaves weights that a file lacks random, and only logs it."""
    logger, handler = logging.getLogger("timm.models._builder"), _MissingKeys()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)
    if handler.said:
        raise ConfigError(f"models: the weights of {name!r} are not complete: {handler.said[:200]}")


def _source(name: str) -> str:
    """A model name as the libraries take it: folders and s3:// become `local-dir:`."""
    if name.startswith("s3://"):
        return f"local-dir:{model_files.download(name)}"
    return f"local-dir:{Path(name).resolve()}" if Path(name).is_dir() else name


def _check_weights(params: ModelParams) -> None:
    has_own = Path(params.name).is_dir() or params.name.startswith(("s3://", "hf-hub:"))
    if params.weights and has_own:
        raise ConfigError(
            f"models: {params.name!r} comes with its own weights; leave `weights` out, or give "
            "the architecture's plain name"
        )


def _file(weights: str | None) -> str | None:
    if weights and weights.startswith("s3://"):
        folder, _, name = weights.rpartition("/")
        return str(model_files.download(folder, name) / name)
    return weights


def _weights_digest(network: Any) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        total.update(flat.numpy().tobytes())
    return total.hexdigest()
