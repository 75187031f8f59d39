"""Why an image is in a version of pairs or not: copies, caption, neighbours, and its pairs."""

from collections.abc import Iterator

import polars as pl

from flows.published import GONE, SHORT, SHOWN, Line, Listed, Row, Version, cosine
from infra import likeness
from infra.text import plain


def image_chain(version: Version, row: Row, most: int) -> Iterator[Line]:
    """From an image's file to the pairs that it is in, with `most` neighbours of each space."""
    image_id = row["image_id"]
    if row["level"] == "object":
        yield "image", image_id
    yield from file_of(version, image_id)
    yield from _caption(version, image_id)
    yield from copies(version, image_id)
    yield from fit(version, image_id)
    of_image = version.fate("image", image_id)
    if of_image and of_image["fate"] in ("paired", "unpaired"):
        yield "eligible", "yes"
        for space in version.bands:
            yield from _space(version, space, image_id, most)
        yield from _uses(version, image_id)


def file_of(version: Version, image_id: str) -> Iterator[Line]:
    """What file an image is, and the objects that hold it."""
    about = version.row("describe", "images", image_id)
    if about:
        size = f"{about['width']} x {about['height']} px, {about['bytes']:,} bytes"
        yield "file", f"{about['format']}, {size}, licence {plain(about['licence'] or '', 80)}"
    same = version.fates.filter((pl.col("level") == "object") & (pl.col("image_id") == image_id))
    keys = same.sort(pl.col("fate") == "exact_duplicate", "id")["id"].to_list()
    for at, key in enumerate(keys[:SHOWN]):
        note = "" if len(keys) == 1 else "  (stands for the others)" if not at else "  (copy)"
        yield "object", plain(key, 200) + note
    if len(keys) > SHOWN:
        yield "", f"and {len(keys) - SHOWN:,} more copies"


def _caption(version: Version, image_id: str) -> Iterator[Line]:
    chosen = version.row("align_captions", "aligned", image_id)
    if chosen is None:
        return
    texts, every = (
        version.table("describe", "captions"),
        version.table("describe", "image_captions"),
    )
    if chosen["caption_id"] is None or texts is None or every is None:
        yield "caption", "none" if chosen["caption_id"] is None else f"its text is {GONE}"
        return
    own = every.filter(pl.col("image_id") == image_id).join(texts, on="caption_id")
    first = pl.col("caption_id") != chosen["caption_id"]
    for at, text in enumerate(own.sort(first, "caption_id")["text"].to_list()[:SHOWN]):
        if not at:
            among = f"best of {own.height}, " if own.height > 1 else ""
            yield (
                "caption",
                f"{plain(text, 200)}  ({among}CLIPScore {cosine(chosen['clip_score'])})",
            )
        else:
            yield "", f"not used: {plain(text, 200)}"


def copies(version: Version, image_id: str) -> Iterator[Line]:
    """Of whom an image is a near-duplicate, and for whom it stands."""
    survivors = version.table("deduplicate", "survivors")
    if survivors is None:
        fate = version.fate("image", image_id)
        if fate and fate["fate"] == "near_duplicate":
            of = f"of {version.name(fate['detail'])}: pHash differs in {fate['value']} of 64 bits"
            yield "duplicate", of
        return
    own = survivors.filter(pl.col("image_id") == image_id).to_dicts()
    if own and own[0]["survivor_id"] != image_id:
        yield "duplicate", f"of {version.name(own[0]['survivor_id'])}"
        yield "", _relation(version, own[0])
    lost = survivors.filter(
        (pl.col("survivor_id") == image_id) & (pl.col("image_id") != image_id)
    ).sort("image_id")
    for at, row in enumerate(lost.head(SHOWN).iter_rows(named=True)):
        label = "stands for" if not at else ""
        yield label, f"{version.name(row['image_id'])}: {_relation(version, row)}"
    if lost.height > SHOWN:
        yield "", f"and {lost.height - SHOWN:,} more near-duplicates"


def _relation(version: Version, row: Row) -> str:
    """How alike two near-duplicates are, with the bounds of the config."""
    params = version.manifest["config"].get("dedup", {})
    if params.get("near") == "cosine":
        return f"vectors of {params['model']} at a cosine of at least {params['cosine']}"
    return (
        f"pHash differs in {row['distance']} of 64 bits, likeness {cosine(row['likeness'])} "
        f"(looked for within {params.get('radius')} bits, alike from "
        f"{cosine(likeness.LIKE)} on)"
    )


def fit(version: Version, image_id: str) -> Iterator[Line]:
    """How well the caption fits against the cut."""
    fate = version.fate("image", image_id)
    scored = version.row("score_captions", "values", image_id)
    lost = fate is not None and fate["fate"] == "low_clip_score"
    value = fate["value"] if fate and lost else scored["value"] if scored else None
    if value is None:
        return
    params = version.manifest["config"].get("clip_score", {})
    by = "negCLIPLoss" if params.get("keep") == "neg_clip_loss" else "CLIPScore"
    cut = version.manifest["clip_score_cut"]
    said = "below the cut" if lost else "at or above the cut"
    yield "caption fit", f"{by} {cosine(value)}, {said} {cosine(cut)}"


def _space(version: Version, space: str, image_id: str, most: int) -> Iterator[Line]:
    band = version.bands[space]
    window = f"band {window_of(band)}"
    near = version.listed(space, image_id)
    if near is None:
        yield space, f"{window}; its list is {GONE}"
        return
    if not near:
        yield space, f"{window}; it is not in this space"
        return
    counts = {p: sum(n.place == p for n in near) for p in ("above", "in band", "below")}
    told = ", ".join(f"{count} {place}" for place, count in counts.items())
    yield space, f"{window}; {len(near)} neighbours: {told}"
    for one in _worth(near, most):
        name = version.name(one.image_id)
        yield "", f"{one.rank:>3}  {cosine(one.score)}  {one.place:<7}  {name}"


def _worth(near: list[Listed], most: int) -> list[Listed]:
    """The best neighbours and, before the list is full, the best of those in the band."""
    inside = [one for one in near if one.place == "in band"]
    chosen = {*near[: max(1, most // 2)], *inside[:most]} if most else set()
    return sorted(chosen)[:most]


def _uses(version: Version, image_id: str) -> Iterator[Line]:
    """Pairs that an image is in, as query, as target and as hard negative."""
    pairs = version.pairs
    if not pairs.width:
        yield "pairs", "none"
        return
    published = set(version.records["pair_id"].to_list()) if version.records.width else set()
    for role, other in (("query", "target"), ("target", "query")):
        rows = pairs.filter(pl.col(role) == image_id).sort("pair_id")
        yield f"as {role}", f"{rows.height} pairs"
        for pair, image in rows.select("pair_id", other).head(SHOWN).iter_rows():
            fate = "record" if pair in published else _why_no_record(version, pair)
            yield "", f"{pair[:SHORT]}  {other} {version.name(image)}  ({fate})"
    negative = pl.col("negatives").list.contains(image_id) & (pl.col("query") != image_id)
    yield "as negative", f"{pairs.filter(negative).height} pairs of other queries"


def _why_no_record(version: Version, pair: str) -> str:
    fate = version.fate("pair", pair)
    return str(fate["fate"]) if fate else "no fate"


def window_of(band: Row) -> str:
    """A band in words."""
    return f"{cosine(band['low'])} to {cosine(band['high'])}"
