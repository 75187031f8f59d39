"""SD-RPN's labels of maps that show one thing at a time, each threshold from both sides."""

import io
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from infra import samples, tables
from infra.folder import FolderStore
from tasks import label_regions_of_interest as stage
from tasks.label_regions_of_interest import LabelParams, label_regions_of_interest
from tests.tasks.examples import rows

UNIT = 1_000_000_000
PEAK = 20_000_000  # 0.02 of the attention
GRID = 12
# As the code for LLaVA: what the paper says, and no more.
PLAIN = LabelParams(margin=0, padding=False, weakest=0)


def blob(top, left, bottom, right, height=PEAK):
    looked = np.zeros((GRID, GRID), np.int64)
    looked[top:bottom, left:right] = height
    return looked


def map_row(looked, name="m", **more):
    return {
        "map_id": name, "image_id": "i", "status": "answered", "answer": "it", "steps": 3,
        "height": GRID, "width": GRID, "grounding": looked.ravel().tolist(), "sink": None,
        "sink_rule": None, "heads": "1:all", "sink_threshold": 0, **more,
    }  # fmt: skip


def label(
    build, looked, params=PLAIN, sink=None, size=(240, 240), rule="attention", level=10_000_000
):
    """The record of one map, or its drop."""
    shown = {} if sink is None else {"sink": sink.ravel().tolist(), "sink_rule": rule}
    row = map_row(looked, **shown, sink_threshold=level)
    maps = tables.write(build.store, "maps", [row])
    given = samples.write(
        build.store, pl.DataFrame({"sample_id": ["s"], "image_id": ["i"], "map_id": ["m"]})
    )
    headers = pl.DataFrame({"image_id": ["i"], "width": [size[0]], "height": [size[1]]})
    images = tables.write(build.store, "images", headers.to_arrow())
    found = label_regions_of_interest(build, given, maps, images, params)
    kept, lost = rows(build, found.samples), rows(build, found.drops)
    assert len(kept) + len(lost) == 1
    return (kept or lost)[0]


def cells(record):
    return np.reshape(record["labels"], (GRID, GRID))


def test_one_blob_is_foreground_in_a_box_and_the_rest_is_background(build):
    record = label(build, blob(3, 4, 6, 8))
    assert (cells(record)[3:6, 4:8] == 1).all()
    assert (record["foreground"], record["background"], record["ignored"]) == (12, 132, 0)
    assert (record["status"], record["steps"], record["heads"]) == ("ok", 3, "1:all")
    assert record["box"] == [80, 60, 160, 120]
    assert record["thresholds"] == "0.2 0.1 0.5 0"


