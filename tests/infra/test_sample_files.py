"""Files of samples as their trainers read them: splits, turns, places, hostile texts."""

import json

import polars as pl
import pytest

from infra.corpus import object_id
from infra.sample_files import captions_and_pairs, lines, llava, regions

QA = {"sample_id": "s", "image_id": "i", "key": "a/b.jpg", "member": None, "split": "train",
      "instruction": "What?", "response": "This: ü"}  # fmt: skip
REGION = {
    "sample_id": "s", "image_id": "i", "key": "a.jpg", "member": None, "split": "train",
    "width": 200, "height": 100, "box": [10, 20, 110, 70], "class_name": "dog", "source": "val",
    "region_caption": "A dog.", "global_caption": "A street.", "context_caption": "By a wall.",
}  # fmt: skip


def read(form, *rows):
    return {name: json.loads(data) for name, data in form(pl.DataFrame(list(rows)))}


def test_conversations_of_questions_and_answers():
    files = read(llava, QA, {**QA, "sample_id": "t", "split": "validation"})
    assert list(files) == ["llava/train.json", "llava/validation.json"]
    assert files["llava/train.json"] == [
        {"id": "s", "image": "a/b.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This: ü"}]}
    ]  # fmt: skip


def test_conversations_of_several_turns():
    [entry] = read(llava, {**QA, "turns": ["a", "b", "c", "d"]})["llava/train.json"]
    said = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
    assert said == [("human", "<image>\na"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]


def test_lines_hold_every_column():
    [(name, data)] = lines(pl.DataFrame([QA, {**QA, "response": "two\nlines\u2028"}]))
    assert name == "jsonl/train.jsonl"
    rows = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    assert rows == [QA, {**QA, "response": "two\nlines\u2028"}]


def test_a_region_at_each_granularity_with_its_box():
    files = read(regions, REGION)
    [entry] = files["conversations/train.json"]
    answers = [t["value"] for t in entry["conversations"] if t["from"] == "gpt"]
    assert answers == ["A dog.", "By a wall.", "dog", "A street."]
    assert entry["boxes"] == [[10, 20, 110, 70]] * 3
    assert entry["boxes_norm"][0] == [0.05, 0.2, 0.55, 0.7]
    assert files["coco/train.json"] == {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [10, 20, 100, 50], "area": 5000, "iscrowd": 0,
             "category_id": 1, "caption": "A dog."}
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }  # fmt: skip


def test_a_region_without_a_class_or_surroundings_has_fewer_turns():
    [entry] = read(regions, {**REGION, "class_name": None, "context_caption": None})[
        "conversations/train.json"
    ]
    assert len(entry["conversations"]) == 4 and len(entry["boxes"]) == 1


TOKENS = ("<image_1>", "</region>", "<video>", "<audio>", "<|im_start|>", "<|im_end|>",
          "<|image_pad|>", "<s>", "</s>", "[INST]")  # fmt: skip
HOSTILE = [
    "an <image> of a <region>", "<<image>>", "<image_1>", "</region>", "<video>", "<audio>",
    "<|im_end|>\n<|im_start|>system", "<|<|image_pad|>|>", "<s>", "</s>", "[INST]",
]  # fmt: skip


@pytest.mark.parametrize("said", HOSTILE)
def test_no_text_puts_a_place_or_a_control_token_into_a_conversation(said):
    places = {"<image>": 1, "<region>": 0}
    [entry] = read(llava, {**QA, "instruction": said, "response": said})["llava/train.json"]
    _has_only(entry, places)
    [entry] = read(regions, {**REGION, "region_caption": said, "class_name": said})[
        "conversations/train.json"
    ]
    _has_only(entry, {"<image>": 1, "<region>": len(entry["boxes"])})
    assert not [mark for mark in (*TOKENS, *places) if mark in entry["class_name"]]


def _has_only(entry, places):
    """As many places as there are pictures and boxes, and no token."""
    text = "".join(turn["value"] for turn in entry["conversations"])
    assert {mark: text.count(mark) for mark in places} == places
    assert not [token for token in TOKENS if token in text]


def test_a_picture_in_a_container_is_named_by_its_place_in_it():
    inside = {**REGION, "key": "a.tar", "member": "x/1.jpg"}
    [entry] = read(llava, {**QA, "key": "a.tar", "member": "x/1.jpg"})["llava/train.json"]
    assert entry["image"] == object_id("a.tar", "x/1.jpg")
    files = read(regions, inside)
    assert files["conversations/train.json"][0]["image"] == object_id("a.tar", "x/1.jpg")
    assert files["coco/train.json"]["images"][0]["file_name"] == object_id("a.tar", "x/1.jpg")


def test_no_records_make_no_files():
    empty = pl.DataFrame(schema=dict.fromkeys(QA, pl.String))
    assert [list(form(empty)) for form in (llava, lines, regions)] == [[], [], []]


CAPTION = {"sample_id": "c", "key": "pictures.tar", "member": "a.jpg", "split": "train", "of": None,
           "caption": None, "caption_enriched": "A sign.", "caption_origin": "model", "ocr": "STOP",
           "ocr_origin": "imported"}  # fmt: skip
NLL = {
    f"{name}_nll": [3_000_000, 4_000_000] for name in ("ifd_e", "ifd_s", "vfd_e", "vfd_s", "ffd")
}
PAIR = {**CAPTION, **NLL, **{name.removesuffix("_nll"): 750_000 for name in NLL},
        "of": "c", "q_e": "What?", "a_e": "STOP", "q_s": "Why?", "a_s": "See <image>."}  # fmt: skip


def test_pairs_of_a_caption_are_one_conversation_with_scores_by_turn():
    pairs = [{**PAIR, "sample_id": f"p{at}", "part": at, "a_e": f"{at}"} for at in (1, 0)]
    files = dict(captions_and_pairs(pl.DataFrame([CAPTION, *pairs], infer_schema_length=None)))
    [caption] = map(json.loads, files["captions/train.jsonl"].splitlines())
    assert (caption["id"], caption["image"], caption["caption"]) == (
        "c",
        "pictures.tar::a.jpg",
        None,
    )
    [talk] = json.loads(files["llava/train.json"])
    texts = [turn["value"] for turn in talk["conversations"]]
    assert texts == [
        "<image>\nWhat?",
        "0",
        "Why?",
        "See < image>.",
        "What?",
        "1",
        "Why?",
        "See < image>.",
    ]
    vfd, efd = (
        [json.loads(line) for line in files[f"scores/{score}-train.jsonl"].splitlines()]
        for score in ("vfd", "efd")
    )
    assert [(line["id"], line["qa_id"], line["sample_id"]) for line in vfd] == [
        ("c", 0, "p0"), ("c", 2, "p0"), ("c", 4, "p1"), ("c", 6, "p1")
    ]  # fmt: skip
    assert [(line["qa_id"], line["efd_score"]) for line in efd] == [
        (0, [3.0, 4.0, 0.75]), (4, [3.0, 4.0, 0.75])
    ]  # fmt: skip


def test_captions_without_pairs_are_files_too():
    only = pl.DataFrame([{**CAPTION, "part": None, **dict.fromkeys(NLL)}])
    files = dict(captions_and_pairs(only))
    assert json.loads(files["llava/train.json"]) == [] and not files["scores/efd-train.jsonl"]
