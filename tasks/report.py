"""The report of a version: one HTML file with no script and nothing outside it, made to be read.

Captions, names and instructions are untrusted: everything that is printed passes `infra.text.plain`
and is escaped, and the page's policy allows nothing but its own style and pictures in data URIs.
"""

import base64
import hashlib
import io
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import polars as pl
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from infra import agreement, changes, charts, corpus, drift, images, rates, tables, versions
from infra.build import Build
from infra.corpus import Source
from infra.store import NotFound
from infra.tables import Table
from infra.text import plain

TEMPLATES = Path(__file__).parent / "templates"
TEXT_LIMIT = 2_000  # characters of anything printed; the template cuts most things shorter
LARGE, SMALL = 400, 144  # pixels of the long side
MOST_PICTURES = 300
PICTURE_BYTES = 4_000_000  # of all pictures as data URIs, so that the file stays below 6 MB
MOST_SOURCE_BYTES = 64 << 20
MOST_PIXELS = 50_000_000  # larger pictures are named and not shown
QUALITY = 76
MINUS = "\u2212"

PAIRS, EXAMPLES, COUPLES, GROUPS, COPIES, SHARED = 25, 8, 4, 6, 4, 8
GALLERY_NEGATIVES = 3
CAME_AND_WENT = 12  # records shown that are new, and that are gone
READ_AHEAD = 4

FIGURES = (
    ("objects", "objects"),
    ("images", "images"),
    ("eligible", "eligible"),
    ("pairs", "pairs mined"),
    ("records", "records"),
)
# Templates of the sections, in their order, and their titles in the list of contents.
SECTIONS = (
    ("pairs", "Pairs"),
    ("since", "Since the last version"),
    ("funnel", "What became of it all"),
    ("checks", "Checks"),
    ("scores", "Scores"),
    ("drift", "Drift"),
    ("copies", "Near-duplicates"),
    ("captions", "Captions"),
    ("cost", "Time and work"),
    ("config", "Config"),
    ("licences", "Licences"),
)
SAMPLE_SECTIONS = (
    ("samples", "Records"),
    ("since", "Since the last version"),
    ("yields", "What became of the samples"),
    ("cost", "Time and work"),
    ("config", "Config"),
    ("licences", "Licences"),
)
GALLERY = 24  # records of a recipe that are shown
SHOWN_SECONDS = 0.05
# What is kept after the fates in the list have left, in the order of the stages.
OBJECT_STEPS = (
    ("objects listed", ()),
    ("pictures", ("metadata", "ignored", "forgotten", "vanished")),
    (
        "usable pictures",
        ("unreadable", "crashed_decoder", "too_large", "too_small", "extreme_aspect"),
    ),
    ("distinct images", ("exact_duplicate", "near_duplicate")),
    ("eligible images", ("low_clip_score",)),
    ("images in a record", ("unpaired",)),
)
MEANINGS = {
    "metadata": "Files of captions or records: read, and no pictures.",
    "ignored": "Files that are neither pictures nor captions.",
    "forgotten": "Withdrawn on request.",
    "vanished": "Listed, but gone when they were to be read.",
    "unreadable": "Not a picture that can be read whole.",
    "crashed_decoder": "Killed the process that decoded them, twice.",
    "too_large": "Over the bound on bytes or pixels.",
    "too_small": "The short side is under the least number of pixels.",
    "extreme_aspect": "Too long and thin.",
    "exact_duplicate": "The same bytes as another object.",
    "near_duplicate": "Nearly the same picture as a better one, which stays.",
    "low_clip_score": "The caption does not fit the picture well enough.",
    "unpaired": "Not query or target of any record.",
    "recorded": "Their picture is in a record.",
    "without_record": "A picture that can be used, and is in no record.",
    "reverse_kept": "The same pair the other way round stays.",
    "captions_say_nothing": "The two captions give no instruction.",
    "no_caption": "One of the two pictures has no caption.",
    "refused": "The model, or a filter of its provider, declined.",
    "truncated": "The answer ran into the limit on its tokens.",
    "empty": "The answer said nothing.",
    "too_long": "The answer was over the bounds on its length.",
    "wrong_schema": "The answer was not the JSON asked for, also after a repair.",
    "too_few_distinct": "Too few of the instructions differ.",
    "gives_away_target": "The instructions quote the target's caption or name.",
    "judged_wrong": "The judge called too many of the instructions wrong.",
    "unjudged": "The judge gave no usable answer.",
    "target_not_preferred": "Among its hard negatives, the judge took another for the target.",
    "target_not_preferred_in_space": "A hard negative lies nearer to query and instruction.",
    "over_budget": "Waits: the budget was spent. The next build goes on here.",
    "endpoint_error": "Waits: the endpoint failed and billed nothing. The next build asks again.",
    "in_batch": "Waits: in a batch that the provider has not finished.",
}
# Objects whose bytes are no picture, or none that should be opened here.
WITHOUT_PICTURE = frozenset(
    ("metadata", "ignored", "forgotten", "vanished", "unreadable", "crashed_decoder", "too_large")
)


