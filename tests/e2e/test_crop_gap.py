"""Closer looks, whole: a server that reads signs can do so only where they have pixels enough."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from datasets import load_dataset
from PIL import Image

from flows.config import load_config, open_build
from flows.crop_gap import RECIPE
from flows.recipe import build_recipe
from infra.pictures import View, shown
from sample.recipes import crop_gap_records as drawn
from tests import reading
from tests.mllm_server import MllmServer
from tests.recipes import write_config

LADDER = [1024, 768, 576, 384, 256, 128, 64]
COLUMNS = {name: name for name in ("image", "question", "answer", "boxes")}
RECORDS = {
    "files": ["questions.jsonl"],
    "format": "rows",
    "columns": COLUMNS,
    "optional": ["boxes"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The scenes: two of each of seven sizes of letters."""
    folder = tmp_path_factory.mktemp("scenes")
    for key, data in drawn.files():
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_bytes(data)
    return folder


def run(corpus: Path, folder: Path, server: MllmServer, **changed):
    """Run the recipe on the scenes."""
    model = {"max_pixels": 12_845_056, **changed.pop("model", {})}
    changed = {"records": RECORDS, "model": model, **changed}
    config = load_config(write_config(folder, "crop_gap", corpus, server, **changed))
    with open_build(config) as opened:
        return build_recipe(opened, RECIPE, config)


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """A first run: the folder of its store, its result, and how many questions it asked."""
    folder = tmp_path_factory.mktemp("first")
    with MllmServer(rule=reading.rule) as server:
        result = run(corpus, folder, server)
        return folder, result, server.counts.total()


@pytest.fixture
def crop_gap(corpus, first, tmp_path):
    """Runs the recipe again, on a copy of the store of the first run."""
    shutil.copytree(first[0] / "store", tmp_path / "store")

    def again(server, **changed):
        return run(corpus, tmp_path, server, **changed)

    return again


def records_of(result) -> pl.DataFrame:
    return pl.read_parquet(Path(result["manifest"]).parent / "records/*.parquet")


def fates_of(result) -> Counter[str]:
    fates = pl.read_parquet(Path(result["manifest"]).parent / "fates.parquet")
    of_samples = fates.filter(pl.col("level") == "sample")
    return Counter(
        rule if fate == "dropped" else fate
        for fate, rule in of_samples.select("fate", "rule").iter_rows()
    )


def legible(data: bytes, tokens: int) -> bool:
    """Whether a scene can be read at a level, found without the recipe."""
    jpeg = shown(data, View("it", pixels=tokens * 784), 12_845_056)
    return reading.read(Image.open(io.BytesIO(jpeg))) is not None


def test_the_smaller_the_letters_the_more_pixels_they_need(first, corpus):
    _, result, asked = first
    # Four words are in letters too small for anybody, or large enough for any level.
    assert fates_of(result) == {"recorded": 10, "hard_pool": 2, "never_diverges": 2}
    records = records_of(result)
    boxed = records.filter(pl.col("boxes").list.len() > 0)
    # The two that are wrong at full resolution are asked once, the others at seven levels more.
    assert asked == 14 + 12 * len(LADDER) + 2 * boxed.height
    assert set(boxed["gap"]) == {1}
    assert records.height - boxed.height == records["gap"].null_count() == 2
    sizes = {word.lower(): size for word, size, *_ in drawn.scenes()}
    rows = records.with_columns(
        pl.col("answer").replace_strict(sizes, return_dtype=pl.Int64).alias("letters")
    )
    levels = rows.group_by("letters").agg(pl.col("global_tokens").mean()).sort("letters")
    assert levels["letters"].to_list() == [13, 17, 24, 34, 46]
    assert levels["global_tokens"].is_sorted(descending=True)
    assert levels["global_tokens"].n_unique() == 5
    for row in rows.iter_rows(named=True):
        data = (corpus / row["key"]).read_bytes()
        first = next(tokens for tokens in LADDER if not legible(data, tokens))
        assert row["global_tokens"] == first, row["answer"]
        assert row["difficulty"] == len(LADDER) - LADDER.index(first)
        jpeg = shown(data, View.of(row["global_view"]), 12_845_056)
        exact = Image.open(io.BytesIO(jpeg)).size
        assert exact == (row["global_width"], row["global_height"])
        assert first * 784 * 0.99 < exact[0] * exact[1] <= first * 784


