"""Pictures as an MLLM takes them: resized JPEGs, many to an object of the store, read by range."""

import hashlib
import io
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from infra import corpus, images, pins, tables
from infra.build import Build
from infra.canonical import digest
from infra.cluster import Crash
from infra.corpus import Source
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.store import Store
from infra.tables import Table

QUALITY = 90
SHARD = 256  # pictures that are prepared when the first of them is wanted
PART = 64  # of them to a worker


class View(NamedTuple):
    """What is shown of an image: all of it, or a box in pixels, perhaps smaller, perhaps as noise.

    Its name is `<image_id>[#crop=l,t,r,b][#pixels=n][#noise]`; that of the whole is the image_id.
    """

    image_id: str
    crop: tuple[int, int, int, int] | None = None
    pixels: int | None = None
    noise: bool = False

    @property
    def name(self) -> str:
        crop = f"#crop={','.join(map(str, self.crop))}" if self.crop else ""
        pixels = f"#pixels={self.pixels}" if self.pixels else ""
        return f"{self.image_id}{crop}{pixels}{'#noise' if self.noise else ''}"

    @classmethod
    def of(cls, name: str) -> "View":
        """The view of a name."""
        image_id, *parts = name.split("#")
        said = dict(part.partition("=")[::2] for part in parts)
        crop = tuple(map(int, said["crop"].split(","))) if "crop" in said else None
        pixels = int(said["pixels"]) if "pixels" in said else None
        return cls(image_id, crop, pixels, "noise" in said)  # type: ignore[arg-type]


class Place(NamedTuple):
    """Where a prepared picture lies in the store."""

    key: str
    offset: int
    length: int


class Lying(NamedTuple):
    """A picture that anybody can read: the store, and the place in it."""

    store: Store
    place: Place

    def read(self) -> bytes:
        return self.store.get(*self.place)


class Prepared:
    """Pictures by the names of their views, made on the pool when the first of a shard is wanted.

    Images are prepared together with those that are used with them: `in_order` of use. Safe for
    threads.
    """

    def __init__(self, build: Build, in_order: Iterable[str], objects: Table, max_pixels: int):
        places = corpus.sources(tables.frame(build.store, objects))
        rows = [(name, places[View.of(name).image_id]) for name in dict.fromkeys(in_order)]
        self._build = build
        self._work = partial(prepare, (build.corpus, build.store, max_pixels))
        self._shards = [tuple(rows[at : at + SHARD]) for at in range(0, len(rows), SHARD)]
        self._shard = {image: at // SHARD for at, (image, _) in enumerate(rows)}
        self._found: dict[int, Future[dict[str, Place]]] = {}
        self._threads = ThreadPoolExecutor(2, "pictures")
        self._lock = threading.Lock()

    def __call__(self, image_id: str) -> bytes:
        """The JPEG of an image. Raises PairmillError where resizing it ended its worker."""
        return self.lying(image_id).read()

    def lying(self, image_id: str) -> Lying:
        """The JPEG of an image as a reference to it. Raises as a call does."""
        at = self._shard[image_id]
        with self._lock:
            for wanted in (at, at + 1):  # the next shard is at work while this one is used
                if wanted < len(self._shards) and wanted not in self._found:
                    self._found[wanted] = self._threads.submit(self._prepare, wanted)
        return Lying(self._build.store, self._found[at].result()[image_id])

    def _prepare(self, at: int) -> dict[str, Place]:
        found: dict[str, Place] = {}
        parts = [self._shards[at][n : n + PART] for n in range(0, len(self._shards[at]), PART)]
        for _, result in self._build.pool.map(self._work, parts):
            if isinstance(result, Crash):
                raise PairmillError(
                    f"resizing pictures ended its worker: {result.reason}; run again"
                )
            found |= {image: Place(*place) for image, place in result.items()}
        return found


def prepare(
    places: tuple[Store, Store, int], wanted: Sequence[tuple[str, Source]]
) -> dict[str, list[Any]]:
    """Write the pictures of (image_id, source) rows as JPEGs of at most `max_pixels`.

    `places` is (corpus, store, max_pixels). Returns Place rows by image_id. The same rows are not
    prepared twice. Raises NotFound, or images.Unreadable, for a picture that changed meanwhile.
    """
    bucket, store, max_pixels = places
    ledger, name = Ledger(store), digest([max_pixels, QUALITY, [row[0] for row in wanted]])
    record = ledger.find("pictures", str(max_pixels), name)
    if record is None:
        joined, rows = io.BytesIO(), {}
        for image_id, source in wanted:
            data = shown(corpus.fetch(bucket, source), View.of(image_id), max_pixels)
            rows[image_id] = [joined.tell(), len(data)]
            joined.write(data)
        key = f"pictures/{hashlib.sha256(joined.getvalue()).hexdigest()}.jpegs"
        pins.put(store, key, joined.getvalue())
        record = {"rows": {image_id: [key, *row] for image_id, row in rows.items()}}
        ledger.write("pictures", str(max_pixels), name, record)
    return dict(record["rows"])


def shown(data: bytes, view: View, max_pixels: int) -> bytes:
    """A view of a picture as a JPEG of at most `max_pixels`, or fewer where the view says so.

    A crop is cut from the picture at its full size; noise has the size that the view would have.
    """
    most = min(max_pixels, view.pixels or max_pixels)
    if view.crop is None and not view.noise:
        return shrink(data, most)
    picture = cut(data, view)
    picture = picture.resize(fitted(*picture.size, most), images.Resampling.LANCZOS)
    if view.noise:
        seed = int(hashlib.sha256(view.name.encode()).hexdigest()[:16], 16)
        shape = (picture.height, picture.width, 3)
        values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        picture = images.Image.fromarray(values)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def cut(data: bytes, view: View) -> images.Image.Image:
    """The part of a picture that a view shows, RGB, at its full size. Raises images.Unreadable."""
    header = images.read_header(data, images.MOST_PIXELS)
    picture = images.decode(data, min(header.width, header.height), images.MOST_PIXELS)
    if view.crop:
        left, top, right, bottom = view.crop
        box = (max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom))
        picture = picture.crop(box)
    return picture


def fitted(width: int, height: int, most: int) -> tuple[int, int]:
    """Width and height at which a picture has at most `most` pixels: its own, or in proportion."""
    scale = min(1.0, math.sqrt(most / (width * height)))
    wide, high = (min(most, max(1, int(side * scale))) for side in (width, height))
    return wide, high


def shrink(data: bytes, max_pixels: int) -> bytes:
    """A picture as a JPEG of at most `max_pixels`; one that is small enough keeps its size."""
    header = images.read_header(data, images.MOST_PIXELS)
    width, height = fitted(header.width, header.height, max_pixels)
    picture = images.decode(data, max(1, min(width, height)), images.MOST_PIXELS)
    picture = picture.resize((width, height), images.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
