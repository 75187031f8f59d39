"""Regions of interest, whole: from questions to labels as SD-RPN's trainer makes them."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from flows.absent import verify_absent
from flows.config import load_config, open_build
from flows.forget import Options, forget
from flows.recipe import build_recipe
from flows.roi_labels import RECIPE
from infra.errors import ConfigError
from infra.folder import FolderStore
from tests.mllm_server import MllmServer
from tests.recipes import SAMPLE, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"grounding": {1: [0]}, "sink": {1: [1]}}
SECTIONS = {
    "records": {"files": ["questions.json"], "format": "conversations"},
    "questions": {"modes": {"scenes/": "natural", "signs/": "textual"}},
    "model": {
        "max_tokens": 128,
        "local": {"name": str(SAMPLE / "models/looking"), "device": "cpu"},
    },
    "attention": {"heads": {"natural": HEADS, "textual": HEADS}},
}


def maker():
    spec = importlib.util.spec_from_file_location(
        "roi_labels_records", SAMPLE / "recipes/roi_labels_records.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A corpus of the sample's scenes and signs, without its clip art, and what is true of them."""
    folder, module = tmp_path_factory.mktemp("scenes") / "corpus", maker()
    for key, data in module.files():
        if not key.startswith("clip_art/"):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
    records = json.loads((folder / "questions.json").read_text())
    ours = [record for record in records if not record["image"].startswith("clip_art/")]
    (folder / "questions.json").write_text(json.dumps(ours))
    return folder, {(item.key, item.question): item for item in (*module.scenes(), *module.signs())}


@pytest.fixture(scope="module")
def first(scenes, tmp_path_factory):
    """A finished first run: its store, and its result."""
    folder = tmp_path_factory.mktemp("first")
    return folder, run(folder, scenes[0])


def run(folder, corpus, **changed):
    config = load_config(
        write_config(folder, "roi_labels", corpus, None, **{**SECTIONS, **changed})
    )
    with open_build(config) as opened:
        result = build_recipe(opened, RECIPE, config)
        return {
            **result, "maps": opened.work["maps_made"], "drawn": opened.work["regions_drawn"]
        }  # fmt: skip


@pytest.fixture
def again(first, scenes, tmp_path):
    """Runs once more in a copy of the first run's store, perhaps over another corpus."""
    shutil.copytree(first[0] / "store", tmp_path / "store")

    def once_more(corpus=None, **changed):
        return run(tmp_path, corpus or scenes[0], **changed)

    return once_more


def files(result):
    return Path(result["manifest"]).parent


def records(result):
    return pl.read_parquet(files(result) / "records/*.parquet").sort("sample_id")


def test_every_sample_has_a_fate_and_the_yields_are_these(first):
    _, result = first
    yields = json.loads(Path(result["manifest"]).read_text())["yields"]
    assert yields == [
        ["records", 25, {"later_turn": 24}],
        ["questions", 24, {"other_source": 1}],
        ["attention", 24, {}],
        ["labels", 22, {"too_large": 1, "too_weak": 1}],
    ]
    fates = pl.read_parquet(files(result) / "fates.parquet").filter(pl.col("level") == "sample")
    assert dict(fates["fate"].value_counts().iter_rows()) == {
        "recorded": 22, "later_turn": 24, "other_source": 1, "too_large": 1, "too_weak": 1,
    }  # fmt: skip
    assert result["maps"] == 24


