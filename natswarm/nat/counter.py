"""Does a NAT count its ports? Follow the counter through the ports that were seen.

A counting NAT gives each new mapping the next port, ours and other subscribers', so the ports we
see ascend (or descend) with gaps for the others. The order may be broken:

    a datagram was overtaken, or was lost behind the NAT and asked for again: one port is out of
    place, the others go on
    the counter reached its end, or we got a new block of ports: it goes on from elsewhere

A dynamic programme finds the chain of ports that explains all with the fewest of both. Gaps follow
a geometric law (other subscribers come in bursts; a Poisson law would be surer than the NATs are).

Source: Klinec & Matyas 2014 for sequential NATs under cross traffic; RFC 7753 for counters that go
round in a block.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from natswarm.nat.cross_traffic import Gap

__all__ = ["Chain", "follow"]

PORT_COUNT = 65_536

# Counters step by 1 or 2 (keeping the parity of ports, RFC 4787 section 4.2.2); 16 leaves room.
STEP_MAX = 16

# What it costs, in nats: a port out of place names its place among some dozens twice, and its
# distance from there; a new start names a port, and is one port in twenty at most.
DISPLACED_COST = 7.0
START_COST = math.log(PORT_COUNT)
JUMP_COST = START_COST + 3.0
# After a pause other tests of ours may have moved the counter on, too: such gaps say nothing of
# others.
PAUSE_S = 1.0
# Echoes leave 5 to 15 ms apart; what a NAT does in less is not worth telling apart.
TIME_MIN_S = 0.005
# A mean of skips where none were seen: one in 50 is.
SKIP_MIN = 0.02
# How many ports in a row may be out of place.
DISPLACED_MAX = 4
# One in so many ports may be out of place or a new start: any few ports are on some chain.
PORTS_PER_BREAK = 5


@dataclass(frozen=True, slots=True)
class Chain:
    """A counter's way through the ports that were seen, in the order of asking.

    Attributes:
        step: From one mapping to the next, not 0.
        evidence: Natural logarithm of how likely it makes the ports.
        gaps: Steps that others took between two of ours, and how long that took.
        jumps: (port before, port after) wherever it went on from elsewhere.
        ports: The ports on the chain, in the order of asking.
    """

    step: int
    evidence: float
    gaps: tuple[Gap, ...]
    jumps: tuple[tuple[int, int], ...]
    ports: tuple[int, ...]


def follow(ports: Sequence[int], times: Sequence[float]) -> Chain | None:
    """Return the likeliest chain through `ports`; None where there are too few for any.

    Args:
        ports: External ports of distinct mappings, in the order in which they were asked for.
        times: When, seconds.
    """
    if len(ports) < 3:
        return None
    chains = [
        chain for sign in (1, -1) if (chain := _follow_signed(ports, times, sign)) is not None
    ]
    return max(chains, key=lambda chain: chain.evidence, default=None)


def _follow_signed(ports: Sequence[int], times: Sequence[float], sign: int) -> Chain | None:
    ascents = [
        (sign * (ports[index + 1] - ports[index]), times[index + 1] - times[index])
        for index in range(len(ports) - 1)
    ]
    ascents = sorted(ascent for ascent in ascents if ascent[0] > 0)
    if not ascents:
        return None
    typical = ascents[len(ascents) // 2]
    pace = _Pace(1, (typical[0] - 0.5) / max(typical[1], TIME_MIN_S))
    best: Chain | None = None
    for _ in range(4):
        path = _best_path(ports, times, sign, pace)
        chain = _chain(ports, times, path, sign, pace)
        breaks = len(ports) - len(path) + len(chain.jumps)
        if breaks > len(ports) // PORTS_PER_BREAK:
            break
        if best is not None and chain.evidence <= best.evidence + 1e-9:
            break
        best = chain
        pace = _refined(ports, times, path, sign, pace)
    return best


class _Pace(NamedTuple):
    """How a counter moves: by `step`, others taking `rate` steps a second."""

    step: int
    rate: float

    def gap_cost(self, skips: int, seconds: float) -> float:
        # A hair more than nothing: else a single skip would break a chain without others.
        mean = self.rate * max(seconds, TIME_MIN_S) + SKIP_MIN
        return math.log(1 + mean) + skips * math.log((1 + mean) / mean)

    def displaced_cost(self) -> float:
        return DISPLACED_COST + math.log(1 + self.rate * TIME_MIN_S)

    def step_cost(self, gap: int, displaced: int, seconds: float) -> float:
        """Return the cost of a gap on the chain: infinite where only a jump can explain it."""
        if gap <= 0 or gap % self.step:
            return math.inf
        return self.gap_cost(max(0, gap // self.step - 1 - displaced), seconds)


def _best_path(ports: Sequence[int], times: Sequence[float], sign: int, pace: _Pace) -> list[int]:
    """Return the indices on the cheapest chain; between two of them all others are displaced."""
    count = len(ports)
    displaced_cost = pace.displaced_cost()
    costs = [START_COST + displaced_cost * index for index in range(count)]
    before: list[int | None] = [None] * count
    for index in range(1, count):
        for previous in range(max(0, index - 1 - DISPLACED_MAX), index):
            displaced = index - previous - 1
            gap, seconds = sign * (ports[index] - ports[previous]), times[index] - times[previous]
            cost = costs[previous] + displaced_cost * displaced
            cost += min(pace.step_cost(gap, displaced, seconds), JUMP_COST)
            if cost < costs[index]:
                costs[index], before[index] = cost, previous
    last = min(
        range(max(0, count - 1 - DISPLACED_MAX), count),
        key=lambda index: costs[index] + displaced_cost * (count - 1 - index),
    )
    path = [last]
    while (previous_index := before[path[-1]]) is not None:
        path.append(previous_index)
    return path[::-1]


def _refined(
    ports: Sequence[int], times: Sequence[float], path: Sequence[int], sign: int, pace: _Pace
) -> _Pace:
    """Fit step and rate to the gaps of a chain that are no jumps."""
    gaps = []
    for a, b in pairwise(path):
        gap, seconds = sign * (ports[b] - ports[a]), times[b] - times[a]
        # By steps of 1, which divide everything: the step may have been a coincidence.
        loose = pace._replace(step=1, rate=pace.rate * pace.step)
        if loose.step_cost(gap, b - a - 1, seconds) <= JUMP_COST and seconds <= PAUSE_S:
            gaps.append((gap, b - a - 1, seconds))
    if not gaps:
        return pace
    found = math.gcd(*(gap for gap, _, _ in gaps))
    step = found if found <= STEP_MAX else 1  # else a coincidence of few gaps
    skips = sum(max(0, gap // step - 1 - displaced) for gap, displaced, _ in gaps)
    return _Pace(step, skips / max(sum(seconds for _, _, seconds in gaps), TIME_MIN_S))


def _chain(
    ports: Sequence[int],
    times: Sequence[float],
    path: Sequence[int],
    sign: int,
    pace: _Pace,
) -> Chain:
    step = pace.step
    gaps: list[Gap] = []
    ascending = sorted(ports)
    jumps = []
    costs = START_COST
    for a, b in pairwise(path):
        gap, displaced = sign * (ports[b] - ports[a]), b - a - 1
        if pace.step_cost(gap, displaced, times[b] - times[a]) > JUMP_COST:
            jumps.append((ports[a], ports[b]))
            costs += JUMP_COST
            continue
        # Those of ours that lie in between are no steps of others, whenever they were seen: who
        # asks again after a lost answer sees a port of earlier.
        low, high = min(ports[a], ports[b]), max(ports[a], ports[b])
        ours = bisect_left(ascending, high) - bisect_right(ascending, low)
        skips, seconds = max(0, gap // step - 1 - ours), times[b] - times[a]
        if seconds > PAUSE_S:
            costs += min(pace.gap_cost(skips, seconds), JUMP_COST)
        else:
            gaps.append(Gap(skips, seconds, ours + 1))
    duration_s = sum(gap.seconds for gap in gaps)
    fitted = _Pace(step, sum(gap.step_count for gap in gaps) / max(duration_s, TIME_MIN_S))
    costs += sum(fitted.gap_cost(gap.step_count, gap.seconds) for gap in gaps)
    costs += fitted.displaced_cost() * (len(ports) - len(path))
    evidence = (
        -costs
        - 0.5 * math.log(len(ports))  # the rate was fitted
        - math.log(2)  # the sign
        - math.log(step * (step + 1))  # a prior that sums to one over all steps
    )
    return Chain(
        sign * step,
        evidence,
        tuple(gaps),
        tuple(jumps),
        tuple(ports[index] for index in path),
    )
