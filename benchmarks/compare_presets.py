"""MegaPairs by the paper's settings and by ours, on one corpus with the sample's models.

    python benchmarks/compare_presets.py CORPUS
        [--judge URL --model NAME]    false negatives by the line-up
        [--sheets FOLDER]             cases for a reader, the presets mixed
        [--gold FILE]                 false negatives by the verdicts of a reader

Near-duplicates among pairs are told by our own deduplication: query and target have one survivor.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from false_negatives import Case, cases_of, judged, rate, sheets

from flows.build import known, stages
from flows.config import BuildConfig, open_build, parse_config
from infra import corpus, gold, tables, versions
from infra.agreement import share
from infra.build import Build
from infra.tables import Table
from tasks.round_trip import RoundTripping, round_trip

SAMPLE = Path(__file__).parents[1] / "sample"
PRESETS = {"paper": "the paper's settings", "ours": "ours"}
SPACES = ("clip_image", "clip_text", "dino")

Row = tuple[str, str]


class Arguments(NamedTuple):
    """The command line."""

    corpus: Path
    store: Path
    judge: str | None
    model: str | None
    sheets: Path | None
    gold: Path | None
    cases: int


def config(given: Arguments, preset: str) -> BuildConfig:
    """One preset over the corpus; with a judge, the line-up over every labelled pair."""
    checks: dict[str, Any] = {}
    if given.judge:
        endpoint = {"url": given.judge, "model": given.model}
        checks = {"judge": {"endpoint": endpoint}, "line_up": {"share": 1.0, "unjudged": "keep"}}
    written = {
        "dataset": preset,
        "preset": preset,
        "corpus": {"uri": str(given.corpus.resolve())},
        "store": {"uri": str(given.store.resolve())},
        "models": {
            "clip": {"library": "open_clip", "name": str(SAMPLE / "models/clip")},
            "dino": {"library": "timm", "name": str(SAMPLE / "models/dino")},
        },
        "spaces": {
            "clip_image": {"model": "clip"},
            "dino": {"model": "dino"},
            "clip_text": {"model": "clip", "of": "caption"},
        },
        "pairs": {"targets": 3},
        "checks": checks,
    }
    parsed: BuildConfig = parse_config(written)
    return parsed


class Built(NamedTuple):
    """A preset's version: its manifest and the tables that are measured."""

    manifest: dict[str, Any]
    survivors: pl.DataFrame
    pairs: pl.DataFrame
    labels: pl.DataFrame
    objects: pl.DataFrame
    captions: pl.DataFrame

    @property
    def labelled(self) -> pl.DataFrame:
        """Pairs with instructions."""
        return self.pairs.join(self.labels, on="pair_id", how="semi")


def built(run: Build, parsed: BuildConfig) -> Built:
    """Build a preset, where that is not done, and read what is measured."""
    stages(run, parsed)
    manifest = versions.find_version(run.store, parsed.dataset, "latest")

    def read(stage: str, name: str) -> pl.DataFrame:
        return tables.frame(run.store, Table.from_json(manifest["tables"][stage][name]))

    captions = read("filter_captions", "eligible").join(
        read("describe", "captions"), on="caption_id"
    )
    return Built(
        manifest,
        read("deduplicate", "survivors"),
        read("mine_pairs", "pairs"),
        read("label_pairs", "labels"),
        read("describe", "objects"),
        captions.select("image_id", "text"),
    )


def yields(found: Built) -> Iterator[Row]:
    """What each stage left, and where in the bands pairs lie."""
    counts, members = found.manifest["counts"], found.manifest["members"]
    yield "objects", f"{counts['objects']:,}"
    yield "distinct pictures", f"{counts['images']:,}"
    survivors = found.survivors["survivor_id"].n_unique()
    yield "left by the removal of near-duplicates", f"{survivors:,}"
    yield "left by the filter of captions", f"{counts['eligible']:,}"
    yield "with a target", f"{found.pairs['query'].n_unique():,}"
    yield "pairs", f"{found.pairs.height:,}"
    yield "labelled from captions", f"{found.labels.height:,}"
    ties = found.pairs.explode("ties").unnest("ties").filter(pl.col("in_band"))
    pairs = dict(ties["space"].value_counts().iter_rows())
    for space in SPACES:
        reached = found.manifest["occupied"][space] / members[space]
        yield f"pairs in the band of `{space}`", f"{pairs.get(space, 0):,}"
        yield f"images with a neighbour in the band of `{space}`", f"{100 * reached:.1f} %"


