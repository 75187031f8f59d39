"""A build in an empty folder; an import of records about its pictures."""

import json
from pathlib import Path

import pytest

from infra.build import Build
from tasks.import_records import ImportParams, find_files, import_records
from tests.corpora import fill
from tests.tasks.examples import new_build, put, rows

PICTURES = [(f"images/{name}.jpg", None, name) for name in "abc"]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return new_build(tmp_path)


@pytest.fixture
def imported(build: Build):
    """Imports files of a corpus whose usable pictures, a and b, are 640 x 480 unless told
    otherwise; c was too small, say. A picture is (key, member, image_id).
    """

    def run(held, pictures=PICTURES, usable="ab", size=(640, 480), **params):
        fill(build, {key: text if isinstance(text, str | bytes) else json.dumps(text)
                     for key, text in held.items()})  # fmt: skip
        objects = put(build, "objects", "key member image_id", pictures)
        images = put(build, "images", "image_id width height", [(i, *size) for i in usable])
        given = ImportParams(**{"files": [*held], **params})
        found = import_records(build, find_files(build, given), objects, images, given)
        lost = [(row["id"], row["rule"], row["detail"]) for row in rows(build, found.drops)]
        return rows(build, found.samples), lost

    return run
