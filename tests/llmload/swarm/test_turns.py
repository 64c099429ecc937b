"""Turns at computing go in batches, first to those who used least."""

from __future__ import annotations

import pytest
import trio

from llmload.swarm.turns import BatchTurns


class Machine:
    """Takes a second a batch, and writes down what was in it."""

    def __init__(self, rows_max: int) -> None:
        self.batches: list[list[str]] = []
        self.turns = BatchTurns(self.compute, rows_max=rows_max)

    async def compute(self, items):
        self.batches.append(list(items))
        await trio.sleep(1)
        return [KeyError(item) if item.startswith("bad") else item.upper() for item in items]

    @property
    def order(self) -> list[str]:
        return [item for batch in self.batches for item in batch]


async def test_who_waits_goes_together(autojump_clock):
    machine = Machine(rows_max=4)
    results = []

    async def work(owner):
        results.append(await machine.turns.run(owner, owner, 1))

    async with trio.open_nursery() as nursery:
        for owner in "abcdefg":
            nursery.start_soon(work, owner)
    assert sorted(results) == list("ABCDEFG")
    # The first one does not wait for others.
    assert [len(batch) for batch in machine.batches] == [1, 4, 2]


async def test_many_of_one_do_not_hold_up_another(autojump_clock):
    machine = Machine(rows_max=1)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(machine.turns.run, "greedy", "g", 1)
        await trio.sleep(2.5)
        for _ in range(3):
            nursery.start_soon(machine.turns.run, "modest", "m", 1)
    assert len(machine.order) == 13
    # Three turns were had or given; from then on they alternate.
    assert machine.order[3:9].count("m") == 3
    assert machine.turns.waiting_count == 0


async def test_large_items_go_alone_and_count_as_large(autojump_clock):
    machine = Machine(rows_max=4)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(machine.turns.run, "long", "prompt", 12)
            nursery.start_soon(machine.turns.run, "short", "token", 1)
    assert all(len(batch) == 1 for batch in machine.batches if "prompt" in batch)
    assert machine.order.index("prompt", machine.order.index("prompt") + 1) > 3


async def test_an_error_is_its_callers_alone(autojump_clock):
    machine = Machine(rows_max=4)
    results = {}

    async def work(item):
        try:
            results[item] = await machine.turns.run(item, item, 1)
        except KeyError:
            results[item] = None

    async with trio.open_nursery() as nursery:
        for item in ("first", "bad", "good"):
            nursery.start_soon(work, item)
    assert results == {"first": "FIRST", "bad": None, "good": "GOOD"}


@pytest.mark.parametrize("cancel_at_s", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("victim", range(4))
async def test_cancelled_ones_lose_no_turn(autojump_clock, cancel_at_s, victim):
    """Whoever is cancelled whenever: all others get their results, and nothing is left."""
    machine = Machine(rows_max=2)
    done = []

    async def work(index, scope):
        with scope:
            done.append(await machine.turns.run(index, str(index), 1))

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for index, scope in enumerate(scopes):
            nursery.start_soon(work, index, scope)
        await trio.sleep(cancel_at_s)
        scopes[victim].cancel()
    assert {str(index) for index in range(4)} - set(done) <= {str(victim)}
    assert await machine.turns.run("one", "more", 1) == "MORE"
    assert not machine.turns._active
    assert not machine.turns._used
    assert not machine.turns._is_busy