def near_duplicates(found: Built, survivor: Mapping[str, str]) -> Iterator[Row]:
    """Pairs of images that have one survivor by our deduplication."""
    ends = found.pairs.select("query", "target").iter_rows()
    same = sum(survivor[a] == survivor[b] for a, b in ends)
    yield "near-duplicates among pairs", part(same, found.pairs.height)


def by_round_trip(run: Build, parsed: BuildConfig, found: Built) -> Iterator[Row]:
    """How near hard negatives are to query and instruction, by the check that asks no model.

    All of a pair at once, as the check counts; and one by one, which is fair to presets that have
    more of them.
    """
    yield (
        "hard negatives a pair, with the query",
        f"{found.pairs['negatives'].list.len().mean():.2f}",
    )
    _, seen = known(run, parsed, lambda stage: stage)
    labels = tables.write_frame(run.store, "labels", found.labels)
    params = RoundTripping(
        mode="report", weight=0.25, needed=1, model=parsed.models["clip"], device="cpu"
    )

    def counted(pairs: pl.DataFrame) -> Counter[str]:
        written = tables.write_frame(run.store, "pairs", pairs)
        back = round_trip(run, written, labels, seen.vectors["clip"], seen.texts["clip"], params)
        facts = tables.read(run.store, back.facts).to_pylist()
        return Counter({fact["name"]: fact["value"] for fact in facts})

    first = counted(found.labelled)
    yield (
        "round trip: target before all hard negatives",
        part(first["preferred"], first["instructions"]),
    )
    one_by_one = Counter[str]()
    for place in range(1, parsed.pairs.negatives):
        one = pl.concat_list(
            pl.col("negatives").list.get(at, null_on_oob=True) for at in (0, place)
        )
        has = found.labelled.filter(pl.col("negatives").list.len() > place)
        one_by_one += counted(has.with_columns(negatives=one))
    asked = one_by_one["instructions"]
    yield (
        "round trip: a hard negative as near as the target",
        part(asked - one_by_one["preferred"], asked),
    )


def part(count: int, of: int) -> str:
    """A share for a table."""
    return f"{100 * count / max(1, of):.1f} % ({count:,} of {of:,})"


def by_line_up(found: Built) -> Iterator[Row]:
    """Hard negatives that the judge says fit."""
    counts = found.manifest["checks"].get("line_up")
    if counts:
        false = share(counts.get("fits all", 0), counts.get("checked all", 0))
        yield "false negatives among hard negatives, by the judge", rate(false)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--store", type=Path, help="keep the store here; a second run is quick")
    parser.add_argument("--judge", help="URL of an endpoint that speaks the OpenAI protocol")
    parser.add_argument("--model", help="its model")
    parser.add_argument("--sheets", type=Path, help="write cases for a reader here")
    parser.add_argument("--gold", type=Path, help="verdicts on such cases, as `pairmill gold` has")
    parser.add_argument("--cases", type=int, default=120, help="cases of each preset")
    given = vars(parser.parse_args())
    if bool(given["judge"]) != bool(given["model"]):
        parser.error("--judge and --model go together")
    with tempfile.TemporaryDirectory() as folder:
        compare(Arguments(**{**given, "store": given["store"] or Path(folder) / "store"}))


def compare(given: Arguments) -> None:
    """Build both presets, print the table, and draw the sheets that are asked for."""
    verdicts = gold.settled(gold.read(given.gold)).verdicts if given.gold else []
    rows: dict[str, dict[str, str]] = {}
    cases: list[Case] = []
    survivors: dict[str, str] = {}
    for preset in reversed(PRESETS):  # ours first: its survivors tell near-duplicates of both
        parsed = config(given, preset)
        with open_build(parsed) as run:
            found = built(run, parsed)
            survivors = survivors or dict(found.survivors.select("image_id", "survivor_id").rows())
            chosen = cases_of(found.pairs, found.labels, given.cases)
            cases += chosen
            rows[preset] = dict(
                [
                    *yields(found),
                    *near_duplicates(found, survivors),
                    *by_round_trip(run, parsed, found),
                    *by_line_up(found),
                    *judged(chosen, verdicts),
                ]
            )
    if given.sheets:
        captions = dict(found.captions.iter_rows())
        sheets(run.corpus, corpus.sources(found.objects), captions, cases, given.sheets)
    print(f"| | {' | '.join(PRESETS.values())} |\n|---|{'---:|' * len(PRESETS)}")
    for name in rows["ours"]:
        print(f"| {name} | {' | '.join(rows[preset][name] for preset in PRESETS)} |")


if __name__ == "__main__":
    main()
