"""Questions to a published version: where its report is, and why something is in it or not."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from flows.config import load_config
from infra.errors import ConfigError, PairmillError
from infra.store import Location, Store, open_store
from infra.text import plain
from infra.versions import find_version, version_folder

SHOWN = 10


def open_dataset(config: Path | None, store: str | None, dataset: str | None) -> tuple[Store, str]:
    """The store and dataset that `-c CONFIG`, or `--store` and `--dataset`, name."""
    if config:
        parsed = load_config(config)
        place = parsed.store.model_dump(exclude={"single_writer"})
        if store:
            place["uri"] = store
        return open_store(Location(**place)), dataset or parsed.dataset
    if not store or not dataset:
        raise ConfigError("name a dataset: give -c CONFIG, or --store URI and --dataset NAME")
    return open_store(Location(uri=store)), dataset


def fetch_report(
    version: str, config: Path | None, store: str | None, dataset: str | None, output: Path | None
) -> str:
    """Where the report of a version is; with `output` a copy is written there first."""
    place, name = open_dataset(config, store, dataset)
    manifest = find_version(place, name, version)
    key = f"{version_folder(name, manifest['version'])}/report.html"
    if output is None:
        return f"{place.uri}/{key}"
    output.write_bytes(place.get(key))
    return str(output)


def why(
    name: str, version: str, config: Path | None, store: str | None, dataset: str | None
) -> Iterator[str]:
    """The fate of an object key, image id or pair id, or a prefix of an id, with its numbers."""
    place, dataset_name = open_dataset(config, store, dataset)
    manifest = find_version(place, dataset_name, version)
    folder = version_folder(dataset_name, manifest["version"])
    fates = pl.read_parquet(io.BytesIO(place.get(f"{folder}/fates.parquet")))
    exact = fates.filter(pl.col("id") == name)
    found = exact if exact.height else fates.filter(pl.col("id").str.starts_with(name))
    if not found.height or not name:
        raise PairmillError(
            f"version {manifest['version']} of {dataset_name} has no object, image or pair "
            f"{plain(name, 80)!r}; give a key, or the start of an id"
        )
    if found.height > SHOWN:
        yield f"{found.height} ids begin so; the first {SHOWN}:"
    records = _records(place, manifest, folder)
    for row in found.head(SHOWN).iter_rows(named=True):
        yield from _explain(row, fates, records, manifest)


def _records(place: Store, manifest: dict[str, Any], folder: str) -> pl.DataFrame:
    names = [f["name"] for f in manifest["files"] if f["name"].startswith("records/")]
    parts = [pl.read_parquet(io.BytesIO(place.get(f"{folder}/{name}"))) for name in names]
    return pl.concat(parts) if parts else pl.DataFrame()


def _explain(
    row: dict[str, Any], fates: pl.DataFrame, records: pl.DataFrame, manifest: dict[str, Any]
) -> Iterator[str]:
    yield f"{row['level']} {plain(row['id'], 200)}"
    yield f"  fate        {row['fate']}, decided by {row['stage']}"
    for part in ("rule", "value", "detail"):
        if row[part] is not None:
            yield f"  {part:<11} {plain(str(row[part]), 200)}"
    if row["level"] == "object" and row["image_id"]:
        yield f"  image       {row['image_id']}"
    if row["fate"] == "low_clip_score":
        yield f"  cut         {manifest['clip_score_cut']} (value in 10^-6)"
    image_id = row["image_id"] or row["id"]
    if row["level"] == "image":
        same = fates.filter((pl.col("level") == "object") & (pl.col("image_id") == image_id))
        for name in same["id"].to_list()[:SHOWN]:
            yield f"  object      {plain(name, 200)}"
    if row["level"] == "pair":
        yield from _pair(records.filter(pl.col("pair_id") == row["id"]), manifest)
    elif row["fate"] == "paired":
        used = records.filter((pl.col("query") == image_id) | (pl.col("target") == image_id))
        for pair_id, query in used.select("pair_id", "query").head(SHOWN).iter_rows():
            yield f"  pair        {pair_id} as {'query' if query == image_id else 'target'}"


def _pair(record: pl.DataFrame, manifest: dict[str, Any]) -> Iterator[str]:
    bands = {band["space"]: band for band in manifest["bands"]}
    for row in record.iter_rows(named=True):
        for side in ("query", "target"):
            caption = plain(row[f"{side}_caption"] or "(no caption)", 120)
            yield f"  {side:<11} {row[side]}  {plain(row[f'{side}_key'], 120)}  {caption}"
        for tie in row["ties"]:
            band = bands[tie["space"]]
            where = "in" if tie["in_band"] else "outside"
            yield (
                f"  {tie['space']:<11} score {tie['score']}, rank {tie['rank'] or 'not listed'}, "
                f"{where} the band {band['low']} to {band['high']}"
            )
        for text in row["instructions"]:
            yield f"  instruction {plain(text, 300)}"
        yield f"  labeller    {row['labeller']} {row['model'] or ''}".rstrip()
        yield f"  negatives   {len(row['negatives'])}, the query first"
        yield f"  licence     {plain(row['licence'], 80)}; split {row['split']}"
