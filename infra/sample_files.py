"""Files of records as their trainers read them, beside the Parquet files of every version."""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import corpus
from infra.attention_maps import UNIT
from infra.grpo_files import grpo
from infra.product import Product
from infra.text import inert

Files = Iterator[tuple[str, bytes]]
# Scores of LLaVAR-2: our columns by the turn, of a pair's four, that the code names them by.
SCORES = {"ifd": {0: "ifd_e", 2: "ifd_s"}, "vfd": {0: "vfd_e", 2: "vfd_s"}, "efd": {0: "ffd"}}
SD_RPN_ROWS = 2_000  # of 576 cells: some 25 MB a file of JSON lines

OF_IMAGE = ("image_id", "key", "member", "licence", "split")
# What a trainer asks of a region, from the region to the whole. RegionGPT (arXiv 2403.02330) asks
# for the category of `<region>` in the same way; the words are ours.
REGION_QUESTIONS = (
    "Describe <region> in detail.",
    "Describe <region> together with what is around it.",
    "What is <region>? Answer with its category.",
    "Describe the whole picture.",
)
REGION_COLUMNS = ("region_caption", "context_caption", "class_name", "global_caption")


def samples_of(files: Callable[[pl.DataFrame], Files]) -> Product:
    """A version whose records are samples, with these files."""
    return Product(lambda rows: rows["image_id"], files, "sample_card.md", _told)


