"""Publish: write a version, its manifest last, and move `latest` by a conditional write."""

import hashlib
import io
import json
import platform
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import polars as pl
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from infra import changes, corpus, drift, gates, tables
from infra.build import Build
from infra.canonical import canonical, digest, settings
from infra.errors import PairmillError, Refused
from infra.gates import Failed
from infra.hugging_face import FILES, card_metadata
from infra.product import Contents, Product
from infra.store import Conflict, Store
from infra.text import markdown
from infra.versions import (
    complete_numbers,
    read_latest,
    read_manifest,
    refused_folder,
    version_folder,
)

TAR_BYTES = 256 << 20
TEMPLATES = Path(__file__).parent / "templates"
ENTRY = ("dataset", "version", "digest", "config_digest")  # what latest.json holds


class GateParams(BaseModel):
    """What a version must hold before it is published; otherwise the build ends with status 3."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_images: int = Field(0, ge=0, description="Images that survive deduplication and filters.")
    min_records: int = Field(0, ge=0, description="Records.")
    max_drop_images: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the last version's eligible images that may be missing.",
    )
    max_drop_records: float = Field(
        1.0, ge=0, le=1, description="Share of the last version's records that may be missing."
    )
    max_failures: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of pictures that were unreadable, crashed the decoder or vanished.",
    )
    min_band_occupancy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="In every space, the share of its images with a neighbour in the band.",
    )


class PublishParams(BaseModel):
    """What a version consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: bool = Field(
        False,
        description="Also write the pictures, as WebDataset tars; samples with their records.",
    )
    title: str = Field("", max_length=200, description="Title of the dataset card.")
    gates: GateParams = Field(GateParams(), description="Quality gates.")
    keep_versions: int = Field(
        0, ge=0, description="Versions kept, the latest among them; older ones go. 0: all."
    )
    keep_days: int = Field(
        0, ge=0, description="Age in days above which older versions go. 0: no bound."
    )


class Version(NamedTuple):
    """A published version. `fresh` is false where an older one was the same."""

    number: int
    digest: str
    manifest: str
    report: str
    fresh: bool
    counts: dict[str, Any]


def publish(
    build: Build,
    dataset: str,
    contents: Contents,
    described: Mapping[str, Any],
    render_report: Callable[[Mapping[str, Any]], bytes],
    params: PublishParams,
    measure: Callable[[], Mapping[str, Any]] = dict,
    product: Product | None = None,
) -> Version:
    """Publish a version, or name the latest where nothing differs from it. A product is pairs
    unless told otherwise.

    `described` is what the manifest says of the run beyond its files, the config (as allowed to be
    published) above all; `measure` gives more of it and is asked only where there is something to
    publish. Raises Refused at a quality gate, which judges nothing that is published already, and
    PairmillError where another build published meanwhile.
    """
    start, product = time.perf_counter(), product or PAIRS
    rows, fates = (
        tables.frame(build.store, contents.records),
        tables.frame(build.store, contents.fates),
    )
    value = content_digest(rows, fates)
    counts = _counts(rows, fates, contents)
    latest, etag = read_latest(build.store, dataset)
    config_digest = digest(settings(described["config"]))
    if latest and latest["digest"] == value and latest["config_digest"] == config_digest:
        if not build.planning:
            _forget_refusal(build.store, dataset)
        return _named(build, dataset, latest, fresh=False)
    build.begin("publish", {"records": len(rows)})
    last = read_manifest(build.store, dataset, latest["version"]) if latest else None
    manifest: dict[str, Any] = {
        "dataset": dataset,
        "version": None,
        "digest": value,
        "config_digest": config_digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"pairmill": package_version("pairmill"), "python": platform.python_version()},
        "counts": counts,
        **settings({**described, **measure()}),
        "history": drift.history(last),
    }
    manifest["since"] = changes.since(build.store, last, manifest, contents.fates, contents.records)
    if shut := gates.failed(manifest, last, params.gates.model_dump()):
        _refuse(build, manifest, shut, latest, render_report)
    entry = _complete(build.store, dataset, latest, value, config_digest)
    if entry is None:
        manifest["version"] = _claim(build.store, dataset)
        data_files = _data_files(build, rows, fates, contents, params, product)
        card = _card(manifest, params, product.card)
        _write(build, manifest, data_files, card, render_report, start)
        entry = {k: manifest[k] for k in ENTRY}
    named = _move_latest(build.store, dataset, entry, etag)
    _forget_refusal(build.store, dataset)
    return _named(build, dataset, named, fresh=named["version"] == entry["version"])


