"""Asking: stored answers, retries, pace, budget and lease, against a real server."""

import asyncio
import logging
from decimal import Decimal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from infra import mllm
from infra.asking import AskParams, ask_all, secret
from infra.budget import Budget, Limits, Prices, charged
from infra.errors import ConfigError
from infra.mllm import EndpointUnavailable, Flawed
from tests.mllm_server import MllmServer, Storm
from tests.tasks.examples import new_build

PRICES = Prices(input=Decimal(10), output=Decimal(20))  # 100 + 20 tokens: 0.0014 a call
CALL = 1_400_000  # 10^-9


class Note(BaseModel):
    model_config = ConfigDict(extra="forbid")
    instructions: list[str]


def question(number: int) -> mllm.Request:
    return mllm.Request(
        instructions='Answer as JSON: {"instructions": ["..."]}',
        pictures=tuple(mllm.Picture(name, f"{number:064x}") for name in ("One", "Other")),
        text=f"What is on picture {number}?",
        answer=Note,
        resize="none",
        model="tiny",
        max_tokens=100,
    )


def params(*servers: MllmServer, attempt=0, budget=None, **endpoint) -> AskParams:
    settings = {"url": servers[0].url, "model": "tiny", "backoff_s": 0.001, "attempts": 3}
    also = [{"url": server.url} for server in servers[1:]]
    return AskParams(
        endpoint=settings | {"also": also} | endpoint, budget=budget or {}, attempt=attempt
    )


def ask(tmp_path, asking: AskParams, numbers=range(1), at_once=1000):
    """The build, and the answers to questions by their numbers."""
    build = new_build(tmp_path)
    turns = asyncio.Semaphore(at_once)

    async def work(ask, number):
        async with turns:
            return await mllm.ask_for(ask, question(number), Note)

    rows = ask_all(build, "test", list(numbers), work, asking, lambda image_id: b"jpeg")
    return build, rows


def test_what_was_answered_is_never_asked_again(tmp_path):
    with MllmServer() as server:
        first, rows = ask(tmp_path, params(server), range(100))
        again, same = ask(tmp_path, params(server), range(120))
    assert rows == same[:100] and all(isinstance(row, Note) for row in same)
    assert server.counts == {"good": 120}
    assert set(server.paid.values()) == {1}
    assert first.work["labels_requested"] == 100 and again.work["labels_requested"] == 20
    cost = again.bill.stages["test"]
    assert (cost["calls"], cost["cached"], cost["input_tokens"]) == (20, 100, 2000)


def test_a_second_run_needs_no_server_and_no_lease(tmp_path):
    with MllmServer() as server:
        asking = params(server)
        _, rows = ask(tmp_path, asking, range(5))
    (tmp_path / "store" / "leases" / "responses.json").unlink()
    assert ask(tmp_path, asking, range(5))[1] == rows
    assert not (tmp_path / "store" / "leases" / "responses.json").exists()


def test_two_who_ask_the_same_at_once_pay_once(tmp_path):
    with MllmServer(delay_ms=20) as server:
        _, rows = ask(tmp_path, params(server), [7] * 20)
    assert server.counts == {"good": 1} and len({row.model_dump_json() for row in rows}) == 1


@pytest.mark.parametrize(
    "script", [["refusal"], ["truncated"], ["empty"], ["over-long"], ["not json", "not json"]]
)
def test_a_bad_answer_was_paid_for_and_is_final(tmp_path, script):
    with MllmServer(script) as server:
        _, [flaw] = ask(tmp_path, params(server))
        _, [same] = ask(tmp_path, params(server))
        assert flaw.rule == same.rule and server.counts.total() == len(script)
        _, [note] = ask(tmp_path, params(server, attempt=1))
        _, [kept] = ask(tmp_path, params(server, attempt=1))
    assert isinstance(note, Note) and note == kept
    assert server.counts.total() == len(script) + 1