def _told(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """The records of each image, which are all of one split, for its `.json` in the tars."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows.iter_rows(named=True):
        said = {name: value for name, value in row.items() if name not in OF_IMAGE}
        told = found.setdefault(row["image_id"], {"split": row["split"], "records": []})
        told["records"].append(said)
    return found


def llava(rows: pl.DataFrame) -> Files:
    """LLaVA's conversation JSON: {id, image, conversations: [{from, value}, ...]}.

    Of columns `turns` (texts, questions and answers in turn), or `instruction` and `response`.
    """
    for split, part in _splits(rows):
        entries = [
            _conversation(row["sample_id"], _image(row), _turns(row))
            for row in part.iter_rows(named=True)
        ]
        yield f"llava/{split}.json", _json(entries)


def _image(row: Mapping[str, Any]) -> str:
    """The name of a record's picture: its key, or its place in a container."""
    return corpus.object_id(row["key"], row["member"])


def _turns(row: Mapping[str, Any]) -> list[str]:
    return list(row.get("turns") or [row["instruction"], row["response"]])


def _conversation(name: str, image: str, turns: Sequence[str]) -> dict[str, Any]:
    """An entry of LLaVA's JSON: the picture stands before the first turn, and nowhere else."""
    said = [inert(turn) for turn in turns]
    said[0] = f"<image>\n{said[0]}"
    sides = ("human", "gpt")
    talk = [{"from": sides[at % 2], "value": text} for at, text in enumerate(said)]
    return {"id": name, "image": image, "conversations": talk}


def lines(rows: pl.DataFrame) -> Files:
    """JSON lines: every column of a record, one object a line."""
    for split, part in _splits(rows):
        dumped = (json.dumps(row, ensure_ascii=False) for row in part.iter_rows(named=True))
        yield f"jsonl/{split}.jsonl", "".join(f"{line}\n" for line in dumped).encode()


def captions_and_pairs(rows: pl.DataFrame) -> Files:
    """Captions as JSON lines, pairs of turns as LLaVA's conversations, one to a caption's image in
    groups of four turns, and a file a score, as github.com/llavar/LLaVAR-2 has them: `qa_id` is the
    place of the question's turn, of FFD (there `efd_score`) that of the first question's; a score
    is [numerator, denominator, ratio]. `sample_id` is ours.
    """
    for split, part in _splits(rows):
        captions = part.filter(pl.col("of").is_null()).sort("sample_id")
        yield f"captions/{split}.jsonl", _json_lines(map(_caption, captions.iter_rows(named=True)))
        pairs = part.filter(pl.col("of").is_not_null()).sort("of", "part", "sample_id")
        talks = [list(rows.iter_rows(named=True)) for _, rows in pairs.group_by(
            "of", maintain_order=True)]  # fmt: skip
        yield f"llava/{split}.json", _json([_talk(rows) for rows in talks])
        for score in SCORES:
            found = (line for rows in talks for line in _scores(rows, score))
            yield f"scores/{score}-{split}.jsonl", _json_lines(found)


def _caption(row: Mapping[str, Any]) -> dict[str, Any]:
    said = ("caption_enriched", "caption_origin", "caption", "ocr", "ocr_origin")
    image = _image(row)
    return {"id": row["sample_id"], "image": image, **{name: row[name] for name in said}}


def _talk(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    turns = [pair[name] for pair in pairs for name in ("q_e", "a_e", "q_s", "a_s")]
    image = _image(pairs[0])
    return _conversation(pairs[0]["of"], image, turns)


def _scores(pairs: Sequence[Mapping[str, Any]], score: str) -> Iterator[dict[str, Any]]:
    for at, pair in enumerate(pairs):
        for turn, column in SCORES[score].items():
            found = [part and part / 1e6 for part in (*pair[f"{column}_nll"], pair[column])]
            name = {"id": pair["of"], "qa_id": 4 * at + turn, "sample_id": pair["sample_id"]}
            yield {**name, f"{score}_score": found}


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def regions(rows: pl.DataFrame) -> Files:
    """Captions of boxes: conversations with `<region>`, and COCO's captions with a box each.

    `conversations/<split>.json` is LLaVA's form, with what fills the `<region>` placeholders in
    their order: `boxes` (left, top, right, bottom in pixels of the original) and `boxes_norm`, the
    same from 0 to 1. `coco/<split>.json` has images, annotations (bbox: left, top, width, height)
    and categories.
    """
    for split, part in _splits(rows):
        said = [_region(row) for row in part.iter_rows(named=True)]
        yield f"conversations/{split}.json", _json(said)
        yield f"coco/{split}.json", _json(_coco_captions(part))


def _region(row: Mapping[str, Any]) -> dict[str, Any]:
    asked = [(f"<image>\n{REGION_QUESTIONS[0]}", row["region_caption"])]
    asked += [
        (question, row[column])
        for question, column in zip(REGION_QUESTIONS[1:], REGION_COLUMNS[1:], strict=True)
        if row.get(column)
    ]
    turns = [
        {"from": side, "value": value}
        for question, answer in asked
        for side, value in (("human", question), ("gpt", inert(answer)))
    ]
    count = sum(question.count("<region>") for question, _ in asked)
    sides = (row["width"], row["height"]) * 2
    norm = [round(side / of, 6) for side, of in zip(row["box"], sides, strict=True)]
    return {
        "id": row["sample_id"], "image": _image(row), "width": row["width"],
        "height": row["height"], "boxes": [row["box"]] * count, "boxes_norm": [norm] * count,
        "class_name": inert(row["class_name"] or "") or None, "box_source": row["source"],
        "conversations": turns,
    }  # fmt: skip


def _coco_captions(rows: pl.DataFrame) -> dict[str, Any]:
    rows = rows.with_columns(corpus.object_ids(rows).alias("key"))
    pictures = rows.select("image_id", "key", "width", "height").unique("image_id").sort("image_id")
    numbers = {name: at for at, name in enumerate(pictures["image_id"], 1)}
    names = sorted({name for name in rows["class_name"] if name is not None})
    classes = {name: at for at, name in enumerate(names, 1)}
    return {
        "images": [
            {"id": numbers[image], "file_name": key, "width": width, "height": height}
            for image, key, width, height in pictures.iter_rows()
        ],
        "annotations": [
            {
                "id": at, "image_id": numbers[row["image_id"]], "bbox": _sides(row["box"]),
                "area": math.prod(_sides(row["box"])[2:]), "iscrowd": 0,
                "category_id": classes.get(row["class_name"]), "caption": row["region_caption"],
            }
            for at, row in enumerate(rows.iter_rows(named=True), 1)
        ],
        "categories": [{"id": at, "name": name} for name, at in classes.items()],
    }  # fmt: skip


def _sides(box: Sequence[int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def sd_rpn(rows: pl.DataFrame) -> Files:
    """What SD-RPN's trainer builds its labels from, one record a sample, as JSON lines and Parquet.

    {question_id, prompt, text (the model's own answer), image, sink_attn, grounding_attn_o2i}: the
    attention of each cell, sinks still in the map (github.com/YuHengsss/SD-RPN). Its authors pickle
    the same records; loading a pickle runs whatever code is in it. Without heads that show sinks,
    sink_attn is 0 everywhere; where hidden states show them, it is 1 for sinks and 0 for the rest.
    Of columns question, answer, grounding, sink (in billionths), sink_rule, sink_threshold.

    `regions/` beside it has what we make of them: labels of cells (1, 0, -1) row by row, the box
    around the foreground and those of its regions, in pixels of the picture.
    """
    for split, part in _splits(rows):
        for at in range(0, part.height, SD_RPN_ROWS):
            rows_here = list(part[at : at + SD_RPN_ROWS].iter_rows(named=True))
            records = [_sd_rpn(row) for row in rows_here]
            name = f"{split}-{at // SD_RPN_ROWS:05d}"
            yield f"regions/{name}.jsonl", _json_lines([_regions_found(row) for row in rows_here])
            yield f"sd_rpn/{name}.jsonl", _json_lines(records)
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(records, _SD_RPN), buffer, compression="zstd")
            yield f"sd_rpn/{name}.parquet", buffer.getvalue()


def _regions_found(row: Mapping[str, Any]) -> dict[str, Any]:
    boxes = row["boxes"]
    return {
        "question_id": row["sample_id"],
        "image": _image(row),
        "question": row["question"],
        "answer": row.get("response"),
        "answer_own": row["answer"],
        "grid": [row["grid_height"], row["grid_width"]],
        "labels": row["labels"],
        "box": row["box"],
        "boxes": [boxes[at : at + 4] for at in range(0, len(boxes), 4)],
    }


def _sd_rpn(row: Mapping[str, Any]) -> dict[str, Any]:
    sink = row["sink"] or [0] * len(row["grounding"])
    if row["sink_rule"] in ("norm", "dims"):  # 1 where the trainer's own threshold is to find one
        sink = [UNIT * (strength > row["sink_threshold"]) for strength in sink]
    return {
        "question_id": row["sample_id"],
        "prompt": inert(row["question"]),
        "text": inert(row["answer"]),
        "image": _image(row),
        "sink_attn": [value / UNIT for value in sink],
        "grounding_attn_o2i": [value / UNIT for value in row["grounding"]],
    }


_SD_RPN = pa.schema(
    [(name, pa.string()) for name in ("question_id", "prompt", "text", "image")]
    + [(name, pa.list_(pa.float32())) for name in ("sink_attn", "grounding_attn_o2i")]
)


def _splits(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for split in ("train", "validation"):
        part = rows.filter(pl.col("split") == split) if rows.height else rows
        if part.height:
            yield split, part


EXPORTS: Mapping[str, Callable[[pl.DataFrame], Files]] = {
    "llava": llava,
    "lines": lines,
    "captions_and_pairs": captions_and_pairs,
    "regions": regions,
    "sd_rpn": sd_rpn,
    "grpo": grpo,
}
