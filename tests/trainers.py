"""Files as trainers read them: LLaVA's loader in its own steps, `datasets`, `webdataset`."""

import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image
from webdataset import WebDataset

ROLES = {"human": 0, "gpt": 1}


def llava_entries(file: Path, pictures: Path) -> list[dict[str, Any]]:
    """The entries of a file, each held against what llava/train/train.py (v1.5) wants of it.

    It opens the picture below its folder, puts it where `<image>` stands, takes that many pictures
    as there are places, and wants people and model to speak in turn, people first.
    """
    entries: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
    for entry in entries:
        Image.open(pictures / entry["image"]).convert("RGB")
        turns = entry["conversations"]
        assert [ROLES[turn["from"]] for turn in turns] == [at % 2 for at in range(len(turns))]
        assert len(turns) % 2 == 0
        places = [turn["value"].count("<image>") for turn in turns]
        assert places == [1] + [0] * (len(turns) - 1), entry
        assert turns[0]["value"].startswith("<image>\n")
        assert all(turn["value"].removeprefix("<image>\n").strip() for turn in turns)
    return entries


def rows(files: Path, kind: str = "parquet") -> list[dict[str, Any]]:
    """Rows of files as `datasets` loads them; `files` may be a pattern."""
    cache = files.parent.parent / "cache"
    loaded = load_dataset(kind, data_files=str(files), split="train", cache_dir=str(cache))
    return list(loaded)


def samples(tar: Path) -> list[dict[str, Any]]:
    """Samples of a tar as `webdataset` decodes them: `__key__`, the picture, and `json`."""
    return list(WebDataset(str(tar), shardshuffle=False).decode("pil"))
