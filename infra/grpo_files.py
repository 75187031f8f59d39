"""Files for reinforcement learning: questions with a small and a full view, and boxes."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import corpus
from infra.pictures import View
from infra.text import inert

GRPO_FACTS = (
    "box_source", "boxes_given", "reason", "difficulty", "gap", "right_with_crop",
    "right_with_noise", "licence",
)  # fmt: skip
VERL_FACTS = {
    "id": pa.string(), "image": pa.string(), "size": pa.list_(pa.int64()),
    "boxes": pa.list_(pa.list_(pa.int64())), "box_source": pa.string(), "reason": pa.string(),
    "difficulty": pa.int64(), "gap": pa.int64(),
}  # fmt: skip
VERL = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.struct({"image": pa.string(), "max_pixels": pa.int64()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(VERL_FACTS),
    }
)


def grpo(rows: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    """Questions with a small and a full view, as JSON lines and as verl's Parquet.

    `grpo/<split>.jsonl` says everything, boxes as rows of four; `verl/<split>.parquet` has verl's
    columns (data_source, prompt, images, ability, reward_model, extra_info), the small view as the
    picture with the `max_pixels` that Qwen's image processor goes by. Records without a small view
    are in the former only. Pictures are named as objects of the corpus.
    """
    for split in ("train", "validation") if rows.height else ():
        part = rows.filter(pl.col("split") == split)
        entries = [_grpo(row) for row in part.iter_rows(named=True)]
        dumped = (json.dumps(entry, ensure_ascii=False) for entry in entries)
        if entries:
            yield f"grpo/{split}.jsonl", "".join(f"{line}\n" for line in dumped).encode()
        usable = [_verl(entry) for entry in entries if entry["global"]]
        if usable:
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(usable, VERL), buffer)
            yield f"verl/{split}.parquet", buffer.getvalue()


def _grpo(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question with its views. Levels go by tokens, 0 for the original."""
    flat = row["boxes"]
    small = None
    if row["global_view"]:
        size = [row["global_width"], row["global_height"]]
        pixels = View.of(row["global_view"]).pixels
        small = {"tokens": row["global_tokens"], "max_pixels": pixels, "size": size}
    levels = zip(row["level_tokens"], row["level_answers"], strict=True)
    return {
        "id": row["sample_id"],
        "image": corpus.object_id(row["key"], row["member"]),
        "size": [row["width"], row["height"]],
        "global": small,
        "question": row["question"],
        "answer": row["answer"],
        "answers_by_level": {str(tokens): said for tokens, said in levels},
        "boxes": [flat[at : at + 4] for at in range(0, len(flat), 4)],
        **{name: row[name] for name in GRPO_FACTS},
    }


def _verl(entry: Mapping[str, Any]) -> dict[str, Any]:
    question = f"<image>\n{inert(entry['question'])}"
    return {
        "data_source": "pairmill/crop_gap",
        "prompt": [{"role": "user", "content": question}],
        "images": [{"image": entry["image"], "max_pixels": entry["global"]["max_pixels"]}],
        "ability": "visual_question_answering",
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        "extra_info": {name: entry[name] for name in VERL_FACTS},
    }
