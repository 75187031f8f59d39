"""Differences of two versions: what came, went and changed, row by row, each with one reason."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from infra import tables, versions
from infra.errors import PairmillError
from infra.mllm import PENDING
from infra.store import Store
from infra.tables import Table

LEVELS = ("object", "image", "pair", "sample", "record")
COLUMNS = {
    "level": pl.String, "id": pl.String, "change": pl.String, "reason": pl.String,
    "before": pl.String, "after": pl.String, "other": pl.String,
}  # fmt: skip
ELIGIBLE = ("paired", "unpaired")
IN_RECORD = ("paired", "recorded")
# Columns of a record that change together, by what a reader calls them.
PARTS = {
    "label": ("instructions", "description", "labeller", "model"),
    "negatives": ("negatives", "positives"),
    "ranks": ("ties",),
    "caption": ("query_caption", "target_caption"),
    "source": ("query_key", "query_member", "target_key", "target_member"),
    "licence": ("query_licence", "target_licence", "licence"),
    "split": ("split",),
}

Manifest = Mapping[str, Any]


class Side(NamedTuple):
    """One of two versions in memory. `pairs` are all that were mined, or else those in records;
    of samples there are none.
    """

    manifest: Manifest
    fates: pl.DataFrame
    records: pl.DataFrame
    pairs: pl.DataFrame

    @property
    def levels(self) -> tuple[str, ...]:
        """What has fates here, and records."""
        return tuple(level for level in LEVELS if level != self._other)

    @property
    def _other(self) -> str:
        return "pair" if self.manifest.get("recipe") else "sample"


def published(store: Store, manifest: Manifest) -> Side:
    """A version as it lies in the store."""
    records = versions.records(store, manifest)
    mined = versions.table(store, manifest, "mine_pairs", "pairs")
    return side(manifest, versions.fates(store, manifest), records, mined)


def unpublished(store: Store, manifest: Manifest, fates: Table, records: Table) -> Side:
    """A version about to be published, from the tables of its build."""
    mined = versions.table(store, manifest, "mine_pairs", "pairs")
    rows = tables.frame(store, records)
    return side(manifest, tables.frame(store, fates), rows, mined)


def side(
    manifest: Manifest, fates: pl.DataFrame, records: pl.DataFrame, mined: pl.DataFrame | None
) -> Side:
    """Put a version together; records without rows get the columns that are compared."""
    columns: dict[str, Any] = {"pair_id": pl.String, "query": pl.String, "target": pl.String}
    tie = pl.Struct(
        {"space": pl.String, "score": pl.Int32, "rank": pl.Int32, "in_band": pl.Boolean}
    )
    lists: dict[str, Any] = {"ties": pl.List(tie), "negatives": pl.List(pl.String)}
    none = pl.DataFrame(schema=columns | lists)
    if manifest.get("recipe"):
        empty = pl.DataFrame(schema={"sample_id": pl.String, "image_id": pl.String})
        return Side(manifest, fates, records if records.width else empty, none)
    if not records.width:
        records = none
    pairs = records if mined is None else mined
    return Side(manifest, fates, records, pairs.select(*columns, *lists))


def between(old: Side, new: Side) -> pl.DataFrame:
    """Every object, image, pair, sample and record that differs, as rows of COLUMNS, sorted.

    `change` is added, removed or changed; `before` and `after` are fates, for records the parts
    that differ; `other` is the image or parameter that a reason speaks of.
    """
    images = _images(old, new)
    if new.manifest.get("recipe"):
        made = _samples(old, new)
        records = _records_of_samples(old, new, made)
    else:
        made = _pairs(old, new)
        records = _records(old, new, made)
    found = [_objects(old, new, images), images, made, records]
    typed = [pl.col(name).cast(kind) for name, kind in COLUMNS.items()]
    return pl.concat([frame.select(typed) for frame in found]).sort("level", "id")


def since(
    store: Store, last: Manifest | None, manifest: Manifest, fates: Table, records: Table
) -> dict[str, Any] | None:
    """How a version about to be published differs from the last one, in counts; None for the first.

    A last version that can't be read any more must not stop every later night.
    """
    if last is None:
        return None
    new = unpublished(store, manifest, fates, records)
    try:
        old = published(store, last)
        return summary(last, manifest, between(old, new))
    except (PairmillError, pl.exceptions.PolarsError) as error:
        return {"version": last["version"], "unreadable": str(error).partition("\n")[0]}


def _level(side: Side, level: str) -> pl.DataFrame:
    rows = side.fates.filter(pl.col("level") == level)
    return rows.select("id", "fate", "value", "detail", "image_id")


def _joined(old: pl.DataFrame, new: pl.DataFrame, key: str = "id") -> pl.DataFrame:
    """Rows of both sides beside each other: `x` and `x_new`, `change`, without equal ones."""
    both = old.with_columns(was=True).join(
        new.with_columns(now=True), on=key, how="full", suffix="_new", coalesce=True
    )
    same = [pl.col(name).eq_missing(pl.col(f"{name}_new")) for name in old.columns if name != key]
    change = (
        pl.when(pl.col("was").is_null())
        .then(pl.lit("added"))
        .when(pl.col("now").is_null())
        .then(pl.lit("removed"))
        .otherwise(pl.lit("changed"))
    )
    kept = ~(pl.col("was").is_not_null() & pl.col("now").is_not_null() & pl.all_horizontal(same))
    return both.filter(kept).with_columns(change.alias("change"))


def _first(*cases: tuple[pl.Expr, str | pl.Expr], otherwise: str | pl.Expr) -> pl.Expr:
    """The value of the first case that holds."""
    chain: Any = pl
    for condition, value in cases:
        chain = chain.when(condition).then(pl.lit(value) if isinstance(value, str) else value)
    last = pl.lit(otherwise) if isinstance(otherwise, str) else otherwise
    return chain.otherwise(last)


def _fate_of(side: Side, name: str) -> pl.DataFrame:
    """image id -> fate on a side, as columns (other, name)."""
    rows = _level(side, "image")
    return rows.select(pl.col("id").alias("other"), pl.col("fate").alias(name))


def _gone(old: Side, new: Side) -> str:
    """How a removed name is spoken of: a forgotten one has no name any more to know it by."""
    forgotten = [side.fates.filter(pl.col("fate") == "forgotten").height for side in (old, new)]
    return "left the corpus" if forgotten[1] <= forgotten[0] else "left the corpus or was forgotten"


def _images(old: Side, new: Side) -> pl.DataFrame:
    rows = _joined(_level(old, "image"), _level(new, "image"))
    was, now = pl.col("fate"), pl.col("fate_new")
    lost, found = now == "near_duplicate", was == "near_duplicate"
    other = pl.when(lost).then("detail_new").when(found).then("detail")
    rows = rows.with_columns(other.alias("other"), pl.col("detail").alias("survivor"))
    for name, frame in (("other_was", _fate_of(old, "f")), ("other_now", _fate_of(new, "f"))):
        rows = rows.join(frame.rename({"f": name}), on="other", how="left")
    left = _fate_of(new, "survivor_now").rename({"other": "survivor"})
    rows = rows.join(left, on="survivor", how="left")
    dedup = pl.lit(_differs(old, new, "dedup"))
    cuts = [s.manifest.get("clip_score_cut") for s in (old, new)]
    was_cut, now_cut = (pl.lit(cut, pl.Int64) for cut in cuts)
    reason = _first(
        ((now == "forgotten") & (pl.col("change") == "added"), "forgotten"),
        (pl.col("change") == "added", "arrived"),
        (pl.col("change") == "removed", _gone(old, new)),
        (lost & found & pl.col("survivor_now").is_null(), "another survivor: the old one left"),
        (lost & found & pl.col("other_was").is_null(), "another survivor: it arrived"),
        (lost & found & (pl.col("detail") != pl.col("detail_new")), "another survivor"),
        (lost & pl.col("other_was").is_null(), "near-duplicate of an image that arrived"),
        (lost & dedup, "near-duplicate since dedup changed"),
        (lost & (pl.col("other_was") == "near_duplicate"), "its own survivor changed"),
        (lost & ~found, "near-duplicate of an image that comes first now"),
        (found & ~lost & pl.col("other_now").is_null(), "the image it duplicates left"),
        (found & ~lost & dedup, "no near-duplicate since dedup changed"),
        (found & ~lost, "the image it duplicates comes later now"),
        ((now == "low_clip_score") & (was == now), "its caption's fit moved"),
        ((now == "low_clip_score") & (pl.col("value_new") >= was_cut), "the caption cut moved"),
        (now == "low_clip_score", "its caption fits worse"),
        ((was == "low_clip_score") & (pl.col("value") >= now_cut), "the caption cut moved"),
        (was == "low_clip_score", "its caption fits better"),
        (now.is_in(IN_RECORD), "in a record now"),
        (was.is_in(IN_RECORD) & now.is_in(["unpaired", "without_record"]), "in no record any more"),
        otherwise=pl.format("{} became {}", was, now),
    )
    return rows.with_columns(reason=reason, level=pl.lit("image"), before=was, after=now)


def _objects(old: Side, new: Side, images: pl.DataFrame) -> pl.DataFrame:
    rows = _joined(_level(old, "object"), _level(new, "object"))
    because = images.select(
        pl.col("id").alias("image_id_new"), pl.col("reason").alias("because"), "other"
    )
    rows = rows.join(because, on="image_id_new", how="left")
    known = [_level(s, "image").select("id", pl.lit(True).alias("known")) for s in (old, new)]
    rows = rows.join(
        known[0].rename({"id": "image_id_new", "known": "had"}), "image_id_new", "left"
    )
    rows = rows.join(known[1].rename({"id": "image_id", "known": "has"}), "image_id", "left")
    left = rows.filter(pl.col("change") == "removed").select(image_id_new="image_id", left=True)
    came = rows.filter(pl.col("change") == "added").select(image_id="image_id_new", came=True)
    rows = rows.join(left.unique(), "image_id_new", "left").join(came.unique(), "image_id", "left")
    copy = pl.col("fate_new") == "exact_duplicate"
    reason = _first(
        (pl.col("fate_new").eq("forgotten") & (pl.col("change") == "added"), "forgotten"),
        ((pl.col("change") == "added") & pl.col("left"), "renamed: its new name"),
        ((pl.col("change") == "added") & pl.col("had"), "one more copy"),
        (pl.col("change") == "added", "arrived"),
        ((pl.col("change") == "removed") & pl.col("came"), "renamed: its old name"),
        ((pl.col("change") == "removed") & pl.col("has"), "one copy less"),
        (pl.col("change") == "removed", _gone(old, new)),
        (pl.col("image_id").ne_missing(pl.col("image_id_new")), "new bytes under its name"),
        (copy & (pl.col("fate") == "exact_duplicate"), "another copy stands for it"),
        (copy, "another copy came before it"),
        (pl.col("fate") == "exact_duplicate", "the copy before it left"),
        (pl.col("because").is_not_null(), pl.col("because")),
        otherwise=pl.format("{} became {}", pl.col("fate"), pl.col("fate_new")),
    )
    return rows.with_columns(
        reason=reason, level=pl.lit("object"), before=pl.col("fate"), after=pl.col("fate_new")
    )


def _pairs(old: Side, new: Side) -> pl.DataFrame:
    spaces = list(dict.fromkeys([*_spaces(old), *_spaces(new)]))
    rows = _joined(_flat(old, spaces), _flat(new, spaces), "id")
    for end in ("query", "target"):
        rows = rows.with_columns(pl.coalesce(end, f"{end}_new").alias(end))
        for name, one in (("was", old), ("now", new)):
            fate = _fate_of(one, f"{end}_fate_{name}").rename({"other": end})
            rows = rows.join(fate, on=end, how="left")
    added, removed = (pl.col("change") == change for change in ("added", "removed"))
    settings = " and ".join(k for k in ("pairs", "spaces", "neighbours") if _differs(old, new, k))
    moved = [_out_of_band(one, ending) for one, ending in ((old, "_new"), (new, ""))]
    other_spaces = pl.lit(set(_spaces(old)) != set(_spaces(new)))
    known = pl.col("query").is_not_null()
    labels = pl.col("fate").ne_missing(pl.col("fate_new"))
    ranks = pl.any_horizontal(
        [pl.col(c).ne_missing(pl.col(f"{c}_new")) for c in _tie_columns(rows)] or [pl.lit(False)]
    )
    reason = _first(
        (added & known & _missing("was"), "an image of it arrived"),
        (removed & known & _missing("now"), f"an image of it {_gone(old, new)}"),
        (added & known & _dropped("was"), "an image of it was dropped before"),
        (removed & known & _dropped("now"), "an image of it is dropped now"),
        ((added | removed) & other_spaces, "a space came or went"),
        (added & known & moved[0], "a band moved"),
        (removed & known & moved[1], "a band moved"),
        ((added | removed) & pl.lit(bool(settings)), f"settings of {settings} changed"),
        (added, "it ranks before others now"),
        (removed, "others rank before it now"),
        (labels & (pl.col("fate_new") == "published"), "labelled now"),
        (labels & (pl.col("fate") == "published"), "no label any more"),
        (labels, pl.format("{} became {}", pl.col("fate"), pl.col("fate_new"))),
        (ranks, "its scores or ranks moved"),
        otherwise="its negatives changed",
    )
    other = _first(
        (added & pl.col("query_fate_was").is_null(), pl.col("query")),
        (added & pl.col("target_fate_was").is_null(), pl.col("target")),
        (removed & ~pl.col("query_fate_now").is_in(ELIGIBLE).fill_null(False), pl.col("query")),
        (removed & ~pl.col("target_fate_now").is_in(ELIGIBLE).fill_null(False), pl.col("target")),
        otherwise=pl.lit(None, pl.String),
    )
    return rows.with_columns(
        reason=reason, level=pl.lit("pair"), before=pl.col("fate"), after=pl.col("fate_new"),
        other=pl.when(known).then(other),
    )  # fmt: skip


def _flat(side: Side, spaces: Sequence[str]) -> pl.DataFrame:
    """Pairs with their fate, each space's score and rank in columns, negatives as one text."""
    fates = side.fates.filter(pl.col("level") == "pair").select("id", "fate")
    pairs = side.pairs.select(
        pl.col("pair_id").alias("id"), "query", "target", pl.col("negatives").list.join(" ")
    )
    ties = side.pairs.select(pl.col("pair_id").alias("id"), "ties").explode("ties")
    ties = ties.drop_nulls("ties").unnest("ties")
    found = fates.join(pairs, on="id", how="left")
    for space in spaces:
        one = ties.filter(pl.col("space") == space)
        columns = [pl.col(c).alias(f"{space} {c}") for c in ("score", "rank")]
        found = found.join(one.select("id", *columns), on="id", how="left")
    return found


