"""The law by which a NAT draws external ports: fit it to observed ports, predict the next ones.

A puncture against an unpredictable NAT costs about as many probes as there are ports it may have
drawn, so knowing that a carrier hands out blocks of 256 instead of 64,512 ports turns minutes into
a fraction of a second. A few echoes show it: each law is scored by how likely it makes the ports
that were seen (Bayesian evidence, parameters integrated or paid for), and the likeliest law wins
only if all others together have less than 2 % of the evidence.

Errors: of 400 draws from each of 17 laws, 16 echoes showed the right one every time (at least 99 %
with 95 % confidence) and held the next port in 99 % and more (test_allocation.py prints them). What
16 ports cannot tell, nobody can: four ports that fall into one half of a 2048-block look like a
1024-block once in eight times, so `block_size` is the smallest that covers the truth with 99 %; and
a counter shared with so many subscribers that it goes round between two echoes *is* uniform to us.

Source: RFC 6888 REQ-14 and RFC 7753 for blocks; RFC 6056 for the laws of ephemeral ports; Klinec &
Matyas 2014 for sequential NATs under cross traffic. Knows nothing of sockets, clocks or peers.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.behaviour import AllocationLaw

__all__ = [
    "SAFE_RANGE",
    "PortAllocation",
    "PortRange",
    "PortSample",
    "fit_allocation",
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

# Carriers hand out 128 to 2048 ports (Richter et al., IMC 2016); vendors offer powers of two.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
# Juniper's default for one host. Older blocks than this have been handed back.
BLOCKS_MAX = 8

# Ranges narrower than two of the largest blocks have not been seen; what looks like one is a block.
RANGE_PORTS_MIN = 8192

# A law is believed when everything else together has less than this share of the evidence.
DOUBT_MAX = 0.02
# A range or block is widened until the truth lies outside with at most 1 %.
COVERAGE_DOUBT_MAX = 0.01
# Fewer ports than this say nothing of a range: the estimate would be wider than all ports.
RANGE_SAMPLES_MIN = 6

# Counters step by 1 or 2 (keeping the parity of ports, RFC 4787 section 4.2.2); 16 leaves room.
STEP_MAX = 16

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
    """

    local_port: int
    destination: Endpoint
    external_port: int
    sent_at: float
    external_ip: str = ""


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
        block_size: BLOCK: ports in a block, a power of two.
        blocks: BLOCK: the lowest port of every block seen, the newest first.
        step: SEQUENTIAL: from one new mapping to the next, not 0; may be negative.
        others_per_s: SEQUENTIAL: steps that other subscribers take in a second.
        last_port: SEQUENTIAL: the newest port seen.
        is_overloading: True where one external port was seen to serve two mappings at once, so a
            block is never used up; None where that was not seen, which proves nothing.
        sample_count: How many ports the fit rests on.
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
        if self.seen_low is None or self.seen_high is None:
            return (PortRange(self.low, self.high),)
        parts = (
            PortRange(self.seen_low, self.seen_high),
            PortRange(self.low, self.seen_low - 1),
            PortRange(self.seen_high + 1, self.high),
        )
        return tuple(part for part in parts if part.port_count > 0)

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
                return f"sequential {self.step:+d} from {self.last_port}"
            case AllocationLaw.PRESERVING:
                return "preserving"
            case AllocationLaw.UNIFORM:
                return f"uniform {self.low}..{self.high}"


