"""The batch API against a real server that loses, repeats and mixes up what it was asked."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
from contextlib import AsyncExitStack
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra import mllm, responses
from infra.asking import AskParams, ask_all
from infra.batches import PREFIX, Batches, Line, forget, unfinished
from infra.budget import Amount, Budget, Prices, Spending
from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.lease import hold
from infra.mllm import BatchParams, Endpoint, Response, Unanswered
from tests.mllm_server import MllmServer
from tests.tasks.examples import new_build

PRICES = Prices(input=Decimal(10), output=Decimal(20))


class Note(BaseModel):
    instructions: list[str]


def request(name: str) -> mllm.Request:
    image = hashlib.sha256(name.encode()).hexdigest()
    return mllm.Request(
        instructions='Answer as JSON: {"instructions": ["..."]}',
        pictures=(mllm.Picture("Source image", image), mllm.Picture("Target image", image)),
        text=name,
        answer=Note,
        resize="at most 1000 px, JPEG",
        model="tiny",
        max_tokens=100,
        about=(f"caption of {name}",),
    )


NAMES = [f"request {n}" for n in range(7)]


class Single:
    """Sends the first request."""

    def __init__(self, client: mllm.Client):
        self.send = partial(mllm.send, client)


async def _ask(url, store, names, params, budget, attempts, leave):
    """What each name got, and the bill. Like infra.asking: what is stored is not asked."""
    endpoint = Endpoint(
        url=url, model="tiny", backoff_s=0.001, attempts=attempts, timeout_s=2, prices=PRICES
    )
    async with AsyncExitStack() as stack:
        lease = stack.enter_context(hold(store, responses.LEASE))
        kept = await stack.enter_async_context(responses.open_responses(store, lease))
        images = lambda image_id: image_id.encode() * 100  # noqa: E731
        client = await stack.enter_async_context(mllm.connect(endpoint, endpoint, images))
        spending = Spending(store, lease.epoch, budget, Amount(), 0.0)

        async def keep(line, response):
            said = response.status, response.text, response.finish_reason, response.model
            about = line.images, line.about, line.stage, 0
            await kept.add(
                responses.Stored(line.key, line.attempt, *said, None, None, None, None, *about)
            )

        batches = Batches(
            *(client, store, params, keep, Single(client), spending),
            most=lambda request: Amount(5_000_000, 200, 1),
            stage="test",
            may_go_on=lease.check,
        )
        stack.push_async_callback(batches.close)
        await batches.pick_up()

        async def one(name):
            key = mllm.request_key(request(name))
            if found := kept.get(key):
                return found
            response = await batches.send(request(name))
            await keep(Line(key, 0, (), (), "test"), response)
            return response

        tasks = [asyncio.create_task(one(name)) for name in names]
        if leave:
            await leave()
        else:
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = {n: t for n, t in zip(names, tasks, strict=True) if not t.cancelled()}
    return {name: task.exception() or task.result() for name, task in found.items()}, spending


def ask(url, store, names=NAMES, budget=None, attempts=3, leave=None, **changed):
    settings = {"collect_s": 0.02, "poll_s": 0.01, "wait_s": 5, "settle_s": 0.05}
    params = BatchParams(**settings | changed)
    return asyncio.run(_ask(url, store, names, params, budget or Budget(), attempts, leave))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "FLUSH_SECONDS", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    (tmp_path / "store").mkdir()
    return FolderStore(str(tmp_path / "store"))


def answers(found) -> list[str]:
    """The names that were answered, each with what is said about its own picture."""
    good = [name for name, a in found.items() if not isinstance(a, Exception)]
    for name in good:
        image = hashlib.sha256(name.encode()).hexdigest().encode() * 100
        assert hashlib.sha256(image).hexdigest()[:6] in found[name].text
    return good


def rules(found) -> list[str]:
    return [a.rule for a in found.values() if isinstance(a, Unanswered)]


def test_requests_are_collected_and_answered_for_less(store):
    with MllmServer() as server:
        found, spending = ask(server.url, store)
        again, unspent = ask(server.url, store)
    assert answers(found) == NAMES
    assert server.counts == {"good": 1, "batch: good": 6}
    (batch,) = server.batches.batches.values()
    assert batch["endpoint"] == "/v1/chat/completions"
    assert not server.batches.files, "pictures were left with the provider"
    assert [*unfinished(store)] == []
    # 100 tokens in and 20 out at half the price; the first call was not in the batch.
    assert spending.spent == (6 * (100 * 10 + 20 * 20) * 1_000 // 2, 6 * 120, 6)
    assert answers(again) == NAMES
    assert unspent.spent == Amount() and len(server.batches.batches) == 1


@pytest.mark.parametrize(
    ("script", "answered", "rule"),
    [
        (["out of order"], 7, None),
        (["twice"], 7, None),
        (["strange lines"], 7, None),
        (["partly failed", "all failed", "good"], 5, "endpoint_error"),
        (["partly failed", "good"], 7, None),
        (["lines missing"], 6, "endpoint_error"),
        (["expired"], 4, "endpoint_error"),
        (["failed"], 1, "endpoint_error"),
    ],
)
def test_what_a_batch_fails_to_answer_stays_pending(script, answered, rule, store):
    with MllmServer() as server:
        server.batches.script = list(script)
        found, _ = ask(server.url, store)
        assert len(answers(found)) == answered
        assert rules(found) == [rule] * (7 - answered)
        assert set(server.paid.values()) == {1} and server.paid.total() == answered
        assert not server.batches.files and [*unfinished(store)] == []


def test_what_may_have_been_billed_stays_charged(store):
    with MllmServer() as server:
        server.batches.script = ["lines missing"]
        _, missing = ask(server.url, store)
        server.batches.script = ["failed"]
        _, failed = ask(server.url, store, ["another", "one more"])
    assert (missing.settled.calls, missing.lost.calls) == (5, 1)
    assert failed.spent == Amount()


def test_bad_answers_in_a_batch_are_answers(store):
    with MllmServer(["good", "refusal", "truncated", "400", "429", "html"]) as server:
        found, _ = ask(server.url, store, NAMES[:6], tries=1)
    statuses = [a.status for a in found.values() if isinstance(a, Response)]
    assert sorted(statuses) == ["answered", "refused", "truncated"]
    assert rules(found) == ["endpoint_error"] * 3


@pytest.mark.parametrize(("changed", "sizes"), [({"most": 4}, [2, 4]), ({}, [6])])
def test_a_batch_has_bounds(changed, sizes, store):
    with MllmServer() as server:
        found, _ = ask(server.url, store, **changed)
    assert len(answers(found)) == 7
    counts = [b["request_counts"]["total"] for b in server.batches.batches.values()]
    assert sorted(counts) == sizes


def test_a_big_batch_is_cut_by_its_size(store, monkeypatch):
    monkeypatch.setattr(mllm, "_encode", lambda images, image_id: "data:," + "x" * 300_000)
    with MllmServer(rule=lambda request: "refusal") as server:
        ask(server.url, store, megabytes=1)
    assert len(server.batches.batches) == 6


def test_a_batch_that_takes_long_is_left_to_the_next_build(store):
    with MllmServer() as server:
        server.batches.script = ["never"]
        found, spending = ask(server.url, store, wait_s=0.2)
        assert rules(found) == ["in_batch"] * 6
        assert spending.spent.calls == 6
        (left,) = unfinished(store)
        assert left.batch in server.batches.batches and len(left.lines) == 6
        # Nobody asks for four of them any more; all the same they are stored.
        server.batches.plans[left.batch] = "good"
        found, spending = ask(server.url, store, NAMES[:3])
    assert set(server.paid.values()) == {1}
    assert len(server.batches.batches) == 1
    assert spending.spent.calls == 0
    keys = {mllm.request_key(request(name)) for name in NAMES[1:]}
    assert all(responses.look(store).get(key) for key in keys)


def test_what_failed_in_a_batch_that_was_left_is_asked_again_at_once(store):
    with MllmServer() as server:
        server.batches.script = ["never"]
        ask(server.url, store, wait_s=0.1)
        (left,) = unfinished(store)
        server.batches.plans[left.batch] = "partly failed"
        found, _ = ask(server.url, store)
    assert len(answers(found)) == 7
    assert set(server.paid.values()) == {1}


def test_a_batch_whose_results_are_gone_waits_and_says_how_to_end_that(store):
    with MllmServer() as server:
        server.batches.faults = {"GET files id content": ["404"] * 9}
        found, _ = ask(server.url, store)
        assert rules(found) == ["in_batch"] * 6
        (left,) = unfinished(store)
        assert f"delete {left.place} to give" in str(found[NAMES[1]])
        store.delete(left.place)
        server.batches.faults = {}
        found, _ = ask(server.url, store)
    assert len(answers(found)) == 7


def test_a_request_in_a_batch_is_waited_for_and_never_sent_again(store):
    with MllmServer() as server:
        server.batches.script = ["never"]
        ask(server.url, store, wait_s=0.1)
        found, _ = ask(server.url, store, NAMES[1:], wait_s=0.1)
        assert rules(found) == ["in_batch"] * 6
    assert len(server.batches.batches) == 1 and server.counts == {"good": 1}


@pytest.mark.parametrize(
    ("faults", "batches"),
    [
        ({"POST batches": ["lost"]}, 1),
        ({"POST batches": ["cut", "503", "429"]}, 1),
        ({"POST batches": ["lost"], "GET batches": ["500", "cut"]}, 1),
        ({"POST files": ["503", "lost", "cut"]}, 1),
        ({"GET batches id": ["429", "500", "cut", "lost", "lost"]}, 1),
        ({"GET files id content": ["503", "lost"]}, 1),
        ({"DELETE files id": ["500"]}, 1),
    ],
)
def test_a_lost_answer_of_the_provider_makes_no_second_batch(faults, batches, store):
    with MllmServer() as server:
        server.batches.faults = {route: [*wrong] for route, wrong in faults.items()}
        server.batches.retry_after = "0"
        found, _ = ask(server.url, store, attempts=5)
    assert len(answers(found)) == 7
    assert len(server.batches.batches) == batches
    assert set(server.paid.values()) == {1}


def test_a_batch_that_may_have_been_made_is_not_made_again(store):
    """The provider loses the answer and then can't be asked, for a whole night."""
    with MllmServer() as server:
        server.batches.faults = {"POST batches": ["lost"], "GET batches": ["503"] * 3}
        found, _ = ask(server.url, store)
        assert rules(found) == ["in_batch"] * 6
        found, _ = ask(server.url, store, NAMES[1:])
    assert len(answers(found)) == 6
    assert len(server.batches.batches) == 1 and set(server.paid.values()) == {1}