def _spaces(side: Side) -> list[str]:
    return [band["space"] for band in side.manifest.get("bands", ())]


def _tie_columns(rows: pl.DataFrame) -> list[str]:
    ends = (" score", " rank")
    return [c for c in rows.columns if c.endswith(ends) and f"{c}_new" in rows.columns]


def _missing(when: str) -> pl.Expr:
    return pl.col(f"query_fate_{when}").is_null() | pl.col(f"target_fate_{when}").is_null()


def _dropped(when: str) -> pl.Expr:
    return ~(
        pl.col(f"query_fate_{when}").is_in(ELIGIBLE) & pl.col(f"target_fate_{when}").is_in(ELIGIBLE)
    )


def _out_of_band(side: Side, ending: str) -> pl.Expr:
    """Whether scores on the other side would lie in no band of this side."""
    inside = [
        pl.col(f"{band['space']} score{ending}").is_between(band["low"], band["high"])
        for band in side.manifest.get("bands", ())
    ]
    return ~pl.any_horizontal([one.fill_null(False) for one in inside] or [pl.lit(True)])


def _records(old: Side, new: Side, pairs: pl.DataFrame) -> pl.DataFrame:
    rows = _joined(_parts(old.records), _parts(new.records))
    because = pairs.select("id", pl.col("reason").alias("because"), "other")
    rows = rows.join(because, on="id", how="left")
    parts = [
        pl.when(pl.col(name).ne_missing(pl.col(f"{name}_new"))).then(pl.lit(name)) for name in PARTS
    ]
    changed = pl.concat_list(parts).list.drop_nulls().list.join(", ")
    is_changed = pl.col("change") == "changed"
    reason = pl.when(is_changed).then(pl.format("changed: {}", changed)).otherwise("because")
    return rows.with_columns(
        level=pl.lit("record"), reason=reason.fill_null("its pair changed"),
        before=pl.lit(None, pl.String), after=pl.when(is_changed).then(changed),
    )  # fmt: skip


