"""What other subscribers do at a NAT: new flows at random times, which take ports from ours.

They fill blocks, occupy the ports we would keep, drive sequential counters on, and use up the NAT's
rate of new mappings. They are flows like any others in the NAT's table, but cost no events: the NAT
makes those of the time that passed when it next has something to do.

Source: Poisson as in Klinec & Matyas (2014), who punctured through up to 35 new flows a second.
Knows no table.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.sim.ports import poisson

__all__ = ["BackgroundFlows", "BackgroundLoad"]

# Flows alive at a time. A new one costs some 10 us, and as many are made when the NAT is first
# used: more would stall a scenario for seconds without a word.
MAX_LIVE_FLOWS = 200_000

SOURCE_PORTS = (32_768, 60_999)  # Linux `ip_local_port_range`, as of `natswarm/sim/host.py`


@dataclass(frozen=True, slots=True)
class BackgroundLoad:
    """Flows of subscribers that nobody simulates in full.

    Attributes:
        subscriber_count: How many subscribers they come from, each as often as the others.
        flows_per_s: New flows of all of them a second, Poisson; each is to a remote of its own.
        hold_s: How long each holds its session, idle lifetime included, seconds.
    """

    subscriber_count: int
    flows_per_s: float
    hold_s: float

    def __post_init__(self) -> None:
        if self.subscriber_count < 1:
            raise ValueError(f"flows come from at least one subscriber: {self}")
        for value in (self.flows_per_s, self.hold_s):
            if not 0 < value < math.inf:
                raise ValueError(f"not a load, its rate and times must be positive: {self}")
        if self.flows_per_s * self.hold_s > MAX_LIVE_FLOWS:
            raise ValueError(
                f"{self.flows_per_s * self.hold_s:,.0f} background flows at a time; at most "
                f"{MAX_LIVE_FLOWS:,} can be simulated"
            )


class BackgroundFlows:
    """The flows of one NAT, in order of time.

    Before it is first asked, the load has been on for ever.
    """

    def __init__(self, load: BackgroundLoad, rng: random.Random) -> None:
        self.hold_s = load.hold_s
        self._load = load
        self._rng = rng
        self._next_time = -math.inf
        self._flow_count = 0

    def skipped(self, now: float) -> int:
        """Return how many flows came and went since last time; leaves only those still alive."""
        start = now - self.hold_s
        if self._next_time >= start:
            return 0
        passed_s = start - self._next_time
        self._next_time = start + self._interval()
        return (
            0 if passed_s == math.inf else 1 + poisson(self._load.flows_per_s * passed_s, self._rng)
        )

    def until(self, now: float) -> Iterator[tuple[float, Endpoint, Endpoint]]:
        """Yield (start, internal, remote) of the flows that start up to `now`, in order."""
        rng, load = self._rng, self._load
        low, high = SOURCE_PORTS
        while self._next_time <= now:
            time = self._next_time
            self._next_time += self._interval()
            self._flow_count += 1
            # No addresses: nobody can send to them, and no real one can be like them.
            internal = Endpoint(
                f"other/{rng.randrange(load.subscriber_count)}", rng.randint(low, high)
            )
            yield time, internal, Endpoint(f"elsewhere/{self._flow_count}", 443)

    def _interval(self) -> float:
        return self._rng.expovariate(self._load.flows_per_s)
