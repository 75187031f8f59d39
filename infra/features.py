"""One read and one decode of an image feed everything: hashes, quality and all model inputs.

What runs on a Dask worker: a shard of sources in, Parquet shards of rows out.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from infra import corpus, growing, images, models, tables, tombstones
from infra.build import Build
from infra.canonical import digest
from infra.captions import Text
from infra.cluster import Crash
from infra.corpus import Bounds, Item, Source
from infra.ledger import Ledger
from infra.models import Geometry, ModelFacts, ModelParams
from infra.schema import SCHEMAS
from infra.store import Store
from infra.tables import Shard, Table
from infra.tombstones import Tombstones

# Pillow warns of broken EXIF and large pictures amid the progress bars; fates say it better.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Raise it when the same bytes give other hashes, quality facts or pixels than before.
DECODE_VERSION = 1


class Limits(NamedTuple):
    """Bounds on a picture, judged from its header before any pixel is decoded."""

    min_side: int
    max_pixels: int
    max_aspect: float

    def rule(self, width: int, height: int) -> tuple[str, int] | None:
        """The fate of a picture of that size and the value that decided, or None."""
        if width * height > self.max_pixels:
            return "too_large", width * height
        if min(width, height) < self.min_side:
            return "too_small", min(width, height)
        if max(width, height) > self.max_aspect * min(width, height):
            return "extreme_aspect", max(width, height) * 1000 // min(width, height)
        return None


class Job(NamedTuple):
    """What every shard of one describe stage shares; it travels with each shard, so it is small."""

    corpus: Store
    store: Store
    family: str
    limits: Limits
    bounds: Bounds
    models: Mapping[str, tuple[ModelParams, ModelFacts, str]]
    device: str
    known: Table | None
    threads: int
    short_side: int
    forgotten: str = ""  # digest of the tombstones that apply


class Shards(NamedTuple):
    """What a shard needs computed: the families (`looks`, model names) its images lack."""

    sources: tuple[Source, ...]
    needs: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return f"{self.sources[0].member or self.sources[0].key}{more}"


class Seen(NamedTuple):
    """One image after its only decode."""

    image_id: str
    header: dict[str, Any]
    look: dict[str, Any] | None
    pixels: dict[Geometry, np.ndarray]


def describe_shard(job: Job, shard: Shards) -> dict[str, Any]:
    """Read, hash, decode and embed a shard; write its rows and, last, its receipt.

    Returns {"tables": {name: shard}, "work": counts}. A shard with a receipt is not done again.
    """
    known = [s.sha256 for s in job.known.shards] if job.known else []
    key = digest([job.family, shard, known, *([job.forgotten] if job.forgotten else [])])
    ledger = Ledger(job.store)
    record = ledger.find("describe", f"{job.family}/receipts", key)
    if record is not None:
        return {**record, "fresh": False}
    record, complete = _describe(job, shard)
    if complete:
        ledger.write("describe", f"{job.family}/receipts", key, record)
    return {**record, "fresh": True}


def _describe(job: Job, shard: Shards) -> tuple[dict[str, Any], bool]:
    """The receipt of a shard, and whether it read all: what vanished may come back."""
    names = ("objects", "forgotten", "headers", "looks")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    embedders = {name: _Embedder(job, name) for name in job.models if name in shard.needs}
    geometries = {job.models[name][1].geometry for name in embedders}
    items = _Items(job, rows["objects"], rows["forgotten"])
    work = Counter[str]()
    for seen in corpus.ahead(
        lambda item: look(item, job.limits, geometries, job.short_side),
        items.new_images(shard),
        job.threads,
    ):
        rows["headers"].append(seen.header)
        if seen.look is None:
            continue
        work["images_decoded"] += 1
        if "looks" in shard.needs or seen.look.get("rule"):
            rows["looks"].append(seen.look)
        if seen.pixels:
            work["images_embedded"] += 1
        for embedder in embedders.values():
            embedder.add(seen)
    items.attach_captions()
    _check_containers(job, shard, rows)
    written = {
        name: tables.write_shard(job.store, pa.Table.from_pylist(part, schema=SCHEMAS[name]))
        for name, part in rows.items()
        if part
    }
    for name, embedder in embedders.items():
        if shard_of := embedder.finish():
            written[f"vectors/{name}"] = shard_of
    complete = all(row["rule"] != "vanished" for row in rows["objects"])
    return {"tables": {n: list(s) for n, s in written.items()}, "work": dict(work)}, complete


def _check_containers(job: Job, shard: Shards, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Members of a container that changed while it was read are left to the next listing."""
    for source in {s.key: s for s in shard.sources if s.kind != "loose"}.values():
        mine = [row for row in rows["objects"] if row["key"] == source.key]
        if not mine or corpus.is_as_listed(job.corpus, source):
            continue
        for name in ("objects", "forgotten"):
            rows[name][:] = [row for row in rows[name] if row["key"] != source.key]
        lost = {"key": source.key, "stamp": source.stamp, "size": source.size, "captions": []}
        lost |= {"rule": "vanished", "detail": "changed while it was read"}
        rows["objects"].append(lost)


