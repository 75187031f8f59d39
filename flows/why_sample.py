"""Why a sample is in a version or not: its origin, its way through the stages, what was asked.

A recipe's stages stand in its manifest in order, each with the tables that it left.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl

from flows import asked
from flows.published import GONE, SHORT, SHOWN, Line, Row, Version
from flows.trail import SAMPLES
from flows.why_image import file_of
from infra import versions
from infra.changes import config_changes
from infra.samples import BASE
from infra.store import NotFound
from infra.text import plain

WANTED = {
    "least": "at least ", "most": "at most ", "is": "", "is_not": "another than ",
    "longer": "of at least so many characters: ",
}  # fmt: skip
OWN = ("sample_id", "image_id", "key", "member", "licence", "split", "path", "of", "split_from")
LONG = 200  # characters of a value
MOST_SETTINGS = 12
_ID = re.compile("[0-9a-f]{64}")


class Stop(NamedTuple):
    """A stage of the recipe: what reports call it, and the stage."""

    name: str
    stage: str


def stops(version: Version) -> list[Stop]:
    """The stages of a version's recipe in order; those of older versions are not told."""
    return [Stop(*stop) for stop in version.manifest.get("stages", ())]


def sampled(version: Version) -> bool:
    """Whether a version is of samples."""
    return bool(version.manifest.get("recipe"))


def imported_as(version: Version, place: str) -> str | None:
    """The sample that a row of a file of records became: `<key>#<row>`."""
    rows = _origins(version).filter(pl.col("name") == place)
    return rows["sample_id"][0] if rows.height else None


def sample_chain(version: Version, row: Row) -> Iterator[Line]:
    """A sample from its origin to the stage that dropped it, or to its record."""
    name = row["id"]
    yield from _because(version, row)
    yield from _origin(version, row)
    if row["image_id"]:
        yield "image", version.name(row["image_id"])
        yield from (line for line in file_of(version, row["image_id"]) if line[0] == "file")
    yield from _way(version, name)
    yield from _record(version, name)
    yield from _asked(version, name)
    yield from _made_of_it(version, name)


def samples_of(version: Version, rows: pl.DataFrame) -> Iterator[Line]:
    """Some samples with what became of each."""
    counts = rows.group_by("fate").len().sort("len", "fate", descending=True).iter_rows()
    yield "samples", ", ".join(f"{count:,} {fate}" for fate, count in counts) or "none"
    for name, fate, stage in rows.sort("id").select("id", "fate", "stage").head(SHOWN).iter_rows():
        by = f", {stage}" if fate != "recorded" else ""
        yield "", f"{_short(name)}  {fate}{by}"
    if rows.height > SHOWN:
        yield "", f"and {rows.height - SHOWN:,} more"


def of_image(version: Version, image_id: str) -> Iterator[Line]:
    """A picture's file and its samples."""
    yield from file_of(version, image_id)
    texts, every = (version.table("describe", name) for name in ("captions", "image_captions"))
    if texts is not None and every is not None:
        own = every.filter(pl.col("image_id") == image_id).join(texts, on="caption_id")
        for text in own.sort("caption_id")["text"].to_list()[:SHOWN]:
            yield "caption", plain(text, LONG)
    yield from samples_of(version, _samples(version).filter(pl.col("image_id") == image_id))


def of_file(version: Version, key: str) -> Iterator[Line]:
    """The samples of a file of records."""
    origins = _origins(version).filter(pl.col("name").str.starts_with(f"{key}#"))
    mine = pl.col("id").is_in(origins["sample_id"].implode())
    here = mine | pl.col("id").str.starts_with(f"{key}#")
    yield from samples_of(version, _samples(version).filter(here))


def _samples(version: Version) -> pl.DataFrame:
    return version.fates.filter(pl.col("level") == "sample")


def _because(version: Version, row: Row) -> Iterator[Line]:
    """By which numbers and texts the stage decided that dropped a sample."""
    if row["fate"] == "recorded":
        return
    at = _dropped_by(version, row["id"])
    if at and at.name != at.stage:
        yield "at", at.name
    params = _params(version, at) if at else None
    rule = _rule(params, row["fate"])
    found = row["value"] if row["value"] is not None else row["detail"]
    if rule:
        column, comparison, bound = rule
        names = column if isinstance(column, str) else " + ".join(column)
        said = "missing" if found is None else _value(found)
        yield "because", f"{names} is {said}, not {WANTED[comparison]}{_value(bound)}"
        return
    if row["detail"] and _ID.fullmatch(row["detail"]):
        apart = "" if row["value"] is None else f": pHash differs in {row['value']} of 64 bits"
        yield "twin of", f"{row['detail'][:SHORT]}{apart}"
        return
    if row["detail"]:
        yield "because", plain(row["detail"], 300)
    if row["value"] is not None:
        yield "value", _value(row["value"])
        told = config_changes({}, params) if isinstance(params, Mapping) else ()
        settings = [f"{key} {_value(value)}" for key, _, value in told if value not in ("", [], {})]
        if settings:
            yield "settings", ", ".join(settings[:MOST_SETTINGS])


def _dropped_by(version: Version, name: str) -> Stop | None:
    for stop in stops(version):
        lost = version.table(stop.name, "drops")
        if lost is not None and name in lost["id"]:
            return stop
    return None


