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
    ascents = [sign * (b - a) for a, b in pairwise(ports)]
    ascents = sorted(gap for gap in ascents if gap > 0)
    if not ascents:
        return None
    step, mean = 1, max(0.5, ascents[len(ascents) // 2] - 1.0)
    best: Chain | None = None
    for _ in range(4):
        path = _best_path(ports, sign, step, mean)
        chain = _chain(ports, times, path, sign, step, mean)
        if len(ports) - len(path) + len(chain.jumps) > len(ports) // PORTS_PER_BREAK:
            break
        if best is not None and chain.evidence <= best.evidence + 1e-9:
            break
        best = chain
        gaps = _gaps(ports, path, sign)
        if gaps:
            found = math.gcd(*(gap for gap, _ in gaps))
            step = found if found <= STEP_MAX else 1  # else a coincidence of few gaps
            skips = [max(0, gap // step - 1 - between) for gap, between in gaps]
            mean = sum(skips) / len(skips)
    return best


def _gap_cost(skips: int, mean: float) -> float:
    if mean == 0:
        return 0.0 if skips == 0 else math.inf
    return math.log(1 + mean) + skips * math.log((1 + mean) / mean)


def _displaced_cost(mean: float) -> float:
    return DISPLACED_COST + math.log(1 + mean)


def _best_path(ports: Sequence[int], sign: int, step: int, mean: float) -> list[int]:
    """Return the indices on the cheapest chain; between two of them all others are displaced."""
    # With a mean of 0 a single skip would break the chain; a hair more lets it bend.
    mean = max(mean, 0.02)
    count = len(ports)
    displaced_cost = _displaced_cost(mean)
    costs = [START_COST + displaced_cost * index for index in range(count)]
    before: list[int | None] = [None] * count
    for index in range(1, count):
        for previous in range(max(0, index - 1 - DISPLACED_MAX), index):
            displaced = index - previous - 1
            gap = sign * (ports[index] - ports[previous])
            cost = costs[previous] + displaced_cost * displaced
            if gap > 0 and gap % step == 0:
                skips = max(0, gap // step - 1 - displaced)
                cost += min(_gap_cost(skips, mean), JUMP_COST)
            else:
                cost += JUMP_COST
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


def _is_jump(gap: int, displaced: int, step: int, mean: float) -> bool:
    return (
        gap <= 0
        or gap % step != 0
        or _gap_cost(max(0, gap // step - 1 - displaced), max(mean, 0.02)) > JUMP_COST
    )


def _gaps(ports: Sequence[int], path: Sequence[int], sign: int) -> list[tuple[int, int]]:
    """Return (distance, displaced ports in between) of neighbours on the chain that ascend."""
    gaps = []
    for a, b in pairwise(path):
        gap = sign * (ports[b] - ports[a])
        if gap > 0 and not _is_jump(gap, b - a - 1, 1, _typical_gap(ports, path, sign)):
            gaps.append((gap, b - a - 1))
    return gaps


def _typical_gap(ports: Sequence[int], path: Sequence[int], sign: int) -> float:
    ascents = sorted(gap for a, b in pairwise(path) if (gap := sign * (ports[b] - ports[a])) > 0)
    return float(ascents[len(ascents) // 2]) if ascents else 1.0


def _chain(
    ports: Sequence[int],
    times: Sequence[float],
    path: Sequence[int],
    sign: int,
    step: int,
    mean: float,
) -> Chain:
    gaps: list[Gap] = []
    ascending = sorted(ports)
    jumps = []
    costs = START_COST
    for a, b in pairwise(path):
        gap, displaced = sign * (ports[b] - ports[a]), b - a - 1
        if _is_jump(gap, displaced, step, mean):
            jumps.append((ports[a], ports[b]))
            costs += JUMP_COST
            continue
        # Those of ours that lie in between are no steps of others, whenever they were seen: who
        # asks again after a lost answer sees a port of earlier.
        low, high = min(ports[a], ports[b]), max(ports[a], ports[b])
        ours = bisect_left(ascending, high) - bisect_right(ascending, low)
        gaps.append((max(0, gap // step - 1 - ours), times[b] - times[a]))
    fitted_mean = sum(count for count, _ in gaps) / len(gaps) if gaps else 0.0
    costs += sum(_gap_cost(skips, fitted_mean) for skips, _ in gaps)
    costs += _displaced_cost(fitted_mean) * (len(ports) - len(path))
    evidence = (
        -costs
        - 0.5 * math.log(len(ports))  # the mean was fitted
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