class _Items:
    """Notes an object row for every item and passes on the images not seen before.

    Of what was forgotten it notes keyed hashes, and passes nothing on.
    """

    def __init__(self, job: Job, objects: list[dict[str, Any]], forgotten: list[dict[str, Any]]):
        self.job, self.objects, self.forgotten = job, objects, forgotten
        store: Any = job.store
        self.gone = _tombstones(store, job.forgotten) if job.forgotten else Tombstones()
        self.gone_stems: set[tuple[str, str]] = set()
        self.seen: set[str] = set()
        self.texts: dict[tuple[str, str], list[Text]] = {}
        self.stems: list[tuple[str, str]] = []

    def new_images(self, shard: Shards) -> Iterator[tuple[str, bytes]]:
        store: Any = self.job.store
        known = _known(store, self.job.known) if self.job.known else frozenset()
        for item in corpus.read(self.job.corpus, shard.sources, self.job.bounds):
            if item.rule == "sidecar":
                self._note_text(item)
                if item.source.member is None:
                    continue  # a loose sidecar is an object of its own in the listing
            image_id = self._note(item)
            if image_id and image_id not in self.seen and image_id not in known:
                self.seen.add(image_id)
                yield image_id, item.data or b""

    def _note_text(self, item: Item) -> None:
        where = item.source.key if item.source.member is not None else ""
        self.texts.setdefault((where, item.stem), []).append(item.text)

    def _note(self, item: Item) -> str | None:
        source, rule, detail = item.source, item.rule, item.detail
        if rule == "sidecar":
            rule, detail = "metadata", item.text.refused
        image_id = hashlib.sha256(item.data).hexdigest() if item.data and not rule else None
        if item.data == b"" and not rule:
            rule, detail = "unreadable", "empty"
        where = source.key if source.kind != "loose" else ""
        if image_id and self.gone.has_image(image_id):
            place = (source.key, source.member, source.stamp)
            self.forgotten.append(growing.forgotten_row(*place, image_id, self.gone))
            self.gone_stems.add((where, item.stem))
            return None
        self.objects.append(
            {
                "key": source.key,
                "member": source.member,
                "stamp": source.stamp,
                "offset": source.offset,
                "size": source.size,
                "image_id": image_id,
                "captions": list(item.text.captions),
                "licence": item.text.licence,
                "rule": rule,
                "detail": detail or item.text.refused,
            }
        )
        self.stems.append((where, item.stem))
        return image_id

    def attach_captions(self) -> None:
        """Give images the texts of their sidecars, which may stand anywhere in a container."""
        self._forget_captions()
        for row, stem in zip(self.objects, self.stems, strict=True):
            for text in self.texts.get(stem, ()) if row["image_id"] else ():
                row["captions"] = sorted({*row["captions"], *text.captions})
                row["licence"] = row["licence"] or text.licence
                row["detail"] = row["detail"] or text.refused

    def _forget_captions(self) -> None:
        """A sidecar within a container goes with its picture, unless another has its stem."""
        rows = list(zip(self.objects, self.stems, strict=True))
        dead = self.gone_stems - {stem for row, stem in rows if row["image_id"]}
        if not dead:
            return
        kept = [(r, s) for r, s in rows if s not in dead or r["rule"] != "metadata"]
        for row in (r for r, s in rows if s in dead and r["rule"] == "metadata"):
            place = (row["key"], row["member"], row["stamp"])
            self.forgotten.append(growing.forgotten_row(*place, None, self.gone))
        self.objects[:] = [row for row, _ in kept]
        self.stems = [stem for _, stem in kept]


@lru_cache(maxsize=2)
def _tombstones(store: Any, digest: str) -> Tombstones:
    """What is forgotten, read once a process for each set of tombstones."""
    return tombstones.load(store)


@lru_cache(maxsize=2)
def _known(store: Any, table: Table) -> frozenset[str]:
    return frozenset(tables.read(store, table)["image_id"].to_pylist())


def look(
    item: tuple[str, bytes], limits: Limits, geometries: Iterable[Geometry], short_side: int
) -> Seen:
    """Header, then limits, then one decode: hashes, thumbnail, quality, and model inputs."""
    image_id, data = item
    header: dict[str, Any] = {"image_id": image_id, "bytes": len(data)}
    try:
        facts = images.read_header(data, images.MOST_PIXELS)
    except images.Unreadable as error:
        rule = "too_large" if error.rule == "too_large" else "unreadable"
        return Seen(image_id, header | {"rule": rule, "detail": str(error)[:200]}, None, {})
    header |= {
        "format": facts.format,
        "width": facts.width,
        "height": facts.height,
        "frames": facts.frames,
    }
    if limits.rule(facts.width, facts.height):
        return Seen(image_id, header, None, {})
    try:
        picture = images.decode(data, short_side, limits.max_pixels)
    except images.Unreadable as error:
        broken = {"image_id": image_id, "rule": "unreadable", "detail": str(error)[:200]}
        return Seen(image_id, header, broken, {})
    luma = picture.convert("L")
    quality = images.quality(luma, facts)
    row: dict[str, Any] = {
        "image_id": image_id,
        "phash": images.phash(luma),
        "dhash": images.dhash(luma),
        "thumbnail": images.thumbnail(picture).tobytes(),
        "contrast": quality.contrast,
        "sharpness": quality.sharpness,
        "entropy": quality.entropy,
        "informative": quality.informative,
    }
    return Seen(image_id, header, row, {g: square(picture, g) for g in geometries})


