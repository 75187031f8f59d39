"""LLaVAR-2 whole: cards with known text, scripted answers, two tiny models that score."""

import json
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from flows.config import load_config, open_build
from flows.llavar2 import RECIPE
from flows.recipe import build_recipe
from tests import trainers
from tests.mllm_server import MllmServer
from tests.recipes import write_config, write_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
CARDS = 24
COLUMNS = {"image": "image", "caption": "caption", "ocr": "ocr"}
LENIENT = {"filter": {"mifd_max": 9.0, "ffd_max": 9.0}}


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return write_corpus("llavar2", tmp_path_factory.mktemp("cards"))


@pytest.fixture
def few(cards, tmp_path):
    """Writes a corpus of the first few cards."""

    def write(count: int) -> Path:
        folder = tmp_path / "few"
        lines = (cards / "records.jsonl").read_text().splitlines(keepends=True)[:count]
        for line in lines:
            picture = json.loads(line)["image"]
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(cards / picture, folder / picture)
        (folder / "records.jsonl").write_text("".join(lines))
        return folder

    return write


@pytest.fixture(scope="module")
def run_in(tiny_mllms):
    """Runs the recipe on a corpus, with its store in a folder."""
    models = {
        "text": {"name": str(tiny_mllms["blind"])},
        "vision": {"name": str(tiny_mllms["llava"])},
    }

    def run(folder, server, corpus, columns=COLUMNS, **changed):
        sections = {
            "records": {
                "files": ["records.jsonl"],
                "format": "rows",
                "columns": columns,
                "optional": ["caption"],
            },
            "difficulty": models,
            **LENIENT,
            **changed,
        }
        folder.mkdir(exist_ok=True)
        config = load_config(write_config(folder, "llavar2", corpus, server, **sections))
        with open_build(config) as opened:
            return {**build_recipe(opened, RECIPE, config), "work": dict(opened.work)}

    return run


@pytest.fixture(scope="module")
def sample(run_in, cards, tmp_path_factory):
    """The sample, built once: how to build it again, what came of it, and its server."""
    with MllmServer() as server:
        again = partial(run_in, tmp_path_factory.mktemp("sample"), server, cards)
        yield again, again(), server


@pytest.fixture
def llavar2(run_in, tmp_path):
    return partial(run_in, tmp_path / "first")