def test_boxes_are_in_pixels_of_the_original(first):
    true = {word.lower(): (inner, outer) for word, _, _, inner, outer in drawn.scenes()}
    records = records_of(first[1])
    for row in records.filter(pl.col("boxes").list.len() > 0).iter_rows(named=True):
        inner, outer = true[row["answer"]]
        assert tuple(row["boxes"][:4]) == inner
        assert row["box_source"] == "annotation"
        if row["boxes_given"] == 2:
            assert tuple(row["boxes"][4:]) == outer
        else:
            left, top, right, bottom = row["boxes"][4:]
            assert left < inner[0] and right > inner[2] and top < inner[1] and bottom > inner[3]
            assert (right - left) / (inner[2] - inner[0]) == pytest.approx(1.75, abs=0.1)


def test_what_trainers_read(crop_gap):
    with MllmServer(rule=reading.rule) as server:
        result = crop_gap(server, selection={"hard_pool": "flag"})
    folder = Path(result["manifest"]).parent
    lines = [json.loads(line) for line in (folder / "grpo/train.jsonl").open()]
    reasons = Counter(line["reason"] for line in lines)
    assert reasons == {"selected": 10, "original_wrong": 2}
    for line in lines:
        below = LADDER if line["reason"] == "selected" else []
        assert list(line["answers_by_level"]) == ["0", *map(str, below)]
        if line["global"]:
            at = str(line["global"]["tokens"])
            assert line["answers_by_level"]["0"] == line["answer"] != line["answers_by_level"][at]
            assert line["global"]["max_pixels"] == 784 * line["global"]["tokens"]
    data = str(folder / "verl/train.parquet")
    rows = load_dataset("parquet", data_files=data, cache_dir=str(folder.parent), split="train")
    assert len(rows) == 10
    for row in rows:
        assert row["prompt"][0]["content"].count("<image>") == len(row["images"]) == 1
        line = next(line for line in lines if line["id"] == row["extra_info"]["id"])
        assert row["reward_model"] == {"style": "rule", "ground_truth": line["answer"]}
        assert row["extra_info"]["boxes"] == line["boxes"]


def test_changed_settings_redo_what_depends_on_them(crop_gap, first):
    with MllmServer(rule=reading.rule) as server:
        needing = crop_gap(server, boxes={"required": True})
        assert server.counts.total() == 0
        assert fates_of(needing) == {
            "recorded": 8, "hard_pool": 2, "never_diverges": 2, "no_boxes": 2,
        }  # fmt: skip
        # Without the two highest levels nothing new is asked at a level; but where the selected one
        # is another, so is the picture that goes with the crop.
        short = crop_gap(server, ladder={"budgets": LADDER[2:]})
        moved = records_of(first[1]).filter(
            (pl.col("global_tokens") > LADDER[2]) & (pl.col("boxes").list.len() > 0)
        )
        assert server.counts.total() == 2 * moved.height > 0
        assert records_of(short)["global_tokens"].max() == LADDER[2]


def test_a_crop_that_brings_nothing_is_no_sample(crop_gap):
    def blind_to_parts(request):
        return "reads" if len(reading.pictures(request)) == 1 else "good"

    with MllmServer(rule=blind_to_parts) as server:
        blind = {"temperature": 0.5}  # another model: what was answered does not count
        dropped = crop_gap(server, model=blind)
        kept = crop_gap(server, model=blind, gap={"without_gap": "keep"})
    assert fates_of(dropped)["wrong_with_crop"] == 8
    assert fates_of(kept)["recorded"] == 10


@pytest.mark.parametrize(
    ("shown", "fates"),
    [
        (2, {"recorded": 2, "truncated": 8, "hard_pool": 2, "never_diverges": 2}),
        (1, {"truncated": 14}),
    ],
)
def test_an_answer_that_breaks_off_is_a_fate_and_no_evidence(crop_gap, shown, fates):
    """Neither that a picture is too small, nor that noise in place of a crop does not help."""

    def stumbling(request):
        return "truncated" if len(reading.pictures(request)) == shown else "reads"

    with MllmServer(rule=stumbling) as server:
        changed = {"crops": {"tokens": 512}} if shown == 2 else {"model": {"seed": 2}}
        assert fates_of(crop_gap(server, **changed)) == fates


def test_a_budget_leaves_samples_waiting(crop_gap):
    with MllmServer(rule=reading.rule) as server:
        least = crop_gap(server, model={"seed": 1, "budget": {"calls": 10}})
        # Four at full resolution, and of the others those that are right there.
        assert least["waiting"] == {"over_budget": 4 + 10 - fates_of(least)["hard_pool"]}
        part = crop_gap(server, model={"seed": 1, "budget": {"calls": 50}})
        assert server.counts.total() == 60
        assert part["waiting"]["over_budget"] > 0
        whole = crop_gap(server, model={"seed": 1})
        assert server.counts.total() == 14 + 12 * len(LADDER) + 2 * 8
    assert fates_of(whole)["recorded"] == 10
