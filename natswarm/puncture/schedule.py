"""When and where openers and bursts are due: paced orders of (our port, their endpoint).

The orders come from a generator that only the two peers can seed. Pure: time is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from natswarm.address import Endpoint
from natswarm.nat.allocation import SAFE_RANGE, predict_ports, shuffled_ports
from natswarm.puncture.strategy import Burst, Openers

__all__ = ["BurstRun", "OpenerRun"]

# Bursts go out in small groups: one timer for each of 1,000 probes a second would cost more than
# the probes. After a stall (a phone that slept) the backlog is dropped, not poured out.
TICK_S = 0.005
BACKLOG_MAX_S = 0.05

Way = tuple[int, Endpoint]


class _Pace:
    """When the next of evenly spaced datagrams is due, in groups a tick apart."""

    def __init__(self, per_s: float, start_at: float) -> None:
        self._interval_s = 1 / per_s
        self._due_at = start_at
        self._tick_at = start_at

    @property
    def next_at(self) -> float:
        return max(self._due_at, self._tick_at)

    def begin(self, now: float) -> None:
        """Start a group: drop what a stall has left undone."""
        self._due_at = max(self._due_at, now - BACKLOG_MAX_S)
        self._tick_at = now + TICK_S

    def set(self, per_s: float) -> None:
        """Space what follows anew."""
        self._interval_s = 1 / per_s

    def take(self, now: float) -> bool:
        if self._due_at > now:
            return False
        self._due_at += self._interval_s
        return True


class OpenerRun:
    """Which openers are due: one pass over all ports, and again before they get old."""

    def __init__(self, openers: Openers, now: float) -> None:
        self.openers = openers
        self._pairs = [
            (port_index, destination)
            for port_index in range(1, openers.port_count + 1)
            for destination in openers.destinations
        ]
        self._pace = _Pace(openers.probes_per_s, now)
        self._position = 0
        self._pass_at = now

    @property
    def next_at(self) -> float | None:
        """When something is due; None: never again."""
        return max(self._pass_at, self._pace.next_at)

    def due(self, now: float) -> Iterator[Way]:
        """Yield what is due; what is yielded counts as sent."""
        if now < self._pass_at or now < self._pace.next_at:
            return
        self._pace.begin(now)
        while self._pace.take(now):
            yield self._pairs[self._position]
            self._position += 1
            if self._position == len(self._pairs):
                self._position = 0
                self._pass_at = max(self._pass_at + self.openers.refresh_s, now)
                return


class BurstRun:
    """Which ports of the peer are due."""

    def __init__(self, burst: Burst, rng: random.Random, now: float) -> None:
        self._burst = burst
        self._rng = rng
        self._round_index = 0
        self._left = burst.probe_count
        self._round_at = now + burst.start_s
        self._pace = _Pace(burst.probes_per_s, self._round_at)
        self._kept: list[Way] = []
        self._pairs = self._order()

    @property
    def next_at(self) -> float | None:
        """When something is due; None: never again."""
        return self._pace.next_at if self._left else None

    def due(self, now: float) -> Iterator[Way]:
        """Yield what is due; what is yielded counts as sent."""
        if not self._left or now < self._pace.next_at:
            return
        self._pace.begin(now)
        while self._left and self._pace.take(now):
            self._left -= 1
            if self._burst.probe_count - self._left == self._burst.hurry_count:
                self._pace.set(self._burst.hurry_per_s)
            way = next(self._pairs)
            if self._burst.is_kept and not self._round_index:
                self._kept.append(way)
            yield way
        if not self._left:
            self._start_round(now)

    def _start_round(self, now: float) -> None:
        self._round_index += 1
        if self._round_index == self._burst.round_count:
            return
        self._left = self._burst.probe_count
        self._round_at = max(self._round_at + self._burst.round_interval_s, now)
        self._pace = _Pace(self._burst.probes_per_s, self._round_at)
        self._pairs = iter(self._kept) if self._burst.is_kept else self._order()

    def _order(self) -> Iterator[Way]:
        if self._burst.runs:
            return self._runs()
        if self._burst.scan_stride:
            return self._scan()
        return self._shuffled()

    def _shuffled(self) -> Iterator[Way]:
        """Yield pairs of our port and their endpoint for ever, none twice before all came once."""
        orders = [(index, self._endpoints()) for index in self._burst.port_indices]
        while True:
            for port_index, endpoints in orders:
                yield port_index, next(endpoints)

    def _endpoints(self) -> Iterator[Endpoint]:
        burst = self._burst
        while True:
            if burst.is_shuffled:
                ports = shuffled_ports(burst.allocation.ranges, self._rng)
            else:
                ports = self._likeliest_first()
            for port in ports:
                for ip in burst.ips:
                    yield Endpoint(ip, port)

    def _likeliest_first(self) -> Iterator[int]:
        burst = self._burst
        near = list(islice(predict_ports(burst.allocation, rng=self._rng), burst.near_count))
        # Every `run_length`-th: wherever the peer's run begins, one lies in it; and again for runs
        # that others took a port of.
        for offset in reversed(range(burst.run_length if near else 0)):
            yield from near[offset :: burst.run_length]
        tried = set(near)  # asked, never iterated
        for port in predict_ports(burst.allocation, rng=self._rng, run_length=burst.run_length):
            if port not in tried:
                yield port

    def _scan(self) -> Iterator[Way]:
        burst = self._burst
        index = -burst.scan_lead
        while True:
            index += burst.scan_stride
            for _ in range(burst.copies):
                yield burst.port_indices[0], self._ahead(index)

    def _runs(self) -> Iterator[Way]:
        burst = self._burst
        index = 0
        for count, steps in burst.runs:
            index += steps
            for port_index in burst.port_indices[:count]:
                yield port_index, self._ahead(index)

    def _ahead(self, steps: int) -> Endpoint:
        """Return the endpoint that a counter reaches after so many steps."""
        allocation = self._burst.allocation
        port = (allocation.last_port or SAFE_RANGE.low) + (allocation.step or 1) * steps
        port = SAFE_RANGE.low + (port - SAFE_RANGE.low) % SAFE_RANGE.port_count
        return Endpoint(self._burst.ips[0], port)
