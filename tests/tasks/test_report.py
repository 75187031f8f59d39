"""The report of a tiny version, read back as a browser would: by its elements."""

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra import changes, charts, drift, tables
from infra.build import Build
from infra.canonical import canonical
from infra.cluster import ClusterParams, open_pool
from infra.product import Contents
from infra.schema import SCHEMAS
from infra.store import Location, Store, open_store
from tasks.report import Examined, render
from tests import pictures

ATTACKS = (
    "<img src=x onerror=alert(1)>",
    "</style><script>alert(1)</script>",
    "\x1b[31mred\x1b[0m and \x1b]8;;http://evil\x07link\x1b]8;;\x07",
    "safe\u202egnp.exe\u2066",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}{% for x in y %}",
)


class Page(HTMLParser):
    """Elements with their attributes, the text in them, and the style sheet."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self.within = "", "", [""]
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th", "dt", "dd", "p", "div") else ""
        if tag in ("style", "script"):
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.within[-1]:
            self.within.pop()

    def handle_data(self, data: str) -> None:
        if self.within[-1] == "style":
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split()).replace("\N{MINUS SIGN}", "-")


class World:
    """A corpus of four pictures, the first near the second, and a version of one record."""

    def __init__(self, folder: Path, texts: tuple[str, ...] = ()) -> None:
        self.corpus, self.store = _store(folder / "corpus"), _store(folder / "store")
        captions = [*texts, *("red leaf", "red leaf", "green leaf", "stone")[len(texts) :]]
        self.files = [pictures.jpeg(300, 200, seed) for seed in range(4)]
        self.ids = [hashlib.sha256(data).hexdigest() for data in self.files]
        self.keys = [f"{at}.jpg" for at in range(4)]
        for at, data in enumerate(self.files):
            self.corpus.put(self.keys[at], data)
        self.captions = captions
        self.instructions = [f"Make it {captions[2]}"]
        self.extra: list[dict[str, Any]] = []
        self.judged = False

    def write(self, name: str, rows: list[dict[str, Any]]) -> tables.Table:
        return tables.write(self.store, name, rows)

    def last_version(self) -> dict[str, Any]:
        """Publish a version 2 without this record and with two others: one of its pictures left."""
        gone = {
            "pair_id": "g" * 64, "query": self.ids[2], "target": self.ids[1],
            "instructions": [f"Gone: {self.instructions[0]}"], "negatives": [self.ids[2]],
            "ties": [{"space": "clip_image", "score": 700_000, "rank": 1, "in_band": True}],
        }  # fmt: skip
        left = {**gone, "pair_id": "l" * 64, "target": "f" * 64, "instructions": ["Left for good"]}
        records = pa.Table.from_pylist([gone, left], schema=_schema_of(gone))
        fates = [
            {"level": "image", "id": name, "fate": "paired", "image_id": name, "stage": "publish"}
            for name in (self.ids[1], self.ids[2], "f" * 64)
        ]
        fates += [
            {"level": "pair", "id": row["pair_id"], "fate": "published", "stage": "publish"}
            for row in (gone, left)
        ]
        files = []
        for name, rows in (
            ("records/train.parquet", records),
            ("fates.parquet", pa.Table.from_pylist(fates, schema=SCHEMAS["fates"])),
        ):
            data = tables.encode(rows)
            self.store.put(f"datasets/leaves/v000002/{name}", data)
            sha256 = hashlib.sha256(data).hexdigest()
            files.append({"name": name, "sha256": sha256, "bytes": len(data)})
        last = {**self.manifest(), "version": 2, "files": files}
        self.store.put("datasets/leaves/v000002/manifest.json", canonical(last))
        return last

    def render_after(self, last: dict[str, Any], **more: Any) -> bytes:
        """The report of version 3 after `last`, with the difference that publishing would tell."""
        contents = self.contents()
        manifest = {**self.manifest(), **more}
        new = changes.unpublished(self.store, manifest, contents.fates, contents.records)
        rows = changes.between(changes.published(self.store, last), new)
        since = changes.summary(last, manifest, rows)
        return self.render(since=since, history=drift.history(last), **more)

    def render(self, **more: Any) -> bytes:
        with open_pool(ClusterParams(kind="threads")) as pool:
            build = Build(self.corpus, self.store, pool)
            arguments = [
                self.contents(),
                self.survivors(),
                self.facts(),
                self.lists(),
                self.bands(),
            ]
            manifest = {**self.manifest(), **more}
            examined = self.examined() if self.judged else None
            return render(build, *arguments, manifest, pairs=self.pairs(), checked=examined)

    def examined(self) -> Examined:
        """A judge called the second instruction of a pair wrong, and one of its negatives fit."""
        texts = ["Make it stone", *self.instructions]
        labels = [{"pair_id": "q" * 64, "instructions": texts}]
        said = [("fits", "none"), ("wrong", "untrue")]
        verdicts = [
            {"pair_id": "q" * 64, "number": at, "verdict": verdict, "reason": reason}
            for at, (verdict, reason) in enumerate(said, 1)
        ]
        line_ups = [
            {"pair_id": "q" * 64, "place": at, "image_id": image, "verdict": "fits"}
            for at, image in enumerate((self.ids[1], self.ids[3]), 1)
        ]
        return Examined(
            self.write("labels", labels),
            self.write("verdicts", verdicts),
            self.write("line_ups", line_ups),
        )

    def contents(self) -> Contents:
        ids, captions = self.ids, self.captions
        keys = [f"c{at}" for at in range(4)]
        tie = {"space": "clip_image", "score": 870_000, "rank": 2, "in_band": True}
        record = {
            "pair_id": "p" * 64, "query": ids[1], "target": ids[2], "negatives": [ids[1], ids[3]],
            "instructions": self.instructions, "description": None, "ties": [tie],
            "labeller": "captions", "model": None, "licence": "CC0-1.0", "split": "train",
        }  # fmt: skip
        objects = [
            {"key": k, "stamp": "1", "size": len(d), "image_id": i, "captions": [c], "licence": "x"}
            for k, d, i, c in zip(self.keys, self.files, ids, captions, strict=True)
        ]
        lost = {"near_duplicate": (0, 3, ids[1]), "low_clip_score": (3, -120_000, "neg_clip_loss")}
        fates = [
            {"level": "object", "id": self.keys[at], "fate": fate, "stage": "s", "rule": fate,
             "value": value, "detail": detail, "image_id": ids[at]}
            for fate, (at, value, detail) in lost.items()
        ]  # fmt: skip
        fates += [
            {"level": "object", "id": self.keys[at], "fate": "paired", "stage": "publish",
             "image_id": ids[at]}
            for at in (1, 2)
        ]  # fmt: skip
        fates += [
            {"level": "image", "id": ids[at], "fate": "paired", "stage": "publish",
             "image_id": ids[at]}
            for at in (1, 2)
        ]  # fmt: skip
        fates += [
            {"level": "pair", "id": "p" * 64, "fate": "published", "stage": "publish"},
            {"level": "pair", "id": "q" * 64, "fate": "captions_say_nothing",
             "stage": "label_pairs", "detail": "no difference"},
        ]  # fmt: skip
        records = tables.write(self.store, "records", pa.Table.from_pylist([record]))
        return Contents(
            records,
            self.write("fates", fates + self.extra),
            tables.Table("images"),
            self.write("eligible", [
                {"image_id": ids[at], "caption_id": keys[at], "clip_score": 300_000}
                for at in (1, 2)
            ]),
            self.write("captions", [
                {"caption_id": k, "text": c} for k, c in zip(keys, captions, strict=True)
            ]),
            self.write("objects", objects),
        )  # fmt: skip

    def survivors(self) -> tables.Table:
        first, *others = self.ids
        rows = [{"image_id": i, "survivor_id": i, "distance": 0, "score": 10**6} for i in others]
        rows.append({"image_id": first, "survivor_id": others[0], "distance": 3, "score": 990_000})
        return self.write("survivors", rows)

    def facts(self) -> tables.Table:
        values = [{"name": "value", "value": v} for v in (-120_000, 40_000, 90_000)]
        return self.write("facts", [{"name": "cut", "value": 10_000}, *values])

    def lists(self) -> dict[str, tables.Table]:
        rows = [{"row": at, "neighbours": [1 - at], "scores": [870_000]} for at in (0, 1)]
        return {"clip_image": self.write("lists", rows)}

    def bands(self) -> tables.Table:
        band = {"space": "clip_image", "low": 800_000, "high": 960_000, "scores": 2}
        return self.write("bands", [{**band, "truncated": 2, "crowded": 0}])

    def pairs(self) -> tables.Table:
        ids = self.ids
        return self.write("pairs", [{"pair_id": "q" * 64, "query": ids[2], "target": ids[1]}])

    def manifest(self) -> dict[str, Any]:
        objects = {"paired": 2, "near_duplicate": 1, "low_clip_score": 1}
        for row in self.extra:
            objects[row["fate"]] = objects.get(row["fate"], 0) + 1
        return {
            "dataset": "leaves", "version": 3, "digest": "d" * 64, "config_digest": "e" * 64,
            "created": "2026-11-20T22:34:28+00:00", "code": {"pairmill": "0.1", "python": "3.11"},
            "counts": {
                "objects": sum(objects.values()), "images": 4, "eligible": 2, "pairs": 2,
                "records": 1, "splits": {"train": 1}, "licences": {"CC0-1.0": 1},
                "fates": {"object": objects, "pair": {"published": 1, "captions_say_nothing": 1}},
            },
            "config": {
                "clip_score": {"model": "clip", "keep": "neg_clip_loss", "fraction": "0.9"},
                "pairs": {"targets": 3},
            },
            "clip_score_cut": 10_000,
            "work": {"images_decoded": 4}, "mining": {"pairs_with_too_few_negatives": 1},
            "seconds": {"describe": "1.25", "mine_pairs": "0.5"},
        }  # fmt: skip


def _schema_of(row: dict[str, Any]) -> pa.Schema:
    return pa.Table.from_pylist([row]).schema


def _store(folder: Path) -> Store:
    folder.mkdir(exist_ok=True)
    return open_store(Location(uri=str(folder)))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_counts_reasons_and_pairs_are_told(world: World) -> None:
    page = Page(world.render())
    assert "4 objects went in; 1 record came out." in page.words
    for told in (
        "-1 near duplicate", "-1 low clip score", "pHash distance 3", "fit -0.120", "Cut: 0.010.",
        "2 images in a record", "2 pairs mined", "-1 captions say nothing", "1 records",
        "Make it green leaf", "0.870 rank 2", "2 of 2 neighbours, 100.0 %, are in the band",
        "2 of 3 captioned pictures, 66.7 %, lie at or above the cut", "3 bits",
        "2 of 2 eligible images, 100.0 %, have a caption", "describe 1.2 ", "targets: 3",
        "pairs with too few negatives 1", "CC0-1.0 1",
    ):  # fmt: skip
        assert told in page.words


def test_the_first_version_says_that_it_is_the_first(world: World) -> None:
    page = Page(world.render())
    assert "There is no version before this one to compare it with." in page.words
    assert "caption cut clip neg_clip_loss, fraction 0.9 0.010 new" in page.words
    assert "clip_score: {cut: 0.010000}" in page.words


def test_what_came_and_went_is_told_and_shown(world: World) -> None:
    page = Page(world.render_after(world.last_version()))
    for told in (
        "Since version 2", "records 1 2 0", "New records 1 of 1 shown", "Make it green leaf",
        "Records that are gone 1 of 2 shown", "Gone: Make it green leaf",
        "images removed left the corpus 1", "pairmill diff 2 3",
        "0.010 +0.0000 0.010 to 0.010 from version 2",
    ):  # fmt: skip
        assert told in page.words, told


def test_of_a_record_whose_picture_left_nothing_is_shown(world: World) -> None:
    html = world.render_after(world.last_version())
    assert b"Left for good" not in html
    assert b"l" * 12 not in html
    assert b"f" * 12 not in html


def test_a_changed_setting_is_named(world: World) -> None:
    last = world.last_version()
    config = {**last["config"], "pairs": {"targets": 9}}
    page = Page(world.render_after(last, config=config))
    assert "pairs.targets 3 to 9" in page.words
    world.store.put("datasets/leaves/v000002/fates.parquet", b"PAR1")
    since = {"version": 2, "unreadable": "fates.parquet of version 2 is damaged"}
    assert "fates.parquet of version 2 is damaged" in Page(world.render(since=since)).words


def test_a_refused_build_says_so_first(world: World) -> None:
    said = ["publish.gates.min_records is 9, this build has 1"]
    page = Page(world.render(version=None, refused=said))
    assert "report of a build that was refused" in page.words
    assert "1 record would have come out. Refused on 2026-11-20" in page.words
    assert said[0] in page.words
    assert "--set publish.gates.min_records=" in page.words
    assert "version None" not in page.words.lower()


CHECKS = {
    "judge_labels": {
        "pairs": 10, "unjudged": 0, "verdict fits": 24, "verdict partly": 3, "verdict wrong": 3,
        "reason untrue": 4, "reason vague": 2, "reason none": 24,
    },
    "line_up": {
        "pairs": 20, "preferred": 17, "checked all": 60, "fits all": 6, "partly all": 2,
        "checked clip_image low": 40, "fits clip_image low": 2, "checked dino high": 20,
        "fits dino high": 4, "best A": 12, "best B": 8, "target A": 9, "target B": 11,
        "target said fits": 19,
    },
    "round_trip": {"pairs": 9, "instructions": 25, "preferred": 20, "margin": 500_000,
                   "chance": 5_000_000},
}  # fmt: skip
ATTACKED = {
    "created": "2026-11-21T05:00:00+00:00", "labeller": "tiny", "judge": "big", "pairs": 4,
    "outcomes": [
        {"on": "labels", "where": "caption", "name": "ignore", "trials": 4, "obeyed": 1,
         "broken": 1},
        {"on": "labels", "where": "caption", "name": "control", "trials": 4, "obeyed": 0,
         "broken": 0},
    ],
}  # fmt: skip
AGREEMENT = {"scale": [45, 50], "decision": [48, 50], "kappa": "0.750"}


def test_checks_are_told_with_their_intervals_and_what_they_refused(world: World) -> None:
    world.judged = True
    html = world.render(checks=CHECKS, attacks=ATTACKED, agreement=AGREEMENT)
    page = Page(html)
    for told in (
        "judge agrees with people on the scale, by the gold set; Cohen's kappa 0.750 90.0 % "
        "45 of 50 78.6 to 95.7",
        "judged to fit of instructions judged 80.0 % 24 of 30 62.7 to 90.5",
        "target preferred by the judge of pairs lined up 85.0 % 17 of 20",
        "false negatives of hard negatives checked 10.0 % 6 of 60",
        "clip image, low 5.0 % 2 of 40",
        "dino, high 20.0 % 4 of 20",
        "untrue 4",
        "vague 2",
        "A 9 12 B 11 8",
        "leads the best hard negative by 0.020 on average; by chance it would be preferred in "
        "20.0 %",
        "labels attacks in the caption 50.0 % 2 of 4",
        "labels control, which asks for nothing, in the caption 0.0 % 0 of 4",
        "measured on 2026-11-21, labels by tiny, judge big",
        "Instructions that were judged wrong source and target Make it green leaf untrue",
        "Hard negatives that fit as well source, target, the negative Make it stone",
    ):
        assert told in page.words, told
    world.judged = False
    assert len(page.all("img")) == len(Page(world.render()).all("img")) + 5


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_may_be_the_only_one(world: World, check: str) -> None:
    page = Page(world.render(checks={check: CHECKS[check]}))
    led = "leads the best hard negative by 0.020 on average" in page.words
    assert led == (check == "round_trip")


def test_checks_that_are_off_say_so(world: World) -> None:
    page = Page(world.render())
    assert "Checks None was on. The config's section checks has" in page.words
    assert "checks" in [attrs.get("id") for attrs in page.all("section")]


def test_what_models_say_is_text_and_nothing_else(world: World) -> None:
    """Words, reasons and names of models are hostile, from the answer to the page."""
    world.judged = True
    calm = Page(world.render(checks=CHECKS, attacks=ATTACKED, agreement=AGREEMENT))
    for hostile in ATTACKS:
        world.instructions = [hostile, hostile]
        attacked = {**ATTACKED, "labeller": hostile, "judge": hostile, "created": hostile}
        counts = {"judge_labels": {**CHECKS["judge_labels"], f"reason {hostile}": 9}}
        html = world.render(
            checks={**CHECKS, **counts}, attacks=attacked,
            agreement={**AGREEMENT, "kappa": hostile},
        )  # fmt: skip
        page = Page(html)
        allowed = {name for name, _ in calm.elements}
        assert {name for name, _ in page.elements} <= allowed
        names = {key for _, attrs in page.elements for key in attrs}
        assert not [key for key in names if key.startswith("on")]
        assert b"\x1b" not in html and "\u202e".encode() not in html
        assert b"javascript:" not in html


def test_every_picture_is_in_the_page_and_has_words(world: World) -> None:
    page = Page(world.render())
    sources = [str(img["src"]) for img in page.all("img")]
    assert len(sources) > 8
    assert all(s.startswith(("data:image/webp;base64,", "data:image/svg+xml;")) for s in sources)
    assert all(img["alt"] for img in page.all("img"))
    assert {"red leaf", "green leaf", "stone"} <= {img["alt"] for img in page.all("img")}


def test_every_element_and_class_is_one_that_the_style_knows(world: World) -> None:
    world.judged = True
    told = {"checks": CHECKS, "attacks": ATTACKED, "agreement": AGREEMENT}
    page = Page(world.render_after(world.last_version(), **told))
    classes = {c for _, attrs in page.elements for c in (attrs.get("class") or "").split()}
    assert {"kept", "start"} <= classes
    assert {c for c in classes if f".{c}" not in page.style} <= {"digest"}
    assert all(tag.isalnum() and len(tag) <= 10 for tag, _ in page.elements)
    assert any("open" in attrs for attrs in page.all("details"))


def test_equal_inputs_give_equal_bytes(world: World) -> None:
    assert world.render() == world.render()


def test_policy_allows_the_style_and_nothing_else(world: World) -> None:
    page = Page(world.render())
    meta = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert meta["content"] == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not page.all("script")
    assert not page.all("link")
    assert all(
        name != "style" and not name.startswith("on")
        for _, attrs in page.elements
        for name in attrs
    )
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_untrusted_text_stays_text(tmp_path: Path, attack: str) -> None:
    calm = World(tmp_path)
    calm = Page(calm.render_after(calm.last_version()))
    world = World(tmp_path, (attack,) * 4)
    world.instructions = [attack]
    world.extra = [
        {"level": "object", "id": f"{attack}.jpg", "fate": "unreadable", "stage": "describe",
         "rule": "unreadable", "detail": attack}
    ]  # fmt: skip
    html = world.render_after(world.last_version())
    page = Page(html)
    # Nothing but the elements of the report itself, which has one reason more to tell of.
    more = [tag for tag, _ in page.elements if tag not in {t for t, _ in calm.elements}]
    assert more == []
    assert len(page.all("img")) == len(calm.all("img"))
    assert {name for _, attrs in page.elements for name in attrs} == {
        name for _, attrs in calm.elements for name in attrs
    }
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(html.decode())
    shown = {
        ATTACKS[2]: "red and link", ATTACKS[3]: "safegnp.exe",
    }.get(attack, attack)  # fmt: skip
    assert page.words.count(shown) >= 4
    assert shown in {img["alt"] for img in page.all("img")}


def test_a_caption_without_end_is_cut(tmp_path: Path) -> None:
    short = len(World(tmp_path).render())
    assert len(World(tmp_path, ("word " * 100_000,) * 4).render()) < short + 10_000


def test_pictures_stop_where_the_page_would_grow_too_big(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.report.PICTURE_BYTES", 1)
    page = Page(world.render())
    assert all("svg" in str(img["src"])[:20] for img in page.all("img"))
    assert "not shown" in page.words


def test_a_picture_that_changed_is_named_and_not_shown(world: World) -> None:
    world.corpus.put(world.keys[2], pictures.jpeg(300, 200, 99))
    world.corpus.delete(world.keys[3])
    page = Page(world.render())
    alts = {img["alt"] for img in page.all("img")}
    assert "not shown" in page.words
    assert "red leaf" in alts
    assert not {"green leaf", "stone"} & alts


def test_a_version_without_records_says_so(world: World) -> None:
    full = world.contents
    world.contents = lambda: full()._replace(  # type: ignore[method-assign]
        records=tables.Table("records"), eligible=tables.Table("eligible")
    )
    world.lists = lambda: {"clip_image": tables.Table("lists")}  # type: ignore[method-assign]
    world.facts = lambda: world.write(  # type: ignore[method-assign]
        "facts", [{"name": "cut", "value": 0}]
    )
    counts = {**world.manifest()["counts"], "records": 0, "splits": {}, "licences": {}}
    page = Page(world.render(counts=counts))
    assert "This version has no records." in page.words
    assert "No neighbours in this space." in page.words
    assert "No picture has a caption." in page.words


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1_000_000] * 9, 1_000_000, 1_000_000),
        ([-1_000_000, 0, 1_000_000], 0, None),
        ([5], 800_000, 960_000),
        (list(range(994_000, 998_000)), 995_000, 997_500),
    ],
)
def test_histograms_of_odd_scores(scores: list[int], low: int, high: int | None) -> None:
    found = charts.tally([np.array(scores)])
    assert found.total == len(scores)
    svg = charts.histogram(found, low, high)
    assert svg == charts.histogram(found, low, high)
    assert b"<text" in svg
    assert b"<dc:date>" not in svg


def test_tally_counts_within_a_step() -> None:
    found = charts.tally([np.array([100_000, 500_000]), np.array([900_000])])
    assert found.between(100_000, 500_000) == 2
    assert found.between(500_000, None) == 2
    assert abs(found.quantile(0.5) - 500_000) <= charts.STEP