def test_a_further_attempt_asks_only_what_went_wrong(tmp_path):
    with MllmServer(["good", "refusal", "good"]) as server:
        ask(tmp_path, params(server, concurrency=1), range(3))
        _, rows = ask(tmp_path, params(server, attempt=1), range(3))
    assert all(isinstance(row, Note) for row in rows)
    assert server.counts == {"good": 3, "refusal": 1}


@pytest.mark.parametrize("failure", ["429", "429 retry-after", "500", "503", "closed socket"])
def test_what_failed_is_tried_again(tmp_path, failure):
    with MllmServer([failure, failure]) as server:
        _, [note] = ask(tmp_path, params(server))
    assert isinstance(note, Note)
    assert server.counts == {failure: 2, "good": 1}


def test_a_slow_answer_is_given_up_asked_for_again_and_charged_twice(tmp_path):
    with MllmServer(["good", "slow"]) as server:
        build, rows = ask(tmp_path, params(server, timeout_s=0.5, concurrency=1), range(2))
    assert all(isinstance(row, Note) for row in rows)
    assert server.counts == {"good": 2, "slow": 1}
    assert build.bill.stages["test"]["lost"] == 1 and build.bill.charged.calls == 3


@pytest.mark.parametrize(
    ("failure", "calls"),
    [("500", 3), ("400", 1), ("429 come back tomorrow", 1), ("429 no quota", 1), ("404", 1)],
)
def test_a_call_that_fails_for_good_stays_pending_and_costs_only_itself(tmp_path, failure, calls):
    with MllmServer(["good", *[failure] * calls]) as server:
        _, rows = ask(tmp_path, params(server), range(3), at_once=1)
        _, again = ask(tmp_path, params(server), range(3))
    assert [isinstance(row, Note) for row in rows] == [True, False, True]
    assert rows[1].rule == "endpoint_error"
    assert all(isinstance(row, Note) for row in again)
    assert server.counts == {"good": 3, failure: calls}


def test_storms_of_429_pass_and_every_answer_is_paid_for_once(tmp_path):
    with MllmServer(delay_ms=2) as server:
        server.storms = [Storm(after=20, calls=12), Storm(after=60, calls=12, retry_after="0.05")]
        build, rows = ask(tmp_path, params(server), range(100))
    assert all(isinstance(row, Note) for row in rows)
    assert set(server.paid.values()) == {1} and server.counts["storm"] == 24
    assert build.bill.charged.calls == 100


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ("404", "404: .*no such model.*check endpoint.url"),
        ("429 no quota", "you owe us money.*quota"),
        ("redirect", "redirects elsewhere, which is refused"),
        ("html", "no chat completion; check endpoint.url"),
        ("closed socket", "no connection to 127.0.0.1"),
    ],
)
def test_an_endpoint_that_has_never_answered_ends_the_build_in_one_line(tmp_path, behaviour, told):
    with (
        MllmServer(rule=lambda request: behaviour) as server,
        pytest.raises(EndpointUnavailable, match=told) as caught,
    ):
        ask(tmp_path, params(server), range(10))
    assert "\n" not in str(caught.value)


def test_three_first_requests_may_be_rejected_before_the_endpoint_is_given_up(tmp_path):
    with MllmServer(["400"] * 3) as server:
        _, (flaw, note) = ask(tmp_path, params(server), range(2), at_once=1)
    assert flaw.rule == "endpoint_error" and isinstance(note, Note)
    with (
        MllmServer(rule=lambda request: "400") as server,
        pytest.raises(EndpointUnavailable, match="not to our liking"),
    ):
        ask(tmp_path / "other", params(server, concurrency=1), range(4))


def test_an_endpoint_that_dies_is_not_asked_for_ever(tmp_path):
    with MllmServer(["good"], rule=lambda request: "500") as server:
        _, (note, *flaws) = ask(
            tmp_path, params(server, attempts=1, patience_s=0.01), range(200), at_once=1
        )
    assert isinstance(note, Note) and {flaw.rule for flaw in flaws} == {"endpoint_error"}
    assert server.counts["500"] < 100


