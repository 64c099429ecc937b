"""The event heap: order, time, bounds, the alarm a driver sleeps by."""

from __future__ import annotations

import math

import pytest

from natswarm.sim.trace import TraceLines
from natswarm.sim.world import World


def test_events_run_in_time_order_and_equal_times_in_order_of_scheduling():
    world = World(1)
    seen = []
    for label, time in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0)):
        world.at(time, lambda label: seen.append((label, world.now)), label)
    assert not world.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 2.0)]
    assert world.event_count == 4


def test_run_until_includes_its_end_and_moves_time_there():
    world = World(1)
    seen = []
    world.at(1.0, seen.append, 1)
    world.at(1.5, seen.append, 2)
    world.run_until(1.0)
    assert (seen, world.now, world.next_time()) == ([1], 1.0, 1.5)
    world.run_for(0.25)
    assert (seen, world.now) == ([1], 1.25)
    world.run_until(0.5)  # the past: nothing happens
    assert world.now == 1.25
    world.run_until(9.0)
    assert (seen, world.now, world.next_time()) == ([1, 2], 9.0, math.inf)


def test_events_scheduled_by_events_run_in_the_same_call():
    world = World(1)
    seen = []

    def tick(left: int) -> None:
        seen.append(world.now)
        if left:
            world.after(1.0, tick, left - 1)

    world.at(1.0, tick, 3)
    world.run_until(3.0)
    assert seen == [1.0, 2.0, 3.0]


def test_run_stops_at_the_condition_the_deadline_or_the_limit():
    world = World(1)
    ticks = []

    def tick() -> None:
        ticks.append(world.now)
        world.after(1.0, tick)

    world.at(1.0, tick)
    assert world.run(until=lambda: len(ticks) == 2)
    assert world.now == 2.0
    assert not world.run(until=lambda: len(ticks) == 9, deadline=5.0)
    assert world.now == 5.0
    with pytest.raises(RuntimeError, match="seed 1"):
        world.run(event_limit=100)


@pytest.mark.parametrize("time", [0.5, math.nan])
def test_the_past_cannot_be_scheduled(time: float):
    world = World(1)
    world.run_until(1.0)
    with pytest.raises(ValueError, match="cannot schedule"):
        world.at(time, print)


def test_an_event_cannot_run_the_world():
    world = World(1)
    world.at(1.0, world.run_until, 2.0)
    with pytest.raises(RuntimeError, match="already"):
        world.run()
    world.at(1.0, world.run)
    with pytest.raises(RuntimeError, match="already"):
        world.run_until(1.0)


def test_an_event_that_raises_leaves_a_world_that_goes_on():
    world = World(1)
    seen = []
    world.at(1.0, lambda: 1 / 0)
    world.at(1.0, seen.append, "after")
    with pytest.raises(ZeroDivisionError):
        world.run_until(2.0)
    world.run_until(2.0)
    assert (seen, world.now, world.event_count) == (["after"], 2.0, 2)


def test_streams_depend_on_seed_and_label_alone():
    draws = World(3).stream("a").random()
    other = World(3)
    other.rng.random()
    other.stream("b").random()
    assert other.stream("a").random() == draws
    assert World(4).stream("a").random() != draws
    assert World(3).stream("b").random() != draws


def test_the_alarm_rings_for_what_is_earlier_than_all_before_and_for_nothing_else():
    world = World(1)
    rung: list[float] = []
    world.set_alarm(math.inf, rung.append)
    for time in (5.0, 6.0, 3.0, 4.0, 2.0):
        world.at(time, print)
    assert rung == [5.0, 3.0, 2.0]
    world.set_alarm(-math.inf, None)
    world.at(1.0, print)
    assert rung == [5.0, 3.0, 2.0]


def test_catching_up_follows_the_clock_and_does_nothing_inside_an_event():
    world = World(1)
    world.catch_up()
    assert world.now == 0.0
    seen = []
    clock = [2.0]
    world.clock = lambda: clock[0]

    def event() -> None:
        clock[0] = 9.0
        world.catch_up()
        seen.append(world.now)

    world.at(1.0, event)
    world.catch_up()
    assert seen == [1.0]
    assert world.now == 2.0


def test_trace_lines_are_readable():
    lines: list[str] = []
    TraceLines(lines.append)(0.0125, "sent", "phone", "something")
    assert lines == ["      12.500 ms  phone            sent         something"]
