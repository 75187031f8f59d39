"""Budgets: prices, reservations that never pass a limit, and journals that outlive a process."""

import asyncio
import random
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.budget import (
    NANO,
    Amount,
    Budget,
    Limits,
    OverBudget,
    Prices,
    Spending,
    bound,
    charged,
    price,
)
from infra.errors import PairmillError
from infra.folder import FolderStore

PRICES = Prices(input=Decimal("0.15"), output=Decimal("0.60"), cached_input=Decimal("0.075"))
NOVEMBER = 1_795_000_000.0  # 2026-11-18


def tokens(total: int, output: int, cached: int = 0) -> dict[str, int]:
    return {"input": total, "output": output, "cached": cached}


@pytest.mark.parametrize(
    ("usage", "nano"),
    [
        (tokens(1_000_000, 0), 150_000_000),
        (tokens(0, 1_000_000), 600_000_000),
        (tokens(1_000_000, 0, cached=1_000_000), 75_000_000),
        (tokens(1200, 80, cached=1024), 26_400 + 76_800 + 48_000),
        (tokens(1, 0), 150),
        (None, None),
    ],
)
def test_a_price_is_exact(usage, nano):
    assert price(PRICES, usage) == nano


def test_a_price_by_the_call_and_parts_of_a_nano_rounded_up():
    assert price(Prices(input=0, output=0, call=Decimal("0.002")), tokens(9, 9)) == 2_000_000
    assert price(Prices(input=Decimal("0.0375"), output=0), tokens(1, 0)) == 38
    assert price(None, tokens(1, 1)) is None


def test_a_bound_takes_every_byte_of_text_for_a_token():
    assert bound(PRICES, 1000, 1600, 500) == Amount(2600 * 150 + 500 * 600, 3100, 1)
    assert bound(None, 1000, 0, 500) == Amount(0, 1500, 1)


NOTHING = Amount()


def spending(tmp_path, epoch=1, before=NOTHING, started=NOVEMBER, now=lambda: NOVEMBER, **limits):
    store = FolderStore(str(tmp_path))
    return Spending(store, epoch, Budget(**limits), before, started, now)


def run(body):
    return asyncio.run(body)


def test_what_is_reserved_counts_until_it_is_settled(tmp_path):
    async def body():
        spent = spending(tmp_path, calls=2)
        first = await spent.reserve(Amount(10, 100, 1))
        second = await spent.reserve(Amount(10, 100, 1))
        third = asyncio.create_task(spent.reserve(Amount(10, 100, 1)))
        await asyncio.sleep(0.01)
        assert not third.done()  # the first may yet turn out not to be billed
        spent.release(first)
        third = await third
        spent.settle(second, 7, tokens(50, 20))
        spent.settle(third, 7, tokens(50, 20))
        with pytest.raises(OverBudget):
            await spent.reserve(Amount(1, 1, 1))
        return spent.spent

    assert run(body()) == Amount(14, 140, 2)


