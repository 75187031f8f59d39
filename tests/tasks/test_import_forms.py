"""Import from files in the forms in which public sets come: a literal small one of each."""

import pytest

from infra.errors import ConfigError
from tests.corpora import jsonl, parquet


def said(found, *columns):
    return sorted(tuple(row[name] for name in columns) for row in found)


def test_llava_v1_5_mix665k(imported):
    """Names of several folders below one root, dialogues, and text without a picture."""
    mix = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
         "conversations": [
             {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
             {"from": "gpt", "value": "The bus in the image is white and red."},
             {"from": "human", "value": "What feature can be seen on the back of the bus?"},
             {"from": "gpt", "value": "The back of the bus features an advertisement."}]},
        {"id": "wgByO4Y_0", "model": "", "conversations": [
            {"from": "human", "value": "Give me a recipe."}, {"from": "gpt", "value": "Sure."}]},
        {"id": "VG_100K_2/1", "image": "vg/VG_100K_2/1.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A man."}]},
    ]  # fmt: skip
    pictures = [("data/coco/train2017/000000033471.jpg", None, "a"),
                ("data/vg/VG_100K_2/1.jpg", None, "b")]  # fmt: skip
    found, lost = imported({"llava_v1_5_mix665k.json": mix}, pictures, format="conversations",
                           images="data")  # fmt: skip
    assert said(found, "image_id", "instruction", "source") == [
        ("a", "What are the colors of the bus in the image?", "llava_v1_5_mix665k"),
        ("a", "What feature can be seen on the back of the bus?", "llava_v1_5_mix665k"),
        ("b", "Who?", "llava_v1_5_mix665k"),
    ]
    assert lost == [("llava_v1_5_mix665k.json#1", "no_such_image", "none is named")]


def test_messages_as_llama_factory_and_chat_endpoints_have_them(imported):
    text = jsonl(
        {"messages": [{"role": "system", "content": "Be short."},
                      {"role": "user", "content": "<image>Who are they?"},
                      {"role": "assistant", "content": "Kane and Gretzka."}],
         "images": ["images/a.jpg"]},
        {"messages": [{"role": "user", "content": [
            {"type": "image", "image": "images/b.jpg"}, {"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "At home."}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}},
            {"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": "At home."}]},
    )  # fmt: skip
    found, lost = imported({"mllm.jsonl": text}, format="conversations")
    assert said(found, "image_id", "instruction", "response") == [
        ("a", "Who are they?", "Kane and Gretzka."), ("b", "Where?", "At home."),
    ]  # fmt: skip
    assert lost == [("mllm.jsonl#2", "no_such_image", "https://example.org/a.jpg")]


def test_parquet_with_pictures_and_conversations_as_llava_next_and_onevision_publish(imported):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    data = parquet({
        "id": ["1", "2"],
        "conversations": [talk, talk],
        "data_source": ["chartqa", None],
        "image": [{"bytes": b"\xff\xd8", "path": "x.jpg"}, {"bytes": b"\xff\xd8", "path": "x.jpg"}],
    })  # fmt: skip
    key = "data/train-00000-of-00001.parquet"
    pictures = [(key, "00000000", "a"), (key, "00000001", "b")]
    found, lost = imported({key: data}, pictures, format="conversations", source="data_source")
    assert said(found, "image_id", "instruction", "source") == [
        ("a", "What?", "chartqa"), ("b", "What?", "train-00000-of-00001"),
    ]  # fmt: skip
    assert lost == []


def test_dialogues_that_datasets_stored_as_an_object_of_lists(imported):
    talk = {"value": ["What?", "A dog."], "from": ["human", "gpt"]}
    data = parquet({"image": ["images/a.jpg"], "conversations": [talk]})
    [row], _ = imported({"t.parquet": data}, format="conversations")
    assert (row["instruction"], row["response"]) == ("What?", "A dog.")


def test_dialogues_that_a_column_holds_as_json(imported):
    talk = '[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]'
    data = parquet({"image": ["images/a.jpg"] * 2, "messages": [talk, "A dog."]})
    [row], [lost] = imported({"t.parquet": data}, format="conversations")
    assert (row["instruction"], row["response"]) == ("What?", "A dog.")
    assert lost[1] == "malformed_record"


def test_a_source_that_entries_name(imported):
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    entries = [{"image": f"images/{name}.jpg", "conversations": talk, "source": source}
               for name, source in (("a", "TextVQA"), ("b", 7))]  # fmt: skip
    found, _ = imported({"mix.json": entries}, format="conversations")
    assert said(found, "image_id", "source") == [("a", "TextVQA"), ("b", "mix")]
    rows, _ = imported({"mix.json": entries}, format="rows", columns={"image": "image"})
    assert said(rows, "image_id", "source") == [("a", "TextVQA"), ("b", "mix")]


INSTANCES = {
    "info": {"description": "COCO 2017 Dataset", "year": 2017},
    "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "BY"}],
    "images": [{"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640,
                "coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg",
                "date_captured": "2013-11-14 17:02:52", "id": 397133}],
    "annotations": [
        {"segmentation": [[224.24, 297.18, 228.29, 297.18]], "area": 1481.38, "iscrowd": 0,
         "image_id": 397133, "bbox": [217.62, 240.54, 38.99, 57.75], "category_id": 44,
         "id": 82445},
        {"segmentation": {"counts": [272, 2, 4, 4], "size": [427, 640]}, "area": 18419,
         "iscrowd": 1, "image_id": 397133, "bbox": [1, 0, 276, 122], "category_id": 44,
         "id": 904400082445}],
    "categories": [{"supercategory": "kitchen", "id": 44, "name": "bottle"}],
}  # fmt: skip
VAL2017 = [("val2017/000000397133.jpg", None, "a")]


def test_coco_instances(imported):
    [row], lost = imported({"annotations/instances_val2017.json": INSTANCES}, VAL2017,
                           size=(640, 427), format="coco", images="val2017")  # fmt: skip
    assert (row["box"], row["class_name"]) == ([217, 240, 257, 299], "bottle")
    assert lost == [("annotations/instances_val2017.json#1", "crowd", "bottle")]


def test_coco_captions(imported):
    captions = {**INSTANCES, "annotations": [
        {"image_id": 397133, "id": 37, "caption": "A man is in a kitchen making pizzas."},
        {"image_id": 397133, "id": 39, "caption": "A chef \n"}]}  # fmt: skip
    del captions["categories"]
    found, lost = imported({"annotations/captions_val2017.json": captions}, VAL2017,
                           format="coco_captions", images="val2017")  # fmt: skip
    assert said(found, "image_id", "caption") == [
        ("a", "A chef"), ("a", "A man is in a kitchen making pizzas."),
    ]  # fmt: skip
    assert lost == []


def test_members_of_tars_by_their_names(imported):
    name = "000000397133.jpg"
    pictures = [("other.tar", name, "b"), ("train/00007.tar", name, "a")]
    [row], _ = imported({"instances.json": INSTANCES}, pictures, size=(640, 427), format="coco",
                        images="train/*.tar")  # fmt: skip
    assert row["image_id"] == "a"


@pytest.mark.parametrize("folder", ["train/images/v1/patch8", "train/patch8"])
def test_objects365(imported, folder):
    """Its file names patches by a path that few copies on disk have whole."""
    name = "images/v1/patch8/objects365_v1_00420917.jpg"
    data = {
        "images": [{"id": 420917, "file_name": name, "height": 480, "width": 640,
                    "license": 5, "url": ""}],
        "annotations": [{"id": 1, "iscrowd": 0, "isfake": 0, "area": 1648.8, "isreflected": 0,
                         "bbox": [500.09, 205.11, 89.6, 18.4], "image_id": 420917,
                         "category_id": 1}],
        "categories": [{"name": "Person", "id": 1}],
    }  # fmt: skip
    pictures = [(f"{folder}/objects365_v1_00420917.jpg", None, "a")]
    [row], lost = imported({"zhiyuan_objv2_train.json": data}, pictures, format="coco",
                           images="train")  # fmt: skip
    assert (row["box"], row["class_name"], lost) == ([500, 205, 590, 224], "Person", [])


REF = {
    "sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 1719310,
    "ref_id": 0, "image_id": 581857, "split": "train", "category_id": 1,
    "sentences": [
        {"tokens": ["navy", "blue", "shirt"], "raw": "navy blue shirt", "sent_id": 0,
         "sent": "navy blue shirt"},
        {"tokens": ["woman"], "raw": "woman", "sent_id": 1, "sent": "woman back in blue"}],
}  # fmt: skip
REFER = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 480,
                "width": 640, "license": 1}],
    "annotations": [{"id": 1719310, "image_id": 581857, "category_id": 1, "iscrowd": 0,
                     "bbox": [0.0, 45.95, 238.92, 408.64]}],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
}  # fmt: skip
TRAIN2014 = [("train2014/COCO_train2014_000000581857.jpg", None, "a")]


