"""Every answer has a why: of objects, images and pairs, there or not there."""

import json

import polars as pl
import pytest
import yaml

from tests.flows.conftest import run_build


@pytest.fixture
def tables(made):
    """The fates and records of the latest version."""
    folder = made.dataset / "v000003"
    return (
        pl.read_parquet(folder / "fates.parquet"),
        pl.read_parquet(folder / "records/*.parquet"),
    )


@pytest.fixture
def why(made, pairmill):
    """The lines of an answer, blanks squeezed."""

    def ask(*words):
        out, status = pairmill("why", *words, "-c", made.config)
        assert status == 0, out
        return [" ".join(line.split()) for line in out.splitlines()]

    return ask


def image_of(fates, key):
    return fates.filter((pl.col("level") == "object") & (pl.col("id") == key))["image_id"][0]


def test_an_object_is_told_from_its_file_to_its_pairs(made, tables, why):
    _, records = tables
    row = records.row(0, named=True)
    lines = why(row["query_key"])
    assert lines[0] == f"object {row['query_key']}"
    assert "fate paired, decided by publish" in lines
    assert f"image {row['query']}" in lines
    assert any(line.startswith("file JPEG,") or line.startswith("file PNG,") for line in lines)
    assert any(line.startswith(f"caption {row['query_caption']} (CLIPScore") for line in lines)
    assert "eligible yes" in lines
    for space in ("clip_image", "dino", "clip_text"):
        assert any(line.startswith(f"{space} band ") and " in band," in line for line in lines)
    pair = f"{row['pair_id'][:12]} target {row['target'][:12]} {row['target_key']} (record)"
    assert pair in lines


def test_neighbours_have_rank_score_and_place(made, tables, why):
    _, records = tables
    row = records.row(0, named=True)
    tie = row["ties"][0]
    lines = why(row["query_key"], "--neighbours", "50")
    place = "in band" if tie["in_band"] else None
    start = f"{tie['rank']} {tie['score'] / 1e6:.4f} {place or ''}".strip()
    assert any(line.startswith(start) and row["target"][:12] in line for line in lines)


def test_a_pair_is_told_with_scores_bands_label_and_negatives(tables, why):
    _, records = tables
    row = records.row(0, named=True)
    lines = why(row["pair_id"][:16])
    assert lines[0] == f"pair {row['pair_id']}"
    for text in row["instructions"]:
        assert f"instruction {text}" in lines
    assert "labeller captions" in lines
    for tie in row["ties"]:
        place = "in band" if tie["in_band"] else ""
        start = f"{tie['space']} score {tie['score'] / 1e6:.4f}, "
        assert any(line.startswith(start) and place in line for line in lines)
    assert any(line.endswith("the query itself") for line in lines)
    others = [line for line in lines if line.startswith("below every band against the target:")]
    assert len(others) == len(row["negatives"]) - 1


def test_negatives_out_of_the_bands_are_told_as_what_they_are(history, pairmill):
    data = yaml.safe_load(history.config.read_text("utf-8"))
    data["pairs"]["negatives_from"] = "retrieved"
    history.config.write_text(yaml.safe_dump(data), "utf-8")
    run_build(data)
    records = pl.read_parquet(history.dataset / "v000004/records/*.parquet")
    row = records.filter(pl.col("negatives").list.len() > 1).row(0, named=True)
    out, _ = pairmill("why", row["pair_id"], "-c", history.config)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    first = next(at for at, line in enumerate(lines) if row["negatives"][1][:12] in line)
    assert "in band" in lines[first]
    against = [line for line in lines if "against the target:" in line]
    assert len(against) == len(row["negatives"]) - 1
    assert any(line.startswith("against the target:") for line in against)


def test_a_near_duplicate_names_its_survivor_with_the_bounds(made, tables, why):
    fates, _ = tables
    lines = why("smaller.png")
    assert "fate near_duplicate, decided by deduplicate" in lines
    survivor = image_of(fates, made.keys[0])
    assert any(line.startswith(f"duplicate of {survivor[:12]}") for line in lines)
    assert any("looked for within 10 bits, alike from 0.8000 on" in line for line in lines)
    stands = [line for line in why(made.keys[0]) if line.startswith("stands for")]
    assert len(stands) == 1
    assert "smaller.png" in stands[0]


def test_a_copy_names_the_object_that_stands_for_it(made, why):
    lines = why("zz copy.jpg")
    assert lines[0] == "object images/zz copy.jpg"
    assert f"copy of {made.keys[0]}" in lines
    assert f"object {made.keys[0]} (stands for the others)" in lines


