"""The heap of events that is time itself in a simulation.

Thousands of punctures of thousands of datagrams each have to fit into minutes, so an event is a
plain tuple (time, sequence, callback, arguments) on a `heapq` and nothing is allocated beside it.
The sequence number makes events of the same time run in the order they were scheduled, which makes
a run a function of its seed alone. There is no cancelling: whoever set a timer looks, when it
fires, whether it still matters (as sans-IO cores do anyway).

Idea: FoundationDB's and TigerBeetle's deterministic simulation; quinn's and neqo's test pairs.
Knows neither networks nor clocks: a driver may tie it to one (`clock`, `set_alarm`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from heapq import heappop, heappush

__all__ = ["Trace", "World"]

Trace = Callable[[float, str, str, object], None]
"""Called with (time, what happened, where, about what); see `natswarm/sim/trace.py`."""

_Event = tuple[float, int, Callable[..., object], tuple[object, ...]]

# `run()` is for worlds that come to rest. One that schedules for ever is a bug of the test or of
# the core under test, and should fail instead of hang; a puncture takes under a million events.
DEFAULT_EVENT_LIMIT = 50_000_000


class World:
    """Virtual time, what is due in it, and the randomness of one run.

    Attributes:
        seed: Replays the run.
        now: Virtual seconds since the start; only grows. Read it, never write it.
        rng: For the scenario. Parts of the world take a `stream` each instead, so that one more
            draw in one of them leaves all others as they were.
        trace: Hears of every step of every datagram; None costs nearly nothing.
        event_count: Events run so far.
        clock: Set by a driver that ties the world to a running clock: returns the virtual time
            it should be. See `catch_up`.
    """

    def __init__(self, seed: int, *, trace: Trace | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.rng = self.stream("world")
        self.trace = trace
        self.event_count = 0
        self.clock: Callable[[], float] | None = None
        self._heap: list[_Event] = []
        self._sequence = 0
        self._is_running = False
        self._alarm_time = -math.inf
        self._alarm: Callable[[float], None] | None = None

    def stream(self, label: str) -> random.Random:
        """Return a generator that depends on the seed and `label` only."""
        # Text is hashed with SHA-512 by `random`, not with the per-process `hash`.
        return random.Random(f"{self.seed}/{label}")

    def at(self, time: float, callback: Callable[..., object], *args: object) -> None:
        """Run `callback(*args)` at virtual time `time`, after all events scheduled for it before.

        Raises:
            ValueError: `time` is past, or not a number.
        """
        if not time >= self.now:
            raise ValueError(f"cannot schedule for {time}: it is {self.now} already")
        self._sequence = sequence = self._sequence + 1
        heappush(self._heap, (time, sequence, callback, args))
        if time < self._alarm_time:
            self._alarm_time = time
            if self._alarm is not None:
                self._alarm(time)

    def after(self, delay_s: float, callback: Callable[..., object], *args: object) -> None:
        """Run `callback(*args)` in `delay_s` virtual seconds from the present."""
        self.catch_up()
        self.at(self.now + delay_s, callback, *args)

    def next_time(self) -> float:
        """Return when the next event is due; infinity when none is."""
        return self._heap[0][0] if self._heap else math.inf

    def run_until(self, time: float) -> None:
        """Run every event due up to and including `time`; then it is `time`.

        An exception of a callback comes out here; the world can go on after it.

        Raises:
            RuntimeError: Called from inside an event.
        """
        if self._is_running:
            raise RuntimeError("the world runs already: an event must not run it")
        self._is_running = True
        heap = self._heap
        count = 0
        try:
            while heap and heap[0][0] <= time:
                self.now, _, callback, args = heappop(heap)
                count += 1
                callback(*args)
            if time > self.now:
                self.now = time
        finally:
            self.event_count += count
            self._is_running = False

    def run_for(self, duration_s: float) -> None:
        """Run the events of the next `duration_s` virtual seconds."""
        self.run_until(self.now + duration_s)

    def run(
        self,
        *,
        until: Callable[[], bool] | None = None,
        deadline: float = math.inf,
        event_limit: int = DEFAULT_EVENT_LIMIT,
    ) -> bool:
        """Run event by event until a condition holds or nothing more is due by `deadline`.

        Args:
            until: Looked at before the first event and after each.
            deadline: Virtual time of the last event to run. Time stays at the last event run.
            event_limit: More events than this are a bug.

        Returns:
            Whether `until` holds; False without it.

        Raises:
            RuntimeError: `event_limit` events ran, or called from inside an event.
        """
        if self._is_running:
            raise RuntimeError("the world runs already: an event must not run it")
        self._is_running = True
        heap = self._heap
        count = 0
        try:
            while True:
                if until is not None and until():
                    return True
                if not heap or heap[0][0] > deadline:
                    return False
                if count >= event_limit:
                    raise RuntimeError(
                        f"no rest after {count} events at {self.now} s (seed {self.seed})"
                    )
                self.now, _, callback, args = heappop(heap)
                count += 1
                callback(*args)
        finally:
            self.event_count += count
            self._is_running = False

    def catch_up(self) -> None:
        """Run what is due by the driver's clock; nothing without one or inside an event.

        Whoever acts on the world from outside its events calls this first, so that the act falls
        behind everything that should have happened before it.
        """
        if self.clock is not None and not self._is_running:
            self.run_until(self.clock())

    def set_alarm(self, time: float, alarm: Callable[[float], None] | None) -> None:
        """Have `alarm(due)` called whenever something becomes due before all known, and `time`."""
        self._alarm_time = time
        self._alarm = alarm
