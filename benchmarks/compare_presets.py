"""MegaPairs by the paper's settings and by ours, on one corpus with the sample's models.

    python benchmarks/compare_presets.py CORPUS

Near-duplicates among pairs are told by our own deduplication: query and target have one survivor.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from flows.build import stages
from flows.config import open_build, parse_config
from infra import tables, versions
from infra.build import Build
from infra.tables import Table

SAMPLE = Path(__file__).parents[1] / "sample"


def config(corpus: Path, store: Path, preset: str) -> dict[str, Any]:
    return {
        "dataset": preset,
        "preset": preset,
        "corpus": {"uri": str(corpus.resolve())},
        "store": {"uri": str(store)},
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
    }


def measured(run: Build, result: dict[str, Any], survivors: pl.DataFrame) -> dict[str, str]:
    """What a preset came to, by name."""
    manifest = versions.find_version(run.store, result["dataset"], "latest")
    named = manifest["tables"]
    pairs = tables.frame(run.store, Table.from_json(named["mine_pairs"]["pairs"]))
    found = {
        "images": f"{manifest['counts']['images']:,}",
        "left by dedup and caption filter": f"{manifest['counts']['eligible']:,}",
        "pairs": f"{pairs.height:,}",
        "labelled from captions": f"{manifest['counts']['records']:,}",
    }
    ties = pairs.select("pair_id", "ties").explode("ties").unnest("ties").filter(pl.col("in_band"))
    for space, count in sorted(ties["space"].value_counts().iter_rows()):
        occupied, of = manifest["occupied"][space], manifest["members"][space]
        found[f"pairs in the band of {space}"] = f"{count:,}"
        found[f"images with a neighbour in the band of {space}"] = f"{occupied / of:.1%}"
    of = dict(survivors.iter_rows())
    same = sum(of.get(a, a) == of.get(b, b) for a, b in pairs.select("query", "target").iter_rows())
    found["near-duplicates among pairs"] = f"{same / max(1, pairs.height):.1%}"
    wanted = pairs["negatives"].list.len()
    found["hard negatives a pair"] = f"{wanted.mean():.2f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    corpus = parser.parse_args().corpus
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        survivors = pl.DataFrame()
        for preset in ("ours", "paper"):
            parsed = parse_config(config(corpus, Path(folder) / "store", preset))
            with open_build(parsed) as run:
                result = {"dataset": preset, **stages(run, parsed)}
                if survivors.is_empty():
                    manifest = versions.find_version(run.store, preset, "latest")
                    table = Table.from_json(manifest["tables"]["deduplicate"]["survivors"])
                    survivors = tables.frame(run.store, table, ["image_id", "survivor_id"])
                rows[preset] = measured(run, result, survivors)
    print("| | the paper's settings | ours |\n|---|---:|---:|")
    for name in dict.fromkeys([*rows["paper"], *rows["ours"]]):
        print(f"| {name} | {rows['paper'].get(name, '0')} | {rows['ours'].get(name, '0')} |")


if __name__ == "__main__":
    main()
