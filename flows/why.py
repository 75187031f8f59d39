"""`pairmill why`: what became of an object, an image or a pair, with every number that decided."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from flows import asked, opinions
from infra import growing, likeness, neighbours, tables, tombstones, versions
from infra.errors import PairmillError
from infra.ledger import Ledger
from infra.store import Store
from infra.tables import Table
from infra.text import plain
from tasks.mine_pairs import pair_id

SHOWN = 10
# Fates whose detail is part of the chain that follows.
TOLD_BELOW = ("near_duplicate", "exact_duplicate", "low_clip_score", "reverse_kept")
CHECKS = ("judge_labels", "line_up", "round_trip")  # they drop pairs that have a label
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


def why(store: Store, manifest: Mapping[str, Any], name: str, most: int) -> Iterator[str]:
    """The fate of an object key, image id or pair id, or the start of one, and what decided it.

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
    query, target = (_image(version, name) for name in (first, second))
    yield f"{version.name(query)}  as query of  {version.name(target)}"
    mined = version.fate("pair", pair_id(query, target))
    lines = _explained(version, mined, 0) if mined else _no_pair(version, query, target)
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
    manifest, kind = version.manifest, gone.found(name)
    if kind is not None:
        raise PairmillError(
            f"version {manifest['version']} of {manifest['dataset']} has nothing of the {kind} "
            f"{plain(name, 80)!r}: `pairmill forget` named it"
        )
    raise PairmillError(
        f"version {manifest['version']} of {manifest['dataset']} has no object, image or pair "
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
        yield from _pair(version, row)
    elif row["image_id"]:
        yield from _image_chain(version, row, most)


def _fate(version: Version, row: Row) -> Iterator[Line]:
    decided = f"{row['fate']}, decided by {row['stage']}"
    by_rule = row["rule"] and row["rule"] != row["fate"]
    yield "fate", f"{decided}: {plain(row['rule'], 80)}" if by_rule else decided
    limit = _limit(version, row)
    if row["fate"] == "forgotten":
        yield "because", "`pairmill forget` named it; of its name the keyed hash above is kept"
    elif limit:
        yield "because", limit
    elif row["detail"] and row["level"] != "pair" and row["fate"] not in TOLD_BELOW:
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


def _image_chain(version: Version, row: Row, most: int) -> Iterator[Line]:
    image_id = row["image_id"]
    if row["level"] == "object":
        yield "image", image_id
    yield from _file(version, image_id)
    yield from _caption(version, image_id)
    yield from _copies(version, image_id)
    yield from _fit(version, image_id)
    of_image = version.fate("image", image_id)
    if of_image and of_image["fate"] in ("paired", "unpaired"):
        yield "eligible", "yes"
        for space in version.bands:
            yield from _space(version, space, image_id, most)
        yield from _uses(version, image_id)


def _file(version: Version, image_id: str) -> Iterator[Line]:
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
                f"{plain(text, 200)}  ({among}CLIPScore {_cosine(chosen['clip_score'])})",
            )
        else:
            yield "", f"not used: {plain(text, 200)}"


def _copies(version: Version, image_id: str) -> Iterator[Line]:
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
        f"pHash differs in {row['distance']} of 64 bits, likeness {_cosine(row['likeness'])} "
        f"(looked for within {params.get('radius')} bits, alike from "
        f"{_cosine(likeness.LIKE)} on)"
    )


def _fit(version: Version, image_id: str) -> Iterator[Line]:
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
    yield "caption fit", f"{by} {_cosine(value)}, {said} {_cosine(cut)}"


def _space(version: Version, space: str, image_id: str, most: int) -> Iterator[Line]:
    band = version.bands[space]
    window = f"band {_window(band)}"
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
        yield "", f"{one.rank:>3}  {_cosine(one.score)}  {one.place:<7}  {name}"


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


def _pair(version: Version, fate: Row) -> Iterator[Line]:
    rows = version.pairs
    found = rows.filter(pl.col("pair_id") == fate["id"]).to_dicts() if rows.width else []
    if fate["fate"] == "reverse_kept":
        yield "reverse", f"{fate['detail']} stays for it, as pairs.direction is one"
    if not found:
        if fate["fate"] != "reverse_kept":
            yield "images", f"the table of pairs is {GONE}"
        return
    row = found[0]
    for side in ("query", "target"):
        caption = plain(version.captions.get(row[side], "(no caption)"), 120)
        yield side, f"{version.name(row[side])}  {caption}"
    yield from _ties(version, row)
    yield from _label(version, fate)
    noted = (version.table(*place) for place in asked.tables_of(version.manifest))
    yield from asked.told(version.store, [frame for frame in noted if frame is not None], row)
    yield from opinions.told(version.table, row, version.name)
    yield from _negatives(version, row)


def _ties(version: Version, row: Row) -> Iterator[Line]:
    for tie in row["ties"]:
        rank = f"rank {tie['rank']}" if tie["rank"] else "not listed"
        place = version.place(tie["space"], tie["score"])
        window = _window(version.bands[tie["space"]])
        yield tie["space"], f"score {_cosine(tie['score'])}, {rank}, {place} ({window})"


