"""Texts after pictures: once a picture, whoever asks; kept over crashes and interruptions."""

import hashlib
import io
from dataclasses import replace
from functools import partial

import polars as pl
import pytest

from infra import samples
from infra.cluster import Crash
from infra.local_mllm import LocalModel
from infra.mllm import Response
from tasks import continue_prefix as stage
from tasks.continue_prefix import ContinueParams, continue_prefix
from tests.pictures import scene
from tests.tasks.examples import put, rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Breaking:
    """A pool in which a shard with this picture ends its worker, as a shard and alone."""

    def __init__(self, pool, image: str):
        self.pool, self.image = pool, image

    def map(self, fn, shards, *, split=None, resources=None):
        if split is None:  # preparing pictures
            yield from self.pool.map(fn, shards)
            return
        waiting = list(shards)
        while waiting:
            shard = waiting.pop(0)
            if not any(item.image_id == self.image for item in shard):
                yield shard, fn(shard)
            elif len(shard) == 1:
                yield shard, Crash("out of memory")
            else:
                waiting = [*split(shard), *waiting]


@pytest.fixture
def world(build, tiny_mllms, tmp_path):
    """Five pictures, image_ids in order; a stage over samples of given pictures."""
    found = []
    for seed in range(5):
        buffer = io.BytesIO()
        scene(64, 48, seed).save(buffer, "PNG")
        image = hashlib.sha256(buffer.getvalue()).hexdigest()
        (tmp_path / f"corpus/{seed}.png").write_bytes(buffer.getvalue())
        found.append((f"{seed}.png", None, "", None, len(buffer.getvalue()), image))
    objects = put(build, "objects", "key member stamp offset size image_id", found)
    local = LocalModel(name=str(tiny_mllms["llava"]), device="cpu", batch_size=2)
    params = ContinueParams(local=local, least_tokens=3, most_tokens=8)

    def run(given, build=build, **changed):
        frame = pl.DataFrame(
            [(f"s{at}", image) for at, image in enumerate(given)],
            {"sample_id": pl.String, "image_id": pl.String},
            orient="row",
        )
        before = build.work["texts_written"]
        table = samples.write(build.store, frame)
        made = continue_prefix(build, table, objects, params=params.model_copy(update=changed))
        return made, build.work["texts_written"] - before

    return [image for *_, image in found], run


def texts(build, made):
    return {row["image_id"]: row["continuation"] for row in rows(build, made.samples)}


def test_samples_of_one_picture_share_its_text_and_what_is_known_is_not_written_again(build, world):
    (a, b, c, *_), run = world
    first, written = run([a, b, a])
    assert (written, len(rows(build, first.samples))) == (2, 3)
    more, written = run([c, b])
    assert written == 1
    assert texts(build, more)[b] == texts(build, first)[b]
    assert {row["sample_id"] for row in rows(build, more.written)} == {b, c}
    assert run([a, b, a]) == (first, 0)


def test_the_rows_of_a_pass_are_in_its_key_too(world, tiny_mllms):
    """They decide the last bits of what is drawn from; how many passes there are does not."""
    images, run = world
    run(images[:2])
    local = LocalModel(name=str(tiny_mllms["llava"]), device="cpu", batch_size=2)
    for changed, written in (({"batches": 5}, 0), ({"batch_size": 3}, 2)):
        assert run(images[:2], local=local.model_copy(update=changed))[1] == written


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"top_k": 5}, {"temperature": 0.5}, {"least_tokens": 4}]
)
def test_what_decides_a_text_is_in_its_key(world, changed):
    images, run = world
    run(images[:2])
    assert run(images[:2], **changed)[1] == 2


def test_a_picture_that_ends_the_model_is_dropped_and_tried_again_the_others_are_kept(build, world):
    images, run = world
    broken = replace(build, pool=Breaking(build.pool, images[2]))
    first, written = run(images, broken)
    assert written == 4
    drops = [(r["id"], r["rule"], r["detail"]) for r in rows(build, first.drops)]
    assert drops == [("s2", "crashed_model", "out of memory")]
    second, written = run(images)
    assert (written, rows(build, second.drops)) == (1, [])
    assert texts(build, first).items() < texts(build, second).items()


def test_an_interrupted_build_goes_on_from_its_receipts(build, world, monkeypatch):
    images, run = world
    monkeypatch.setattr(stage, "SHARD", 2)
    answered = stage.continue_from
    calls = []

    def dying(fail, *given):
        calls.append(given)
        if fail and len(calls) > 1:
            raise KeyboardInterrupt
        return answered(*given)

    monkeypatch.setattr(stage, "continue_from", partial(dying, True))
    with pytest.raises(KeyboardInterrupt):
        run(images)
    monkeypatch.setattr(stage, "continue_from", partial(dying, False))
    made, written = run(images)
    assert written in (2, 3)  # of five: the first shard was done, and perhaps the last
    monkeypatch.undo()
    whole = texts(build, run(images, seed=1)[0])
    assert texts(build, made).keys() == whole.keys() == set(images)


def test_an_answer_without_words_is_dropped():
    usage = {"input": 1, "output": 8, "cached": 0}
    for text, kept in ((" \n", ("empty", "")), (" so ", ("truncated", "so"))):
        assert stage._text(Response("truncated", text, "length", "m", usage)) == kept
