"""The law by which a NAT draws external ports, with its parameters; and the next ports it may draw.

A puncture against an unpredictable NAT costs about as many probes as there are ports it may have
drawn, so the ports come likeliest first. `fit.py` finds the law from ports that peers saw.

Source: RFC 4787 section 4.2 for the laws, RFC 6888 REQ-14 and RFC 7753 for blocks. Knows nothing of
sockets, clocks or peers.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.shape import shape_density

__all__ = [
    "SAFE_RANGE",
    "PortAllocation",
    "PortRange",
    "PortSample",
    "predict_ports",
    "shuffled_ports",
]


class PortRange(NamedTuple):
    """External ports from `low` to `high`, both included."""

    low: int
    high: int

    @property
    def port_count(self) -> int:
        """How many ports."""
        return self.high - self.low + 1


# Where any NAT may draw from: everything but the well-known ports (RFC 4787 section 4.2.1 lets a
# NAT keep those apart, and all known ones do).
SAFE_RANGE = PortRange(1024, 65_535)

# Sizes of blocks: below, nobody could browse; above, it is a range.
BLOCK_SIZE_MIN, BLOCK_SIZE_MAX = 16, 8192
# Juniper's default for one host. Older blocks than this have been handed back.
BLOCKS_MAX = 8

# Slices of a range with a shape: the mean of one differs from its edges by a few per cent.
SHAPE_SLICES = 64

# How far past its last port a counter is looked for first: our own mappings in between, and what
# others open until a puncture is over. Echoes end 2 s before there is a profile, a puncture takes
# 1 to 5 s.
SEQUENTIAL_OWN_PORTS = 64
SEQUENTIAL_HORIZON_S = 8.0


@dataclass(frozen=True, slots=True)
class PortSample:
    """One external port that a peer saw.

    Attributes:
        local_port: Our UDP port.
        destination: Whom we sent to.
        external_port: What they saw.
        sent_at: When the datagram left, seconds.
        external_ip: At which of our public addresses; empty where there is only one.
        is_contiguous: Whether all mappings that we made since the sample before are samples, too.
    """

    local_port: int
    destination: Endpoint
    external_port: int
    sent_at: float
    external_ip: str = ""
    is_contiguous: bool = True


@dataclass(frozen=True, slots=True)
class PortAllocation:
    """A fitted law.

    Attributes:
        law: Which.
        low: Lowest port a new mapping may get, 1..65535; holds with about 99 %.
        high: Highest one.
        seen_low: UNIFORM: the lowest port seen; ports between this and `seen_high` are likelier
            than those outside.
        seen_high: UNIFORM: the highest port seen.
        block_size: BLOCK: ports in a block. SEQUENTIAL: the same where the counter was seen to
            go round in blocks.
        blocks: With `block_size`: the lowest port of every block seen, the newest first.
        step: SEQUENTIAL: from one new mapping to the next, not 0; may be negative.
        others_per_s: SEQUENTIAL: steps that other subscribers take in a second.
        last_port: SEQUENTIAL: the newest port seen.
        is_overloading: True where one external port was seen to serve two mappings at once, so a
            block is never used up; False where many pairs would have been likely and none was
            seen; None where that proves nothing.
        sample_count: How many ports the fit rests on.
        shape: UNIFORM: (alpha, beta) of a Beta law over `low`..`high` where ports are drawn
            unevenly; None: evenly, or not enough ports to tell.
        weights: UNIFORM: how likely a port of each of as many equal slices of `low`..`high` seems,
            1 to 100, by few ports and without a `shape`; empty: not said.
        preserves_parity: Whether even ports of ours get even external ones and odd ones odd (RFC
            4787 section 4.2.2); None: too few ports to tell, or the port is kept anyway.
        law_probability: How sure the law is, 0..1, given that it is one of these; None: not said.
    """

    law: AllocationLaw
    low: int = SAFE_RANGE.low
    high: int = SAFE_RANGE.high
    seen_low: int | None = None
    seen_high: int | None = None
    block_size: int | None = None
    blocks: tuple[int, ...] = ()
    step: int | None = None
    others_per_s: float | None = None
    last_port: int | None = None
    is_overloading: bool | None = None
    sample_count: int = 0
    shape: tuple[float, float] | None = None
    preserves_parity: bool | None = None
    law_probability: float | None = None
    weights: tuple[int, ...] = ()

    @property
    def ranges(self) -> tuple[PortRange, ...]:
        """The ranges the next port falls into, disjoint, likeliest first.

        For SEQUENTIAL the window that the counter may have moved on to since.
        """
        if self.law is AllocationLaw.BLOCK and self.block_size is not None and self.blocks:
            return tuple(
                PortRange(max(base, 1), min(base + self.block_size, 65_536) - 1)
                for base in self.blocks
            )
        if self.law is AllocationLaw.SEQUENTIAL and self.last_port is not None and self.step:
            return self._ports_ahead(self.last_port, self.step)
        if self.seen_low is None or self.seen_high is None or self.shape is not None:
            return (PortRange(self.low, self.high),)
        parts = (
            PortRange(self.seen_low, self.seen_high),
            PortRange(self.low, self.seen_low - 1),
            PortRange(self.seen_high + 1, self.high),
        )
        return tuple(part for part in parts if part.port_count > 0)

    @property
    def slices(self) -> tuple[tuple[PortRange, float], ...]:
        """UNIFORM: parts of the range with their probabilities, the densest first.

        Ports of one part are as good as equally likely. Empty where all are, as far as is known.
        """
        if self.shape is not None:
            count = SHAPE_SLICES
            shares = [(index + 0.5) / count for index in range(count)]
            weights = [shape_density(*self.shape, share) for share in shares]
        else:
            count = len(self.weights)
            weights = [float(weight) for weight in self.weights]
        width = self.high - self.low + 1
        edges = [self.low + width * index // count for index in range(count + 1)] if count else []
        parts = [PortRange(start, end - 1) for start, end in pairwise(edges)]
        masses = [weight * part.port_count for weight, part in zip(weights, parts, strict=True)]
        total = math.fsum(masses)
        order = sorted(range(count), key=lambda index: weights[index], reverse=True)
        return tuple(
            (parts[index], masses[index] / total) for index in order if parts[index].port_count
        )

    @property
    def window_steps(self) -> int:
        """SEQUENTIAL: how many steps ahead the next port may be."""
        return SEQUENTIAL_OWN_PORTS + math.ceil((self.others_per_s or 0.0) * SEQUENTIAL_HORIZON_S)

    def _ports_ahead(self, last_port: int, step: int) -> tuple[PortRange, ...]:
        circle = self.high - self.low + 1
        # A window wider than the circle is the circle.
        reach = min(abs(step) * self.window_steps, circle) - 1
        sign = 1 if step > 0 else -1
        near = (last_port + sign - self.low) % circle
        far = near + sign * reach
        if 0 <= far < circle:
            return (PortRange(self.low + min(near, far), self.low + max(near, far)),)
        wrapped = PortRange(self.low, self.low + far - circle)
        ahead = PortRange(self.low + near, self.high)
        if sign < 0:
            wrapped = PortRange(self.high + 1 + far, self.high)
            ahead = PortRange(self.low, self.low + near)
        return (ahead, wrapped)

    @property
    def port_count(self) -> int:
        """How many ports the next one is drawn from."""
        return sum(part.port_count for part in self.ranges)

    def __str__(self) -> str:
        """As on a screen: `block 256 at 41216..41471`."""
        match self.law:
            case AllocationLaw.BLOCK:
                where = ", ".join(f"{part.low}..{part.high}" for part in self.ranges)
                return f"block {self.block_size} at {where}"
            case AllocationLaw.SEQUENTIAL:
                inside = f" in blocks of {self.block_size}" if self.block_size else ""
                return f"sequential {self.step:+d} from {self.last_port}{inside}"
            case AllocationLaw.PRESERVING:
                return "preserving"
            case AllocationLaw.UNIFORM:
                if self.shape is not None:
                    return f"Beta{self.shape} over {self.low}..{self.high}"
                return f"uniform {self.low}..{self.high}"


def predict_ports(
    allocation: PortAllocation,
    *,
    rng: random.Random,
    local_port: int | None = None,
    run_length: int = 1,
) -> Iterator[int]:
    """Yield each port that a new mapping may get exactly once, likeliest first.

    Ends with the ports of the allocation's ranges, for a counter with the whole circle; whoever
    wants more starts over.

    Args:
        allocation: The fitted law.
        rng: Orders ports that are equally likely, so that nobody else can tell the order.
        local_port: Of the mapping, for a NAT that preserves it; None where unknown.
        run_length: How many mappings are opened in a row. Against a counter every
            `run_length`-th port is tried first: wherever the run begins, one try lies in it.
    """
    if allocation.law is AllocationLaw.PRESERVING:
        if local_port is not None:
            yield local_port
        for port in shuffled_ports(allocation.ranges, rng):
            if port != local_port:
                yield port
    elif allocation.law is AllocationLaw.SEQUENTIAL and allocation.step:
        yield from _next_ports(allocation, run_length)
    elif slices := allocation.slices:
        for part, _ in slices:
            yield from shuffled_ports([part], rng)
    else:
        # Newer blocks first: mappings that are asked for now come from the newest. Of a range what
        # was seen first, then both margins at once.
        first, *others = allocation.ranges
        groups = (
            [(first,), others]
            if allocation.seen_low is not None
            else [(part,) for part in allocation.ranges]
        )
        for group in groups:
            yield from shuffled_ports(group, rng)


def shuffled_ports(ranges: Sequence[PortRange], rng: random.Random) -> Iterator[int]:
    """Yield every port of `ranges` once, in random order.

    A Fisher-Yates shuffle that keeps only the swapped entries: shuffling 64,512 ports up front
    would hold up the event loop for 40 ms, and most punctures end after some hundred.
    """
    starts = []
    total = 0
    for part in ranges:
        starts.append(total)
        total += part.port_count
    swapped: dict[int, int] = {}
    for index in range(total):
        other = rng.randrange(index, total)
        position = swapped.pop(other, other)
        if other != index:
            swapped[other] = swapped.pop(index, index)
        part_index = bisect_right(starts, position) - 1
        yield ranges[part_index].low + position - starts[part_index]


def _next_ports(allocation: PortAllocation, run_length: int) -> Iterator[int]:
    """Yield all ports ahead of a counter, window by window, each stride by stride."""
    step, last_port = allocation.step or 1, allocation.last_port or allocation.low
    circle = allocation.high - allocation.low + 1
    yielded: set[int] = set()  # asked, never iterated
    window = allocation.window_steps
    round_count = circle // math.gcd(step, circle)  # steps until the counter comes round
    for start in range(1, round_count + 1, window):
        stop = min(start + window, round_count + 1)
        # Offset run_length - 1 first: a run that starts at the very next port ends there.
        for offset in reversed(range(min(run_length, stop - start))):
            for index in range(start + offset, stop, run_length):
                port = allocation.low + (last_port + step * index - allocation.low) % circle
                yielded.add(port)
                yield port
    # A step of 2 leaves every second port. They come last: others may move it by odd amounts.
    for port in range(allocation.low, allocation.high + 1):
        if port not in yielded:
            yield port