def _samples(old: Side, new: Side) -> pl.DataFrame:
    """Samples by the fate that they had and have; what is made of records has new names."""
    rows = _joined(_level(old, "sample"), _level(new, "sample"))
    rows = rows.with_columns(pl.coalesce("image_id_new", "image_id").alias("other"))
    for name, one in (("image_was", old), ("image_now", new)):
        rows = rows.join(_fate_of(one, name), on="other", how="left")
    added, removed = (pl.col("change") == change for change in ("added", "removed"))
    was, now, has_image = pl.col("fate"), pl.col("fate_new"), pl.col("other").is_not_null()
    waited, waits = (fate.is_in(PENDING) for fate in (was, now))
    reason = _first(
        (added & has_image & pl.col("image_was").is_null(), "its image arrived"),
        (removed & has_image & pl.col("image_now").is_null(), f"its image {_gone(old, new)}"),
        (now == "forgotten_image", "its image was forgotten"),
        (
            added & now.is_in(("no_such_image", "image_unusable")),
            "its record names no image that is there",
        ),
        (added, "a new record, or another answer about an old one"),
        (removed, "its record is gone, or has another answer"),
        (waited & ~waits, pl.format("answered now: {}", now)),
        (was != now, pl.format("{} became {}", was, now)),
        otherwise=pl.format("{}, by another value", now),
    )
    return rows.with_columns(reason=reason, level=pl.lit("sample"), before=was, after=now)