def square(picture: Any, geometry: Geometry) -> np.ndarray:
    """A decoded picture as a model's input, uint8 [size, size, 3]."""
    resize = math.floor(geometry.size / geometry.crop_pct)
    return images.fit(
        picture,
        geometry.size,
        geometry.mode,  # type: ignore[arg-type]
        geometry.interpolation,
        geometry.fill,
        resize if geometry.mode == "shortest" else None,
    )


class _Embedder:
    """Collects pixels into full batches of one model and writes the vectors."""

    def __init__(self, job: Job, name: str):
        self.store = job.store
        params, facts, _ = job.models[name]
        self.facts = facts
        self.model = load_checked(params, job.device, facts)
        self.ids: list[str] = []
        self.pixels: list[np.ndarray] = []
        self.vectors: list[np.ndarray] = []

    def add(self, seen: Seen) -> None:
        if not seen.pixels:
            return
        self.ids.append(seen.image_id)
        self.pixels.append(seen.pixels[self.facts.geometry])
        if len(self.pixels) == self.model.params.batch:
            self._flush()

    def _flush(self) -> None:
        self.vectors.append(self.model.embed_images(np.stack(self.pixels)))
        self.pixels.clear()

    def finish(self) -> Shard | None:
        if self.pixels:
            self._flush()
        if not self.vectors:
            return None
        rows = tables.vector_rows("image_id", self.ids, np.concatenate(self.vectors))
        return tables.write_shard(self.store, rows)


def load_checked(params: ModelParams, device: str, facts: ModelFacts) -> models.Model:
    """The model. Raises ConfigError where its weights are not those the driver saw."""
    model = models.load(params, device)
    if model.facts != facts:
        raise models.ConfigError(
            f"models: the weights of {params.name!r} are not those this store was built with "
            f"({model.facts.weights[:12]}, not {facts.weights[:12]}); pin the weights file"
        )
    return model


def model_facts(params: ModelParams, device: str) -> ModelFacts:
    """Load a model on a worker and say what it is."""
    return models.load(params, device).facts


def facts_of(build: Build, params: ModelParams, device: str) -> ModelFacts:
    """Facts of a model, asked of a worker the first time a store meets it.

    Raises ConfigError for a model that can't be loaded.
    """
    spec = digest([params.model_dump(mode="json", exclude={"batch"}), device, models.files(params)])
    record = build.ledger.find("models", device, spec)
    if record is None:
        build.begin("load models", {"model": params.name})
        load = partial(model_facts, device=device)
        (_, found), *_ = build.pool.map(load, [params], resources=resources(device))
        if isinstance(found, Crash):
            raise RuntimeError(f"loading {params.name} ended its worker: {found.reason}")
        size, mode, interpolation, fill, crop = found.geometry
        record = {
            "geometry": [size, mode, interpolation, fill, repr(crop)],
            "model": list(found[1:]),
        }
        build.ledger.write("models", device, spec, record)
    size, mode, interpolation, fill, crop = record["geometry"]
    geometry = Geometry(size, mode, interpolation, fill, float(crop))
    return ModelFacts(geometry, *record["model"])


def resources(device: str) -> dict[str, float] | None:
    """What a worker must have to run a model."""
    return {"GPU": 1.0} if device == "cuda" else None


def embed_captions(job: Job, name: str, shard: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Embed (caption_id, text) rows with the text tower of model `name`, with a receipt."""
    params, facts, numerics = job.models[name]
    ledger = Ledger(job.store)
    key = digest(["captions", numerics, [row[0] for row in shard]])
    record = ledger.find("describe", f"{job.family}/receipts", key)
    if record is None:
        model = load_checked(params, job.device, facts)
        parts = [shard[at : at + params.batch] for at in range(0, len(shard), params.batch)]
        vectors = np.concatenate([model.embed_texts([text for _, text in p]) for p in parts])
        rows = tables.vector_rows("caption_id", [row[0] for row in shard], vectors)
        record = {"tables": {f"texts/{name}": list(tables.write_shard(job.store, rows))}}
        ledger.write("describe", f"{job.family}/receipts", key, record)
    return dict(record)


def embed_texts(
    place: tuple[Store, ModelParams, ModelFacts, str], texts: Sequence[str]
) -> list[Any]:
    """Embed texts with a model's text tower, for once: vectors by number, as the row of a shard.

    `place` is (store, params, facts, device).
    """
    store, params, facts, device = place
    model = load_checked(params, device, facts)
    parts = [texts[at : at + params.batch] for at in range(0, len(texts), params.batch)]
    vectors = np.concatenate([model.embed_texts(part) for part in parts])
    rows = tables.vector_rows("caption_id", [str(at) for at in range(len(texts))], vectors)
    return list(tables.write_shard(store, rows))
