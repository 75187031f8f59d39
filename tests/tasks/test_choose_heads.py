"""Heads chosen by boxes: a model whose looking head is known, and masses computed once more."""

import io
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw
from pydantic import ValidationError

from infra import samples, tables
from infra.attention_prompts import watched_prompt
from infra.errors import ConfigError
from infra.local_mllm import LocalModel
from infra.local_probes import attention
from tasks.choose_heads import ChooseParams, Choosing, choose_heads
from tests.pools import Crashing
from tests.recipes import SAMPLE
from tests.tasks.examples import rows

pytestmark = pytest.mark.usefixtures("one_thread")

RED = [[70, 20, 110, 70], [15, 60, 50, 95], [100, 40, 140, 80]]
WIDTH, HEIGHT = 160, 100


def choosing(folder, **changed):
    local = LocalModel(name=str(folder), device="cpu", batch_size=2)
    about = {"samples": 3, "heads": 1, "layers": (0.0, 1.0), "modes": ["natural", "textual"]}
    return Choosing(
        local=local, max_tokens=16, square_pixels=112 * 112, **{**about, **changed}
    )  # fmt: skip


@pytest.fixture
def looking():
    return choosing(SAMPLE / "models/looking")


def pictures(build, count=3):
    """White pictures with one red box each, as tables of objects and of images."""
    objects, images = [], []
    for n in range(count):
        picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        left, top, right, bottom = RED[n]
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill=(220, 30, 40))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        build.corpus.put(f"{n}.png", data := buffer.getvalue())
        objects.append({"key": f"{n}.png", "image_id": f"i{n}", "size": len(data), "stamp": "s"})
        images.append({"image_id": f"i{n}", "width": WIDTH, "height": HEIGHT})
    headers = pl.DataFrame(images).to_arrow()
    return tables.write(build.store, "objects", objects), tables.write(
        build.store, "images", headers
    )


def boxed(build, *items):
    """Samples of (number of a picture, question, flat boxes), all in natural mode."""
    frame = [
        {"sample_id": f"{n} {question}", "image_id": f"i{n}", "prompt": question,
         "mode": "natural", "annotated_boxes": boxes}
        for n, question, boxes in items
    ]  # fmt: skip
    types = {**dict.fromkeys(("sample_id", "image_id", "prompt", "mode"), pl.String),
             "annotated_boxes": pl.List(pl.Int64)}  # fmt: skip
    return samples.write(build.store, pl.DataFrame(frame, types))


WHERE = "Where is the red one?"
ASKED = tuple((n, WHERE, RED[n]) for n in range(3))


def choose(build, params, items=ASKED, count=3):
    return choose_heads(build, boxed(build, *items), *pictures(build, count), params)


def named(build, found):
    return [(row["mode"], row["layer"], row["head"]) for row in rows(build, found.heads)]


def test_the_head_that_was_made_to_look_at_the_thing_is_chosen_of_all(build, looking):
    """Layer 1: head 0 looks at the colour that is named, head 1 at the sink."""
    found = choose(build, looking)
    assert named(build, found) == [("natural", 1, 0)]
    (row,) = rows(build, found.heads)
    assert row["samples"] == 3 and row["mass"] > 100_000_000


def test_masses_are_those_of_each_head_s_own_map_written_out_once_more(build, tiny_mllms):
    params = choosing(tiny_mllms["llava"])
    found = choose(build, params)
    heads = {f"{layer} {head}": {layer: [head]} for layer in range(2) for head in range(4)}
    sums = np.zeros(8)
    for n, question, (left, top, right, bottom) in ASKED:
        data = build.corpus.get(f"{n}.png")
        prompt = watched_prompt("", data, question, 112 * 112, 16)
        (looks,) = attention(params.local, heads, [prompt])
        # Four cells of 40 pixels a side; 30 pixels above the picture are padding.
        inside = np.zeros((4, 4), bool)
        for y in range(4):
            for x in range(4):
                inside[y, x] = (
                    40 * x < right and left < 40 * (x + 1)
                    and 40 * y < bottom + 30 and top + 30 < 40 * (y + 1)
                )  # fmt: skip
        for at, name in enumerate(heads):
            looked = looks.rows[name].mean(0).reshape(4, 4)
            sums[at] += looked[inside].sum() - looked.sum() * inside.sum() / 16
    masses = np.sum([row["masses"] for row in rows(build, found.masses)], axis=0)
    assert np.allclose(masses / 1e9, sums, atol=1e-5)
    assert named(build, found) == [("natural", *divmod(int(np.argmax(sums)), 4))]


