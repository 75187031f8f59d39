"""`pairmill why`: what became of an object, an image, a pair or a sample, and what decided."""

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from flows.published import SHOWN, Line, Row, Version
from flows.why_image import image_chain
from flows.why_pair import no_pair, pair_chain
from flows.why_sample import imported_as, of_file, of_image, sample_chain, sampled
from infra import tombstones
from infra.errors import PairmillError
from infra.store import Store
from infra.text import plain
from tasks.mine_pairs import pair_id

# Fates whose detail is part of the chain that follows.
TOLD_BELOW = ("near_duplicate", "exact_duplicate", "low_clip_score", "reverse_kept")


def why(store: Store, manifest: Mapping[str, Any], name: str, most: int) -> Iterator[str]:
    """The fate of an object key, of an id, or of the start of one, and what decided it.

    `most` neighbours are shown in each space. Raises PairmillError where nothing has that name.
    """
    version = Version(store, manifest)
    found = _find(version, name)
    if len(found) > SHOWN:
        yield f"{len(found)} ids begin so; the first {SHOWN}:"
    for at, row in enumerate(found[:SHOWN]):
        if at:
            yield ""
        yield f"{row['level']} {plain(row['id'], 300)}"
        for label, text in _explained(version, row, most):
            yield f"  {label:<12} {text}"


def why_not(store: Store, manifest: Mapping[str, Any], first: str, second: str) -> Iterator[str]:
    """Why one image is the target of another, or is not."""
    version = Version(store, manifest)
    if sampled(version):
        raise PairmillError("this version has samples, not pairs: ask about one name at a time")
    query, target = (_image(version, name) for name in (first, second))
    yield f"{version.name(query)}  as query of  {version.name(target)}"
    mined = version.fate("pair", pair_id(query, target))
    lines = _explained(version, mined, 0) if mined else no_pair(version, query, target)
    if mined:
        yield f"  {'pair':<12} {mined['id']}"
    for label, text in lines:
        yield f"  {label:<12} {text}"


def _find(version: Version, name: str) -> list[dict[str, Any]]:
    """Rows of fates by exact id, else by its start, else by the file name at its end.

    What was forgotten stands there under a keyed hash, which is found by the name.
    """
    ids, gone = pl.col("id"), tombstones.load(version.store)
    starts, ends = ids.str.starts_with(name), ids.str.ends_with(f"/{name}")
    for match in (ids == name, starts, ends, ids == gone.keyed(name)):
        rows = version.fates.filter(match) if name else version.fates.clear()
        if rows.height:
            return rows.to_dicts()
    if name and (sample := imported_as(version, name)):
        return version.fates.filter((pl.col("level") == "sample") & (ids == sample)).to_dicts()
    manifest, kind = version.manifest, gone.found(name)
    if kind is not None:
        raise PairmillError(
            f"version {manifest['version']} of {manifest['dataset']} has nothing of the {kind} "
            f"{plain(name, 80)!r}: `pairmill forget` named it"
        )
    raise PairmillError(
        f"version {manifest['version']} of {manifest['dataset']} has no object, image or "
        f"{'sample' if sampled(version) else 'pair'} "
        f"{plain(name, 80)!r}; give a key, a file name, or the start of an id"
    )


def _image(version: Version, name: str) -> str:
    """The one image that a name means. Raises PairmillError for none, several or a pair."""
    rows = [row for row in _find(version, name) if row["level"] != "pair"]
    ids = {row["image_id"] for row in rows} - {None}
    if len(ids) == 1:
        return str(ids.pop())
    said = f"means {len(ids)} images; give more of it" if ids else "is no image: a pair, or no file"
    raise PairmillError(f"{plain(name, 80)!r} {said}")


def _explained(version: Version, row: Row, most: int) -> Iterator[Line]:
    yield from _fate(version, row)
    if row["level"] == "pair":
        yield from pair_chain(version, row)
    elif row["level"] == "sample":
        yield from sample_chain(version, row)
    elif row["image_id"] and sampled(version):
        if row["level"] == "object":
            yield "image", row["image_id"]
        yield from of_image(version, row["image_id"])
    elif row["fate"] == "metadata" and sampled(version):
        yield from of_file(version, row["id"])
    elif row["image_id"]:
        yield from image_chain(version, row, most)


def _fate(version: Version, row: Row) -> Iterator[Line]:
    decided = f"{row['fate']}, decided by {row['stage']}"
    by_rule = row["rule"] and row["rule"] != row["fate"]
    yield "fate", f"{decided}: {plain(row['rule'], 80)}" if by_rule else decided
    limit = _limit(version, row)
    if row["fate"] == "forgotten":
        yield "because", "`pairmill forget` named it; of its name the keyed hash above is kept"
    elif limit and row["level"] != "sample":
        yield "because", limit
    elif row["detail"] and row["level"] not in ("pair", "sample") and row["fate"] not in TOLD_BELOW:
        yield "because", plain(row["detail"], 300)
    if row["fate"] == "exact_duplicate":
        yield "copy of", plain(row["detail"] or "", 200)


def _limit(version: Version, row: Row) -> str | None:
    """A value against the bound of the config that it broke."""
    params, value = version.manifest["config"].get("describe", {}), row["value"]
    if value is None:
        return None
    said = {
        "too_small": f"short side {value} px, below describe.min_side {params.get('min_side')}",
        "extreme_aspect": (
            f"{value / 1000:.1f} : 1, above describe.max_aspect {params.get('max_aspect')}"
        ),
        "too_large": f"{value:,}, above describe.max_pixels {params.get('max_pixels')}",
    }
    return said.get(row["fate"])