def test_a_batch_is_refused_in_one_line(store):
    with MllmServer() as server:
        server.batches.faults = {"POST batches": ["400"]}
        found, spending = ask(server.url, store)
        assert not server.batches.files
    assert rules(found) == ["endpoint_error"] * 6
    assert all("not now" in str(a) for a in found.values() if isinstance(a, Unanswered))
    assert spending.spent == Amount() and [*unfinished(store)] == []


def test_a_budget_bounds_a_batch(store):
    with MllmServer() as server:
        found, spending = ask(server.url, store, budget=Budget(calls=4))
    assert rules(found) == ["over_budget"] * 2
    assert len(answers(found)) == 5 and spending.spent.calls == 4


def test_batches_of_another_server_are_waited_for_by_name(store):
    with MllmServer() as server, MllmServer() as other:
        server.batches.script = ["never"]
        ask(server.url, store, wait_s=0.1)
        found, _ = ask(other.url, store, NAMES[1:], wait_s=0.1)
    assert rules(found) == ["in_batch"] * 6 and not other.counts
    told = str(found[NAMES[1]])
    assert server.url in told and "responses/batches/" in told and "\n" not in told


def test_what_is_forgotten_leaves_a_batch_and_its_answer_is_not_stored(store):
    with MllmServer() as server:
        server.batches.script = ["never"]
        ask(server.url, store, wait_s=0.1)
        gone = hashlib.sha256(NAMES[1].encode()).hexdigest()
        assert forget(store, lambda what: what in (gone, f"caption of {NAMES[2]}")) == 2
        (left,) = unfinished(store)
        assert gone not in store.get(left.place).decode()
        server.batches.plans[left.batch] = "good"
        ask(server.url, store, NAMES[3:])
    view = responses.look(store)
    held = [bool(view.get(mllm.request_key(request(name)))) for name in NAMES[1:]]
    assert held == [False, False, True, True, True, True]


