"""Pace: how the limit on calls in flight moves, and who gets a turn."""

import asyncio

import pytest

from infra.pace import FIRST, Lane, Lanes


def lane(most=64, weight=1.0, backoff_s=1.0, patience_s=60.0) -> Lane:
    return Lane(most, weight, backoff_s, patience_s)


def answers(one: Lane, count: int, *, at: float, taking: float) -> None:
    """As many answers at a time while the lane is busy."""
    for _ in range(count):
        one.in_flight = int(one.limit)
        one.answered(at, at + taking)
    one.in_flight = 0


def test_the_limit_doubles_by_the_round_until_the_most():
    one = lane()
    answers(one, FIRST, at=0, taking=0.5)
    assert one.limit == 2 * FIRST
    answers(one, 100, at=1, taking=0.5)
    assert one.limit == 64


def test_429_halves_the_limit_once_for_calls_that_were_under_way_together():
    one = lane()
    answers(one, 100, at=0, taking=0.5)
    for _ in range(10):
        one.refused(1.0, 2.0, retry_after=None)
    assert one.limit == 32
    one.refused(2.5, 3.0, retry_after=None)
    assert one.limit == 16


def test_after_a_429_the_limit_grows_by_one_a_round():
    one = lane()
    one.refused(0.0, 1.0, retry_after=0.0)
    assert one.limit == FIRST / 2
    answers(one, FIRST // 2, at=5, taking=0.5)
    assert 8.9 < one.limit < 9.1


def test_the_limit_does_not_grow_while_answers_take_twice_as_long_as_at_best():
    one = lane(most=512)
    answers(one, 32, at=0, taking=0.5)
    answers(one, 500, at=1, taking=5.0)
    grown = one.limit
    answers(one, 100, at=2, taking=5.0)
    assert one.limit == grown < 200


def test_the_limit_does_not_grow_where_nobody_uses_it():
    one = lane()
    one.in_flight = 1
    one.answered(0, 0.5)
    assert one.limit == FIRST


def test_retry_after_is_honoured():
    one = lane(backoff_s=0.0)
    one.refused(0.0, 10.0, retry_after=7.0)
    assert one.not_before == 17.0


def test_a_server_that_only_fails_is_probed_one_call_at_a_time_and_then_given_up():
    one = lane(patience_s=60.0)
    for second in range(FIRST + 1):
        one.failed(float(second))
    assert one.room == 1 and one.not_before > FIRST
    assert not one.is_dead
    one.failed(61.0)
    assert one.is_dead


def test_an_answer_ends_a_row_of_failures():
    one = lane(patience_s=60.0)
    one.failed(0.0)
    one.answered(30.0, 31.0)
    one.failed(80.0)
    assert not one.is_dead and one.failures == 1


def test_turns_go_by_weight():
    async def body():
        lanes = Lanes([lane(weight=3), lane(weight=1)])
        given = [await lanes.turn() for _ in range(12)]
        return [given.count(0), given.count(1)]

    assert asyncio.run(body()) == [9, 3]


def test_who_waits_goes_on_when_a_turn_is_given_back():
    async def body():
        lanes = Lanes([lane(most=1)])
        assert await lanes.turn() == 0
        waiting = [asyncio.create_task(lanes.turn()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            lanes.over(0)
            assert await asyncio.wait_for(task, 1) == 0

    asyncio.run(body())


def test_nobody_overtakes_who_waits():
    async def body():
        lanes, order = Lanes([lane(most=1)]), []

        async def work(name):
            for turn in "ab":
                await lanes.turn()
                order.append(name + turn)
                await asyncio.sleep(0)
                lanes.over(0)

        await asyncio.gather(*map(work, "123"))
        return order

    assert asyncio.run(body()) == ["1a", "2a", "3a", "1b", "2b", "3b"]


def test_a_cancelled_waiter_passes_its_turn_on():
    async def body():
        lanes = Lanes([lane(most=1)])
        await lanes.turn()
        first, second = (asyncio.create_task(lanes.turn()) for _ in range(2))
        await asyncio.sleep(0)
        lanes.over(0)
        first.cancel()
        assert await asyncio.wait_for(second, 1) == 0
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(body())


def test_a_lane_that_is_held_opens_by_itself():
    async def body():
        one = lane()
        one.not_before = asyncio.get_running_loop().time() + 0.02
        assert await asyncio.wait_for(Lanes([one]).turn(), 1) == 0

    asyncio.run(body())


def test_nobody_waits_for_the_dead():
    async def body():
        one = lane(most=1)
        lanes = Lanes([one])
        await lanes.turn()
        waiting = [asyncio.create_task(lanes.turn()) for _ in range(3)]
        await asyncio.sleep(0)
        one.is_dead = True
        lanes.over(0)
        return await asyncio.wait_for(asyncio.gather(*waiting), 1)

    assert asyncio.run(body()) == [None, None, None]