def overlap(one, other):
    """Intersection over union of two boxes."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    shared = max(0, right - left) * max(0, bottom - top)
    areas = ((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return shared / (sum(areas) - shared)


def share_inside(high, box, size):
    """The share of cells whose middle lies in a box of the picture, before it was padded."""
    cell = max(size) / len(high)
    middles = (np.argwhere(high)[:, ::-1] + 0.5) * cell
    middles -= [(max(size) - side) // 2 for side in size]
    return ((middles >= box[:2]) & (middles <= box[2:])).all(1).mean()


def test_labels_lie_where_the_answer_is_and_would_not_without_the_removal_of_sinks(first, scenes):
    found, raw, chance, overlaps = [], [], [], []
    for row in records(first[1]).iter_rows(named=True):
        item = scenes[1][row["key"], row["question"].partition("\n")[0]]
        size = Image.open(scenes[0] / row["key"]).size
        assert 0 <= row["box"][0] < row["box"][2] <= size[0]
        assert 0 <= row["box"][1] < row["box"][3] <= size[1]
        if item.box is None:
            continue
        labels, looked = (np.reshape(row[name], (24, 24)) for name in ("labels", "grounding"))
        found.append(share_inside(labels == 1, item.box, size))
        raw.append(share_inside(looked > 0.2 * looked.max(), item.box, size))
        left, top, right, bottom = item.box
        chance.append((right - left) * (bottom - top) / (size[0] * size[1]))
        overlaps.append(overlap(row["box"], item.box))
    assert len(found) == 22
    assert np.mean(found) > 0.98 and np.mean(raw) < 0.6 and np.mean(chance) < 0.05
    assert np.median(overlaps) > 0.5


def test_a_trainer_reads_the_records_and_makes_the_same_labels(first):
    """As SD-RPN's code does at load time, written out once more."""
    folder, ours = files(first[1]), records(first[1])
    lines = [json.loads(line) for line in (folder / "sd_rpn/train-00000.jsonl").open()]
    table = pq.read_table(folder / "sd_rpn/train-00000.parquet").to_pylist()
    assert [list(line) for line in lines] == [
        ["question_id", "prompt", "text", "image", "sink_attn", "grounding_attn_o2i"]
    ] * len(ours)
    by_id = {row["sample_id"]: row for row in ours.iter_rows(named=True)}
    for line, row in zip(lines, table, strict=True):
        for name in ("sink_attn", "grounding_attn_o2i"):
            assert np.allclose(line[name], row[name], atol=1e-7) and len(line[name]) == 576
        expected = by_id[line["question_id"]]
        assert line["prompt"] == expected["question"] and line["image"] == expected["key"]
        looked = np.reshape(line["grounding_attn_o2i"], (24, 24))
        assert looked[0, 0] > 0  # the sink is still in the map
        looked = np.where(np.reshape(line["sink_attn"], (24, 24)) >= 1e-2, 0, looked)
        high = looked > 0.2 * looked.max()
        assert (np.reshape(expected["labels"], (24, 24))[high] == 1).all()
        assert expected["foreground"] == high.sum()


def test_the_parquet_file_is_a_dataset_and_regions_are_plain_json(first):
    folder, ours = files(first[1]), records(first[1])
    data = load_dataset(
        "parquet", data_files=str(folder / "sd_rpn/*.parquet"), split="train",
        cache_dir=str(first[0] / "cache"),
    )  # fmt: skip
    assert data.num_rows == len(ours) and len(data[0]["sink_attn"]) == 576
    lines = [json.loads(line) for line in (folder / "regions/train-00000.jsonl").open()]
    by_id = {row["sample_id"]: row for row in ours.iter_rows(named=True)}
    for line in lines:
        expected = by_id[line["question_id"]]
        assert line["labels"] == expected["labels"] and line["grid"] == [24, 24]
        assert [side for box in line["boxes"] for side in box] == expected["boxes"]


def test_the_report_shows_maps_and_boxes(first):
    page = (files(first[1]) / "report.html").read_text()
    assert page.count('class="heat"') == 22
    assert page.count("<rect") >= 22


