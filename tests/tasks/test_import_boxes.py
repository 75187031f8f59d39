"""Plain rows with several boxes a record."""

import json

import pytest

from infra import tables
from infra.build import Build
from infra.store import Store
from tasks.import_records import ImportParams, find_files, import_records

COLUMNS = {"image": "image", "question": "question", "boxes": "regions"}
GOOD = [[10.4, 20, 30.2, 40], [0, 0, 50, 60]]


def imported(build: Build, regions, optional=("boxes",)):
    row = {"image": "a.png", "question": "What is it?", "regions": regions}
    corpus: Store = build.corpus
    corpus.put("rows.json", json.dumps([row]).encode())
    params = ImportParams(
        files=["rows.json"], format="rows", columns=COLUMNS, optional=list(optional)
    )
    objects = [{"key": "a.png", "member": None, "image_id": "i"}]
    found = import_records(
        build,
        find_files(build, params),
        tables.write(build.store, "objects", objects),
        tables.write(build.store, "images", [{"image_id": "i", "width": 99, "height": 99}]),
        params,
    )
    rows = tables.frame(build.store, found.samples).to_dicts()
    return rows, tables.read(build.store, found.drops)["rule"].to_pylist()


def test_boxes_are_whole_pixels_one_after_the_other(build):
    [row], drops = imported(build, GOOD)
    assert row["boxes"] == [10, 20, 31, 40, 0, 0, 50, 60]
    assert drops == []


@pytest.mark.parametrize("none", [[], None])
def test_a_record_may_have_none(build, none):
    [row], drops = imported(build, none)
    assert (row["boxes"], drops) == (None, [])


def test_a_record_must_have_some_where_they_are_not_optional(build):
    rows, drops = imported(build, [], optional=())
    assert (rows, drops) == ([], ["malformed_record"])


def test_a_box_without_area_is_malformed(build):
    rows, drops = imported(build, [*GOOD, [5, 5, 5, 9]])
    assert (rows, drops) == ([], ["malformed_record"])
