"""Attention over shards: maps as computed once more by hand, and nothing computed twice."""

import io
import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from infra import samples, tables
from infra.attention_prompts import squared
from infra.errors import ConfigError
from infra.local_mllm import LocalModel, load
from infra.schema import SCHEMAS
from tasks import map_attention as stage
from tasks.map_attention import HeadsParams, MapParams, SinkParams, map_attention
from tests.pictures import scene
from tests.pools import Crashing
from tests.recipes import SAMPLE
from tests.tasks.examples import new_build, rows

pytestmark = pytest.mark.usefixtures("one_thread")

LOOKING = {"grounding": {1: [0]}, "sink": {1: [1]}}
QUESTIONS = ("What is it?", "Where is the red one? It may be behind the others.", "Why?")


def params(folder, heads=None, **changed):
    local = LocalModel(name=str(folder), device="cpu")
    chosen = {mode: HeadsParams(**heads) for mode in ("natural", "textual")} if heads else {}
    return MapParams(local=local, square_pixels=112 * 112, heads=chosen, max_tokens=16, **changed)


@pytest.fixture
def looking():
    return params(SAMPLE / "models/looking", LOOKING)


def corpus(build, count=3):
    """Pictures of different shapes in the bucket, as a table of objects."""
    places = []
    for n in range(count):
        buffer = io.BytesIO()
        scene(60 + 20 * n, 80, n).save(buffer, "PNG")
        data = buffer.getvalue()
        build.corpus.put(f"{n}.png", data)
        places.append({"key": f"{n}.png", "image_id": f"i{n}", "size": len(data), "stamp": "s"})
    return tables.write(build.store, "objects", places)


def asked(build, *items):
    """Samples of (number of a picture, question), in natural mode where the number is even."""
    frame = [
        {"sample_id": f"{n} {question}", "image_id": f"i{n}", "prompt": question,
         "mode": "textual" if n % 2 else "natural"}
        for n, question in items
    ]  # fmt: skip
    return samples.write(build.store, pl.DataFrame(frame))


def maps_of(build, found):
    return {row["map_id"]: row for row in rows(build, found.maps)}


