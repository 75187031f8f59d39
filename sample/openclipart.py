"""Reads the Open Clip Art corpus and says which pictures a model may learn from.

The rule is a hash of the picture's key, so that every script and test agrees without sharing state:
the first share of the hash range is the sample bucket, a thin slice after it is held out as well,
and the rest may be trained on unless its bytes equal an unseen picture's.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

SALT = "pairmill sample 1:"
SAMPLE_SHARE = 0.177
HELD_OUT_SHARE = 0.024

Split = Literal["sample", "held_out", "train"]


@dataclass(frozen=True)
class Picture:
    """One picture of the corpus with what its `.txt` and `.json` say."""

    key: str
    path: str  # the library's own folder and file name, no suffix
    suffix: str  # of the encoded file: png or jpg
    data: bytes
    title: str
    keywords: tuple[str, ...]
    licence: str

    @property
    def folder(self) -> str:
        """The library's folder, a weak class label."""
        return self.path.rpartition("/")[0]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read_corpus(corpus: Path) -> Iterator[Picture]:
    """Yields the pictures of the WebDataset tars under `corpus`, in the order of the tars."""
    for tar_path in sorted(corpus.rglob("*.tar")):
        with tarfile.open(tar_path) as tar:
            members: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                members.setdefault(key, {})[suffix] = tar.extractfile(member).read()
        for key, parts in members.items():
            suffix = next(s for s in ("png", "jpg") if s in parts)
            about = json.loads(parts["json"])
            yield Picture(
                key=key,
                path=about["path"],
                suffix=suffix,
                data=parts[suffix],
                title=parts["txt"].decode(),
                keywords=tuple(about["keywords"]),
                licence=about["license"],
            )


def split_of(key: str) -> Split:
    """Says where a key falls: the hash is uniform, so the shares hold on average."""
    digest = hashlib.sha256((SALT + key).encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < SAMPLE_SHARE:
        return "sample"
    return "held_out" if draw < SAMPLE_SHARE + HELD_OUT_SHARE else "train"


def separate(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Returns (trainable, unseen); a picture whose bytes equal an unseen one's is in neither."""
    unseen = [p for p in pictures if split_of(p.key) != "train"]
    forbidden = {p.sha256 for p in unseen}
    trainable = [p for p in pictures if split_of(p.key) == "train" and p.sha256 not in forbidden]
    return trainable, unseen


def path_words(path: str) -> str:
    """'food/fruit/red_apple_01' -> 'food fruit red apple'."""
    return " ".join(re.findall(r"[^\W\d_]+|\d+", path))


def full_text(picture: Picture) -> str:
    """Title, then path words, then those keywords that were not said yet."""
    said = f"{picture.title} {path_words(picture.path)}"
    known = set(said.lower().split())
    fresh = [k for k in picture.keywords if k.lower() not in known]
    return " ".join([said, *fresh]).strip()


def decode_on_white(data: bytes) -> Image.Image:
    """Decodes to RGB, turned as EXIF says, transparency laid on white."""
    with Image.open(io.BytesIO(data)) as encoded:
        image = ImageOps.exif_transpose(encoded).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