@pytest.mark.parametrize(
    ("height", "expected"),
    [
        (0, 0), (PEAK // 10 - 1000, 0), (PEAK // 10 + 1000, -1), (PEAK // 5 - 1000, -1),
        (PEAK // 5 + 1000, 1),
    ],
)  # fmt: skip
def test_foreground_is_above_a_fifth_of_the_maximum_and_background_below_a_tenth(
    build, height, expected
):
    looked = blob(3, 4, 6, 8)
    looked[5, 9] = height
    assert cells(label(build, looked))[5, 9] == expected


def test_a_low_cell_inside_the_box_is_ignored_and_never_background(build):
    looked = blob(3, 4, 6, 8)
    looked[4, 5] = 0
    assert cells(label(build, looked))[4, 5] == -1


@pytest.mark.parametrize(("right", "rule"), [(11, "ok"), (12, "too_large")])
def test_a_box_of_half_the_grid_is_too_large(build, right, rule):
    record = label(build, blob(0, 0, 6, right))
    assert rule in (record.get("status"), record.get("rule"))
    if rule == "too_large":
        assert (record["level"], record["value"]) == ("sample", 500_000)


@pytest.mark.parametrize(("height", "rule"), [(4_999_000, "too_weak"), (5_001_000, "ok")])
def test_a_map_whose_maximum_is_below_5e_3_is_too_weak(build, height, rule):
    record = label(build, blob(3, 4, 6, 8, height), LabelParams(margin=0))
    assert rule in (record.get("status"), record.get("rule"))
    if rule == "too_weak":
        assert record["value"] == 4_999


def test_a_map_of_nothing_is_too_weak_whatever_the_threshold(build):
    assert label(build, blob(0, 0, 0, 0))["rule"] == "too_weak"


@pytest.mark.parametrize(("height", "is_sink"), [(9_999_999, False), (10_000_000, True)])
def test_a_cell_is_a_sink_from_the_threshold_on(build, height, is_sink):
    looked, sink = blob(3, 4, 6, 8), np.zeros((GRID, GRID), np.int64)
    looked[11, 0], sink[11, 0] = 2 * PEAK, height
    record = label(build, looked, sink=sink)
    if is_sink:
        assert cells(record)[11, 0] == 0 and record["box"] == [80, 60, 160, 120]
        assert record["cleaned"][11 * GRID] == 0
    else:
        # It is foreground, and so the box reaches from the blob to its corner: half of the grid.
        assert (record["rule"], record["value"]) == ("too_large", 500_000)
    assert record.get("grounding", looked.ravel().tolist()) == looked.ravel().tolist()


@pytest.mark.parametrize("rule", ["norm", "dims"])
@pytest.mark.parametrize(("strength", "is_sink"), [(20_000, False), (20_001, True)])
def test_by_hidden_states_a_cell_is_a_sink_above_the_threshold(build, rule, strength, is_sink):
    looked, sink = blob(3, 4, 6, 8), np.full((GRID, GRID), 900)
    looked[11, 0], sink[11, 0] = PEAK, strength
    params = LabelParams(margin=0, largest=1.1)
    record = label(build, looked, params, sink, rule=rule, level=20_000)
    assert (record["cleaned"][11 * GRID] == 0) is is_sink
    assert (record["sink_rule"], record["sink_threshold"]) == (rule, 20_000)


@dataclass(frozen=True)
class Counting(FolderStore):
    """A store that counts rows which were read as maps and are not yet written as samples."""

    rows: Counter[str] = field(default_factory=Counter)

    def get(self, key, *place):
        data = super().get(key, *place)
        names = pq.read_schema(io.BytesIO(data)).names if key.endswith(".parquet") else ()
        self.count(data, 1 if "grounding" in names and "labels" not in names else 0)
        return data

    def put(self, key, data, **more):
        names = pq.read_schema(io.BytesIO(data)).names if key.endswith(".parquet") else ()
        self.count(data, -1 if "labels" in names else 0)
        return super().put(key, data, **more)

    def count(self, data, sign):
        self.rows["held"] += sign and sign * pq.read_metadata(io.BytesIO(data)).num_rows
        self.rows["peak"] = max(self.rows["peak"], self.rows["held"])


def label_many(build, count, monkeypatch):
    """Labels of so many maps in shards of three, written in parts of five."""
    monkeypatch.setattr(stage, "ROWS", 5)
    store = Counting(build.store.uri)
    counted = replace(build, store=store)
    parts = [
        [map_row(blob(3, 4, 6, 8), f"m{n}") for n in range(at, min(at + 3, count))]
        for at in range(0, count, 3)
    ]
    maps = tables.Table("maps", sum((tables.write(store, "maps", p).shards for p in parts), ()))
    names = [str(n) for n in range(count)]
    frame = {"sample_id": names, "image_id": ["i"] * count, "map_id": [f"m{n}" for n in names]}
    images = pl.DataFrame({"image_id": ["i"], "width": [240], "height": [240]}).to_arrow()
    given = samples.write(store, pl.DataFrame(frame))
    images = tables.write(store, "images", images)
    # The key of the ledger covers all maps, so they are read once before the work begins.
    inner = label_regions_of_interest.__wrapped__
    found = inner(counted, given, maps, images, PLAIN)
    assert sorted(row["sample_id"] for row in rows(build, found.samples)) == sorted(names)
    return found.samples, store.rows["peak"]


def test_as_many_labels_are_in_memory_however_many_there_are(build, monkeypatch):
    few, peak = label_many(build, 14, monkeypatch)
    many, same = label_many(build, 62, monkeypatch)
    assert peak == same == 6
    assert len(few.shards) == 3 and len(many.shards) == 11
    assert max(shard.rows for shard in many.shards) == 6


def test_labels_are_those_of_the_rules_written_out_once_more(build):
    """Sink removal, thresholds and the band, on maps of noise."""
    draw = np.random.default_rng(7)
    seen = set()
    for _ in range(12):
        looked = (draw.exponential(1, (GRID, GRID)) ** 4 * 2e5).astype(np.int64)
        looked[:, 6:] //= 50
        sink = (draw.exponential(1, (GRID, GRID)) * 4e6).astype(np.int64)
        record = label(build, looked, sink=sink)
        g = [[0 if sink[y, x] >= 10_000_000 else looked[y, x] for x in range(GRID)]
             for y in range(GRID)]  # fmt: skip
        peak = max(map(max, g))
        high = [(y, x) for y in range(GRID) for x in range(GRID) if g[y][x] * 5 > peak]
        ys, xs = zip(*high, strict=True)
        area = (max(ys) - min(ys) + 1) * (max(xs) - min(xs) + 1)
        if area * 2 >= GRID**2:
            assert record["rule"] == "too_large"
            continue
        seen.add("ok")
        for y in range(GRID):
            for x in range(GRID):
                inside = min(ys) <= y <= max(ys) and min(xs) <= x <= max(xs)
                expected = 1 if (y, x) in high else 0 if not inside and g[y][x] * 10 < peak else -1
                assert cells(record)[y, x] == expected
    assert seen


def test_the_box_is_a_cell_larger_as_in_the_code_for_qwen(build):
    record = label(build, blob(3, 4, 6, 8), LabelParams())
    assert record["box"] == [60, 40, 180, 140]
    assert (cells(record)[2:7, 3:9] != 0).all() and cells(record)[1, 4] == 0


def test_pixels_are_those_of_the_picture_without_its_padding(build):
    """240 x 120: three rows of cells above it are padding, and background."""
    looked = blob(2, 4, 6, 8)
    looked[0:2] = PEAK * 15 // 100
    record = label(build, looked, LabelParams(margin=0), size=(240, 120))
    assert record["box"] == [80, 0, 160, 60]
    assert (cells(record)[:3] == 0).all()
    assert (cells(record)[3:6, 4:8] == 1).all()
    left, top, right, bottom = record["boxes"]
    assert 0 <= left < right <= 240 and 0 <= top < bottom <= 120


def test_a_region_that_is_all_in_the_padding_is_none(build):
    assert label(build, blob(0, 4, 2, 8), LabelParams(margin=0), size=(240, 120))["rule"] == (
        "in_padding"
    )


def test_boxes_come_one_after_the_other_the_strongest_first(build):
    looked = blob(1, 1, 3, 3) + blob(4, 8, 6, 11, 2 * PEAK)
    record = label(build, looked, LabelParams(margin=0, largest=0.9))
    assert len(record["boxes"]) == 8
    assert record["boxes"][0] > record["boxes"][4]


def test_a_record_whose_regions_are_single_cells_has_labels_and_no_boxes(build):
    record = label(build, blob(5, 5, 6, 6), LabelParams(margin=0, boxes=0.0199))
    assert record["boxes"] == [] and record["foreground"] == 1


def test_thresholds_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="background is above foreground"):
        LabelParams(background=0.3)


def test_nothing_in_nothing_out(build):
    given = samples.write(
        build.store,
        pl.DataFrame([], dict.fromkeys(("sample_id", "image_id", "map_id"), pl.String)),
    )
    images = tables.write(
        build.store,
        "images",
        pl.DataFrame({"image_id": ["i"], "width": [1], "height": [1]}).to_arrow(),
    )
    found = label_regions_of_interest(build, given, tables.Table("maps"), images, PLAIN)
    assert (found.samples.rows, found.drops.rows) == (0, 0)