def fit_allocation(samples: Sequence[PortSample]) -> PortAllocation | None:
    """Find the law that the observed ports follow.

    Args:
        samples: In any order. Several echoes of one mapping count once.

    Returns:
        None without samples. UNIFORM over everything where the samples are too few to tell.
    """
    mappings = _distinct_mappings(samples)
    if not mappings:
        return None
    ports = [sample.external_port for sample in mappings]
    count = len(ports)
    is_overloading = True if len(set(ports)) < count else None
    preserved_count = sum(sample.external_port == sample.local_port for sample in mappings)
    # By chance a port is kept once in tens of thousands, so half of them is no chance; the other
    # half met a port that was taken (RFC 4787 section 4.2.1), and fell back to some other law.
    if 2 * preserved_count >= count:
        return PortAllocation(
            AllocationLaw.PRESERVING, is_overloading=is_overloading, sample_count=count
        )

    fits = [
        (_uniform_log_evidence(ports), _uniform(ports)),
        *((_block_log_evidence(ports, size), _block(ports, size)) for size in BLOCK_SIZES),
    ]
    if (sequential := _sequential(mappings)) is not None:
        fits.append(sequential)
    best = max(evidence for evidence, _ in fits)
    weights = [math.exp(evidence - best) for evidence, _ in fits]
    total = sum(weights)
    by_law: dict[AllocationLaw, float] = {}
    for weight, (_, fit) in zip(weights, fits, strict=True):
        by_law[fit.law] = by_law.get(fit.law, 0.0) + weight / total
    law = max(by_law, key=by_law.__getitem__)
    # Where it stays open between a block and a range, the range holds the block as well; where it
    # stays open whether the NAT counts, only all ports hold everything.
    chosen = PortAllocation(AllocationLaw.UNIFORM)
    if by_law.get(AllocationLaw.SEQUENTIAL, 0.0) <= DOUBT_MAX:
        chosen = _uniform(ports)
    if by_law[law] >= 1 - DOUBT_MAX:
        # Of several block sizes the smallest with which all larger ones together are unlikely:
        # a block too large costs some probes, one too small can cost the puncture.
        remaining = by_law[law]
        for weight, (_, fit) in zip(weights, fits, strict=True):
            if fit.law is law:
                chosen = fit
                remaining -= weight / total
                if remaining <= COVERAGE_DOUBT_MAX:
                    break
    return replace(chosen, is_overloading=is_overloading, sample_count=count)


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


def _distinct_mappings(samples: Sequence[PortSample]) -> list[PortSample]:
    """Return one sample for each mapping, oldest first.

    Echoes of one local port that show one external port are one mapping, whoever saw it: that is
    what endpoint-independent mapping means, and for the other kinds it is rare chance.
    """
    found: dict[tuple[int, int], PortSample] = {}
    for sample in sorted(samples, key=lambda each: each.sent_at):
        found.setdefault((sample.local_port, sample.external_port), sample)
    return list(found.values())


def _uniform_log_evidence(ports: Sequence[int]) -> float:
    """Half the prior on the safe range, half on any range at least `RANGE_PORTS_MIN` wide.

    The second half is the integral of width^-n over all ranges that hold the ports, divided by the
    number of ranges: there are (width - span) ranges of each width. Ranges that stick out of
    1..65535 are counted too; that is a few per cent of a factor, where only powers of ten matter.
    """
    count = len(ports)
    low, high = min(ports), max(ports)
    everything = SAFE_RANGE.port_count if low >= SAFE_RANGE.low else 65_535
    evidence = math.log(0.5) - count * math.log(everything)
    if count >= 3:
        span = high - low
        width = max(span, RANGE_PORTS_MIN)
        # In units of the width, so that nothing underflows.
        integral = 1 / (count - 2) - span / width / (count - 1)
        some_range = (
            math.log(0.5)
            + math.log(2 / 65_535**2)
            + math.log(integral)
            - (count - 2) * math.log(width)
        )
        evidence = max(evidence, some_range) + math.log1p(math.exp(-abs(evidence - some_range)))
    return evidence


def _uniform(ports: Sequence[int]) -> PortAllocation:
    """Range of a uniform law, wide enough to hold the true one with 99 %.

    The unbiased estimate (the span stretched by 1/(n-1) at both ends) is too narrow half of the
    time. A span s of n draws from a range r obeys P(s <= f*r) = n*f^(n-1) - (n-1)*f^n; what is
    missing at one end alone is below the n-th root law, so each end gets half of the doubt.
    """
    count = len(ports)
    if count < RANGE_SAMPLES_MIN:
        return PortAllocation(AllocationLaw.UNIFORM)
    low, high = min(ports), max(ports)
    stretch = (COVERAGE_DOUBT_MAX / 2) ** (-1 / (count - 1)) - 1
    margin = math.ceil((high - low) * stretch)
    floor = SAFE_RANGE.low if low >= SAFE_RANGE.low else 1
    return PortAllocation(
        AllocationLaw.UNIFORM,
        low=max(low - margin, floor),
        high=min(high + margin, 65_535),
        seen_low=low,
        seen_high=high,
    )