def _window(band: Row) -> str:
    return f"{_cosine(band['low'])} to {_cosine(band['high'])}"


def _label(version: Version, fate: Row) -> Iterator[Line]:
    if fate["fate"] != "published":
        yield (
            "no record" if fate["stage"] in CHECKS else "no label",
            f"{fate['fate']}: {plain(fate['detail'] or 'no detail was kept', 300)}",
        )
        return
    record = version.records.filter(pl.col("pair_id") == fate["id"]).to_dicts()
    labels = version.table("label_pairs", "labels")
    kept = [] if labels is None else labels.filter(pl.col("pair_id") == fate["id"]).to_dicts()
    for row in record:
        for text in row["instructions"]:
            yield "instruction", plain(text, 300)
        if row["description"]:
            yield "description", plain(row["description"], 600)
        yield "labeller", f"{row['labeller']} {plain(row['model'] or '', 120)}".rstrip()
        if kept and kept[0]["prompt"]:
            yield "prompt", f"files of digest {kept[0]['prompt'][:SHORT]} (tasks/prompts)"
        yield "licence", f"{plain(row['licence'] or '', 80)}; split {row['split']}"


def _negatives(version: Version, row: Row) -> Iterator[Line]:
    """Each hard negative with where it stands in the query's lists, and against the target."""
    places: dict[str, list[str]] = {}
    for space in version.bands:
        for one in version.listed(space, row["query"]) or ():
            said = f"{space} rank {one.rank}, {_cosine(one.score)}, {one.place}"
            places.setdefault(one.image_id, []).append(said)
    others = [image_id for image_id in row["negatives"] if image_id != row["query"]]
    scores = {space: version.scores(space, row["target"], others) for space in version.bands}
    for at, image_id in enumerate(row["negatives"]):
        label = "negatives" if not at else ""
        if image_id == row["query"]:
            yield label, f"{version.name(image_id)}: the query itself"
            continue
        found = {space: of[image_id] for space, of in scores.items() if image_id in of}
        against = ", ".join(f"{space} {_cosine(score)}" for space, score in found.items())
        low = all(score < version.bands[space]["low"] for space, score in found.items())
        listed = "; ".join(places.get(image_id, ["in the query's lists"]))
        yield label, f"{version.name(image_id)}: {listed}"
        if against:
            yield "", f"  {'below every band ' * low}against the target: {against}"


def _no_pair(version: Version, query: str, target: str) -> Iterator[Line]:
    """Why there is no pair of two images, in that order."""
    if query == target:
        yield "no pair", "they are the same image"
        return
    out = False
    for side, image_id in (("query", query), ("target", target)):
        fate = version.fate("image", image_id)
        if fate and fate["fate"] not in ("paired", "unpaired"):
            yield "no pair", f"the {side} is not eligible: {fate['fate']}"
            if fate["fate"] == "near_duplicate":
                yield from _copies(version, image_id)
            if fate["fate"] == "low_clip_score":
                yield from _fit(version, image_id)
            out = True
    if not out:
        yield from _in_no_turn(version, query, target)


def _in_no_turn(version: Version, query: str, target: str) -> Iterator[Line]:
    """Two eligible images: their score in every space, and what else the query's targets are."""
    inside, lists_gone = [], False
    for space, band in version.bands.items():
        near = version.listed(space, query)
        lists_gone |= near is None
        entry = next((one for one in near or () if one.image_id == target), None)
        score = entry.score if entry else version.scores(space, query, [target]).get(target)
        if score is None:
            lacking = near is not None and version.spaces[space]["of"] == "caption"
            yield space, "one of the two has no caption" if lacking else f"its list is {GONE}"
            continue
        place = version.place(space, score)
        rank = f"rank {entry.rank}" if entry else "not in the query's list"
        if near and not entry:
            rank += f", which ends at {_cosine(near[-1].score)}"
        yield space, f"score {_cosine(score)}, {place} ({_window(band)}), {rank}"
        inside += [space] if entry and place == "in band" else []
    if inside:
        yield from _others_first(version, query, inside)
    elif lists_gone:
        yield "no pair", "it was mined from lists that are gone, so what follows is not known"
    else:
        yield "no pair", "in no space is it both listed and in the band"


def _others_first(version: Version, query: str, inside: Sequence[str]) -> Iterator[Line]:
    """The targets that a query has, where another one was in a band as well."""
    most = version.manifest["config"].get("pairs", {}).get("targets")
    pairs = version.pairs
    rows = pairs.filter(pl.col("query") == query) if pairs.width else pl.DataFrame()
    yield (
        "no pair",
        (
            f"it is in the band of {', '.join(inside)}, but the query has {rows.height} targets "
            f"before it (pairs.targets is {most}; spaces take turns, each giving its best):"
        ),
    )
    if rows.height:
        for pair, image in rows.sort("pair_id").select("pair_id", "target").iter_rows():
            yield "", f"{pair[:SHORT]}  {version.name(image)}"


def _cosine(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:.4f}"