def _refuse(
    build: Build,
    manifest: dict[str, Any],
    shut: Sequence[Failed],
    latest: Mapping[str, Any] | None,
    render_report: Callable[[Mapping[str, Any]], bytes],
) -> NoReturn:
    """Write why and the report of what would have been, over those of an earlier refusal."""
    said = [f"publish.gates.{s.gate} is {s.bound:g}, this build has {s.said}" for s in shut]
    place = refused_folder(manifest["dataset"])
    number = latest["version"] if latest else None
    why = {k: manifest[k] for k in ("dataset", "created", "digest", "config_digest", "counts")}
    why |= {"latest": number, "reasons": settings([s._asdict() for s in shut])}
    build.store.put(f"{place}/report.html", render_report({**manifest, "refused": said}))
    build.store.put(f"{place}/reason.json", canonical(why))
    still = f"latest still names version {number}" if number else "there is no version yet"
    report = f"{build.store.uri}/{place}/report.html"
    raise Refused(
        f"quality gate {'; '.join(said)}; nothing was published, {still}; report of the refused "
        f"build: {report}",
        said,
        report,
    )


def _forget_refusal(store: Store, dataset: str) -> None:
    """The build that was refused is past: its report shows pictures, which may be forgotten."""
    for stat in list(store.list(refused_folder(dataset) + "/")):
        store.delete(stat.key)


def _write(
    build: Build,
    manifest: dict[str, Any],
    data_files: Iterable[tuple[str, bytes | Path]],
    card: str,
    render_report: Callable[[Mapping[str, Any]], bytes],
    start: float,
) -> None:
    """Write the files of a version, and its manifest with their digests last.

    What publishing cost since `start` is told in the manifest: a plan wants to know.
    """
    folder = version_folder(manifest["dataset"], manifest["version"])
    files = _Files(build.store, folder)
    for name, data in data_files:
        files.put(name, data)
        build.progress("publish", len(files.written), None)
    files.put("README.md", card.encode())
    files.put("report.html", render_report(manifest))
    build.progress("publish", len(files.written), len(files.written))
    spent = settings(round(time.perf_counter() - start, 3))
    manifest["seconds"] = {**manifest.get("seconds", {}), "publish": spent}
    manifest["files"] = files.written
    build.store.put(f"{folder}/manifest.json", canonical(manifest), if_absent=True)


def _complete(
    store: Store, dataset: str, latest: Mapping[str, Any] | None, value: str, config_digest: str
) -> dict[str, Any] | None:
    """A version after the latest that has this content and was never named: its build died."""
    last = latest["version"] if latest else 0
    for number in complete_numbers(store, dataset):
        if number > last:
            manifest = read_manifest(store, dataset, number)
            if (manifest["digest"], manifest["config_digest"]) == (value, config_digest):
                return {k: manifest[k] for k in ENTRY}
    return None


def content_digest(records: pl.DataFrame, fates: pl.DataFrame) -> str:
    """SHA-256 over records and fates, by the canonical form of `tables.digest_columns`.

    Of no rows at all it is the same whatever their columns: a version has no file of them.
    """
    parts = [
        tables.digest_columns(frame.to_arrow()) if frame.height else None
        for frame in (records, fates)
    ]
    return digest(parts)