class Contents(Protocol):
    """The tables of a version that the report reads."""

    @property
    def records(self) -> Table: ...
    @property
    def images(self) -> Table: ...
    @property
    def fates(self) -> Table: ...
    @property
    def eligible(self) -> Table: ...
    @property
    def captions(self) -> Table: ...
    @property
    def objects(self) -> Table: ...


class Examined(NamedTuple):
    """Tables of the checks: labels before them, verdicts on them, and line-ups; empty where off."""

    labels: Table
    verdicts: Table
    line_ups: Table


class Facts(NamedTuple):
    """Those tables in memory."""

    records: pl.DataFrame
    fates: pl.DataFrame
    eligible: pl.DataFrame
    captions: pl.DataFrame
    objects: pl.DataFrame
    survivors: pl.DataFrame
    pairs: pl.DataFrame


class Thumbnail(NamedTuple):
    """A picture as it is shown."""

    uri: str
    width: int
    height: int


class Album:
    """Pictures that the page wants, loaded once all of it is known; the first wanted come first."""

    def __init__(self) -> None:
        self.sides: dict[str, int] = {}
        self.uses: Counter[str] = Counter()
        self.loaded: dict[str, Thumbnail] = {}

    def want(self, image_id: str | None, side: int = SMALL) -> None:
        """One use of a picture, to be called as often as the template shows it."""
        if image_id and (image_id in self.sides or len(self.sides) < MOST_PICTURES):
            self.sides[image_id] = max(side, self.sides.get(image_id, 0))
            self.uses[image_id] += 1

    def load(self, build: Build, places: Mapping[str, Source]) -> None:
        """Fetch a few ahead, decode each picture once, stop where the page would grow too big."""
        known = [
            (image_id, side, places[image_id])
            for image_id, side in self.sides.items()
            if image_id in places and places[image_id].size <= MOST_SOURCE_BYTES
        ]
        room = PICTURE_BYTES
        shown = corpus.ahead(lambda item: _thumbnail(build, *item), known, READ_AHEAD)
        for (image_id, _, _), thumbnail in zip(known, shown, strict=True):
            cost = len(thumbnail.uri) * self.uses[image_id] if thumbnail else 0
            if thumbnail and cost <= room:
                room -= cost
                self.loaded[image_id] = thumbnail


