"""CPU time from image bytes to model inputs, hashes and facts, stage by stage, on one core.

Beside it, what a user would write: `Image.open().convert("RGB")`, two resizes and imagehash.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import PIL
from PIL import Image

from infra import images

SIDE = 96


def plain(data: bytes) -> None:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for _ in range(2):
        np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    imagehash.phash(image)
    imagehash.dhash(image)


def chain(data: bytes) -> None:
    header = images.read_header(data)
    picture = images.decode(data, SIDE)
    luma = picture.convert("L")
    images.fit(picture, SIDE, "shortest")
    images.fit(picture, SIDE, "squash")
    images.phash(luma)
    images.dhash(luma)
    images.thumbnail(picture)
    images.quality(luma, header)


def stages(files: list[bytes]) -> dict[str, list[Callable[[], object]]]:
    """For each stage, one call per file on inputs already made."""
    headers = [images.read_header(data) for data in files]
    decoded = [images.decode(data, SIDE) for data in files]
    luma = [picture.convert("L") for picture in decoded]
    return {
        "read_header": [lambda data=data: images.read_header(data) for data in files],
        "decode": [lambda data=data: images.decode(data, SIDE) for data in files],
        "fit shortest": [lambda p=p: images.fit(p, SIDE) for p in decoded],
        "fit squash": [lambda p=p: images.fit(p, SIDE, "squash") for p in decoded],
        "luma": [lambda p=p: p.convert("L") for p in decoded],
        "phash": [lambda p=p: images.phash(p) for p in luma],
        "dhash": [lambda p=p: images.dhash(p) for p in luma],
        "thumbnail": [lambda p=p: images.thumbnail(p) for p in decoded],
        "quality": [
            lambda p=p, h=h: images.quality(p, h) for p, h in zip(luma, headers, strict=True)
        ],
        "whole chain": [lambda data=data: chain(data) for data in files],
        "plain Pillow + imagehash": [lambda data=data: plain(data) for data in files],
    }


def milliseconds(calls: list[Callable[[], object]], rounds: int) -> float:
    """CPU milliseconds a call, the best of `rounds` passes."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for call in calls:
            call()
        best = min(best, time.process_time() - start)
    return 1000 * best / len(calls)


def large(files: list[bytes], side: int) -> list[bytes]:
    """Pictures enlarged to `side` px on the long side and stored as JPEG, quality 90."""
    enlarged = []
    for data in files:
        picture = images.decode(data, 10**6)
        scale = side / max(picture.size)
        shape = (round(picture.width * scale), round(picture.height * scale))
        file = io.BytesIO()
        picture.resize(shape, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        enlarged.append(file.getvalue())
    return enlarged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "sample" / "bucket" / "images"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.rglob("*"))
    jpegs = [path.read_bytes() for path in paths if path.suffix == ".jpg"][: arguments.count]
    pngs = [path.read_bytes() for path in paths if path.suffix == ".png"][: arguments.count]
    sets = {"JPEG": jpegs, "PNG": pngs, "JPEG 2048 px": large(jpegs[:20], 2048)}
    columns = {name: stages(files) for name, files in sets.items()}
    print(f"{platform.machine()}, Python {platform.python_version()}, Pillow {PIL.__version__}")
    for name, files in sets.items():
        sizes = [images.read_header(data) for data in files]
        side = sum(max(header.width, header.height) for header in sizes) / len(files)
        weight = sum(map(len, files)) / len(files) / 1000
        print(f"{name}: {len(files)} files, {side:.0f} px long side, {weight:.0f} kB")
    print(f"\n{'CPU ms per image':26}" + "".join(f"{name:>14}" for name in columns))
    for stage in columns["JPEG"]:
        times = [milliseconds(column[stage], arguments.rounds) for column in columns.values()]
        print(f"{stage:26}" + "".join(f"{value:14.3f}" for value in times))


if __name__ == "__main__":
    main()
