"""Records that strangers wrote: whatever stands anywhere in them is a fate or a one-line error."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import PairmillError

TALK = [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
    {"role": "user", "content": [{"type": "text", "text": "Why?"},
                                 {"type": "image_url", "image_url": {"url": "images/a.jpg"}}]},
    {"role": "assistant", "content": "It barks."},
]  # fmt: skip
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}
REFS = [{"ann_id": 1, "image_id": 1, "category_id": 1, "sentences": [{"sent": "left"}, "right"]}]
GOOD = {
    "conversations": [{"image": "images/a.jpg", "source": "s", "conversations": TALK}],
    "rows": [{"image": "images/a.jpg", "q": "?", "box": [1, 2, 3, 4], "boxes": [[1, 2, 3, 4]]}],
    "coco": COCO,
    "coco_captions": {**COCO, "annotations": [{"id": 1, "image_id": 1, "caption": "A dog."}]},
    "refcoco": {**COCO, "refs": REFS},
}
COLUMNS = {"image": "image", "q": "q", "box": "box", "boxes": "boxes"}
HOSTILE = st.sampled_from(
    [None, True, -1, 1e300, 10**40, float("nan"), float("-inf"), "", "\ud800", "\x00", "<image>",
     "../../etc/passwd", "=cmd|'/c calc'!A0", "x" * 100_001, [], [[]], {}, {"url": []}, [1, "a"],
     {"from": "human"}, [float("inf")] * 4]
)  # fmt: skip


def places(value, path=()):
    yield path
    pairs = {dict: dict.items, list: enumerate}.get(type(value), lambda leaf: ())
    for name, inner in pairs(value):
        yield from places(inner, (*path, name))


def changed(value, path, new):
    if not path:
        return new
    whole = inner = copy.deepcopy(value)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = new
    return whole


@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@pytest.mark.parametrize("form", GOOD)
@given(data=st.data())
def test_anything_anywhere_is_a_fate_or_one_line(imported, form, data):
    path = data.draw(st.sampled_from(list(places(GOOD[form]))))
    held = changed(GOOD[form], path, data.draw(HOSTILE))
    try:
        found, lost = imported(
            {"r.json": json.dumps(held)}, format=form, columns=COLUMNS, images="images"
        )
    except PairmillError as error:
        assert "r.json" in str(error) and "\n" not in str(error) and len(str(error)) < 600
    else:
        assert all(row["image_id"] in "ab" for row in found)
        assert len({name for name, _, _ in lost}) == len(lost)


def test_a_dialogue_of_very_many_turns_takes_time_by_their_number(imported):
    turns = [turn for at in range(20_000) for turn in (
        {"from": "human", "value": f"{at}?"}, {"from": "gpt", "value": "yes"})]  # fmt: skip
    found, _ = imported({"r.json": [{"image": "images/a.jpg", "conversations": turns}]},
                        format="conversations")  # fmt: skip
    assert len(found) == 20_000


@pytest.mark.parametrize("depth", [900, 100_000])
def test_depth_without_end_costs_a_record_or_the_file(imported, depth):
    good = {"image": "images/a.jpg", "conversations": TALK[:2]}
    deep = json.dumps(good)[:-1] + ', "conversations": ' + "[" * depth + "]" * depth + "}"
    held = {"r.jsonl": json.dumps(good) + "\n" + deep}
    try:
        [_], [(_, rule, _)] = imported(held, format="conversations")
        assert rule == "malformed_record"
    except PairmillError as error:
        assert "r.jsonl is not JSON (line 2: maximum recursion" in str(error)