def test_a_damaged_file_of_a_batch_ends_the_build_in_one_line(store):
    store.put(f"{PREFIX}{'0' * 32}.json", b'{"id": ')
    with MllmServer() as server, pytest.raises(PairmillError, match="damaged, so the answers of"):
        ask(server.url, store)


# Kills -----------------------------------------------------------------------------------------


class Deadly(FolderStore):
    """Kills its process before or after the n-th write about a batch."""

    def deadly(self, at, when):
        self.at, self.when, self.count = at, when, 0
        return self

    def _maybe(self, key, when):
        if key.startswith(PREFIX):
            self.count += when == "before"
            if (self.count, when) == (self.at, self.when):
                os.kill(os.getpid(), signal.SIGKILL)

    def put(self, key, *args, **named):
        self._maybe(key, "before")
        etag = super().put(key, *args, **named)
        self._maybe(key, "after")
        return etag

    def delete(self, key):
        self._maybe(key, "before")
        super().delete(key)
        self._maybe(key, "after")


def _ask_and_die(url, uri, at, when):
    responses.FLUSH_SECONDS = 0.01
    ask(url, Deadly(uri).deadly(at, when))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3], ids=["intent", "name", "end"])
def test_after_a_kill_every_request_was_paid_once(at, when, store):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", "infra.responses", "tests.infra.test_batches"])
    with MllmServer() as server:
        work = context.Process(target=_ask_and_die, args=(server.url, store.uri, at, when))
        work.start()
        work.join(60)
        assert work.exitcode == -signal.SIGKILL
        found, _ = ask(server.url, store)
    assert len(answers(found)) == 7
    assert server.paid.total() == 7 and set(server.paid.values()) == {1}
    assert len(server.batches.batches) == 1
    assert [*unfinished(store)] == []