def _block_log_evidence(ports: Sequence[int], size: int) -> float:
    """Blocks of `size` drawn at random among all aligned ones, ports at random inside them."""
    block_count = len({port // size for port in ports})
    return (
        -math.log(len(BLOCK_SIZES))
        - block_count * math.log(65_536 // size)
        # Each further block is half as likely as the one before.
        - block_count * math.log(2)
        - len(ports) * math.log(block_count * size)
    )


def _block(ports: Sequence[int], size: int) -> PortAllocation:
    newest_first = dict.fromkeys(port // size * size for port in reversed(ports))
    blocks = list(newest_first)[:BLOCKS_MAX]
    return PortAllocation(
        AllocationLaw.BLOCK,
        low=max(min(blocks), 1),
        high=max(blocks) + size - 1,
        block_size=size,
        blocks=tuple(blocks),
    )


def _sequential(mappings: Sequence[PortSample]) -> tuple[float, PortAllocation] | None:
    """A counter that moves by a step for each new mapping, ours or others'.

    The ports, sorted, are one walk around the circle of ports, cut at its widest gap. The gaps of
    the walk follow a geometric law (others' mappings in between). Datagrams overtake each other, so
    the order may be off: each port outside the longest ascending run costs the naming of its place.
    """
    ports = [mapping.external_port for mapping in mappings]
    count = len(ports)
    if count < 3:
        return None
    duration_s = max(mappings[-1].sent_at - mappings[0].sent_at, 1e-3)
    best: tuple[float, PortAllocation] | None = None
    for sign in (1, -1):
        walk = sorted(ports, reverse=sign < 0)
        circle = SAFE_RANGE.port_count
        gaps = [(sign * (after - before)) % circle for before, after in pairwise(walk)]
        gaps.append((sign * (walk[0] - walk[-1])) % circle)
        cut = gaps.index(max(gaps)) + 1
        walk = walk[cut:] + walk[:cut]
        inner = gaps[cut:] + gaps[: cut - 1]
        if 0 in inner:
            return None  # a counter does not stand still
        rank = {port: index for index, port in enumerate(walk)}
        displaced = count - _longest_ascent([rank[port] for port in ports])
        # The step divides every gap that lies between neighbours of the walk.
        step = math.gcd(*inner)
        if step > STEP_MAX:
            step = 1  # a coincidence of few gaps
        skip_count = sum(gap // step - 1 for gap in inner)
        skip_mean = skip_count / len(inner)
        gap_log_likelihood = sum(
            _geometric_log_probability(gap // step - 1, skip_mean) for gap in inner
        )
        evidence = (
            -math.log(circle)
            + gap_log_likelihood
            - 0.5 * math.log(count)  # skip_mean was fitted
            - math.log(2)  # the sign
            - math.log(step * (step + 1))  # a prior that sums to one over all steps
            - displaced * 2 * math.log(count)
        )
        if best is None or evidence > best[0]:
            fit = PortAllocation(
                AllocationLaw.SEQUENTIAL,
                step=sign * step,
                # In memory of what was seen; far beyond a million a second nothing was.
                others_per_s=min(round(skip_count / duration_s, 3), 1e6),
                last_port=walk[-1],
            )
            best = (evidence, fit)
    return best


def _geometric_log_probability(value: int, mean: float) -> float:
    if mean == 0:
        return 0.0
    return value * math.log(mean / (1 + mean)) - math.log(1 + mean)


def _longest_ascent(values: Sequence[int]) -> int:
    """Return the length of the longest ascending subsequence, in O(n^2)."""
    lengths: list[int] = []
    for index, value in enumerate(values):
        before = [lengths[i] for i in range(index) if values[i] < value]
        lengths.append(1 + max(before, default=0))
    return max(lengths)
