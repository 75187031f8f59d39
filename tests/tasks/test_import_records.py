"""Records that exist already: every format by a small real file; broken rows and hostile ones."""

import json

import pytest

from infra.errors import ConfigError, PairmillError
from tasks.import_records import ImportParams, find_files, import_records
from tests.corpora import fill
from tests.tasks.examples import put, rows

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


def test_boxes_of_coco_become_the_pixels_that_they_touch(imported):
    found, lost = imported({"annotations/val.json": COCO}, format="coco", images="images")
    said = {(row["image_id"], *row["box"], row["class_name"], row["source"]) for row in found}
    assert said == {("a", 10, 20, 111, 71, "dog", "val"), ("b", 0, 0, 40, 40, "dog", "val")}
    assert lost == []


@pytest.mark.parametrize(
    ("change", "rule", "detail"),
    [
        ({"category_id": 99}, "malformed_record", "lacks 99"),
        ({"bbox": [1, 2, 3]}, "malformed_record", "ValueError"),
        ({"bbox": [10, 10, 0, 5]}, "malformed_record", "box"),
        ({"bbox": [10, 10, -3, 5]}, "malformed_record", "box"),
        ({"bbox": [float("nan"), 0, 5, 5]}, "malformed_record", "ValueError"),
        ({"bbox": [0, 0, float("inf"), 5]}, "malformed_record", "OverflowError"),
        ({"bbox": [0, 0, 1e300, 5]}, "malformed_record", "box"),
        ({"bbox": None}, "malformed_record", "TypeError"),
        ({"image_id": [1]}, "malformed_record", "TypeError"),
        ({"image_id": 5}, "no_such_image", "none is named"),
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


def test_each_question_of_a_dialogue_is_a_sample_with_its_answer(imported):
    said = turns("<image>\nWhat is it?", "A dog.", "Why?", "It barks.")
    entry = {"id": "1", "image": "images/a.jpg", "conversations": said}
    found, lost = imported({"mix.json": [entry]}, format="conversations")
    assert {(row["instruction"], row["response"]) for row in found} == {
        ("What is it?", "A dog."), ("Why?", "It barks."),
    }  # fmt: skip
    assert lost == []


def test_where_only_first_questions_are_wanted_the_others_are_drops(imported):
    said = turns("What is it?", "A dog.", "Why?", "It barks.", "Where?")
    entry = {"image": "images/a.jpg", "conversations": said}
    [row], lost = imported({"mix.json": [entry]}, format="conversations", turns="first")
    assert (row["instruction"], row["response"]) == ("What is it?", "A dog.")
    assert lost == [
        ("mix.json#0.2", "later_turn", "turn 2 of a dialogue"),
        ("mix.json#0.3", "later_turn", "turn 3 of a dialogue"),
    ]


def test_turns_that_do_not_pair_cost_themselves(imported):
    said = [("human", "One?"), ("human", "Two?"), ("gpt", "2"), ("gpt", "3"), ("human", "Four?")]
    talk = [{"from": side, "value": text} for side, text in said]
    files = {"mix.json": [{"image": "images/a.jpg", "conversations": talk}]}
    [row], lost = imported(files, format="conversations")
    assert (row["instruction"], row["response"]) == ("Two?", "2")
    assert lost == [
        ("mix.json#0", "malformed_record", "response"),
        ("mix.json#0.3", "malformed_record", "instruction"),
        ("mix.json#0.4", "malformed_record", "response"),
    ]


@pytest.mark.parametrize(
    ("entry", "rule", "detail"),
    [
        ({"conversations": turns("Hello", "Hi")}, "no_such_image", "none is named"),
        ({"image": "images/a.jpg"}, "malformed_record", "lacks 'messages'"),
        ({"image": "images/a.jpg", "conversations": []}, "malformed_record", "ValueError"),
        ({"image": "images/a.jpg", "conversations": turns("<image>\n ", "A.")},
         "malformed_record", "instruction"),
        ({"image": "images/a.jpg", "conversations": [{"from": "tool", "value": "7"}]},
         "malformed_record", "lacks 'tool'"),
        ({"image": ["images/a.jpg", "images/b.jpg"], "conversations": turns("Same?", "No")},
         "several_images", "2 pictures"),
        ({"image": {"path": {}}, "conversations": turns("What?", "A.")},
         "malformed_record", "TypeError"),
    ],
)  # fmt: skip
def test_one_bad_dialogue_costs_itself(imported, entry, rule, detail):
    good = {"image": "images/a.jpg", "conversations": turns("What?", "A dog.")}
    [_], [(name, said, why)] = imported({"mix.json": [entry, good]}, format="conversations")
    assert (name, said) == ("mix.json#0", rule) and why.startswith(detail)


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


@pytest.mark.parametrize("empty", ["", " \n", None, [], float("nan")])
def test_what_is_empty_is_absent(imported, empty):
    row = {"picture": "images/a.jpg", "q": "Which?", "a": empty}
    [found], _ = imported(
        {"q.jsonl": lines(row)}, format="rows", columns=COLUMNS, optional=["answer"]
    )
    assert (found["question"], found["answer"]) == ("Which?", None)
    _, [lost] = imported({"q.jsonl": lines(row)}, format="rows", columns=COLUMNS)
    assert lost[1:] == ("malformed_record", "answer")


def test_numbers_that_are_none_are_no_text(imported):
    row = {"picture": "images/a.jpg", "q": "Which?"}
    held = {
        "q.jsonl": lines({**row, "a": [float("nan")]}, {**row, "a": float("inf")}, {**row, "a": 2})
    }
    [found], lost = imported(held, format="rows", columns=COLUMNS)
    assert found["answer"] == "2" and [rule for _, rule, _ in lost] == ["malformed_record"] * 2


def test_boxes_in_rows_may_be_sides_as_in_coco(imported):
    held = {"b.jsonl": lines({"i": "images/a.jpg", "b": [100.5, 10, 20, 30], "c": [[1, 2, 3, 4]]})}
    columns = {"image": "i", "box": "b", "boxes": "c"}
    [found], _ = imported(held, format="rows", columns=columns, boxes="sides")
    assert (found["box"], found["boxes"]) == ([100, 10, 121, 40], [1, 2, 4, 6])


@pytest.mark.parametrize("form", ["corners", "sides"])
def test_boxes_that_are_shares_of_the_picture_are_no_pixels(imported, form):
    held = {"b.jsonl": lines({"i": "images/a.jpg", "b": [0.1, 0.2, 0.5, 0.75]},
                             {"i": "images/a.jpg", "b": [0, 0, 1, 1]})}  # fmt: skip
    [_], [lost] = imported(held, format="rows", columns={"image": "i", "box": "b"}, boxes=form)
    assert lost[1:] == ("malformed_record", "ValueError: a box from 0 to 1; pixels are wanted")


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
        ('{"images": [], "annotations": []}', "coco", "lacks 'categories'"),
        ('{"images": [], "categories": [], "annotations": 5}', "coco", "a list of records"),
        ('{"a": 1}', "conversations", "a list of records"),
        ("null", "rows", "a list of records"),
        ('["a", "b"]', "conversations", "not of the format conversations"),
        ("[1]", "rows", "not of the format rows"),
        ("[{}]", "refcoco", "lacks 'sentences'"),
    ],
)
def test_a_file_of_another_kind_ends_the_build_in_one_line(imported, text, form, said):
    with pytest.raises(ConfigError, match=r"x\.json") as error:
        imported({"x.json": text}, format=form, columns=COLUMNS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_line_is_named(imported):
    with pytest.raises(ConfigError, match=r"x\.jsonl is not JSON \(line 2: "):
        imported({"x.jsonl": '{"picture": 1}\n{"pict'}, format="rows", columns=COLUMNS)


def test_no_records_are_a_table_with_its_columns(imported, build):
    found, lost = imported({"x.json": "[]"}, format="conversations")
    assert (found, lost) == ([], [])


def test_a_file_that_changes_while_it_is_read_is_refused(build):
    fill(build, {"a.json": "[]"})
    given = ImportParams(files=["a.json"], format="rows")
    files = find_files(build, given)
    fill(build, {"a.json": '[{"picture": "images/a.jpg"}]'})
    none = [put(build, "objects", "key member image_id", []), put(build, "images", "image_id", [])]
    with pytest.raises(PairmillError, match=r"a\.json changed while it was read; run again"):
        import_records(build, files, *none, given)


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