def test_servers_of_one_model_share_the_calls_and_one_may_be_dead(tmp_path, caplog):
    with MllmServer(delay_ms=2) as one, MllmServer(delay_ms=2) as other:
        ask(tmp_path, params(one, other, weight=3.0), range(200), at_once=8)
        assert 2 < one.counts["good"] / other.counts["good"] < 4
    with MllmServer() as alive, caplog.at_level(logging.WARNING):
        _, rows = ask(tmp_path / "other", params(one, alive), range(5))
    assert all(isinstance(row, Note) for row in rows) and alive.counts["good"] == 5
    assert "going on with the other servers" in caplog.text


def test_a_budget_ends_the_calls_and_the_next_build_goes_on(tmp_path):
    with MllmServer() as server:
        first, rows = ask(tmp_path, params(server, budget={"calls": 30}), range(100))
        done = [row for row in rows if isinstance(row, Note)]
        assert len(done) == 30 == server.counts["good"] == first.bill.charged.calls
        assert {row.rule for row in rows if isinstance(row, Flawed)} == {"over_budget"}
        for _ in range(3):
            _, rows = ask(tmp_path, params(server, budget={"calls": 30}), range(100))
    assert all(isinstance(row, Note) for row in rows)
    assert set(server.paid.values()) == {1} and server.counts["good"] == 100


def test_a_budget_in_money_is_used_up_and_not_passed(tmp_path):
    budget = Budget(money=Decimal("0.0500"))
    with MllmServer(delay_ms=2) as server:
        build, _ = ask(tmp_path, params(server, prices=PRICES, budget=budget), range(100))
    cost = build.bill.stages["test"]
    assert cost["money"] == server.counts["good"] * CALL <= 50_000_000
    # What is left would not have covered the most that a call can cost.
    assert cost["money"] > 50_000_000 - 1600 * 10_000 - 5000 * 10_000


def test_a_month_is_bounded_over_builds(tmp_path):
    budget = Budget(month=Limits(calls=50))
    with MllmServer() as server:
        for start in (0, 40, 80):
            ask(tmp_path, params(server, budget=budget), range(start, start + 40))
    assert server.counts["good"] == 50
    (month,) = (path.name for path in (tmp_path / "store" / "spending").iterdir())
    assert charged(new_build(tmp_path).store, month).calls == 50


def test_unknown_usage_is_told_and_charged_by_its_bound(tmp_path):
    with MllmServer(["no usage", "good"]) as server:
        build, _ = ask(tmp_path, params(server, prices=PRICES, concurrency=1), range(2))
    cost = build.bill.stages["test"]
    assert (cost["calls"], cost["unknown_usage"], cost["input_tokens"]) == (2, 1, 100)
    assert cost["money"] > 2 * CALL


def test_a_budget_in_money_needs_prices():
    with pytest.raises(ValidationError, match=r"needs endpoint\.prices"):
        AskParams(endpoint={"url": "http://h/v1", "model": "m"}, budget={"money": 1})


def test_a_missing_key_names_its_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_LABEL_KEY", raising=False)
    with MllmServer() as server, pytest.raises(ConfigError, match="TEST_LABEL_KEY is not set"):
        ask(tmp_path, params(server, api_key_env="TEST_LABEL_KEY"))
    assert not server.ledger


def test_a_key_comes_from_the_environment_or_a_block(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LABEL_KEY", " sk-1 ")
    build = new_build(tmp_path)
    assert secret(mllm.Server(url="http://h/v1", api_key_env="TEST_LABEL_KEY"), build) == "sk-1"
    with pytest.raises(ConfigError, match="only be read in a flow"):
        secret(mllm.Server(url="http://h/v1", api_key_block="labels"), build)


def test_a_cancelled_run_keeps_what_was_answered(tmp_path):
    build = new_build(tmp_path)

    async def work(ask, number):
        if number == 5:
            await asyncio.sleep(0.2)
            raise KeyError("a bug")
        return await mllm.ask_for(ask, question(number), Note)

    with MllmServer() as server:
        with pytest.raises(KeyError):
            ask_all(build, "test", range(10), work, params(server), lambda image_id: b"jpeg")
        ask(tmp_path, params(server), range(10))
    assert set(server.paid.values()) == {1} and server.counts["good"] == 10
