"""Why a pair is in a version or not: what ties it, its label, what was asked, its negatives."""

from collections.abc import Iterator, Sequence

import polars as pl

from flows import asked, opinions
from flows.published import GONE, SHORT, Line, Row, Version, cosine
from flows.why_image import copies, fit, window_of
from infra.text import plain

CHECKS = ("judge_labels", "line_up", "round_trip")  # they drop pairs that have a label


def pair_chain(version: Version, fate: Row) -> Iterator[Line]:
    """A pair from its two images to its negatives."""
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
        window = window_of(version.bands[tie["space"]])
        yield tie["space"], f"score {cosine(tie['score'])}, {rank}, {place} ({window})"


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
            said = f"{space} rank {one.rank}, {cosine(one.score)}, {one.place}"
            places.setdefault(one.image_id, []).append(said)
    others = [image_id for image_id in row["negatives"] if image_id != row["query"]]
    scores = {space: version.scores(space, row["target"], others) for space in version.bands}
    for at, image_id in enumerate(row["negatives"]):
        label = "negatives" if not at else ""
        if image_id == row["query"]:
            yield label, f"{version.name(image_id)}: the query itself"
            continue
        found = {space: of[image_id] for space, of in scores.items() if image_id in of}
        against = ", ".join(f"{space} {cosine(score)}" for space, score in found.items())
        low = all(score < version.bands[space]["low"] for space, score in found.items())
        listed = "; ".join(places.get(image_id, ["in the query's lists"]))
        yield label, f"{version.name(image_id)}: {listed}"
        if against:
            yield "", f"  {'below every band ' * low}against the target: {against}"


def no_pair(version: Version, query: str, target: str) -> Iterator[Line]:
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
                yield from copies(version, image_id)
            if fate["fate"] == "low_clip_score":
                yield from fit(version, image_id)
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
            rank += f", which ends at {cosine(near[-1].score)}"
        yield space, f"score {cosine(score)}, {place} ({window_of(band)}), {rank}"
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
