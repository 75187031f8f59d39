"""What is known of one version: its files, and the tables of its build that are still there."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from infra import growing, neighbours, tables, versions
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.store import Store
from infra.tables import Table
from infra.text import plain

SHOWN = 10
SHORT = 12  # characters of an id that is not the answer's own

Line = tuple[str, str]
Row = Mapping[str, Any]
GONE = "gone from the store: a newer build, or garbage collection, has taken its place"


class Listed(NamedTuple):
    """One entry of an image's list in a space; rank from 1, score in 10^-6."""

    rank: int
    image_id: str
    score: int
    place: str  # above, in band, below


class Version:
    """What is known of one version: its files, and the tables of its build that are still there."""

    def __init__(self, store: Store, manifest: Mapping[str, Any]):
        self.store, self.manifest = store, manifest
        self.bands = {band["space"]: band for band in manifest.get("bands", ())}
        self.spaces: Mapping[str, Any] = manifest["config"].get("spaces", {})

    @cached_property
    def fates(self) -> pl.DataFrame:
        return versions.fates(self.store, self.manifest)

    @cached_property
    def records(self) -> pl.DataFrame:
        return versions.records(self.store, self.manifest)

    @cached_property
    def pairs(self) -> pl.DataFrame:
        """All pairs mined, or those of records where the table is gone."""
        found = self.table("mine_pairs", "pairs")
        return self.records if found is None else found

    @cached_property
    def names(self) -> dict[str, str]:
        """image id -> the object that stands for it."""
        of = self.fates.filter((pl.col("level") == "object") & pl.col("image_id").is_not_null())
        copy = pl.col("fate") == "exact_duplicate"
        return dict(of.sort(copy, "id", descending=True).select("image_id", "id").iter_rows())

    @cached_property
    def captions(self) -> dict[str, str]:
        """image id -> its chosen caption."""
        chosen, texts = self.table("align_captions", "aligned"), self.table("describe", "captions")
        if chosen is None or texts is None:
            return {}
        rows = chosen.join(texts, on="caption_id").select("image_id", "text")
        return dict(rows.iter_rows())

    def table(self, stage: str, name: str) -> pl.DataFrame | None:
        return versions.table(self.store, self.manifest, stage, name)

    def row(self, stage: str, name: str, image_id: str) -> Row | None:
        """One image's row of a table; None where it has none or the table is gone."""
        found = self.table(stage, name)
        rows = [] if found is None else found.filter(pl.col("image_id") == image_id).to_dicts()
        return rows[0] if rows else None

    def fate(self, level: str, name: str) -> Row | None:
        rows = self.fates.filter((pl.col("level") == level) & (pl.col("id") == name)).to_dicts()
        return rows[0] if rows else None

    def name(self, image_id: str) -> str:
        return f"{image_id[:SHORT]}  {plain(self.names.get(image_id, ''), 120)}".rstrip()

    def place(self, space: str, score: int) -> str:
        """Where a score lies against the band of a space."""
        band = self.bands[space]
        return "above" if score > band["high"] else "in band" if score >= band["low"] else "below"

    def listed(self, space: str, image_id: str) -> list[Listed] | None:
        """An image's list in a space, [] where it is in no list, None where the lists are gone."""
        passing = (self.manifest.get("passing_tables") or {}).get("find_neighbours") or {}
        try:
            members, lists = (
                Table.from_json(passing[name][space]) for name in ("members", "lists")
            )
            ids = tables.read(self.store, members)["image_id"].to_pylist()
            if image_id not in ids:
                return []
            row = ids.index(image_id)
            for part in tables.shards(self.store, lists):
                found = pl.DataFrame(part).filter(pl.col("row") == row).to_dicts()
                if found:
                    scores = found[0]["scores"]
                    near = [ids[at] for at in found[0]["neighbours"]]
                    return [
                        Listed(rank, other, score, self.place(space, score))
                        for rank, (other, score) in enumerate(zip(near, scores, strict=True), 1)
                    ]
        except (KeyError, PairmillError):
            return None
        return []

    def scores(self, space: str, one: str, others: Sequence[str]) -> dict[str, int]:
        """Exact scores of an image with others in a space, for those whose vectors are there."""
        about = self.spaces[space]
        key = {image_id: image_id for image_id in (one, *others)}
        if about["of"] == "caption":
            chosen = self.table("filter_captions", "eligible")
            rows = chosen.filter(pl.col("image_id").is_in([*key])) if chosen is not None else None
            pairs = () if rows is None else rows.select("image_id", "caption_id").iter_rows()
            key = dict(pairs)
        kind = "vectors" if about["of"] == "image" else "texts"
        found = self._vectors(kind, about["model"], [i for i in key.values() if i])
        known = [image_id for image_id in others if key.get(image_id) in found]
        if not known or key.get(one) not in found:
            return {}
        left, right = ([found[key[i]] for i in ids] for ids in ([one] * len(known), known))
        return dict(
            zip(known, neighbours.scores(np.stack(left), np.stack(right)).tolist(), strict=True)
        )

    def _vectors(self, kind: str, model: str, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Vectors of images or captions from the growing tables of the store."""
        name = self.manifest.get("numerics", {}).get(kind, {}).get(model, "")
        try:
            table = growing.load(Ledger(self.store), kind, name.partition("-")[2]).table
            found, matrix = tables.gather(self.store, table, sorted(set(ids)))
        except (KeyError, PairmillError):
            return {}
        return dict(zip(found, matrix, strict=True))


def cosine(value: int | None) -> str:
    """A score or other number in millionths as a decimal."""
    return "unknown" if value is None else f"{value / 1e6:.4f}"
