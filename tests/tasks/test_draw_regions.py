"""Pictures of labels: one of every sample, drawn once, on pages that load nothing."""

import io
import re
from base64 import b64decode
from dataclasses import replace

import polars as pl
import pytest
from PIL import Image

from infra import samples, tables
from tasks import draw_regions as stage
from tasks.draw_regions import DrawParams, draw_regions, pages
from tests.pictures import scene
from tests.pools import Crashing
from tests.tasks.examples import rows

PARAMS = DrawParams(side=64)


def pictures(build, count=3):
    """Pictures of different shapes, as tables of objects and of images."""
    objects, images = [], []
    for n in range(count):
        size = (60 + 20 * n, 80)
        buffer = io.BytesIO()
        scene(*size, n).save(buffer, "PNG")
        build.corpus.put(f"{n}.png", data := buffer.getvalue())
        objects.append({"key": f"{n}.png", "image_id": f"i{n}", "size": len(data), "stamp": "s"})
        images.append({"image_id": f"i{n}", "width": size[0], "height": size[1]})
    headers = pl.DataFrame(images).to_arrow()
    return tables.write(build.store, "objects", objects), tables.write(
        build.store, "images", headers
    )


def labelled(*numbers, label=1, **more):
    """Samples of pictures by their number, with a grid of two by two cells."""
    return pl.DataFrame([
        {
            "sample_id": f"s{n}", "image_id": f"i{n}", "grid_height": 2, "grid_width": 2,
            "labels": [0, label, -1, 0], "box": [40, 0, 60, 40], "boxes": [42, 2, 58, 38],
            "question": f"Where is {n}?", "answer": "Here.", "mode": "natural", "foreground": 1,
            "background": 2, "ignored": 1, "key": f"{n}.png", "member": None, **more,
        }
        for n in numbers
    ])  # fmt: skip


def draw(build, frame, params=PARAMS):
    return draw_regions(build, samples.write(build.store, frame), *pictures(build), params)


def images_of(page):
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page.decode())
    return [Image.open(io.BytesIO(b64decode(data))) for data in found]


def test_every_sample_has_a_picture_of_two_panels_of_this_size(build):
    found = rows(build, draw(build, labelled(0, 1, 2)).overlays)
    sizes = {row["image_id"]: Image.open(io.BytesIO(row["jpeg"])).size for row in found}
    assert sizes == {"i0": (48 * 2 + 8, 64), "i1": (64 * 2 + 8, 64), "i2": (64 * 2 + 8, 51)}


def test_what_is_drawn_is_not_drawn_again_and_what_changed_is(build):
    draw(build, labelled(0, 1))
    draw(build, labelled(0, 1).with_columns(question=pl.lit("Another?")))
    assert build.work["regions_drawn"] == 2
    found = draw(build, labelled(1, 2))
    assert build.work["regions_drawn"] == 3
    assert sorted(row["image_id"] for row in rows(build, found.overlays)) == ["i1", "i2"]
    draw(build, pl.concat([labelled(1), labelled(2, label=-1)]))
    assert build.work["regions_drawn"] == 4
    draw(build, labelled(1), DrawParams(side=100))
    assert build.work["regions_drawn"] == 5


def test_an_interrupted_run_goes_on_from_what_is_written(build, monkeypatch):
    monkeypatch.setattr(stage, "SHARD", 1)

    class Stopping:
        def map(self, fn, shards, **more):
            yield next(iter(build.pool.map(fn, shards, **more)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(replace(build, pool=Stopping()), labelled(0, 1, 2))
    receipts = [s.key for s in build.store.list("ledger/draw_regions/") if "/receipts/" in s.key]
    build.work.clear()
    assert draw(build, labelled(0, 1, 2)).overlays.rows == 3
    assert build.work["regions_drawn"] <= 3 - len(receipts) < 3


def is_deadly(item):
    return item.image_id == "i1"


def test_a_picture_that_ends_its_worker_is_missed_on_its_page_and_tried_again(build):
    frame = labelled(0, 1, 2)
    found = draw(replace(build, pool=Crashing(build.pool, is_deadly)), frame)
    assert (found.overlays.rows, found.lost.rows) == (2, 1)
    (page,) = dict(pages(build.store, found.overlays, frame)).values()
    assert len(images_of(page)) == 2
    assert page.decode().count("Where is") == 3 and b"ended its worker" in page
    again = draw(build, frame)
    assert (again.overlays.rows, again.lost.rows) == (3, 0)


def test_pages_show_every_record_once_and_lead_to_each_other(build, monkeypatch):
    monkeypatch.setattr(stage, "PAGE", 2)
    twins = labelled(0).with_columns(sample_id=pl.lit("t0"))  # another question, the same region
    frame = pl.concat([labelled(0, 1, 2), twins])
    found = dict(pages(build.store, draw(build, frame).overlays, frame))
    assert list(found) == ["pictures/00000.html", "pictures/00001.html"]
    assert build.work["regions_drawn"] == 3
    first, second = found.values()
    assert [len(images_of(page)) for page in (first, second)] == [2, 2]
    ids = re.findall(r'<li id="(\w+)"', (first + second).decode())
    assert sorted(ids) == ["s0", "s1", "s2", "t0"]
    assert b'href="00001.html"' in first and b'rel="prev"' not in first
    assert b'href="00000.html"' in second and b'rel="next"' not in second


def test_what_strangers_wrote_is_text_on_a_page_that_loads_nothing(build):
    evil = "</p><script>alert(1)</script> \x1b[31m & \u202e"
    frame = labelled(0, question=evil, answer=evil, key=f"<b>{'x' * 500}.png")
    (page,) = dict(pages(build.store, draw(build, frame).overlays, frame)).values()
    text = page.decode()
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "x" * 200 not in text
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_nothing_in_no_pages_out(build):
    frame = labelled(0).clear()
    found = draw(build, frame)
    assert list(pages(build.store, found.overlays, frame)) == []
