"""Configs of recipes for tests: the sample's models, a thread pool, a server of answers."""

import runpy
from pathlib import Path
from typing import Any

import yaml

from tests.mllm_server import MllmServer

SAMPLE = Path(__file__).parents[1] / "sample"
EMBEDDERS = {
    "clip": {"library": "open_clip", "name": str(SAMPLE / "models/clip")},
}


def write_corpus(recipe: str, folder: Path) -> Path:
    """The corpus of a recipe as `make recipes` makes it."""
    maker = runpy.run_path(str(SAMPLE / "recipes/make_records.py"))
    found: Path = maker["write"](recipe, folder)
    return found


def write_config(
    folder: Path, recipe: str, corpus: Path, server: MllmServer | None, /, **sections: Any
) -> Path:
    """A config of a recipe; `model` sections are added to that of the server."""
    data: dict[str, Any] = {
        "recipe": recipe,
        "dataset": recipe,
        "corpus": {"uri": str(corpus)},
        "store": {"uri": str(folder / "store")},
        "cluster": {"kind": "threads"},
    }
    if server:
        endpoint = {"url": server.url, "model": "scripted", "backoff_s": 0.01}
        data["model"] = {"endpoint": endpoint, "max_pixels": 4096, **sections.pop("model", {})}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data | sections), "utf-8")
    return path
