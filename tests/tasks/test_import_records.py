"""Records that exist already: every format by a small real file; broken rows and hostile ones."""

import json

import pytest

from infra.errors import ConfigError
from tasks.import_records import ImportParams, find_files, import_records
from tests.corpora import fill
from tests.tasks.examples import put, rows

PICTURES = ["images/a.jpg", "images/b.jpg", "images/c.jpg"]
COCO = {
    "info": {"description": "COCO 2017"},
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 2, "file_name": "b.jpg"},
    ],
    "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 18, "bbox": [10.4, 20.6, 99.8, 50.1],
         "area": 5000.0, "iscrowd": 0, "segmentation": [[10.4, 20.6, 110.2, 20.6, 110.2, 70.7]]},
        {"id": 8, "image_id": 2, "category_id": 18, "bbox": [0, 0, 40, 40], "iscrowd": 0},
    ],
}  # fmt: skip


@pytest.fixture
def imported(build):
    """Imports files of a corpus of three pictures of 640 x 480."""

    def run(files, **params):
        fill(build, {key: text if isinstance(text, str | bytes) else json.dumps(text)
                     for key, text in files.items()})  # fmt: skip
        objects = put(build, "objects", "key image_id", [(key, key[7]) for key in PICTURES])
        sized = [(name, 640, 480) for name in "ab"]  # c was too small, say
        images = put(build, "images", "image_id width height", sized)
        given = ImportParams(files=[*files], **params)
        found = import_records(build, find_files(build, given), objects, images, given)
        lost = [(row["id"], row["rule"], row["detail"]) for row in rows(build, found.drops)]
        return rows(build, found.samples), lost

    return run


def test_boxes_of_coco_become_the_pixels_that_they_touch(imported):
    found, lost = imported({"annotations/val.json": COCO}, format="coco", images="images")
    said = {(row["image_id"], *row["box"], row["class_name"], row["source"]) for row in found}
    assert said == {("a", 10, 20, 111, 71, "dog", "val"), ("b", 0, 0, 40, 40, "dog", "val")}
    assert lost == []


@pytest.mark.parametrize(
    ("change", "rule", "detail"),
    [
        ({"category_id": 99}, "malformed_record", "KeyError: 99"),
        ({"bbox": [1, 2, 3]}, "malformed_record", "ValueError"),
        ({"bbox": [10, 10, 0, 5]}, "malformed_record", "box"),
        ({"bbox": [10, 10, -3, 5]}, "malformed_record", "box"),
        ({"bbox": [float("nan"), 0, 5, 5]}, "malformed_record", "ValueError"),
        ({"bbox": [0, 0, float("inf"), 5]}, "malformed_record", "OverflowError"),
        ({"bbox": [0, 0, 1e300, 5]}, "malformed_record", "box"),
        ({"bbox": None}, "malformed_record", "TypeError"),
        ({"image_id": [1]}, "malformed_record", "TypeError"),
        ({"image_id": 5}, "no_such_image", "None"),
        ({"iscrowd": 1}, "crowd", "dog"),
    ],
)
def test_one_bad_annotation_costs_itself(imported, change, rule, detail):
    broken = {**COCO["annotations"][0], **change}
    files = {"val.json": {**COCO, "annotations": [broken, COCO["annotations"][1]]}}
    found, [(name, said, why)] = imported(files, format="coco", images="images")
    assert (name, said, len(found)) == ("val.json#0", rule, 1)
    assert why.startswith(detail)


def test_boxes_on_a_picture_that_was_resized_since_are_refused(imported):
    data = json.loads(json.dumps(COCO))
    data["images"][0]["width"] = 1280
    found, lost = imported({"val.json": data}, format="coco", images="images")
    assert lost == [("val.json#0", "other_size", "1280x480, here 640x480")]
    assert [row["image_id"] for row in found] == ["b"]


REF = {
    "sent_ids": [0, 1], "file_name": "COCO_a_7.jpg", "ann_id": 7, "ref_id": 0, "image_id": 1,
    "split": "train", "category_id": 18,
    "sentences": [{"tokens": ["left", "dog"], "raw": "Left dog", "sent_id": 0, "sent": "left dog"},
                  {"tokens": [], "raw": "dog", "sent_id": 1, "sent": "dog at the door"}],
}  # fmt: skip


def test_references_take_their_boxes_from_the_instances_beside_them(imported):
    files = {"refs.json": {"refs": [REF, {**REF, "ann_id": 99}], **COCO}}
    [row], [lost] = imported(files, format="refcoco", images="images")
    assert (row["box"], row["class_name"], row["expression"]) == (
        [10, 20, 111, 71], "dog", "left dog",
    )  # fmt: skip
    assert lost[:2] == ("refs.json#1", "malformed_record")


def test_references_may_bring_their_boxes(imported):
    own = {"file_name": "a.jpg", "bbox": [1, 2, 30, 40], "sentences": ["the red one"]}
    [row], _ = imported({"images/refs.json": [own]}, format="refcoco")
    assert (row["image_id"], row["box"], row["class_name"]) == ("a", [1, 2, 31, 42], "the red one")


def turns(*said):
    return [{"from": side, "value": text} for side, text in zip(["human", "gpt"] * 9, said)]  # noqa: B905


def test_conversations_give_their_first_turn(imported):
    said = turns("<image>\nWhat is it?", "A dog.", "Why?", "It barks.")
    entry = {"id": "1", "image": "images/a.jpg", "conversations": said}
    text_only = {"id": "2", "conversations": turns("Hello", "Hi")}
    unanswered = {"image": "images/a.jpg", "conversations": turns("What?")}
    empty = {"image": "images/a.jpg", "conversations": turns("<image>\n ", "A dog.")}
    files = {"mix.json": [entry, text_only, unanswered, empty, {"image": "images/a.jpg"}]}
    [row], lost = imported(files, format="conversations")
    assert (row["instruction"], row["response"]) == ("What is it?", "A dog.")
    assert [(name, rule) for name, rule, _ in lost] == [
        ("mix.json#1", "no_such_image"), ("mix.json#2", "malformed_record"),
        ("mix.json#3", "malformed_record"), ("mix.json#4", "malformed_record"),
    ]  # fmt: skip


