"""The whole build on real pictures: what it finds, and that doing it again does nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config
from flows.plan import plan
from infra.errors import Refused


def version_folder(result):
    return Path(result["manifest"]).parent


def test_a_build_balances_and_publishes(few, build):
    result = build(few)
    assert sum(result["fates"].values()) == result["work"]["objects_listed"] == 151
    assert result["fates"]["metadata"] == 1
    assert result["pairs"] > 0
    records = pl.read_parquet(version_folder(result) / "records" / "*.parquet")
    assert len(records) == result["records"]
    fates = pl.read_parquet(version_folder(result) / "fates.parquet")
    paired = fates.filter((pl.col("level") == "image") & (pl.col("fate") == "paired"))
    assert set(paired["id"]) == {*records["query"], *records["target"]}


def test_a_second_build_does_nothing_and_names_the_first(few, build):
    first, second = build(few), build(few)
    assert second["version"] == first["version"] == 1
    assert second["digest"] == first["digest"]
    assert not second["fresh"]
    work = {name: count for name, count in second["work"].items() if name != "objects_listed"}
    assert set(work.values()) == {0}


def test_the_digest_is_that_of_the_pictures_not_of_names_places_or_history(few, build, tmp_path):
    result = build(few)
    other = tmp_path / "elsewhere"
    shutil.copytree(few, other)
    moved = build(other, dataset="other", store={"uri": str(tmp_path / "fresh")})
    assert moved["digest"] == result["digest"]


def test_pictures_that_come_and_go_leave_the_digest_of_a_full_build(few, build, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(few, corpus)
    pictures = sorted(p for p in corpus.rglob("*") if p.suffix in (".png", ".jpg"))
    away = {p: p.read_bytes() for p in pictures[::7]}
    for path in away:
        path.unlink()
    without = build(corpus)
    for path, data in away.items():
        path.write_bytes(data)
    grown = build(corpus)
    assert grown["version"] == 2
    assert grown["work"]["images_decoded"] <= len(away)
    assert grown["digest"] == build(few, store={"uri": str(tmp_path / "full")})["digest"]
    for path in away:
        path.unlink()
    assert build(corpus)["digest"] == without["digest"]


def test_a_changed_label_rule_decodes_and_searches_nothing(few, build):
    build(few)
    changed = build(few, pairs={"targets": 1})
    assert changed["work"]["images_decoded"] == changed["work"]["images_embedded"] == 0


def test_a_moved_band_searches_nothing_again(few, build, tmp_path):
    spaces = {"dino": {"model": "dino", "band": {"low": 0.6, "high": 0.9}}}
    before = build(few, spaces={"dino": {"model": "dino"}})
    after = build(few, spaces=spaces)
    assert after["digest"] != before["digest"]
    assert after["work"]["similarities_computed"] < 150 * 100


def test_the_plan_says_what_would_be_done(few, build, config_file):
    config = load_config(config_file(few))
    assert plan(config).items[0].stage == "describe"
    first = build(few)
    done = plan(config)
    assert (done.items, done.version.digest) == ([], first["digest"])
    moved = plan(load_config(config_file(few, pairs={"targets": 1})))
    assert moved.items[0][:2] == ("mine_pairs", "changed parameter targets: 3 to 1")


def test_a_quality_gate_keeps_latest_where_it_was(few, build):
    build(few)
    with pytest.raises(Refused, match=r"publish\.gates\.min_images is 100000"):
        build(few, publish={"gates": {"min_images": 100_000}}, pairs={"targets": 1})
    assert build(few)["version"] == 1


def test_the_command_prints_one_last_line_of_json_and_a_status(few, config_file):
    command = [sys.executable, "-m", "flows.cli", "run", str(config_file(few)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["fates"].values()) == result["work"]["objects_listed"]
    assert Path(result["report"]).is_file()
    for name in ("1", "latest", result["digest"][:8]):
        where = ["-c", command[4]]
        found = subprocess.run(
            [sys.executable, "-m", "flows.cli", "report", name, *where],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert found.stdout.strip() == result["report"]


def test_captions_that_are_not_used_are_counted_in_the_manifest(few, build, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(few, corpus)
    pictures = sorted(p for p in corpus.rglob("*") if p.suffix in (".png", ".jpg"))
    pictures[0].with_suffix(".txt").write_text("x" * 100_000)
    with (corpus / "captions.csv").open("a", encoding="utf-8") as file:
        file.write(f"gone.png,a picture that is not there,cc0\n{pictures[1].name},{'y' * 9000},\n")
    manifest = json.loads(Path(build(corpus)["manifest"]).read_text("utf-8"))
    assert manifest["captions_unused"] == {"caption_of_no_file": 2, "caption_too_long": 2}
