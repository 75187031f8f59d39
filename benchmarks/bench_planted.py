"""Planted copies of photographs: how many are found as near-duplicates, how many finds are right.

python benchmarks/bench_planted.py PHOTO_FOLDER...

Every photograph counts once as a whole, at 1,000 px at most; those with a short side of 700 px or
more are also cut into rows of non-overlapping tiles, 288 to 560 px high, whose sizes are drawn by
the file's name. So tiles of one photograph share light, colours and out-of-focus background, which
makes false pairs likelier than among unrelated photographs. Pictures without detail (a blurred
wall, plain sky: `images.quality(...).informative` is false) are left out and counted.

The figures in the README: 74 photographs out of the Debian packages gnome-backgrounds,
mate-backgrounds, plasma-workspace-wallpapers, lomiri-wallpapers-*, lxqt-themes, palapeli-data,
hugin-data and opencv-doc.
"""

import argparse
import os
import platform
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from infra import hamming, images, likeness

SHORT_SIDE = 96
ISSUE_CROP = "crop 3 % at every side"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def pictures(path: Path) -> Iterator[Image.Image]:
    """The photograph as a whole, then its tiles."""
    photograph = Image.open(path).convert("RGB")
    whole = photograph.copy()
    whole.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    yield whole
    width, height = photograph.size
    if min(width, height) < 700:
        return
    draw = random.Random(path.name)
    top = 0
    while top + (side := draw.choice((288, 320, 360, 400, 480, 560))) <= height:
        left = 0
        while left + (across := int(side * draw.choice((0.75, 1, 1.33, 1.5)))) <= width:
            yield photograph.crop((left, top, left + across, top + side))
            left += across
        top += side


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 90} | options)
    return buffer.getvalue()