def test_every_record_has_a_picture_that_a_person_can_judge(first):
    page = (files(first[1]) / "pictures/00000.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 22 == first[1]["drawn"]
    assert set(re.findall(r'<li id="(\w+)"', page)) == {
        name[:12] for name in records(first[1])["sample_id"]
    }
    listed = [
        entry["name"] for entry in json.loads(Path(first[1]["manifest"]).read_text())["files"]
    ]
    assert "pictures/00000.html" in listed


def test_pictures_can_be_left_out(again):
    result = again(pictures=None)
    assert result["fresh"] and result["drawn"] == 0
    assert not (files(result) / "pictures").exists()


def test_what_is_forgotten_has_no_map_left(again, first, scenes, tmp_path):
    dropped = records(first[1]).filter(pl.col("key") == "scenes/00.png")["image_id"][0]
    store = FolderStore(str(tmp_path / "store"))
    list(forget(store, [dropped], None, Options(exact=True, purge=True)))
    after = again()
    fates = pl.read_parquet(files(after) / "fates.parquet")
    assert (fates["fate"] == "forgotten_image").sum() == 2
    assert (after["maps"], after["drawn"], after["records"]) == (0, 0, first[1]["records"] - 2)
    held = [
        path
        for path in (tmp_path / "store/data").rglob("*.parquet")
        if dropped in str(pq.read_table(path).to_pylist())
    ]
    assert held == []
    assert list(verify_absent(store))


def test_another_prompt_is_answered_anew_for_its_samples_alone(again):
    """Natural mode with the plain question: 18 of 24 samples are of that mode."""
    assert again(questions={**SECTIONS["questions"], "natural": "question"})["maps"] == 18


def test_heads_are_chosen_by_boxes_and_the_result_is_that_of_the_heads_which_were_made_to_look(
    scenes, first, tmp_path
):
    """The truth of every second scene is given as rows with boxes; the rest has none."""
    corpus = tmp_path / "boxed"
    shutil.copytree(scenes[0], corpus)
    made = [
        {"image": item.key, "question": item.question + maker().SHORT,
         "truth": [item.box] if at % 2 and item.box else []}
        for at, item in enumerate(scenes[1].values())
    ]  # fmt: skip
    (corpus / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    columns = {"image": "image", "instruction": "question", "annotated_boxes": "truth"}
    sections = {
        "records": {
            "files": ["rows.jsonl"], "format": "rows", "columns": columns,
            "optional": ["annotated_boxes"],
        },
        "choose_heads": {"samples": 4, "heads": 1},
        "attention": {
            "sinks": {mode: {"by": "dims", "dims": [299], "above": 10}
                      for mode in ("natural", "textual")},
        },
    }  # fmt: skip
    result = run(tmp_path, corpus, **sections)
    chosen = json.loads(Path(result["manifest"]).read_text())["heads"]
    assert [(row["mode"], row["layer"], row["head"], row["samples"]) for row in chosen] == [
        ("natural", 1, 0, 4), ("textual", 1, 0, 3),
    ]  # fmt: skip
    ours = {(row["key"], row["question"].split("\n")[0]): row["labels"]
            for row in records(result).iter_rows(named=True)}  # fmt: skip
    theirs = {(row["key"], row["question"].split("\n")[0]): row["labels"]
              for row in records(first[1]).iter_rows(named=True)}  # fmt: skip
    assert ours == theirs
    assert set(records(result)["heads"]) == {"1:0 | dims of layer 1 in 299 > 10"}
    page = (files(result) / "report.html").read_text()
    assert "1:0 | dims of layer 1 in 299 &gt; 10" in page


def test_heads_can_t_be_chosen_without_a_column_of_boxes(scenes, tmp_path):
    with pytest.raises(ConfigError, match="choose_heads needs boxes"):
        load_config(
            write_config(
                tmp_path, "roi_labels", scenes[0], None, **{**SECTIONS, "choose_heads": {}}
            )
        )


@pytest.mark.parametrize("name", ["answer", "boxes"])
def test_a_column_of_the_records_that_the_recipe_writes_itself_is_refused(scenes, tmp_path, name):
    columns = {"image": "image", "instruction": "question", name: name}
    records = {"files": ["questions.json"], "format": "rows", "columns": columns}
    with pytest.raises(ConfigError, match=f"{name} would be mixed up"):
        load_config(
            write_config(
                tmp_path, "roi_labels", scenes[0], None, **{**SECTIONS, "records": records}
            )
        )


def test_an_endpoint_is_refused_in_one_line(scenes, tmp_path):
    with MllmServer() as server, pytest.raises(ConfigError, match="gives no attention"):
        load_config(
            write_config(tmp_path, "roi_labels", scenes[0], server, **{**SECTIONS, "model": {}})
        )