def _counts(rows: pl.DataFrame, fates: pl.DataFrame, contents: Contents) -> dict[str, Any]:
    by_level: dict[str, dict[str, int]] = {}
    for level, fate, count in (
        fates.group_by("level", "fate").len().sort("level", "fate").iter_rows()
    ):
        by_level.setdefault(level, {})[fate] = count
    return {
        "objects": sum(by_level.get("object", {}).values()),
        "images": contents.images.rows,
        "eligible": contents.eligible.rows,
        "pairs": sum(n for f, n in by_level.get("pair", {}).items() if f != "reverse_kept"),
        "records": len(rows),
        "fates": by_level,
        "splits": dict(Counter(rows["split"].to_list())) if len(rows) else {},
        "licences": dict(Counter(rows["licence"].to_list())) if len(rows) else {},
    }


class _Files:
    """Files of one version and their digests."""

    def __init__(self, store: Store, folder: str):
        self.store, self.folder = store, folder
        self.written: list[dict[str, Any]] = []

    def put(self, name: str, data: bytes | Path) -> None:
        key = f"{self.folder}/{name}"
        if isinstance(data, bytes):
            self.store.put(key, data)
            sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        else:
            self.store.upload(key, data)
            with data.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = data.stat().st_size
        self.written.append({"name": name, "sha256": sha256, "bytes": size})


def _data_files(
    build: Build,
    rows: pl.DataFrame,
    fates: pl.DataFrame,
    contents: Contents,
    params: PublishParams,
    product: Product,
) -> Iterator[tuple[str, bytes | Path]]:
    named = product.images(rows) if len(rows) else ()
    pictures = _pictures(build, {name for name in named if name}, contents)
    for split in ("train", "validation"):
        part = rows.filter(pl.col("split") == split) if rows.height else rows
        if part.height:
            yield f"records/{split}.parquet", _parquet(part)
    yield from product.files(rows)
    yield "images.parquet", _parquet(pictures)
    yield "fates.parquet", _parquet(fates)
    if params.images:
        yield from _tars(build, pictures, contents, product.told(rows))


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), buffer, compression="zstd")
    return buffer.getvalue()


def _images_of_pairs(rows: pl.DataFrame) -> Iterator[str | None]:
    yield from (*rows["query"], *rows["target"])
    for name in ("positives", "negatives"):
        yield from rows[name].explode()


def _pictures(build: Build, named: set[str], contents: Contents) -> pl.DataFrame:
    """What is known of each image that a record names."""
    wanted = pl.DataFrame({"image_id": sorted(named)}, {"image_id": pl.String})
    texts = tables.frame(build.store, contents.eligible).join(
        tables.frame(build.store, contents.captions), on="caption_id", how="left"
    )
    return (
        tables.frame(build.store, contents.images)
        .join(wanted, on="image_id", how="semi")
        .join(
            texts.select("image_id", "clip_score", pl.col("text").alias("caption")),
            on="image_id",
            how="left",
        )
        .sort("image_id")
    )


