"""Pictures as an MLLM takes them: resized JPEGs, many to an object of the store, read by range."""

import hashlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra import corpus, images, pins
from infra.canonical import digest
from infra.corpus import Source
from infra.ledger import Ledger
from infra.store import Store

QUALITY = 90


class Place(NamedTuple):
    """Where a prepared picture lies in the store."""

    key: str
    offset: int
    length: int


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
            data = shrink(corpus.fetch(bucket, source), max_pixels)
            rows[image_id] = [joined.tell(), len(data)]
            joined.write(data)
        key = f"pictures/{hashlib.sha256(joined.getvalue()).hexdigest()}.jpegs"
        pins.put(store, key, joined.getvalue())
        record = {"rows": {image_id: [key, *row] for image_id, row in rows.items()}}
        ledger.write("pictures", str(max_pixels), name, record)
    return dict(record["rows"])


def shrink(data: bytes, max_pixels: int) -> bytes:
    """A picture as a JPEG of at most `max_pixels`; one that is small enough keeps its size."""
    header = images.read_header(data, images.MOST_PIXELS)
    scale = min(1.0, math.sqrt(max_pixels / (header.width * header.height)))
    sides = (max(1, int(side * scale)) for side in (header.width, header.height))
    width, height = (min(side, max_pixels) for side in sides)
    picture = images.decode(data, max(1, min(width, height)), images.MOST_PIXELS)
    picture = picture.resize((width, height), images.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