def _thumbnail(build: Build, image_id: str, side: int, source: Source) -> Thumbnail | None:
    """A small picture, or None where the object is gone, has changed or can't be decoded."""
    try:
        data = corpus.fetch(build.corpus, source)
        if hashlib.sha256(data).hexdigest() != image_id:
            return None
        picture = images.decode(data, side // 2, MOST_PIXELS)
    except (NotFound, images.Unreadable):
        return None
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    uri = Markup("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode())
    return Thumbnail(uri, picture.width, picture.height)


def render(
    build: Build,
    contents: Contents,
    survivors: Table,
    filter_facts: Table,
    lists: Mapping[str, Table],
    bands: Table,
    manifest: Mapping[str, Any],
    *,
    pairs: Table | None = None,
    checked: Examined | None = None,
) -> bytes:
    """The report as UTF-8 HTML of a few MB at most, whatever the size of the corpus.

    With `pairs`, those that got no label are shown as well, and with `checked` what judges said of
    some. Pictures that have gone since, or
    changed, are named and not shown. Equal inputs give equal bytes.
    """
    facts = _facts(build, contents, survivors, pairs)
    spaces, album = _spaces(build, lists, bands), Album()
    page = {
        "m": manifest,
        "of": "pair",
        "sections": SECTIONS,
        "figures": [(title, manifest["counts"][name]) for name, title in FIGURES],
        "refused": manifest.get("refused"),
        "gallery": _gallery(facts, spaces, album),
        "since": _since(build, facts, contents, manifest, album),
        "drift": [_course(course) for course in drift.courses(manifest)],
        "checks": _checks(build, facts, manifest, checked, album),
        "funnel": _objects_funnel(facts, manifest, album) + _pairs_funnel(facts, album),
        "spaces": spaces,
        "fit": _fit(build, filter_facts),
        "groups": _groups(facts.survivors, album),
        "captions": _captions(facts, album),
        "seconds": _seconds(manifest),
        "bills": _bills(manifest),
        "currency": manifest.get("currency"),
        "config": Markup.escape(yaml.safe_dump(manifest["config"], sort_keys=False)),
    }
    wanted = facts.objects.filter(pl.col("image_id").is_in(list(album.sides)))
    album.load(build, corpus.sources(wanted))
    return _page({**page, "about": _about(facts, wanted), "pictures": album.loaded}).encode()


class Story(NamedTuple):
    """How records of a recipe are shown: a sentence on what they are; columns that name pictures,
    with what they are called; a column of boxes (left, top, right, bottom, in pixels of the
    original), drawn on the first picture; texts in turn as (who, column); facts as (name, column);
    a column whose values take turns in the gallery; a column of a map over the first picture, as
    rows of integers, with its height and width; whether that map lies over the square which the
    picture was padded to; columns among the facts that are in millionths.
    """

    says: str
    pictures: Mapping[str, str]
    turns: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]] = ()
    boxes: str | None = None
    by: str | None = None
    map: tuple[str, str, str] | None = None
    padded: bool = False
    millionths: Sequence[str] = ()


def render_samples(
    build: Build, contents: Contents, story: Story, manifest: Mapping[str, Any]
) -> bytes:
    """The report of a version of samples as UTF-8 HTML, on the same page as that of pairs."""
    album = Album()
    rows = tables.frame(build.store, contents.records)
    objects = tables.frame(build.store, contents.objects)
    sizes = tables.frame(build.store, contents.images).select("image_id", "width", "height")
    known = {image: (width, height) for image, width, height in sizes.iter_rows()}
    page = {
        "m": manifest,
        "sections": SAMPLE_SECTIONS,
        "figures": [
            ("objects", manifest["counts"]["objects"]),
            ("images", manifest["counts"]["images"]),
            ("samples", _balance(manifest)["total"]),
            ("records", manifest["counts"]["records"]),
        ],
        "refused": manifest.get("refused"),
        "story": story,
        "gallery": [_shown(row, story, known, album) for row in _drawn(rows, story.by)],
        "since": _since_samples(manifest),
        "balance": _balance(manifest),
        "of": "sample",
        "seconds": _seconds(manifest),
        "bills": _bills(manifest),
        "currency": manifest.get("currency"),
        "spaces": {},
        "config": Markup.escape(yaml.safe_dump(manifest["config"], sort_keys=False)),
    }
    wanted = objects.filter(pl.col("image_id").is_in(list(album.sides)))
    album.load(build, corpus.sources(wanted))
    return _page({**page, "about": {}, "pictures": album.loaded}).encode()


def _drawn(rows: pl.DataFrame, by: str | None) -> list[dict[str, Any]]:
    """A fair draw by id, in which the values of a column take turns."""
    if not rows.height:
        return []
    turn = pl.int_range(pl.len()).over(by) if by else pl.int_range(pl.len())
    return rows.sort("sample_id").with_columns(turn.alias("_turn")).sort(
        "_turn", "sample_id"
    ).head(GALLERY).drop("_turn").to_dicts()  # fmt: skip