def _megapairs(rows: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    yield "megapairs.jsonl", b"".join(_json_lines(rows))


def _json_lines(rows: pl.DataFrame) -> Iterator[bytes]:
    """MegaPairs' form: q_img, q_text, t_img, hns; pictures are named by image_id."""
    for row in rows.iter_rows(named=True):
        line = {
            "q_img": row["query"],
            "q_text": row["instructions"],
            "t_img": row["target"],
            "hns": row["negatives"],
            "positives": row["positives"],
            "pair_id": row["pair_id"],
            "ties": row["ties"],
            "captions": [row["query_caption"], row["target_caption"]],
            "sources": [
                [row[f"{side}_key"], row[f"{side}_member"]] for side in ("query", "target")
            ],
            "licence": row["licence"],
            "split": row["split"],
        }
        yield json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _tars(
    build: Build,
    pictures: pl.DataFrame,
    contents: Contents,
    told: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Path]]:
    """The pictures of all records as WebDataset tars: `<image_id>.<type>` and `.json`.

    A tar is a local file until the next one is asked for.
    """
    places = corpus.sources(tables.frame(build.store, contents.objects))
    sides = [told.get(image_id, {}).get("split", "") for image_id in pictures["image_id"]]
    filled = pictures.with_columns(pl.Series("split", sides, pl.String)).with_columns(
        number=(pl.col("bytes").cum_sum().over("split") - pl.col("bytes")) // TAR_BYTES
    )
    for (split, number), part in filled.group_by("split", "number", maintain_order=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{split}{'-' if split else ''}{number:05d}.tar"
            with tarfile.open(path, mode="w") as tar:
                wanted = [places[image_id] for image_id in part["image_id"]]
                read = corpus.ahead(partial(corpus.fetch, build.corpus), wanted, corpus.READ_AHEAD)
                for row, data in zip(part.iter_rows(named=True), read, strict=True):
                    _add_picture(tar, row, data, told.get(row["image_id"], {}))
            yield f"images/{path.name}", path


def _add_picture(
    tar: tarfile.TarFile, row: Mapping[str, Any], data: bytes, told: Mapping[str, Any]
) -> None:
    if hashlib.sha256(data).hexdigest() != row["image_id"]:
        raise PairmillError(
            f"{row['key']} changed while the build ran; run it again to publish the new picture"
        )
    about = {k: row[k] for k in ("key", "member", "caption", "licence", "width", "height")}
    _add(tar, f"{row['image_id']}.{row['format'].lower()}", data)
    _add(tar, f"{row['image_id']}.json", canonical({**about, **settings(told)}))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _card(manifest: Mapping[str, Any], params: PublishParams, template: str = "card.md") -> str:
    """The dataset card, with the metadata block that Hugging Face reads."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {"markdown": markdown, "number": "{:,}".format}
    kind = " pairs" if template == "card.md" else ""
    title = params.title or f"{manifest['dataset']}{kind}"
    splits = manifest["counts"]["splits"]
    return environment.get_template(template).render(
        m=manifest,
        title=title,
        metadata=card_metadata(manifest, title),
        files={s: path for s, path in FILES if splits.get(s)},
        dropped=_dropped,
    )


def _dropped(counts: Mapping[str, int], fates: Iterable[str]) -> str:
    """Counts of fates in words, as a cell of the card."""
    shown = ((fate.replace("_", " "), counts[fate]) for fate in fates if counts.get(fate))
    return ", ".join(f"{count:,} {markdown(name)}" for name, count in shown)


def _claim(store: Store, dataset: str) -> int:
    """Take the next free version number; a number whose build died stays unused."""
    prefix = f"datasets/{dataset}/v"
    taken = {stat.key[len(prefix) :].split("/")[0] for stat in store.list(prefix)}
    number = max((int(name) for name in taken if name.isdigit()), default=0) + 1
    while True:
        try:
            store.put(f"{version_folder(dataset, number)}/claim", b"", if_absent=True)
            return number
        except Conflict:
            number += 1


def _move_latest(
    store: Store, dataset: str, entry: Mapping[str, Any], etag: str | None
) -> Mapping[str, Any]:
    """Make `latest` name an entry; returns what it names, which may be another build's equal."""
    key = f"datasets/{dataset}/latest.json"
    try:
        store.put(key, canonical(dict(entry)), if_match=etag, if_absent=etag is None)
        return entry
    except Conflict:
        now, _ = read_latest(store, dataset)
        if now and all(now[k] == entry[k] for k in ("digest", "config_digest")):
            return now
        raise PairmillError(
            f"another build published version {now['version'] if now else '?'} of {dataset} "
            f"meanwhile; version {entry['version']} is complete but latest does not name it, "
            "run again to publish on top"
        ) from None


def _named(build: Build, dataset: str, entry: Mapping[str, Any], *, fresh: bool) -> Version:
    place = f"{build.store.uri}/{version_folder(dataset, entry['version'])}"
    return Version(
        entry["version"],
        entry["digest"],
        f"{place}/manifest.json",
        f"{place}/report.html",
        fresh,
        read_manifest(build.store, dataset, entry["version"])["counts"],
    )


PAIRS = Product(_images_of_pairs, _megapairs, "card.md")