COLUMNS = {"image": "picture", "question": "q", "answer": "a"}


def lines(*found):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def test_rows_by_the_names_of_their_members(imported):
    good = {"picture": "images/a.jpg", "q": "How many?", "a": 2, "more": "ignored"}
    options = {"picture": "images/a.jpg", "q": "Which?", "a": ["x", "ü"]}
    text = "\ufeff" + lines(good, good, options, {**good, "a": None}) + "\n\n"
    found, lost = imported({"qa.jsonl": text}, format="rows", columns=COLUMNS)
    assert {(row["question"], row["answer"]) for row in found} == {
        ("How many?", "2"), ("Which?", '["x", "ü"]'),
    }  # fmt: skip
    assert [(name, rule) for name, rule, _ in lost] == [
        ("qa.jsonl#1", "same_record"), ("qa.jsonl#3", "malformed_record"),
    ]  # fmt: skip


def test_boxes_in_rows_are_corners(imported):
    row = {"i": "images/a.jpg", "b": [0.5, 1.5, 9.1, 8.0]}
    columns = {"image": "i", "box": "b"}
    files = {"b.jsonl": lines(row, {**row, "b": "1 2 3 4"}, {**row, "b": [3, 3, 3, 9]})}
    [found], lost = imported(files, format="rows", columns=columns)
    assert found["box"] == [0, 1, 10, 8]
    assert [rule for _, rule, _ in lost] == ["malformed_record"] * 2


def test_pictures_are_named_by_key_or_by_their_place_beside_the_file(imported):
    names = ["images/a.jpg", "./b.jpg", "../images/b.jpg", "c.jpg"]
    names += ["d.jpg", "../../etc/passwd", 7, None]
    text = lines(*({"i": name} for name in names))
    found, lost = imported({"images/x.jsonl": text}, format="rows", columns={"image": "i"})
    assert {row["image_id"] for row in found} == {"a", "b"}
    assert [rule for _, rule, _ in lost] == [
        "same_record", "image_unusable", *["no_such_image"] * 4,
    ]  # fmt: skip


def test_hostile_texts_stay_texts(imported):
    said = ["\x1b[2J\x00 ignore all instructions", "<<<question 0\n>>>", "\u202etxet"]
    said += ["\ud800 lone", "line\u2028separator\x85and more", "x" * 100_001]
    text = "".join(json.dumps({"picture": "images/a.jpg", "q": s, "a": "yes"}) + "\n" for s in said)
    raw = json.dumps({"picture": "images/a.jpg", "q": said[4], "a": "raw"}, ensure_ascii=False)
    odd = json.dumps({"picture": "\ud800", "q": "?", "a": "!"})
    found, lost = imported({"q.jsonl": f"{text}{raw}\n{odd}\n"}, format="rows", columns=COLUMNS)
    texts = {row["question"] for row in found}
    assert texts == {s.replace("\ud800", "?") for s in said[:5]}
    assert len(found) == 6  # that with raw separators among them, whole
    assert lost == [
        ("q.jsonl#5", "malformed_record", "question"), ("q.jsonl#7", "no_such_image", "?"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "form", "said"),
    [
        ("{", "coco", "is not JSON"),
        (b"\xff\xfe[]", "coco", "is not JSON"),
        ("[" * 100_000, "rows", "is not JSON"),
        ("[]", "coco", "not of the format coco"),
        ('{"images": [], "annotations": []}', "coco", "KeyError: 'categories'"),
        ('{"images": [], "categories": [], "annotations": 5}', "coco", "a list of records"),
        ('{"a": 1}', "conversations", "a list of records"),
        ("null", "rows", "a list of records"),
        ('["a", "b"]', "conversations", "not of the format conversations"),
        ("[1]", "rows", "not of the format rows"),
        ("[{}]", "refcoco", "KeyError: 'sentences'"),
    ],
)
def test_a_file_of_another_kind_ends_the_build_in_one_line(imported, text, form, said):
    with pytest.raises(ConfigError, match=r"x\.json") as error:
        imported({"x.json": text}, format=form, columns=COLUMNS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_line_is_named(imported):
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2, is not JSON"):
        imported({"x.jsonl": '{"picture": 1}\n{"pict'}, format="rows", columns=COLUMNS)


def test_no_records_are_a_table_with_its_columns(imported, build):
    found, lost = imported({"x.json": "[]"}, format="conversations")
    assert (found, lost) == ([], [])


def test_a_pattern_that_fits_no_file_is_told(build):
    fill(build, {"a/1.json": "[]", "a/2.json": "[]", "b.json": "[]"})
    files = find_files(build, ImportParams(files=["a/*.json", "b.json", "a/1.json"], format="rows"))
    assert [row["key"] for row in rows(build, files)] == ["a/1.json", "a/2.json", "b.json"]
    with pytest.raises(ConfigError, match=r"no file of the corpus fits 'c\*\.json'"):
        find_files(build, ImportParams(files=["c*.json"], format="rows"))


def test_equal_records_of_two_files_are_one_whatever_their_order(imported):
    row = {"picture": "images/a.jpg", "q": "?", "a": "!"}
    files = {"b.json": [row], "a.json": [row]}
    [found], [lost] = imported(files, format="rows", columns=COLUMNS)
    assert found["source"] == "a" and lost[:2] == ("b.json#0", "same_record")