def _shown(
    row: Mapping[str, Any], story: Story, sizes: Mapping[str, tuple[int, int]], album: Album
) -> dict[str, Any]:
    pictures = []
    for at, (column, called) in enumerate(story.pictures.items()):
        if not row[column]:
            continue
        image_id = str(row[column]).partition("#")[0]
        album.want(image_id, LARGE)
        width, height = sizes.get(image_id, (1, 1))
        boxes = _boxes(row[story.boxes]) if at == 0 and story.boxes else []
        heat = None
        if at == 0 and story.map:
            size = (width, height) if story.padded else None
            values, down, across = (row[name] for name in story.map)
            heat = charts.heat(values, down, across, size)
        pictures.append(
            {"image": image_id, "called": called, "boxes": boxes, "width": width,
             "height": height, "map": heat}
        )  # fmt: skip
    turns = [(who, str(row[column])) for who, column in story.turns if row.get(column)]
    facts = [
        (name, _cosine(row[column]) if column in story.millionths else str(row[column]))
        for name, column in story.facts
        if row[column] is not None
    ]
    return {"id": row["sample_id"], "pictures": pictures, "turns": turns, "facts": facts}


def _balance(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Samples that came in, and those made on the way, by branching and splitting: in all, as many
    as there are records and drops.
    """
    fates = manifest["counts"]["fates"].get("sample", {})
    total, recorded = sum(fates.values()), fates.get("recorded", 0)
    _, left, lost = next(iter(manifest["yields"]), ("", 0, {}))
    came = left + sum(lost.values())
    return {"total": total, "came": came, "made": total - came, "dropped": total - recorded}


def _boxes(value: Any) -> list[list[int]]:
    """One box, or several one after the other, as rows of four."""
    flat = list(value or ())
    return [flat[at : at + 4] for at in range(0, len(flat), 4)]


def _since_samples(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    said = manifest.get("since")
    if not said or said.get("unreadable"):
        return said
    empty: dict[str, Any] = {"unreadable": None, "added": [], "removed": []}
    return {**empty, **said, "totals": _totals(said["changes"], "sample")}


def _facts(build: Build, contents: Contents, survivors: Table, pairs: Table | None) -> Facts:
    def frame(table: Table, *columns: str) -> pl.DataFrame:
        return tables.frame(build.store, table, columns or None)

    return Facts(
        frame(contents.records) if contents.records.rows else pl.DataFrame(),
        frame(contents.fates),
        frame(contents.eligible),
        frame(contents.captions),
        frame(contents.objects),
        frame(survivors),
        frame(pairs, "pair_id", "query", "target") if pairs else pl.DataFrame(),
    )


def _page(page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_printable,
    )  # fmt: skip
    environment.filters |= {
        "plain": plain,
        "number": "{:,}".format,
        "cosine": _cosine,
        "moved": _moved,
        "money": _money,
    }
    css = (TEMPLATES / "report.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    style, policy = Markup(css), f"sha256-{digest}"
    return environment.get_template("report.html").render(
        **page, style=style, policy=policy, meanings=MEANINGS, small=SMALL
    )


def _printable(value: Any) -> Any:
    return plain(value, TEXT_LIMIT) if type(value) is str else value


def _bills(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per stage what models were asked and paid; money is in 10^-9 of the currency."""
    names = ("calls", "cached", "input_tokens", "output_tokens", "unknown_usage", "lost", "money")
    costs = manifest.get("cost", {}).items()
    return [
        {"stage": stage, **{name: cost.get(name, 0) for name in names}} for stage, cost in costs
    ]


def _money(nano: float) -> str:
    return f"{nano / 1e9:,.2f}" if nano >= 1e8 else f"{nano / 1e9:.6f}"


def _moved(step: int) -> str:
    return f"{step / 1e6:+.4f}".replace("-", MINUS)


def _cosine(score: int) -> str:
    return f"{score / 1e6:.3f}".replace("-", MINUS)


def _about(facts: Facts, wanted: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Name and caption of images: the chosen caption, or the first that its object has."""
    chosen = facts.eligible.join(facts.captions, on="caption_id", how="left")
    rows = (
        wanted.sort("key", "member", nulls_last=False)
        .unique("image_id", keep="first", maintain_order=True)
        .join(chosen.select("image_id", "text"), on="image_id", how="left")
        .with_columns(caption=pl.coalesce("text", pl.col("captions").list.first()))
    )
    return {row["image_id"]: row for row in rows.iter_rows(named=True)}


def _objects_funnel(facts: Facts, manifest: Mapping[str, Any], album: Album) -> list[Any]:
    counts = manifest["counts"]["fates"].get("object", {})
    left = total = sum(counts.values())
    steps = []
    for name, fates in OBJECT_STEPS:
        left -= sum(counts.get(fate, 0) for fate in fates)
        drops = [_drop(facts, fate, counts[fate], album) for fate in fates if counts.get(fate)]
        steps.append({"name": name, "count": left, "of": total, "drops": drops})
    return steps


def _pairs_funnel(facts: Facts, album: Album) -> list[Any]:
    fates = facts.fates.filter(pl.col("level") == "pair")
    counts = dict(fates.group_by("fate").len().sort("len", "fate", descending=True).iter_rows())
    reverse, published = counts.pop("reverse_kept", 0), counts.pop("published", 0)
    mined = published + sum(counts.values())
    drops = [_pair_drop(facts, fates, fate, count, album) for fate, count in counts.items()]
    first = [{"fate": "reverse_kept", "count": reverse, "reasons": [], "examples": []}]
    return [
        {"name": "pairs mined", "count": mined, "of": mined, "drops": first if reverse else []},
        {"name": "records", "count": published, "of": mined, "drops": drops},
    ]


def _drop(facts: Facts, fate: str, count: int, album: Album) -> dict[str, Any]:
    """Objects of one fate; image ids are SHA-256, so those of least id are a fair draw."""
    rows = facts.fates.filter((pl.col("level") == "object") & (pl.col("fate") == fate))
    if fate not in WITHOUT_PICTURE:
        rows = rows.sort("image_id", "id").unique("image_id", keep="first", maintain_order=True)
    shown = rows.sort("image_id", "id").head(COUPLES if fate == "near_duplicate" else EXAMPLES)
    examples = [_example(row, album) for row in shown.iter_rows(named=True)]
    return {"fate": fate, "count": count, "reasons": [], "examples": examples}


def _example(row: Mapping[str, Any], album: Album) -> dict[str, Any]:
    fate, value, detail = row["fate"], row["value"], row["detail"]
    notes = {
        "near_duplicate": f"pHash distance {value}",
        "exact_duplicate": f"copy of {posixpath.basename(detail or '')}",
        "low_clip_score": f"fit {_cosine(value or 0)}",
        "too_small": f"short side {value} px",
        "extreme_aspect": f"{(value or 0) / 1000:.1f} : 1",
    }
    note = notes.get(fate, "" if fate == "unpaired" else detail or "")
    image = None if fate in WITHOUT_PICTURE else row["image_id"]
    other = detail if fate == "near_duplicate" else None
    album.want(image)
    album.want(other)
    return {"image": image, "other": other, "name": row["id"], "note": note}


def _pair_drop(
    facts: Facts, fates: pl.DataFrame, fate: str, count: int, album: Album
) -> dict[str, Any]:
    rows = fates.filter(pl.col("fate") == fate)
    details = rows["detail"].drop_nulls().value_counts().sort("count", "detail", descending=True)
    examples = []
    if facts.pairs.width:
        shown = rows.select("id").sort("id").head(COUPLES).rename({"id": "pair_id"})
        for _, query, target in facts.pairs.join(shown, on="pair_id").sort("pair_id").iter_rows():
            album.want(query)
            album.want(target)
            examples.append({"image": query, "other": target, "name": "", "note": ""})
    return {
        "fate": fate, "count": count, "reasons": list(details.head(4).iter_rows()),
        "examples": examples,
    }  # fmt: skip


def _spaces(build: Build, lists: Mapping[str, Table], bands: Table) -> dict[str, Any]:
    """Per space its band, a histogram of the scores in its lists, and how many are in the band."""
    spaces = {}
    for row in tables.read(build.store, bands).to_pylist():
        parts = tables.shards(build.store, lists[row["space"]], ["scores"])
        found = charts.tally(part["scores"].combine_chunks().flatten().to_numpy() for part in parts)
        low, high = row["low"], row["high"]
        ends = min(low, found.quantile(charts.TAIL)), max(high, found.quantile(1 - charts.TAIL))
        spaces[row["space"]] = {
            **row,
            "band": [_place(low, ends), _place(high, ends)],
            "ends": ends,
            "inside": found.between(low, high),
            "lists": lists[row["space"]].rows,
            "chart": _chart(found, low, high),
        }
    return spaces


def _place(score: int, ends: tuple[int, int]) -> float:
    """Where a score lies between the ends of a space, in per cent."""
    share = (score - ends[0]) / max(1, ends[1] - ends[0])
    return round(100 * min(1.0, max(0.0, share)), 2)


def _track(score: int, space: Mapping[str, Any]) -> dict[str, Any]:
    return {"at": _place(score, space["ends"]), "band": space["band"]}


def _fit(build: Build, filter_facts: Table) -> dict[str, Any]:
    """How well captions fit: a histogram with the cut."""
    rows = tables.frame(build.store, filter_facts)
    cut = rows.filter(pl.col("name") == "cut")["value"]
    values = rows.filter(pl.col("name") == "value")["value"].to_numpy()
    found = charts.tally([values])
    low = int(cut[0]) if len(cut) else 0
    kept = int((values >= low).sum())
    return {"total": len(values), "cut": low, "kept": kept, "chart": _chart(found, low, None)}


def _chart(found: charts.Tally, low: int, high: int | None) -> str | None:
    if not found.total:
        return None
    svg = charts.histogram(found, low, high)
    return Markup("data:image/svg+xml;base64," + base64.b64encode(svg).decode())


def _gallery(facts: Facts, spaces: Mapping[str, Any], album: Album) -> list[dict[str, Any]]:
    if not len(facts.records):
        return []
    order = {pair_id: at for at, pair_id in enumerate(_chosen(facts.records))}
    rows = facts.records.filter(pl.col("pair_id").is_in(list(order))).to_dicts()
    rows.sort(key=lambda row: order[row["pair_id"]])
    # The pair that opens the page is one on which most spaces agree.
    lead = max(rows, key=lambda row: sum(tie["in_band"] for tie in row["ties"]), default=None)
    rows.sort(key=lambda row: row is not lead)
    for row in rows:
        row["others"] = [i for i in row["negatives"] if i != row["query"]][:GALLERY_NEGATIVES]
        row["ties"] = [tie | _track(tie["score"], spaces[tie["space"]]) for tie in row["ties"]]
        album.want(row["query"], LARGE)
        album.want(row["target"], LARGE)
    for image_id in (i for row in rows for i in row["others"]):
        album.want(image_id)
    return rows


def _chosen(records: pl.DataFrame) -> list[str]:
    """Pair ids of a varied gallery: by spaces that agree and fifth of the score, least id first.

    No image is shown twice as query or target while there are others.
    """
    ties = records.select("pair_id", "query", "target", "ties").explode("ties").unnest("ties")
    found = (
        ties.filter("in_band")
        .group_by("pair_id", "query", "target")
        .agg(pl.col("space").sort().str.join("+"), pl.col("score").sum())
        .sort("space", "score", "pair_id")
        .with_columns(at=pl.int_range(pl.len()).over("space"), n=pl.len().over("space"))
        .with_columns(fifth=pl.col("at") * 5 // pl.col("n"))
        .sort("pair_id")
        .with_columns(turn=pl.int_range(pl.len()).over("space", "fifth"))
        .sort("turn", "pair_id")
    )
    fresh, again, seen = list[str](), list[str](), set[str]()
    for pair_id, query, target in found.select("pair_id", "query", "target").iter_rows():
        (again if {query, target} & seen else fresh).append(pair_id)
        seen |= {query, target}
        if len(fresh) == PAIRS:
            break
    return [*fresh, *again][:PAIRS]


def _checks(
    build: Build,
    facts: Facts,
    manifest: Mapping[str, Any],
    checked: Examined | None,
    album: Album,
) -> dict[str, Any]:
    """Rates of the checks and of attacks, and some of what they refused."""
    counts, attacked = manifest.get("checks", {}), manifest.get("attacks")
    told = manifest.get("agreement")
    people = {n: agreement.share(*told[n]) for n in ("scale", "decision")} if told else {}
    return {
        "rates": rates.of_checks(counts),
        "reasons": rates.of_reasons(counts),
        "spaces": rates.of_spaces(counts),
        "places": rates.of_places(counts),
        "back": counts.get("round_trip", {}),
        "people": people,
        "kappa": told["kappa"] if told else None,
        "attacks": list(rates.of_attacks(attacked)) if attacked else [],
        "attacked": attacked,
        "refused": _refused(build, facts, checked, album) if checked else [],
        "false": _false_negatives(build, facts, checked, album) if checked else [],
    }


def _refused(build: Build, facts: Facts, checked: Examined, album: Album) -> list[dict[str, Any]]:
    """Instructions that a judge called wrong, of each reason in turn, one a pair."""
    verdicts = tables.frame(build.store, checked.verdicts).filter(pl.col("verdict") == "wrong")
    rows = verdicts.sort("pair_id", "number").unique("pair_id", keep="first", maintain_order=True)
    rows = rows.join(facts.pairs, on="pair_id", maintain_order="left") if rows.height else rows
    shown = _in_turn(rows.rename({"pair_id": "id"})).head(EXAMPLES).rename({"id": "pair_id"})
    texts = tables.frame(build.store, checked.labels, ["pair_id", "instructions"])
    found = shown.join(texts, on="pair_id", maintain_order="left").to_dicts()
    for row in found:
        row["text"] = row["instructions"][row["number"] - 1]
        album.want(row["query"])
        album.want(row["target"])
    return found


def _false_negatives(
    build: Build, facts: Facts, checked: Examined, album: Album
) -> list[dict[str, Any]]:
    """Hard negatives that fit as well as the target, of those of least pair id, one a pair."""
    fitting = tables.frame(build.store, checked.line_ups).filter(pl.col("verdict") == "fits")
    if not fitting.height:
        return []
    rows = fitting.join(facts.pairs, on="pair_id").filter(pl.col("image_id") != pl.col("target"))
    rows = rows.sort("pair_id", "place").unique("pair_id", keep="first", maintain_order=True)
    texts = tables.frame(build.store, checked.labels, ["pair_id", "instructions"])
    found = rows.head(EXAMPLES).join(texts, on="pair_id", maintain_order="left").to_dicts()
    for row in found:
        for image in ("query", "target", "image_id"):
            album.want(row[image])
    return found


def _groups(survivors: pl.DataFrame, album: Album) -> dict[str, Any]:
    """Groups of near-duplicates: the largest, then others in order of id, the survivor first."""
    lost = survivors.filter(pl.col("image_id") != pl.col("survivor_id"))
    sizes = lost.group_by("survivor_id").len().sort("len", "survivor_id", descending=[True, False])
    rest = sizes.slice(GROUPS).sort("survivor_id")
    shown = [*sizes.head(GROUPS).iter_rows(), *rest.head(GROUPS).iter_rows()]
    groups = []
    for survivor_id, size in shown:
        copies = lost.filter(pl.col("survivor_id") == survivor_id).sort("image_id").head(COPIES)
        rows = list(copies.select("image_id", "distance").iter_rows())
        for image_id in (survivor_id, *(row[0] for row in rows)):
            album.want(image_id)
        groups.append({"survivor": survivor_id, "copies": rows, "more": size - len(rows)})
    return {"shown": groups, "groups": len(sizes), "images": len(lost), "largest": GROUPS}


def _captions(facts: Facts, album: Album) -> dict[str, Any]:
    """How many images have a caption, and the captions that most of them share."""
    named = facts.eligible.drop_nulls("caption_id")
    shared = (
        named.group_by("caption_id")
        .agg(pl.len().alias("images"), pl.col("image_id").sort().head(3))
        .filter(pl.col("images") > 1)
        .sort("images", "caption_id", descending=[True, False])
    )
    top = shared.head(SHARED).join(facts.captions, on="caption_id", maintain_order="left")
    rows = list(top.select("text", "images", "image_id").iter_rows())
    for image_id in (i for _, _, ids in rows for i in ids):
        album.want(image_id)
    return {
        "with": len(named), "of": len(facts.eligible), "distinct": named["caption_id"].n_unique(),
        "sharing": int(shared["images"].sum()), "shared": rows,
    }  # fmt: skip


def _since(
    build: Build, facts: Facts, contents: Contents, manifest: Mapping[str, Any], album: Album
) -> dict[str, Any] | None:
    """The difference from the last version in counts, and some records that came and went.

    Of those that went only such are shown whose pictures are both in this version: the others may
    have been withdrawn.
    """
    said = manifest.get("since")
    if not said or said.get("unreadable"):
        return said
    last = versions.read_manifest(build.store, manifest["dataset"], said["version"])
    old = changes.published(build.store, last)
    new = changes.unpublished(build.store, manifest, contents.fates, contents.records)
    rows = changes.between(old, new).filter(pl.col("level") == "record")
    here = facts.fates.filter(pl.col("level") == "image")["id"].implode()
    found = {}
    for change, side in (("added", new), ("removed", old)):
        both = pl.col("query").is_in(here) & pl.col("target").is_in(here)
        records = side.records.filter(both).rename({"pair_id": "id"})
        chosen = _in_turn(rows.filter(pl.col("change") == change).join(records, on="id"))
        found[change] = chosen.to_dicts()
        for row in found[change]:
            album.want(row["query"])
            album.want(row["target"])
    return {"unreadable": None, **said, **found, "totals": _totals(said["changes"], "pair")}


def _in_turn(rows: pl.DataFrame) -> pl.DataFrame:
    """A few records, of each reason in turn, least id first."""
    ordered = rows.sort("id").with_columns(turn=pl.int_range(pl.len()).over("reason"))
    return ordered.sort("turn", "reason", "id").head(CAME_AND_WENT)


def _totals(counted: Sequence[Sequence[Any]], of: str) -> dict[str, dict[str, int]]:
    """level -> change -> count, of a version of pairs or samples."""
    levels = ("object", "image", of, "record")
    totals: dict[str, dict[str, int]] = {level: {} for level in levels}
    for level, change, _, count in counted:
        totals[level][change] = totals[level].get(change, 0) + count
    return totals


def _course(course: drift.Course) -> dict[str, Any]:
    """A calibrated value with its line over the versions, in a box of 100 by 24."""
    values = [value for _, value in course.points]
    low, high = min(values), max(values)
    # A thousandth at least fills the box: what moves less than that should look still.
    middle, reach = (low + high) / 2, max(high - low, 1_000) / 2
    step = 100 / max(1, len(values) - 1)
    line = [
        f"{at * step:.2f},{12 - 10 * (value - middle) / reach:.2f}"
        for at, value in enumerate(values)
    ]
    return {
        "name": course.name, "setting": course.setting, "pin": course.pin, "now": values[-1],
        "since": course.points[0][0], "least": low, "most": high, "line": " ".join(line),
        "step": values[-1] - values[-2] if len(values) > 1 else None,
    }  # fmt: skip


def _seconds(manifest: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    """Seconds of each stage; those too short to show together."""
    spent = {stage: float(seconds) for stage, seconds in manifest["seconds"].items()}
    long = [(stage, seconds) for stage, seconds in spent.items() if seconds >= SHOWN_SECONDS]
    rest = [seconds for seconds in spent.values() if seconds < SHOWN_SECONDS]
    return [*long, (f"{len(rest)} shorter", sum(rest))] if len(rest) > 1 else [*spent.items()]
