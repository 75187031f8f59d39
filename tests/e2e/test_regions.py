"""RegionGPT on sheets of clip art, where every box is true and every flaw was put there."""

import json
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config, open_build
from flows.recipe import build_recipe
from flows.regions import RECIPE
from tests import trainers
from tests.mllm_server import MllmServer, said
from tests.recipes import EMBEDDERS, write_config, write_corpus

COCO = {"files": ["annotations/instances.json"], "format": "coco", "images": "images"}
REFS = {"files": ["annotations/refs.json"], "format": "refcoco", "images": "images"}
BOXES, SHEETS, REFERENCES = 95, 24, 32


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    return write_corpus("regions", tmp_path_factory.mktemp("sheets"))


@pytest.fixture
def build(sheets, tmp_path):
    """Runs the recipe on the sheets."""

    def run(server, **changed):
        sections = {"models": EMBEDDERS, "records": COCO, "filter": {"class_rank": 8}, **changed}
        config = load_config(write_config(tmp_path, "regions", sheets, server, **sections))
        with open_build(config) as opened:
            return build_recipe(opened, RECIPE, config)

    return run


def manifest(result):
    return json.loads(Path(result["manifest"]).read_text())


def records(result):
    return pl.read_parquet(Path(result["manifest"]).parent / "records/*.parquet")


def test_every_box_has_one_fate_and_every_yield_is_known(build):
    with MllmServer() as server:
        result = build(server)
        # A question for each sheet, not for each of its regions; then two for a region.
        kept = result["records"]
        assert server.counts.total() == SHEETS + BOXES + kept
        again = build(server)
        assert server.counts.total() == SHEETS + BOXES + kept
    assert (again["fresh"], again["digest"]) == (False, result["digest"])
    drops = {"crowd": 1, "malformed_record": 1, "no_such_image": 1}
    boxes = {"large_share": 1, "outside_picture": 1, "small_region": 2, "small_share": 1}
    yields = {name: (left, rules) for name, left, rules in manifest(result)["yields"]}
    assert yields["import"] == (BOXES + 5, drops)
    assert yields["crop"] == (BOXES, boxes)
    assert yields["whole"] == yields["region"] == (BOXES, {})
    assert yields["filter"] == (kept, {"beyond_quantile": BOXES - kept})
    assert yields["context"] == (kept, {})
    fates = pl.read_parquet(Path(result["manifest"]).parent / "fates.parquet")
    of_samples = fates.filter(pl.col("level") == "sample")
    assert of_samples.height == BOXES + 8 == of_samples["id"].n_unique()
    assert (of_samples["fate"] == "recorded").sum() == kept


def test_trainers_read_the_captions_with_their_boxes(build, sheets):
    with MllmServer() as server:
        result = build(server)
    folder, rows = Path(result["manifest"]).parent, records(result)
    entries = trainers.llava_entries(folder / "conversations/train.json", sheets)
    true = json.loads((sheets / "annotations/instances.json").read_text())
    boxes = {(row["image_id"], *map(int, row["bbox"])) for row in true["annotations"]}
    assert {entry["id"] for entry in entries} == set(rows["sample_id"])
    for entry in entries:
        turns = entry["conversations"]
        assert len(turns) == 8
        text = "\n".join(turn["value"] for turn in turns)
        assert text.count("<region>") == len(entry["boxes"]) == len(entry["boxes_norm"]) == 3
        left, top, right, bottom = entry["boxes"][0]
        assert (int(Path(entry["image"]).stem), left, top, right - left, bottom - top) in boxes
        back = [side * 512 for side in entry["boxes_norm"][0]]
        assert back == pytest.approx(entry["boxes"][0], abs=0.001)
    coco = json.loads((folder / "coco/train.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    known = {(Path(e["image"]).name, *e["boxes"][0], e["conversations"][1]["value"])
             for e in entries}  # fmt: skip
    assert known == {
        (Path(names[a["image_id"]]).name, x, y, x + w, y + h, a["caption"])
        for a in coco["annotations"]
        for x, y, w, h in [a["bbox"]]
    }
    assert len(trainers.rows(folder / "records/*.parquet")) == result["records"]


def test_the_questions_show_the_class_and_the_caption_of_the_whole(build):
    with MllmServer() as server:
        build(server, context=False)
        asked = [said(request) for request in server.requests]
    regions = [text for text in asked if "region_caption" in text]
    assert len(regions) == BOXES
    assert all("<<<class_name " in text and "<<<global_caption " in text for text in regions)
    # All ten wordings were drawn.
    assert len({text.rstrip().rpartition("\n")[2] for text in regions}) == 10


def test_another_threshold_asks_nothing_and_surroundings_can_be_left_out(build):
    with MllmServer() as server:
        first = build(server)
        asked = server.counts.total()
        stricter = build(server, filter={"clip_keep": 0.5, "class_rank": 6})
        assert 0 < stricter["records"] < first["records"]
        without = build(server, context=False)
        assert server.counts.total() == asked and without["records"] == first["records"]
    conversations = Path(without["manifest"]).parent / "conversations/train.json"
    assert len(json.loads(conversations.read_text())[0]["conversations"]) == 6


def test_references_bring_boxes_of_their_own_kind(build):
    with MllmServer() as server:
        result = build(server, records=REFS, context=False)
    yields = {name: (left, rules) for name, left, rules in manifest(result)["yields"]}
    assert yields["import"] == (REFERENCES, {})
    assert {"expression", "class_name", "box"} <= set(records(result).columns)