# As a backend of asking ------------------------------------------------------------------------


def test_a_stage_asks_in_batches_and_the_next_build_takes_what_was_left(tmp_path):
    settings = {"collect_s": 0.05, "poll_s": 0.01, "wait_s": 0.3, "settle_s": 0.05}

    async def work(ask, name):
        return await mllm.ask_for(ask, request(name), Note)

    def rows(build, names=NAMES):
        endpoint = {"url": server.url, "model": "tiny", "prices": PRICES, "batch": settings}
        params = AskParams(endpoint=endpoint)
        return ask_all(build, "test", names, work, params, lambda image_id: image_id.encode())

    with MllmServer() as server:
        server.batches.script = ["never"]
        first = rows(new_build(tmp_path))
        assert isinstance(first[0], Note)
        assert [flaw.rule for flaw in first[1:]] == ["in_batch"] * 6
        (left,) = unfinished(new_build(tmp_path).store)
        server.batches.plans[left.batch] = "twice"
        second, third = new_build(tmp_path), new_build(tmp_path)
        assert all(isinstance(row, Note) for row in rows(second, NAMES[:3]))
        assert all(isinstance(row, Note) for row in rows(third))
    assert set(server.paid.values()) == {1} and server.paid.total() == 7
    assert (second.bill.stages["test"]["cached"], third.bill.stages["test"]["cached"]) == (3, 7)
    stored = responses.look(third.store).get(mllm.request_key(request(NAMES[-1])))
    image = hashlib.sha256(NAMES[-1].encode()).hexdigest()
    assert image in stored.images and stored.captions == (f"caption of {NAMES[-1]}",)
    assert (stored.cost, stored.stage) == (700_000, "test")