def _params(version: Version, stop: Stop) -> Any:
    """The parameters of a stage as the ledger has them; None where its record is gone."""
    wanted = version.manifest["tables"].get(stop.name, {}).get("drops")
    prefix = f"ledger/{stop.stage}/"
    try:
        stats = list(version.store.list(prefix))
    except NotFound:
        return None
    for stat in stats:
        record = versions.parsed(version.store.get(stat.key)) or {}
        if record.get("tables", {}).get("drops") == wanted and record.get("params") is not None:
            return record["params"]
    return None


def _rule(params: Any, name: str) -> tuple[Any, str, Any] | None:
    """(column, comparison, bound) of a rule among a stage's parameters."""
    rows = params if isinstance(params, list) else []
    for row in rows:
        if isinstance(row, list) and len(row) >= 4 and row[0] == name and row[2] in WANTED:
            return row[1], row[2], row[3]
    return None


def _origin(version: Version, row: Row) -> Iterator[Line]:
    """Of which record a sample was made, over samples that it was branched or split from."""
    name, seen = row["id"], set[str]()
    while name not in seen:
        seen.add(name)
        rows = _origins(version).filter(pl.col("sample_id") == name)
        if rows.height:
            yield "from", plain(rows["name"][0], LONG)
            return
        parent = _parent(version, name)
        if parent is None:
            return
        said, name = parent
        fate = version.fate("sample", name)
        yield said, f"{name[:SHORT]}  {fate['fate'] if fate else ''}".rstrip()


def _parent(version: Version, name: str) -> tuple[str, str] | None:
    """How a sample was made of another one, and of which."""
    for column, said in (("split_from", "part of"), ("of", "branched")):
        for row in _rows(version, name):
            if row.get(column) and row[column] != name:
                return said, str(row[column])
    return None


def _rows(version: Version, name: str) -> Iterator[Row]:
    """A sample as each stage left it, the last first."""
    if version.records.width:
        yield from version.records.filter(pl.col("sample_id") == name).to_dicts()
    for stop in reversed(stops(version)):
        for field in SAMPLES:
            found = version.table(stop.name, field)
            if found is not None and {*BASE} <= {*found.columns}:
                yield from found.filter(pl.col("sample_id") == name).to_dicts()


def _origins(version: Version) -> pl.DataFrame:
    """(sample_id, name): the row of a file that each imported sample is."""
    parts = [version.table(stop.name, "origins") for stop in stops(version)]
    found = [part for part in parts if part is not None]
    return found[0] if found else pl.DataFrame(schema={"sample_id": pl.String, "name": pl.String})


def _way(version: Version, name: str) -> Iterator[Line]:
    """The stages that had a sample in their hands."""
    way, gone = [], False
    for stop in stops(version):
        held = False
        for field in SAMPLES:
            found = version.table(stop.name, field)
            if found is None:
                gone |= field in (version.manifest["passing_tables"].get(stop.name) or {})
            elif name in found["sample_id"]:
                held = True
                way.append(stop.name if field == "samples" else f"not {stop.name}")
        lost = version.table(stop.name, "drops")
        if not held and lost is not None and name in lost["id"]:
            way.append(f"{stop.name} (dropped)")
    if way:
        yield "way", " > ".join(way)
    if gone:
        yield "", f"more of its way is {GONE}"


def _record(version: Version, name: str) -> Iterator[Line]:
    """What a trainer reads of a sample."""
    if not version.records.width:
        return
    for row in version.records.filter(pl.col("sample_id") == name).to_dicts():
        number, split = version.manifest["version"], row["split"]
        yield "record", f"version {number}, records/{split}.parquet, licence {row['licence']}"
        if row.get("path"):
            yield "path", " > ".join(row["path"])
        for column, value in row.items():
            if column not in OWN and value is not None:
                yield "", f"{column}: {_value(value)}"


def _asked(version: Version, name: str) -> Iterator[Line]:
    """Every question about a sample or a view of it, with the prompt's file and the answer."""
    for stop in stops(version):
        rows = version.table(stop.name, "asked")
        if rows is None:
            continue
        ids = pl.col("sample_id")
        mine = rows.filter((ids == name) | ids.str.starts_with(f"{name}@"))
        for view, prompt, keys in mine.sort("sample_id").iter_rows():
            at = view.partition("@")[2]
            yield "prompt", f"tasks/prompts/{prompt}.jinja{f' at {at}' if at else ''}"
            yield from asked.answers(version.store, keys)


def _made_of_it(version: Version, name: str) -> Iterator[Line]:
    """Samples that were branched or split from this one."""
    found: dict[str, None] = {}
    for stop in stops(version):
        rows = version.table(stop.name, "samples")
        for column in ("of", "split_from"):
            if rows is not None and column in rows.columns:
                mine = rows.filter(
                    (pl.col(column) == name) & ~pl.col("sample_id").str.contains("@")
                )
                found |= dict.fromkeys(mine["sample_id"].to_list())
    if found:
        made = pl.col("id").is_in(list(found))
        lines = list(samples_of(version, _samples(version).filter(made)))
        yield "made of it", lines[0][1]
        yield from lines[1:]


def _short(name: str) -> str:
    return name[:SHORT] if _ID.fullmatch(name) else plain(name, 120)


def _value(value: Any) -> str:
    return f"{value:,}" if type(value) is int else plain(str(value), LONG)