# What a map is -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_a_map_is_the_mean_over_tokens_and_heads_computed_once_more_by_hand(
    build, tiny_mllms, kind
):
    """The library's plain attention, all weights kept, on a picture padded by hand; the heads are
    those of the paper's general form: all of one middle layer.
    """
    given, objects = asked(build, *enumerate(QUESTIONS)), corpus(build)
    found = map_attention(build, given, objects, params(tiny_mllms[kind]))
    maps = maps_of(build, found)
    loaded = load(LocalModel(name=str(tiny_mllms[kind]), device="cpu"))
    loaded.network.set_attn_implementation("eager")
    for row in rows(build, found.samples):
        number, made = int(row["sample_id"][0]), maps[row["map_id"]]
        picture = scene(60 + 20 * number, 80, number)
        scale = 112 / max(picture.size)
        small = picture.resize(
            [max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC
        )
        square = Image.new("RGB", (112, 112), (127, 127, 127))
        square.paste(small, ((112 - small.width) // 2, (112 - small.height) // 2))
        shown = {"type": "image", "image": square}
        talk = [{"role": "user", "content": [shown, {"type": "text", "text": row["prompt"]}]}]
        inputs = loaded.processor.apply_chat_template(
            talk, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            plain = loaded.network.generate(
                **inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True,
                output_attentions=True,
            )  # fmt: skip
        visual = np.flatnonzero(inputs["input_ids"][0] == loaded.network.config.image_token_id)
        steps = [
            np.mean([layers[1][0, head, 0].numpy()[visual] for head in range(4)], axis=0)
            for layers in plain.attentions[1:]  # the first is the prompt's own pass
        ]
        assert made["steps"] == len(steps)
        assert (made["height"], made["width"]) == (4, 4) and made["heads"] == "1:all"
        assert made["sink"] is None
        expected = np.mean(steps, axis=0) if steps else np.zeros(16)
        assert np.allclose(np.array(made["grounding"]) / 1e9, expected, atol=1e-6)
    loaded.network.set_attn_implementation("sdpa")


def test_heads_of_both_kinds_are_kept_with_their_map(build, looking):
    found = map_attention(build, asked(build, (0, QUESTIONS[1])), corpus(build), looking)
    (made,) = maps_of(build, found).values()
    assert (made["heads"], made["sink_threshold"]) == ("1:0 | 1:1", 10_000_000)
    assert (made["height"], made["width"], len(made["sink"])) == (24, 24, 576)
    assert made["answer"] == "red here" and made["steps"] == 2
    assert int(np.argmax(made["sink"])) == 0  # its sink is the first patch
    assert sum(made["grounding"]) < 1e9


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_sinks_by_the_norm_are_those_of_the_library_s_hidden_states(build, tiny_mllms, kind):
    """What the grounding layer reads: the hidden states before it, of the prompt's own pass."""
    rule = {mode: SinkParams(by="norm", above=12.5) for mode in ("natural", "textual")}
    given, objects = asked(build, *enumerate(QUESTIONS)), corpus(build)
    found = map_attention(build, given, objects, params(tiny_mllms[kind], sinks=rule))
    maps, loaded = maps_of(build, found), load(LocalModel(name=str(tiny_mllms[kind]), device="cpu"))
    for row in rows(build, found.samples):
        made, data = maps[row["map_id"]], build.corpus.get(f"{row['sample_id'][0]}.png")
        shown = {"type": "image", "image": Image.open(io.BytesIO(squared(data, 112 * 112)))}
        inputs = loaded.processor.apply_chat_template(
            [{"role": "user", "content": [shown, {"type": "text", "text": row["prompt"]}]}],
            tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            states = loaded.network(**inputs, output_hidden_states=True).hidden_states[1][0]
        visual = np.flatnonzero(inputs["input_ids"][0] == loaded.network.config.image_token_id)
        expected = np.sqrt((states.double().numpy()[visual] ** 2).sum(1))
        assert np.allclose(np.array(made["sink"]) / 1000, expected, atol=6e-4, rtol=1e-5)
        assert (made["sink_rule"], made["sink_threshold"]) == ("norm", 12_500)
        assert made["heads"] == "1:all | norm of layer 1 > 12.5"


def test_sinks_by_dimensions_are_where_the_model_was_made_to_have_one(build, looking):
    """The hand-made model marks the first patch in dimension 299, of its 304."""
    rule = {"natural": SinkParams(by="dims", dims=[299], above=10)}
    both = looking.model_copy(update={"sinks": rule})
    found = map_attention(build, asked(build, (0, QUESTIONS[1])), corpus(build), both)
    (made,) = maps_of(build, found).values()
    assert np.flatnonzero(np.array(made["sink"]) > made["sink_threshold"]).tolist() == [0]
    assert made["heads"] == "1:0 | dims of layer 1 in 299 > 10"


def test_dimensions_that_are_not_listed_are_asked_for(build, looking):
    rule = {"natural": SinkParams(by="dims")}
    assert rule["natural"].threshold == 20
    unlisted = looking.model_copy(update={"sinks": rule})
    with pytest.raises(ConfigError, match="no dimensions are listed"):
        map_attention(build, asked(build, (0, "Why?")), corpus(build), unlisted)


@pytest.mark.parametrize("given", [{"by": "norm"}, {"by": "norm", "above": 9, "dims": [1]}])
def test_a_rule_that_says_too_little_or_too_much_is_refused(given):
    with pytest.raises(ValidationError, match="norm"):
        SinkParams(**given)


def test_a_picture_is_padded_with_grey_to_a_square_of_so_many_pixels():
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (255, 0, 0)).save(buffer, "PNG")
    padded = np.asarray(Image.open(io.BytesIO(squared(buffer.getvalue(), 60 * 60))))
    assert padded.shape == (60, 60, 3)
    assert (padded[:15] == 127).all() and (padded[45:] == 127).all()
    assert (padded[15:45] == (255, 0, 0)).all()
    as_is = Image.open(io.BytesIO(squared(buffer.getvalue(), None)))
    assert as_is.size == (200, 200)


# What becomes of a sample --------------------------------------------------------------------


def test_a_model_that_says_nothing_makes_no_map(build, tmp_path, looking):
    folder = tmp_path / "silent"
    shutil.copytree(SAMPLE / "models/looking", folder)
    weights = load_file(folder / "model.safetensors")
    head = next(weight for name, weight in weights.items() if "lm_head" in name)
    head[2] += 9.0  # the end, whatever was said
    head[2, 296:] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = map_attention(build, asked(build, (0, "Why?")), corpus(build), params(folder, LOOKING))
    assert found.samples.rows == 0
    assert [row["rule"] for row in rows(build, found.drops)] == ["empty"]


def test_a_question_beyond_the_context_is_refused_and_its_neighbours_are_not(build, looking):
    given = asked(build, (0, "Why? " * 1200), (1, "Why?"), (2, "What?"))
    found = map_attention(build, given, corpus(build), looking)
    assert found.samples.rows == 2
    (drop,) = rows(build, found.drops)
    assert drop["rule"] == "refused" and "tokens" in drop["detail"]


def is_deadly(item):
    return item.image_id == "i1"


def test_a_picture_that_ends_its_worker_is_a_fate_and_is_tried_again(build, looking):
    given = asked(build, (0, "Why?"), (1, "Why?"), (1, "What?"), (2, "Why?"))
    objects = corpus(build)
    looking.local.pinned(build)  # which asks the pool once
    found = map_attention(
        replace(build, pool=Crashing(build.pool, is_deadly)), given, objects, looking
    )
    assert found.samples.rows == 2
    assert [(row["rule"], row["detail"]) for row in rows(build, found.drops)] == [
        ("crashed_model", "killed by signal 9")
    ] * 2
    build.work.clear()
    again = map_attention(build, given, objects, looking)
    assert (again.samples.rows, again.drops.rows, build.work["maps_made"]) == (4, 0, 2)


# Nothing twice -------------------------------------------------------------------------------


def test_a_new_sample_is_looked_at_alone_and_one_that_went_leaves_no_map(build, looking):
    objects = corpus(build)
    first = map_attention(build, asked(build, (0, "Why?"), (1, "Why?")), objects, looking)
    assert build.work["maps_made"] == 2
    second = map_attention(build, asked(build, (1, "Why?"), (2, "Why?")), objects, looking)
    assert build.work["maps_made"] == 3
    old, new = maps_of(build, first), maps_of(build, second)
    assert len(new) == 2 and len(old.keys() & new.keys()) == 1
    assert {row["image_id"] for row in new.values()} == {"i1", "i2"}


def test_samples_that_ask_the_same_of_a_picture_share_its_map(build, looking):
    frame = pl.DataFrame(
        {"sample_id": ["a", "b"], "image_id": ["i0"] * 2, "prompt": ["Why?"] * 2,
         "mode": ["natural"] * 2, "response": ["This.", "That."]}
    )  # fmt: skip
    found = map_attention(build, samples.write(build.store, frame), corpus(build), looking)
    assert (found.samples.rows, found.maps.rows, build.work["maps_made"]) == (2, 1, 1)


def test_an_interrupted_run_goes_on_from_what_is_written(build, looking, monkeypatch):
    monkeypatch.setattr(stage, "SHARD", 2)

    class Stopping:
        def map(self, fn, shards, **more):
            yield from islice(build.pool.map(fn, shards, **more), 1)
            raise KeyboardInterrupt

    given, objects = asked(build, *((n, q) for n in range(3) for q in QUESTIONS)), corpus(build)
    looking.local.pinned(build)
    with pytest.raises(KeyboardInterrupt):
        map_attention(replace(build, pool=Stopping()), given, objects, looking)
    receipts = [s.key for s in build.store.list("ledger/map_attention/") if "/receipts/" in s.key]
    written = sum(json.loads(build.store.get(key))["shard"][1] for key in receipts)
    assert 0 < written < 9
    build.work.clear()
    found = map_attention(build, given, objects, looking)
    # A thread that was at a shard when the run ended may have written one more.
    assert found.maps.rows == 9 and 0 < build.work["maps_made"] <= 9 - written


def test_heads_that_were_chosen_stand_in_where_none_are_given_and_another_choice_looks_anew(
    build, looking
):
    def choice(name, mode, head):
        row = {"mode": mode, "layer": 1, "head": head, "mass": 1, "samples": 1}
        schema = SCHEMAS["heads"]
        return tables.write(build.store, f"heads-{name}", pa.Table.from_pylist([row], schema))

    def heads_of(mode, found):
        return next(row["heads"] for row in rows(build, found.maps) if row["image_id"] == mode)

    given, objects = asked(build, (0, "Why?"), (1, "Why?")), corpus(build)
    unnamed = looking.model_copy(update={"heads": {"textual": looking.heads["textual"]}})
    first = map_attention(build, given, objects, unnamed, choice("a", "natural", 0))
    assert (heads_of("i0", first), heads_of("i1", first)) == ("1:0", "1:0 | 1:1")
    same = map_attention(build, given, objects, unnamed, choice("a", "natural", 0))
    assert (same, build.work["maps_made"]) == (first, 2)
    other = map_attention(build, given, objects, unnamed, choice("b", "natural", 1))
    assert (heads_of("i0", other), build.work["maps_made"]) == ("1:1", 4)


def test_another_model_other_heads_and_another_size_look_anew(build, looking, tiny_mllms):
    given, objects = asked(build, (0, "Why?")), corpus(build)
    others = [
        looking.model_copy(update={"square_pixels": 3136}),
        looking.model_copy(update={"heads": {"natural": HeadsParams(grounding={0: [1]})}}),
        params(tiny_mllms["qwen"]),
    ]
    found = [map_attention(build, given, objects, some) for some in (looking, *others)]
    assert build.work["maps_made"] == 4
    assert len({json.dumps(rows(build, one.maps)[0]["grounding"]) for one in found}) == 4
    paced, wider = (
        looking.local.model_copy(update=more) for more in ({"batches": 7}, {"batch_size": 5})
    )
    map_attention(build, given, objects, looking.model_copy(update={"local": paced}))
    assert build.work["maps_made"] == 4
    map_attention(build, given, objects, looking.model_copy(update={"local": wider}))
    assert build.work["maps_made"] == 5  # it bounds the shape of a pass


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_a_map_hangs_on_its_sample_alone_whatever_else_is_asked(build, tiny_mllms, tmp_path, kind):
    some = params(tiny_mllms[kind])
    wide = some.model_copy(update={"local": some.local.model_copy(update={"batch_size": 8})})
    objects, asks = corpus(build), [(n, q) for n in range(3) for q in QUESTIONS]
    together = maps_of(build, map_attention(build, asked(build, *asks), objects, wide))
    for item in asks[::3]:
        other = new_build(tmp_path / str(item))
        places = corpus(other)
        (one,) = rows(other, map_attention(other, asked(other, item), places, wide).maps)
        assert one == together[one["map_id"]]
