"""The model in process as a backend of asking: batches, references to pictures, failures."""

import asyncio
import os
from dataclasses import replace

import pytest
from pydantic import BaseModel

from infra import local_mllm, mllm
from infra.cluster import ClusterParams, open_pool
from infra.errors import PairmillError
from infra.local_mllm import InProcess, LocalModel, generate, pin
from infra.mllm import Picture, Request, Unanswered, request_key
from infra.pictures import Lying, Place
from tests.infra.test_local_mllm import jpeg

pytestmark = pytest.mark.usefixtures("one_thread")


class Answer(BaseModel):
    words: str


@pytest.fixture
def local(tiny_mllms) -> LocalModel:
    return LocalModel(name=str(tiny_mllms["qwen"]), device="cpu", batch_size=4)


def request(n: int, **changed) -> Request:
    pictures = (Picture("Source image", str(n)), Picture("Target image", str(n + 1)))
    asked = Request("Compare them.", pictures, "What differs?", Answer, "none", "tiny", 12)
    return replace(asked, temperature=0.8, **changed)


def ask(local, pool, requests, pictures=lambda image_id: jpeg(int(image_id))):
    async def all_of_them():
        backend = InProcess(local, pool, pictures)
        try:
            return await asyncio.gather(*map(backend.send, requests), return_exceptions=True)
        finally:
            await backend.close()

    return asyncio.run(all_of_them())


class Watched:
    """A pool that notes how many requests each batch had."""

    def __init__(self, pool):
        self.pool, self.sizes, self.seen = pool, [], []

    def map(self, fn, shards, **options):
        shards = list(shards)
        self.sizes += [len(shard) for shard in shards]
        self.seen += [prompt for shard in shards for prompt in shard]
        return self.pool.map(fn, shards, **options)


def test_requests_are_answered_in_batches_and_each_gets_its_own(local, pool):
    watched, requests = Watched(pool), [request(n) for n in range(10)]
    found = ask(local, watched, requests)
    assert sum(watched.sizes) == 10 and max(watched.sizes) == 4 and len(watched.sizes) <= 4
    alone = [ask(local, pool, [one])[0] for one in requests]
    assert found == alone
    assert len({response.text for response in found}) > 5


def test_the_schema_is_asked_for_in_words_and_the_key_is_the_request_s(local, pool):
    watched = Watched(pool)
    ask(local, watched, [request(1, turns=(("assistant", "{}"), ("user", "Again.")))])
    (prompt,) = watched.seen
    assert prompt.key == request_key(request(1, turns=(("assistant", "{}"), ("user", "Again."))))
    assert prompt.system.startswith("Compare them.\n\nAnswer with one JSON object")
    assert '"words"' in prompt.system
    assert prompt.turns == (("assistant", "{}"), ("user", "Again."))
    assert [shown.name for shown in prompt.pictures] == ["Source image", "Target image"]


def test_pictures_that_lie_in_the_store_travel_as_references(local, build):
    class Stored:
        def __call__(self, image_id):
            raise AssertionError("the bytes were asked for")

        def lying(self, image_id):
            data = jpeg(int(image_id))
            build.store.put(f"pictures/{image_id}", data)
            return Lying(build.store, Place(f"pictures/{image_id}", 0, len(data)))

    watched = Watched(build.pool)
    found = ask(local, watched, [request(1)], Stored())
    assert isinstance(watched.seen[0].pictures[0].data, Lying)
    assert found == ask(local, build.pool, [request(1)])


def test_a_model_that_can_not_be_loaded_ends_in_one_line(local, pool, tmp_path):
    found = ask(local.model_copy(update={"name": str(tmp_path)}), pool, [request(1), request(2)])
    assert all(isinstance(error, PairmillError) for error in found)
    assert "no safetensors" in str(found[0]) and "\n" not in str(found[0])


def test_a_picture_that_is_gone_ends_the_batch_and_not_the_others(local, pool):
    def pictures(image_id):
        if image_id == "0":
            raise PairmillError("it is gone")
        return jpeg(int(image_id))

    one = local.model_copy(update={"batch_size": 1})
    first, *rest = ask(one, pool, [request(n) for n in range(4)], pictures)
    assert str(first) == "it is gone"
    assert all(isinstance(response, mllm.Response) for response in rest)


def deadly(local, prompts):
    """As `generate`, but a certain text ends the process that reads it."""
    if any("DIE" in prompt.text for prompt in prompts):
        os._exit(1)
    return generate(local, prompts)


def test_on_dask_workers_it_answers_the_same(local, pool):
    requests = [request(n) for n in range(5)]
    with open_pool(ClusterParams(kind="local", workers=1)) as workers:
        found = ask(local, workers, requests)
    assert found == ask(local, pool, requests)


@pytest.mark.soak
def test_a_deadly_request_stays_pending_and_its_companions_are_answered(local, pool, monkeypatch):
    requests = [request(n) for n in range(5)]
    expected = ask(local, pool, requests)
    monkeypatch.setattr(local_mllm, "generate", deadly)
    with open_pool(ClusterParams(kind="local", workers=1)) as workers:
        found = ask(local, workers, [*requests[:2], request(2, text="DIE"), *requests[2:]])
    crashed = found.pop(2)
    assert isinstance(crashed, Unanswered) and crashed.rule == "endpoint_error"
    assert "ended its worker" in str(crashed)
    assert found == expected


# Pinning -------------------------------------------------------------------------------------


def test_a_model_is_read_once_per_store_and_named_by_what_it_is(local, build, monkeypatch):
    found = pin(build, local)
    assert found.numerics == local_mllm.numerics(local)
    assert found.model == f"qwen@{found.numerics}"
    monkeypatch.setattr(local_mllm, "numerics", None)  # it is not read again
    assert pin(build, local) == found
    assert pin(build, local.model_copy(update={"batch_size": 9})).numerics == found.numerics


def test_a_model_that_is_not_the_one_asked_for_is_refused(local, build):
    wanted = local.model_copy(update={"numerics": "0" * 20})
    with pytest.raises(PairmillError, match=f"not {'0' * 20}"):
        pin(build, wanted)
    (error,) = ask(wanted, build.pool, [request(1)])
    assert isinstance(error, PairmillError) and "put them back" in str(error)
