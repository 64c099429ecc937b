"""Turns at computing go first to who used least."""

from __future__ import annotations

import pytest
import trio

from llmload.swarm.turns import FairTurns


async def work(turns, owner, log, seconds=1.0):
    async with turns.turn(owner):
        log.append(owner)
        await trio.sleep(seconds)


async def test_many_of_one_do_not_hold_up_another(autojump_clock):
    turns, log = FairTurns(), []
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(work, turns, "greedy", log)
        await trio.sleep(2.5)
        for _ in range(3):
            nursery.start_soon(work, turns, "modest", log)
    assert len(log) == 13
    # Three turns were had or given; from then on they alternate.
    assert log[3:9].count("modest") == 3
    assert turns.waiting_count == 0


async def test_short_steps_get_more_turns_for_the_same_time(autojump_clock):
    turns, log = FairTurns(), []
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(work, turns, "long", log, 3.0)
            nursery.start_soon(work, turns, "short", log, 1.0)
        await trio.sleep(30)
        nursery.cancel_scope.cancel()
    assert log.count("short") / log.count("long") == pytest.approx(3, abs=1)


async def test_cancelled_ones_lose_no_turn(autojump_clock):
    turns, log = FairTurns(2), []
    async with trio.open_nursery() as nursery:
        for index in range(6):
            scope = trio.CancelScope(deadline=trio.current_time() + 0.5 + 0.5 * (index % 2))

            async def cancelled(scope=scope, index=index):
                with scope:
                    await work(turns, index, log)

            nursery.start_soon(cancelled)
        await trio.sleep(0.75)
        nursery.start_soon(work, turns, "last", log)
    assert "last" in log
    async with turns.turn("one"), turns.turn("two"):
        pass  # both are free again
    assert not turns._active
    assert not turns._used_s