def _records_of_samples(old: Side, new: Side, samples: pl.DataFrame) -> pl.DataFrame:
    """Records by their columns; one that came or went does so by the reason of its sample."""
    columns = sorted({*old.records.columns, *new.records.columns} - {"sample_id"})
    rows = _joined(_hashed(old.records, columns), _hashed(new.records, columns))
    because = samples.select("id", pl.col("reason").alias("because"), "other")
    rows = rows.join(because, on="id", how="left")
    parts = [
        pl.when(pl.col(f" {name}").ne_missing(pl.col(f" {name}_new"))).then(pl.lit(name))
        for name in columns
    ]
    changed = pl.concat_list(parts).list.drop_nulls().list.join(", ")
    is_changed = pl.col("change") == "changed"
    reason = pl.when(is_changed).then(pl.format("changed: {}", changed)).otherwise("because")
    return rows.with_columns(
        level=pl.lit("record"), reason=reason.fill_null("its sample changed"),
        before=pl.lit(None, pl.String), after=pl.when(is_changed).then(changed),
    )  # fmt: skip


def _hashed(records: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Records with each column as a number to compare by; null where there is no such column.

    A blank before their names keeps them apart from our own.
    """
    none = pl.lit(None, pl.UInt64)
    hashes = [
        (_hash(name) if name in records.columns else none).alias(f" {name}") for name in columns
    ]
    return records.select(pl.col("sample_id").alias("id"), *hashes)


def _hash(*columns: str) -> pl.Expr:
    return pl.struct(columns).struct.json_encode().hash()


def _parts(records: pl.DataFrame) -> pl.DataFrame:
    parts = [_part(records, name).alias(name) for name in PARTS]
    return records.select(pl.col("pair_id").alias("id"), *parts)


def _part(records: pl.DataFrame, name: str) -> pl.Expr:
    """Some columns of records as one number to compare by."""
    columns = [c for c in PARTS[name] if c in records.columns]
    if not columns:
        return pl.lit(0, pl.UInt64)
    return _hash(*columns)


def _differs(old: Side, new: Side, section: str) -> bool:
    return old.manifest["config"].get(section) != new.manifest["config"].get(section)


def counts(changes: pl.DataFrame) -> list[tuple[str, str, str, int]]:
    """(level, change, reason, how many), objects first, the most frequent reasons first."""
    order = pl.col("level").replace_strict({name: at for at, name in enumerate(LEVELS)})
    return list(
        changes.group_by("level", "change", "reason")
        .len()
        .sort(order, "change", -pl.col("len").cast(pl.Int64), "reason")
        .iter_rows()
    )


def summary(old: Manifest, new: Manifest, changes: pl.DataFrame) -> dict[str, Any]:
    """What a manifest says of its difference from an older version; it names nothing by id."""
    return {
        "version": old["version"],
        "config": [list(row) for row in config_changes(old["config"], new["config"])],
        "models": [name for name, *_ in _models(old, new)],
        "bands": [list(row) for row in _bands(old, new)],
        "cut": [old.get("clip_score_cut"), new.get("clip_score_cut")],
        "changes": [list(row) for row in counts(changes)],
    }


def config_changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) of every setting that differs, None where there was none."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from config_changes(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and _holds_mappings(old, new):
        for before, after in zip(old, new, strict=True):
            yield from config_changes(before, after, key)
    elif old != new:
        yield key, old, new


def _holds_mappings(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and any(isinstance(item, Mapping) for item in (*old, *new))


def _models(old: Manifest, new: Manifest) -> Sequence[tuple[str, Any, Any]]:
    """Models whose numerics differ: other weights, geometry, batch or device."""
    kinds = [m.get("numerics", {}).get("vectors", {}) for m in (old, new)]
    return list(config_changes(*kinds)) if all(kinds) else []


def _bands(old: Manifest, new: Manifest) -> Iterator[tuple[Any, ...]]:
    before = {band["space"]: band for band in old.get("bands", ())}
    for band in new.get("bands", ()):
        was = before.get(band["space"], {})
        yield band["space"], was.get("low"), was.get("high"), band["low"], band["high"]
