"""Builds of small buckets by the real flow, without Prefect's server: stages run as they are."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.build import stages
from flows.config import load_config, open_build

SAMPLE = Path(__file__).parents[2] / "sample"


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 150 captioned pictures of the sample bucket, with their captions file."""
    folder = tmp_path_factory.mktemp("few") / "bucket"
    with (SAMPLE / "bucket/captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:150]
    for row in rows:
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / "bucket" / row["file_name"], target)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config for a corpus: the sample's models, a thread pool, a store in tmp_path."""

    def write(corpus: Path, /, **sections: Any) -> Path:
        data = {
            "dataset": "few",
            "corpus": {"uri": str(corpus)},
            "store": {"uri": str(tmp_path / "store")},
            "models": {
                "clip": {"library": "open_clip", "name": str(SAMPLE / "models/clip")},
                "dino": {"library": "timm", "name": str(SAMPLE / "models/dino")},
            },
            "spaces": {
                "clip_image": {"model": "clip"},
                "dino": {"model": "dino"},
                "clip_text": {"model": "clip", "of": "caption"},
            },
            "cluster": {"kind": "threads"},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data | sections), "utf-8")
        return path

    return write


@pytest.fixture
def build(config_file: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Builds a corpus and returns what `pairmill run --json` would print."""

    def run(corpus: Path, /, **sections: Any) -> dict[str, Any]:
        config = load_config(config_file(corpus, **sections))
        with open_build(config) as opened:
            return stages(opened, config)

    return run