def records_of(result) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The captions, and the pairs."""
    rows = pl.read_parquet(Path(result["manifest"]).parent / "records/*.parquet")
    return rows.filter(pl.col("of").is_null()), rows.filter(pl.col("of").is_not_null())


def likelihoods_of(pairs: pl.DataFrame) -> int:
    """How many likelihoods go into the scores of pairs, told without the recipe."""
    found: set[tuple[str, ...]] = set()
    for image, q_e, a_e, q_s, a_s in pairs.select("image_id", "q_e", "a_e", "q_s", "a_s").rows():
        found |= {("text", a_e), ("text", q_e, a_e), ("text", a_s), ("text", q_s, a_s)}
        found |= {("", q_e, a_e), (image, q_e, a_e), ("", q_s, a_s), (image, q_s, a_s)}
        found.add((image, q_e, a_e, q_s, a_s))
    return len(found)


def yields_of(result) -> dict[str, tuple[int, dict[str, int]]]:
    manifest = json.loads(Path(result["manifest"]).read_text())
    return {name: (left, lost) for name, left, lost in manifest["yields"]}


def test_cards_become_captions_and_pairs_of_turns(sample):
    _, result, _ = sample
    assert result["work"]["labels_requested"] == 2 * CARDS
    captions, pairs = records_of(result)
    assert captions.height == CARDS
    origins = captions.select("caption_origin", pl.col("caption").is_null().alias("none"))
    assert origins.to_dicts().count({"caption_origin": "model", "none": True}) == CARDS // 4
    assert origins.to_dicts().count({"caption_origin": "human", "none": False}) == 3 * CARDS // 4
    yields = yields_of(result)
    assert yields["import"][0] == yields["caption"][0] == yields["ask_pairs"][0] == CARDS
    # The server quotes the card seven times in eight, and answers three pairs.
    assert yields["split"] == (3 * CARDS, {"split": CARDS})
    quoted, spoken = yields["quoted"][0], yields["quoted"][1]["not_a_span"]
    assert quoted + spoken == 3 * CARDS and 0 < spoken < quoted
    assert result["work"]["answers_scored"] == likelihoods_of(pairs)
    assert yields["difficulty"] == (pairs.height, {}) == (quoted, {})
    fates = pl.read_parquet(Path(result["manifest"]).parent / "fates.parquet")
    counts = fates.filter(level="sample")["fate"].value_counts().rows()
    assert dict(counts) == {
        "recorded": CARDS + quoted, "split": CARDS, "not_a_span": spoken
    }  # fmt: skip
    assert all(span in pairs["ocr"][at].replace("\n", " ") for at, span in enumerate(pairs["a_e"]))


def test_card_and_manifest_say_which_numbers_are_not_the_papers(sample):
    folder = Path(sample[1]["manifest"]).parent
    told = json.loads((folder / "manifest.json").read_text())["not_from_source"]
    assert {"key": "filter.mifd_max", "value": "9.0", "default": False} in told
    assert {"key": "least_text", "value": 16, "default": True} in told
    card = (folder / "README.md").read_text()
    table = card.partition("## Numbers that are not the source's")[2].partition("\n## ")[0]
    assert table.count("\n| `") == len(told)
    assert "| `filter.mifd_max` | 9.0 | set here |" in table
    assert "| `least_text` | 16 | own default |" in table


def test_scores_are_the_ratios_of_what_is_stored(sample):
    _, pairs = records_of(sample[1])
    for row in pairs.iter_rows(named=True):
        exact = {
            name: Fraction(*row[f"{name}_nll"]) for name in ("ifd_e", "ifd_s", "vfd_e", "vfd_s")
        }
        for side in ("e", "s"):
            product = exact[f"ifd_{side}"] * exact[f"vfd_{side}"]
            assert abs(product * 10**6 - row[f"mifd_{side}"]) <= Fraction(1, 2)
        assert row["mifd"] == max(row["mifd_e"], row["mifd_s"])
        assert abs(Fraction(*row["ffd_nll"]) * 10**6 - row["ffd"]) <= Fraction(1, 2)


def test_the_files_are_what_trainers_load(sample, cards):
    result = sample[1]
    folder = Path(result["manifest"]).parent
    captions, pairs = records_of(result)
    lines = [json.loads(line) for line in (folder / "captions/train.jsonl").open()]
    assert {line["id"] for line in lines} == set(captions["sample_id"])
    assert all((cards / line["image"]).is_file() for line in lines)
    talks = trainers.llava_entries(folder / "llava/train.json", cards)
    assert sum(len(talk["conversations"]) for talk in talks) == 4 * pairs.height
    assert all(len(talk["conversations"]) % 4 == 0 for talk in talks)
    assert len(trainers.rows(folder / "records/*.parquet")) == result["records"]
    turns = {(talk["id"], at): turn for talk in talks
             for at, turn in enumerate(talk["conversations"])}  # fmt: skip
    for score, each in (("ifd", 2), ("vfd", 2), ("efd", 1)):
        found = [json.loads(line) for line in (folder / f"scores/{score}-train.jsonl").open()]
        assert len(found) == each * pairs.height
        for line in found:
            assert turns[line["id"], line["qa_id"]]["from"] == "human"
            numerator, denominator, ratio = line[f"{score}_score"]
            assert ratio == pytest.approx(numerator / denominator, abs=1e-6)


def test_thresholds_route_by_scores_that_are_there(sample):
    run, first, server = sample
    strict = run(filter={"mifd_max": 1.05, "ffd_max": 1.0})
    fewer = run(filter={**LENIENT["filter"], "keep_top_quantile": 0.5})
    assert server.counts.total() == 2 * CARDS
    assert strict["work"].keys() == fewer["work"].keys() == {"objects_listed"}
    _, pairs = records_of(first)
    easy = pairs.filter(pl.col("mifd") <= 1_050_000)
    kept = easy.filter(pl.col("ffd") <= 1_000_000)
    assert set(records_of(strict)[1]["sample_id"]) == set(kept["sample_id"])
    lost = {"high_mifd": pairs.height - easy.height, "high_ffd": easy.height - kept.height}
    assert yields_of(strict)["difficulty"] == (kept.height, lost)
    assert min(kept.height, *lost.values()) > 0
    order = pairs.sort("mifd", "sample_id", descending=[True, False])
    half = set(order["sample_id"][: (pairs.height + 1) // 2])
    assert set(records_of(fewer)[1]["sample_id"]) == half
    assert yields_of(fewer)["difficulty"][1] == {"beyond_quantile": pairs.height // 2}


def test_without_ocr_the_model_reads(llavar2, few):
    with MllmServer() as server:
        result = llavar2(server, few(2), {"image": "image", "caption": "caption"})
        assert server.counts.total() == 3 * 2
    captions, _ = records_of(result)
    assert set(captions["ocr_origin"]) == {"model"}


def test_pairs_that_wait_for_money_keep_no_caption_back(llavar2, few):
    with MllmServer() as server:
        result = llavar2(server, few(5), model={"budget": {"calls": 5 + 2}})
    assert result["waiting"] == {"over_budget": 3}
    captions, pairs = records_of(result)
    assert captions.height == 5
    assert set(pairs["image_id"]) <= set(captions["image_id"])
    assert yields_of(result)["ask_pairs"] == (2, {"over_budget": 3})