def copies(picture: Image.Image) -> dict[str, bytes]:
    """A picture as JPEG and its copies; a crop of 3 % is taken in four ways, told apart."""
    original = encoded(picture, quality=92)
    image = Image.open(BytesIO(original)).convert("RGB")
    width, height = image.size
    thumb = image.copy()
    thumb.thumbnail((128, 128), Image.Resampling.LANCZOS)
    x, y = round(width * 0.03), round(height * 0.03)
    return {
        "original": original,
        "byte copy": original,
        "quality 50": encoded(image, quality=50),
        "halved": encoded(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
        "thumbnail PNG": encoded(thumb, format="PNG"),
        "brighter 12 %": encoded(ImageEnhance.Brightness(image).enhance(1.12)),
        "crop 3 % of width, height": encoded(
            image.crop((x // 2, y // 2, width - (x - x // 2), height - (y - y // 2)))
        ),
        "crop 3 % at top left": encoded(image.crop((x, y, width, height))),
        "crop 3 % at the bottom": encoded(image.crop((0, 0, width, height - y))),
        "crop 3 % at every side": encoded(image.crop((x, y, width - x, height - y))),
    }


class Facts(NamedTuple):
    phash: int
    thumbnail: np.ndarray
    pixels: int
    informative: bool


def facts(data: bytes) -> Facts:
    header, image = images.read_header(data), images.decode(data, SHORT_SIDE)
    informative = images.quality(image, header).informative
    pixels = header.width * header.height
    return Facts(images.phash(image), images.thumbnail(image), pixels, informative)


def described(path: Path) -> list[dict[str, Facts]]:
    return [{k: facts(v) for k, v in copies(p).items()} for p in pictures(path)]


class Planted(NamedTuple):
    """All images, each picture's original first and its copies behind it."""

    picture: np.ndarray
    kind: np.ndarray
    phash: np.ndarray
    thumbnail: np.ndarray
    pixels: np.ndarray


def planted(folders: list[Path], workers: int) -> Planted:
    found = (p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    paths = sorted((p for p in found if p.is_file()), key=lambda p: (-p.stat().st_size, p.name))
    with ProcessPoolExecutor(workers) as pool:
        every = [rows for part in pool.map(described, paths) for rows in part]
    kept = [rows for rows in every if rows["original"].informative]
    print(f"{len(paths)} photographs, {len(every)} pictures, {len(kept)} of them with detail")
    flat = [(n, kind, row) for n, rows in enumerate(kept) for kind, row in rows.items()]
    return Planted(
        np.array([n for n, _, _ in flat]),
        np.array([kind for _, kind, _ in flat]),
        np.array([row.phash for _, _, row in flat], dtype=np.uint64),
        np.array([row.thumbnail for _, _, row in flat]),
        np.array([row.pixels for _, _, row in flat]),
    )


def by_phash(images: Planted, radius: int) -> np.ndarray:
    """All pairs (i < j) within `radius`, int64 [2, m]."""
    pairs = [np.stack([i, j]) for i, j, _ in hamming.pairs_within(images.phash, radius)]
    return np.concatenate(pairs, axis=1)


def by_likeness(images: Planted) -> np.ndarray:
    columns = likeness.hashes(images.phash, images.thumbnail)
    pairs = []
    for i, k, _ in hamming.matches(columns[:, 0], columns.reshape(-1), likeness.RADIUS):
        j = k // columns.shape[1]
        pairs.append(np.stack([np.minimum(i, j), np.maximum(i, j)])[:, i != j])
    i, j = np.unique(np.concatenate(pairs, axis=1), axis=1)
    return np.stack([i, j])[:, likeness.alike(images.thumbnail, i, j)]


def tied(images: Planted) -> np.ndarray:
    """The picture of every image's survivor, biggest images first."""
    order = np.lexsort((np.arange(len(images.pixels)), -images.pixels))
    columns, thumbs = (
        likeness.hashes(images.phash, images.thumbnail)[order],
        images.thumbnail[order],
    )
    owner = hamming.survivors(columns, lambda i, j: likeness.alike(thumbs, i, j), likeness.RADIUS)
    survivor = np.empty(len(order), dtype=np.int64)
    survivor[order] = order[owner]
    return survivor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}")
    images = planted(options.folders, options.workers)
    start = time.process_time()
    ways = {"pairmill": by_likeness(images)}
    print(
        f"pairmill: {time.process_time() - start:.1f} s of one core for {len(images.kind)} images"
    )
    ways |= {f"pHash <= {radius}": by_phash(images, radius) for radius in (10, 16)}
    first = np.searchsorted(images.picture, images.picture)
    found = {}
    for way, (i, j) in ways.items():
        found[way] = np.zeros(len(images.kind), dtype=np.bool_)
        found[way][j[i == first[j]]] = True
    print(f"{'found with the original':28s}" + "".join(f"{way:>14s}" for way in ways))
    kinds = [kind for kind in dict.fromkeys(images.kind) if kind != "original"]
    for kind in kinds:
        shares = [found[way][images.kind == kind].mean() for way in ways]
        print(f"{kind:28s}" + "".join(f"{share:14.4f}" for share in shares))
    asked = [k for k in kinds if not k.startswith("crop") or k == ISSUE_CROP]
    shares = [np.mean([found[way][images.kind == kind].mean() for kind in asked]) for way in ways]
    print(f"{'six kinds, 3 % at every side':28s}" + "".join(f"{share:14.4f}" for share in shares))
    shares = [found[way][images.kind != "original"].mean() for way in ways]
    print(f"{'all nine':28s}" + "".join(f"{share:14.4f}" for share in shares))
    right = [(images.picture[i] == images.picture[j]) for i, j in ways.values()]
    print(f"{'pairs that are right':28s}" + "".join(f"{same.mean():14.4f}" for same in right))
    print(f"{'false pairs':28s}" + "".join(f"{(~same).sum():14,}" for same in right))
    survivor = tied(images)
    copy = (images.kind != "original") & (survivor != np.arange(len(survivor)))
    same = images.picture[survivor[copy]] == images.picture[copy]
    print(f"survivors: {copy.sum():,} copies dropped, {same.mean():.4f} rightly")


if __name__ == "__main__":
    main()