def test_money_is_bounded_in_the_currency(tmp_path):
    async def body():
        spent = spending(tmp_path, money=Decimal("0.01"))
        for _ in range(10):
            reserved = await spent.reserve(Amount(NANO // 1000, 10, 1))
            spent.settle(reserved, NANO // 1000, tokens(5, 5))
        with pytest.raises(OverBudget):
            await spent.reserve(Amount(1, 0, 1))

    run(body())


def test_unknown_usage_is_charged_as_reserved_and_lost_calls_too(tmp_path):
    async def body():
        spent = spending(tmp_path)
        spent.settle(await spent.reserve(Amount(10, 100, 1)), None, None)
        spent.lose(await spent.reserve(Amount(10, 100, 1)))
        return spent.settled, spent.lost

    assert run(body()) == (Amount(10, 100, 1), Amount(10, 100, 1))


def test_a_bound_that_was_none_makes_later_ones_larger(tmp_path):
    async def body():
        spent = spending(tmp_path)
        spent.settle(await spent.reserve(Amount(10, 100, 1)), 15, tokens(100, 50))
        return await spent.reserve(Amount(10, 100, 1))

    assert run(body()) == Amount(15, 150, 1)


def test_the_journal_covers_a_call_before_it_is_made_and_tells_the_truth_at_the_end(tmp_path):
    store = FolderStore(str(tmp_path))

    async def body():
        spent = spending(tmp_path)
        reserved = await spent.reserve(Amount(10, 100, 1))
        covered = charged(store, "2026-11")
        spent.settle(reserved, 4, tokens(30, 10))
        await spent.close()
        return covered, charged(store, "2026-11")

    covered, final = run(body())
    assert covered.money >= 10 and covered.calls >= 1
    assert final == Amount(4, 40, 1)


def test_a_dead_process_leaves_what_it_had_in_flight_charged(tmp_path):
    async def dies():
        spent = spending(tmp_path, epoch=1)
        for _ in range(3):
            await spent.reserve(Amount(10, 100, 1))

    async def goes_on():
        spent = spending(tmp_path, epoch=2, month=Limits(calls=300))
        count = 0
        try:
            while True:
                spent.settle(await spent.reserve(Amount(1, 1, 1)), 1, tokens(1, 0))
                count += 1
        except OverBudget:
            return count

    run(dies())
    left = charged(FolderStore(str(tmp_path)), "2026-11")
    assert left.calls >= 3
    assert run(goes_on()) == 300 - left.calls


def test_a_month_is_bounded_over_builds_and_a_new_one_begins_at_nothing(tmp_path):
    clock = [NOVEMBER]

    async def body():
        spent = spending(tmp_path, epoch=2, month=Limits(calls=1), now=lambda: clock[0])
        spent.settle(await spent.reserve(Amount(0, 1, 1)), 0, tokens(1, 0))
        with pytest.raises(OverBudget):
            await spent.reserve(Amount(0, 1, 1))
        clock[0] += 30 * 86_400
        spent.settle(await spent.reserve(Amount(0, 1, 1)), 0, tokens(1, 0))
        await spent.close()

    run(body())
    store = FolderStore(str(tmp_path))
    assert [charged(store, month).calls for month in ("2026-11", "2026-12")] == [1, 1]


def test_hours_end_the_calls_of_a_build(tmp_path):
    clock = [NOVEMBER]

    async def body():
        spent = spending(tmp_path, hours=2.0, now=lambda: clock[0])
        spent.settle(await spent.reserve(Amount(0, 1, 1)), 0, tokens(1, 0))
        clock[0] += 7201
        with pytest.raises(OverBudget):
            await spent.reserve(Amount(0, 1, 1))

    run(body())


def test_earlier_stages_of_the_build_count(tmp_path):
    async def body():
        spent = spending(tmp_path, before=Amount(0, 0, 5), calls=6)
        await spent.reserve(Amount(0, 1, 1))
        return spent

    run(body())
    with pytest.raises(OverBudget):
        run(spending(tmp_path, before=Amount(0, 0, 6), calls=6).reserve(Amount(0, 1, 1)))


def test_a_damaged_journal_stops_spending(tmp_path):
    FolderStore(str(tmp_path)).put("spending/2026-11/00000007.json", b"{")
    with pytest.raises(PairmillError, match="what was spent in 2026-11 is unknown"):
        run(spending(tmp_path).reserve(Amount(0, 1, 1)))


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(0, 60),
    callers=st.integers(1, 8),
    outcomes=st.lists(st.sampled_from(["settled", "unbilled", "lost"]), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_concurrent_callers_never_pass_the_budget(tmp_path_factory, limit, callers, outcomes, seed):
    draw = random.Random(seed)

    async def body():
        spent = spending(tmp_path_factory.mktemp("store"), tokens=limit * 10)
        made = []

        async def caller():
            for outcome in outcomes:
                try:
                    reserved = await spent.reserve(Amount(0, 10, 1))
                except OverBudget:
                    return
                await asyncio.sleep(0)
                if outcome == "settled":
                    actual = draw.randint(0, 10)
                    made.append(actual)
                    spent.settle(reserved, 0, tokens(actual, 0))
                elif outcome == "lost":
                    made.append(10)
                    spent.lose(reserved)
                else:
                    spent.release(reserved)

        await asyncio.wait_for(asyncio.gather(*(caller() for _ in range(callers))), 10)
        return sum(made), spent.spent.tokens

    made, told = run(body())
    assert made == told <= limit * 10