def test_refer_s_two_files_once_its_pickle_is_json(imported):
    files = {"refcoco/refs(unc).json": [REF, {**REF, "ann_id": 5}],
             "refcoco/instances.json": REFER}  # fmt: skip
    [row], [lost] = imported(files, TRAIN2014, files=["refcoco/refs*.json"], format="refcoco",
                             instances="refcoco/instances.json", images="train2014")  # fmt: skip
    assert (row["box"], row["class_name"], row["expressions"]) == (
        [0, 45, 239, 455], "person", ["navy blue shirt", "woman back in blue"],
    )  # fmt: skip
    assert lost[:2] == ("refcoco/refs(unc).json#1", "malformed_record")


def test_only_the_wanted_splits_of_references(imported):
    refs = [REF, {**REF, "split": "testA"}, {**REF, "split": None}]
    found, lost = imported({"refs.json": {"refs": refs, **REFER}}, TRAIN2014, format="refcoco",
                           images="train2014", only={"split": ["train", "val"]})  # fmt: skip
    assert len(found) == 1
    assert lost == [("refs.json#1", "not_wanted", "split: testA"),
                    ("refs.json#2", "not_wanted", "split: None")]  # fmt: skip


def test_references_in_parquet_whose_boxes_are_corners_are_plain_rows(imported):
    data = parquet({
        "ref_id": [0], "image_path": ["coco/train2014/COCO_train2014_000000581857.jpg"],
        "bbox": [[0.0, 45.95, 238.92, 454.59]], "captions": [["navy blue shirt", "woman"]],
    })  # fmt: skip
    columns = {"image": "image_path", "box": "bbox", "said": "captions"}
    [row], _ = imported({"refcoco.parquet": data}, TRAIN2014, format="rows", columns=columns)
    assert (row["image_id"], row["box"]) == ("a", [0, 45, 239, 455])
    assert row["said"] == '["navy blue shirt", "woman"]'


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("refs(unc).p", "a pickle runs whatever code is in it"),
        ("a.json.gz", "unpack it"),
        ("a.csv", "write its rows as JSON lines or Parquet"),
        ("a.txt", "rename or convert it"),
    ],
)
def test_files_of_other_kinds_are_refused_in_one_line(imported, key, remedy):
    with pytest.raises(ConfigError, match="records are read from files ending in") as error:
        imported({key: b"\x80\x03]q\x00."}, format="rows", columns={"image": "image"})
    assert remedy in str(error.value) and "\n" not in str(error.value)
