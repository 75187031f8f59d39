"""What SD-RPN's trainer reads, by a literal example."""

import io
import json

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from infra import sample_files
from infra.sample_files import EXPORTS


def attended(n: int, sink: list[int] | None) -> dict:
    return {
        "sample_id": f"s{n}", "split": "train", "key": "a.tar", "member": f"{n}.png",
        "question": "Where?\n", "response": "There.", "answer": "here", "grid_height": 1,
        "grid_width": 2, "grounding": [5_000_000, 250_000_000], "sink": sink, "labels": [0, 1],
        "box": [1, 2, 3, 4], "boxes": [1, 2, 3, 4, 5, 6, 7, 8],
        "sink_rule": sink and "attention", "sink_threshold": 10_000_000,
    }  # fmt: skip


def test_attention_is_a_share_again_and_without_heads_that_show_sinks_there_are_none(monkeypatch):
    monkeypatch.setattr(sample_files, "SD_RPN_ROWS", 2)
    rows = pl.DataFrame([attended(0, [0, 20_000_000]), attended(1, None), attended(2, None)])
    files = dict(EXPORTS["sd_rpn"](rows))
    assert sorted(files) == [
        f"{folder}/train-0000{n}.{kind}"
        for folder, kinds in (("regions", ["jsonl"]), ("sd_rpn", ["jsonl", "parquet"]))
        for n in (0, 1)
        for kind in kinds
    ]
    lines = [json.loads(line) for line in files["sd_rpn/train-00000.jsonl"].splitlines()]
    assert lines[0] == {
        "question_id": "s0", "prompt": "Where?\n", "text": "here", "image": "a.tar::0.png",
        "sink_attn": [0, 0.02], "grounding_attn_o2i": [0.005, 0.25],
    }  # fmt: skip
    assert lines[1]["sink_attn"] == [0, 0]
    table = pq.read_table(io.BytesIO(files["sd_rpn/train-00001.parquet"]))
    assert table["question_id"].to_pylist() == ["s2"]
    assert table["grounding_attn_o2i"].to_pylist() == [[np.float32(0.005), 0.25]]
    found = json.loads(files["regions/train-00001.jsonl"])
    assert found["boxes"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (found["labels"], found["grid"], found["answer"]) == ([0, 1], [1, 2], "There.")


def test_sinks_that_hidden_states_show_are_1_so_that_any_threshold_of_the_trainer_finds_them():
    row = attended(0, [20_000, 20_001]) | {"sink_rule": "dims", "sink_threshold": 20_000}
    (line,) = dict(EXPORTS["sd_rpn"](pl.DataFrame([row])))["sd_rpn/train-00000.jsonl"].splitlines()
    assert json.loads(line)["sink_attn"] == [0, 1]