@pytest.mark.parametrize(("layers", "expected"), [((0.0, 0.4), 0), ((0.5, 1.0), 1)])
def test_heads_are_sought_between_these_layers(build, tiny_mllms, layers, expected):
    found = choose(build, choosing(tiny_mllms["llava"], layers=layers))
    assert [layer for _, layer, _ in named(build, found)] == [expected]


def test_as_many_heads_as_are_wanted_are_those_with_the_largest_masses(build, tiny_mllms):
    found = choose(build, choosing(tiny_mllms["llava"], heads=3))
    masses = np.sum([row["masses"] for row in rows(build, found.masses)], axis=0)
    best = [divmod(int(at), 4) for at in np.argsort(-masses)[:3] if masses[at] > 0]
    assert named(build, found) == [("natural", *head) for head in sorted(best)]
    assert len(best) > 1


def test_a_choice_is_that_of_the_samples_with_the_smallest_hashes(build, looking):
    """Whatever else is there, and whatever was measured before."""
    items = [(n, f"Where is the red one? {word}", RED[n]) for n in range(3) for word in "abcd"]
    first = choose(build, looking, items[:6])
    assert build.work["heads_measured"] == 3
    all_of_them = choose(build, looking, items)
    names = sorted(row["name"] for row in rows(build, all_of_them.masses))
    everything = choose(build, looking.model_copy(update={"samples": 100}), items)
    assert names == sorted(row["name"] for row in rows(build, everything.masses))[:3]
    # What was measured in another build, or under other settings, is not measured again.
    assert build.work["heads_measured"] == len(
        {row["name"] for one in (first, everything) for row in rows(build, one.masses)}
    )


def test_a_choice_that_stays_keeps_its_name(build, looking):
    one, two = choose(build, looking, ASKED[:2]), choose(build, looking)
    assert one.heads.name == two.heads.name and one.masses != two.masses


def test_samples_without_boxes_or_room_or_beside_the_picture_say_nothing(build, looking):
    items = [
        ASKED[0], (1, "Where?", []), (1, "Why? " * 1200, RED[1]), (2, WHERE, [900, 900, 950, 950]),
    ]  # fmt: skip
    found = choose(build, looking, items)
    assert sorted(row["status"] for row in rows(build, found.masses)) == [
        "no_answer", "ok", "outside",
    ]  # fmt: skip
    assert rows(build, found.heads)[0]["samples"] == 1


@pytest.mark.parametrize(
    ("items", "said"),
    [([(0, WHERE, [])], "could be measured"), ([(0, WHERE, [0, 0, 9, 9])], "no head looks")],
)
def test_without_a_box_that_tells_there_is_no_choice(build, looking, items, said):
    with pytest.raises(ConfigError, match=said):
        choose(build, looking.model_copy(update={"layers": (0.5, 1.0)}), items)


def is_deadly(item):
    return item.source.key == "1.png"


def test_a_sample_that_ends_its_worker_is_left_out_and_tried_again(build, looking):
    looking.local.pinned(build)  # which asks the pool once
    found = choose(replace(build, pool=Crashing(build.pool, is_deadly)), looking)
    assert (found.masses.rows, found.lost.rows) == (2, 1)
    build.work.clear()
    again = choose(build, looking)
    assert (again.masses.rows, again.lost.rows, build.work["heads_measured"]) == (3, 0, 1)
    choose(build, looking)
    assert build.work["heads_measured"] == 1


def test_settings_out_of_range_are_refused():
    for wrong in ({"samples": 0}, {"heads": 0}, {"layers": (0.8, 0.2)}, {"layers": (-1, 2)}):
        with pytest.raises(ValidationError):
            ChooseParams(**wrong)