def test_what_could_not_be_read_says_why(why):
    lines = why("broken.png")
    assert "fate unreadable, decided by describe" in lines
    assert any(line.startswith("because ") for line in lines)


def test_a_caption_that_fits_badly_is_told_with_the_cut(made, tables, why):
    fates, _ = tables
    low = fates.filter((pl.col("level") == "object") & (pl.col("fate") == "low_clip_score"))
    lines = why(low["id"][0])
    manifest = json.loads((made.dataset / "v000003/manifest.json").read_bytes())
    cut = f"{manifest['clip_score_cut'] / 1e6:.4f}"
    said = f"caption fit negCLIPLoss {low['value'][0] / 1e6:.4f}, below the cut {cut}"
    assert said in lines


def test_a_pair_without_a_label_says_by_which_rule(tables, why):
    fates, _ = tables
    pair = fates.filter(pl.col("fate") == "captions_say_nothing").row(0, named=True)
    assert f"no label captions_say_nothing: {pair['detail']}" in why(pair["id"])


def test_two_images_that_are_a_pair(tables, why):
    _, records = tables
    row = records.row(0, named=True)
    assert f"pair {row['pair_id']}" in why(row["query_key"], row["target"][:16])


def test_two_images_that_are_no_pair(made, tables, why):
    fates, records = tables
    assert "no pair they are the same image" in why(made.keys[0], made.keys[0])
    lost = why(made.keys[0], "smaller.png")
    assert "no pair the target is not eligible: near_duplicate" in lost
    assert any(line.startswith("duplicate of") for line in lost)
    row = records.row(0, named=True)
    mined = set(records.filter(pl.col("query") == row["query"])["target"])
    eligible = fates.filter(
        (pl.col("level") == "image") & pl.col("fate").is_in(["paired", "unpaired"])
    )["id"]
    said = [
        line
        for other in eligible
        if other not in mined and other != row["query"]
        for line in why(row["query"], other)
        if line.startswith(("no pair", "no label"))
    ]
    assert said.count("no pair in no space is it both listed and in the band") > 0
    assert any("but the query has 2 targets before it (pairs.targets is 2" in line for line in said)


def test_another_version_can_be_asked(made, pairmill):
    out, status = pairmill("why", made.keys[5], "-c", made.config)
    assert (status, "has no object, image or pair" in out) == (1, True)
    assert pairmill("why", made.keys[5], "--version", "1", "-c", made.config).status == 0


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["nothing.png"], "give a key, a file name, or the start of an id", 1),
        ([""], "has no object, image or pair ''", 1),
        (["\x1b[31mred"], "has no object, image or pair 'red'", 1),
        (["a", "b", "c"], "why takes one name, or two images", 2),
        (["captions.csv", "smaller.png"], "'captions.csv' is no image", 1),
        (["smaller.png", "nothing.png"], "has no object, image or pair 'nothing.png'", 1),
        (["broken.png", "--version", "7"], "'few' has no version '7'", 1),
    ],
)
def test_names_that_mean_nothing(made, pairmill, words, said, status):
    out, found = pairmill("why", *words, "-c", made.config)
    assert (found, said in out) == (status, True), out


def test_without_the_build_s_tables_it_says_what_is_gone(history, tables, pairmill):
    _, records = tables
    row = records.row(0, named=True)
    for path in (history.folder / "store/data").rglob("*.parquet"):
        path.unlink()
    for name in (row["query_key"], row["pair_id"], "smaller.png"):
        out, status = pairmill("why", name, "-c", history.config)
        assert status == 0
        if name == row["query_key"]:
            assert "its list is gone from the store" in out
            assert row["pair_id"][:12] in out
        if name == row["pair_id"]:
            assert row["instructions"][0] in out
        if name == "smaller.png":
            assert "pHash differs in" in out


def test_what_was_forgotten_is_known_by_its_hash_only(history, pairmill):
    key = history.keys[12]
    assert pairmill("forget", key, "-c", history.config).status == 0
    run_build(yaml.safe_load(history.config.read_text("utf-8")))
    out, status = pairmill("why", key, "-c", history.config)
    assert status == 0
    assert "forgotten, decided by forget" in out
    assert "of its name the keyed hash above is kept" in out
    told = pairmill("diff", "3", "4", "-c", history.config).out
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert any(line.startswith("images added forgotten 1") for line in lines)
    manifest = (history.dataset / "v000004/manifest.json").read_text("utf-8")
    report = (history.dataset / "v000004/report.html").read_text("utf-8")
    assert key not in manifest
    assert key not in report
