"""Fit the law by which a NAT draws external ports to the ports that were seen.

A puncture against an unpredictable NAT costs about as many probes as there are ports it may have
drawn, so knowing that a carrier hands out blocks of 256 instead of 64,512 ports turns minutes into
a fraction of a second. A few echoes show it: each law is scored by how likely it makes the ports
that were seen (Bayesian evidence, parameters integrated or paid for), and the likeliest law wins
only if all others together have less than 2 % of the evidence; its share is `law_probability`.

What no number of echoes of the quick part can tell, nobody can: four ports that fall into one half
of a 2048-block look like a 1024-block once in eight times, so a block of few ports is the smallest
whose doubles are ruled out with 99 %; where a block ends in which a NAT counts shows only when the
count comes there; blocks of 1000 and of 1008 differ by ports that 24 draws do not hit (they are
told apart by hundreds, as the test of the quota draws them); and a counter shared with so many
subscribers that it goes round between two echoes *is* uniform to us.

Source: RFC 6888 REQ-14 and RFC 7753 for blocks, RFC 7422 for sizes that are no powers of two; RFC
6056 for the laws of ephemeral ports. Knows nothing of sockets, clocks or peers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from natswarm.nat.allocation import (
    BLOCKS_MAX,
    SAFE_RANGE,
    PortAllocation,
    PortSample,
)
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.counter import PAUSE_S, Chain, follow
from natswarm.nat.cross_traffic import rate_interval
from natswarm.nat.interval import Interval
from natswarm.nat.shape import Shape, fit_shape, port_weights

__all__ = ["allocation_intervals", "fit_allocation"]

# A law is believed when everything else together has less than this share of the evidence.
DOUBT_MAX = 0.02
# A range or block is widened until the truth lies outside with at most 1 %.
COVERAGE_DOUBT_MAX = 0.01
# Fewer ports than this say nothing of a range, whose estimate would be wider than all ports, nor
# of a block: any few may lie in one half.
RANGE_SAMPLES_MIN = 6

# Ranges narrower than two of the largest blocks have not been seen; what looks like one is a block.
RANGE_PORTS_MIN = 8192

# By chance so many ports in a row have the parity of ours once in 4,096 times.
PARITY_SAMPLES_MIN = 12

# From this many ports on their shape is asked for: `shape.py` says why not from fewer.
SHAPE_SAMPLES_MIN = 48


class _Grid(NamedTuple):
    """Blocks of `size` ports that start at `offset`, `offset` + `size`, ..."""

    size: int
    offset: int
    prior: float

    def base_of(self, port: int) -> int:
        return port - (port - self.offset) % self.size


def _grids() -> tuple[_Grid, ...]:
    # Carriers hand out 128 to 2048 ports (Richter et al., IMC 2016); vendors offer powers of two.
    powers = (64, 128, 256, 512, 1024, 2048, 4096)
    # RFC 7422 divides the 64,512 ports from 1024 on among 16, 32, ... 512 subscribers.
    shares = (126, 252, 504, 1008, 2016, 4032)
    # Whoever configures a size by hand.
    rounds = (100, 200, 250, 500, 1000, 2000, 4000)
    grids = [_Grid(size, 0, 0.8 / len(powers)) for size in powers]
    rare = [(size, 1024 % size) for size in (*powers, *shares, *rounds) if 1024 % size]
    rare += [(size, 0) for size in rounds]
    grids += [_Grid(size, offset, 0.2 / len(rare)) for size, offset in rare]
    return tuple(sorted(grids))


GRIDS = _grids()


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
    count = len(mappings)
    seen = {(sample.external_ip, sample.external_port) for sample in mappings}
    is_overloading = True if len(seen) < count else None
    preserved_count = sum(sample.external_port == sample.local_port for sample in mappings)
    # By chance a port is kept once in tens of thousands, so half of them is no chance; the other
    # half met a port that was taken (RFC 4787 section 4.2.1), and fell back to some other law.
    if 2 * preserved_count >= count:
        return PortAllocation(
            AllocationLaw.PRESERVING,
            is_overloading=is_overloading,
            sample_count=count,
            # Against one chance in 65,536 for each.
            law_probability=round(1 - 65_536.0**-preserved_count, 4),
        )

    ports = [sample.external_port for sample in mappings]
    chains = _chains(mappings)
    # Ports that crowd inside a range would else look like some large blocks in the crowd.
    shape = fit_shape(ports) if count >= SHAPE_SAMPLES_MIN else None
    range_evidence = _uniform_log_evidence(ports) + (0.0 if shape is None else shape.advantage)
    fits = [(range_evidence, AllocationLaw.UNIFORM, -1)]
    fits += [
        (_block_log_evidence(mappings, grid), AllocationLaw.BLOCK, index)
        for index, grid in enumerate(GRIDS)
    ]
    if chains:
        evidence = sum(chain.evidence for chain in chains)
        fits.append((evidence, AllocationLaw.SEQUENTIAL, -1))
    best = max(evidence for evidence, _, _ in fits)
    weights = [math.exp(evidence - best) for evidence, _, _ in fits]
    total = sum(weights)
    by_law: dict[AllocationLaw, float] = {}
    for weight, (_, law, _) in zip(weights, fits, strict=True):
        by_law[law] = by_law.get(law, 0.0) + weight / total
    likeliest = max(by_law, key=by_law.__getitem__)
    # Where it stays open between a block and a range, the range holds the block as well; where it
    # stays open whether the NAT counts, only all ports hold everything.
    chosen = PortAllocation(AllocationLaw.UNIFORM)
    if by_law.get(AllocationLaw.SEQUENTIAL, 0.0) <= DOUBT_MAX:
        chosen = _uniform(ports, shape)
    if by_law[likeliest] >= 1 - DOUBT_MAX:
        if likeliest is AllocationLaw.BLOCK and count >= RANGE_SAMPLES_MIN:
            shares = {
                GRIDS[index]: weight / total / by_law[likeliest]
                for weight, (_, _, index) in zip(weights, fits, strict=True)
                if index >= 0
            }
            chosen = _block(ports, _choose_grid(shares))
        elif likeliest is AllocationLaw.SEQUENTIAL:
            chosen = _counter(chains, keeps_parity=bool(_preserves_parity(mappings)))
    probability = round(by_law.get(chosen.law, 0.0), 4)
    return replace(
        chosen,
        is_overloading=is_overloading,
        sample_count=count,
        preserves_parity=_preserves_parity(mappings),
        law_probability=probability,
    )


def allocation_intervals(
    samples: Sequence[PortSample], allocation: PortAllocation
) -> dict[str, Interval]:
    """Return where the estimated figures of a fitted law lie with 90 %.

    For a range (H - highest) / (highest - lowest) has a known law, P(more than t) = (1 + t)^-(n-1),
    whatever the range is: each end alone is exact. A rate of others' steps: `cross_traffic.py`.
    Everything else (step, size, base) is either right or not, with `law_probability`.
    """
    mappings = _distinct_mappings(samples)
    if allocation.law is AllocationLaw.SEQUENTIAL:
        gaps = [gap for chain in _chains(mappings) for gap in chain.gaps]
        if sum(gap.seconds for gap in gaps) <= 0:
            return {}
        keeps_parity = bool(allocation.preserves_parity)
        return {"allocation.others_per_s": rate_interval(gaps, keeps_parity=keeps_parity)}
    is_range = allocation.law is AllocationLaw.UNIFORM and allocation.shape is None
    if not is_range or len(mappings) < RANGE_SAMPLES_MIN:
        return {}
    ports = [mapping.external_port for mapping in mappings]
    low, high = min(ports), max(ports)
    margin = (high - low) * (0.1 ** (-1 / (len(ports) - 1)) - 1)
    return {
        "allocation.low": Interval(max(1, math.floor(low - margin)), low),
        "allocation.high": Interval(high, min(65_535, math.ceil(high + margin))),
    }


def _distinct_mappings(samples: Sequence[PortSample]) -> list[PortSample]:
    """Return one sample for each mapping, oldest first.

    Echoes of one local port that show one external port are one mapping, whoever saw it: that is
    what endpoint-independent mapping means, and for the other kinds it is rare chance.
    """
    found: dict[tuple[int, str, int], PortSample] = {}
    for sample in sorted(samples, key=lambda each: each.sent_at):
        key = (sample.local_port, sample.external_ip, sample.external_port)
        found.setdefault(key, sample)
    return list(found.values())


def _preserves_parity(mappings: Sequence[PortSample]) -> bool | None:
    if any((each.local_port - each.external_port) % 2 for each in mappings):
        return False
    return True if len(mappings) >= PARITY_SAMPLES_MIN else None


# Ranges ------------------------------------------------------------------------------------------


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


def _uniform(ports: Sequence[int], shape: Shape | None) -> PortAllocation:
    """Range of a uniform law, wide enough to hold the true one with 99 %; or of one with a shape.

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
    fitted = PortAllocation(
        AllocationLaw.UNIFORM,
        low=max(low - margin, floor),
        high=min(high + margin, 65_535),
        seen_low=low,
        seen_high=high,
    )
    if shape is not None:
        parameters = (shape.alpha, shape.beta)
        return replace(fitted, low=shape.low, high=shape.high, shape=parameters)
    return replace(fitted, weights=port_weights(ports, fitted.low, fitted.high))


# Blocks ------------------------------------------------------------------------------------------


def _block_log_evidence(mappings: Sequence[PortSample], grid: _Grid) -> float:
    """Blocks drawn at random among all of the grid, ports at random inside them."""
    blocks = {(each.external_ip, grid.base_of(each.external_port)) for each in mappings}
    # Each address has blocks of its own, and which one a mapping has is no matter of ports.
    block_counts = Counter(ip for ip, _ in blocks)
    return (
        math.log(grid.prior)
        - len(blocks) * math.log(65_536 // grid.size)
        # Each further block is half as likely as the one before.
        - len(blocks) * math.log(2)
        - sum(math.log(block_counts[each.external_ip] * grid.size) for each in mappings)
    )


def _choose_grid(shares: dict[_Grid, float]) -> _Grid:
    """Return the likeliest grid, unless much larger blocks are still likely.

    Of sizes that are about the same, the likeliest. But a block too large costs some probes, and
    one too small can cost the puncture: so no block half as large as one that is not ruled out.
    """
    for grid in sorted(shares):
        larger = sum(share for each, share in shares.items() if each.size >= 1.5 * grid.size)
        if larger <= COVERAGE_DOUBT_MAX:
            near = {each: share for each, share in shares.items() if each.size >= grid.size}
            return max(near, key=near.__getitem__)
    return max(shares)


def _block(ports: Sequence[int], grid: _Grid) -> PortAllocation:
    newest_first = dict.fromkeys(max(0, grid.base_of(port)) for port in reversed(ports))
    blocks = list(newest_first)[:BLOCKS_MAX]
    return PortAllocation(
        AllocationLaw.BLOCK,
        low=max(min(blocks), 1),
        high=min(max(blocks) + grid.size, 65_536) - 1,
        block_size=grid.size,
        blocks=tuple(blocks),
    )


# Counters ----------------------------------------------------------------------------------------


def _chains(mappings: Sequence[PortSample]) -> list[Chain]:
    """Return a chain for each public address, which has a counter of its own; all or none."""
    by_ip: dict[str, list[PortSample]] = {}
    for mapping in mappings:
        by_ip.setdefault(mapping.external_ip, []).append(mapping)
    # What may have been in between makes a pause, which says nothing of others.
    pauses = accumulate(0.0 if each.is_contiguous else 2 * PAUSE_S for each in mappings)
    times = {
        mapping: mapping.sent_at + pause for mapping, pause in zip(mappings, pauses, strict=True)
    }
    chains = []
    for group in by_ip.values():
        chain = follow([each.external_port for each in group], [times[each] for each in group])
        if chain is None:
            return []
        chains.append(chain)
    return chains


def _counter(chains: Sequence[Chain], *, keeps_parity: bool) -> PortAllocation:
    # The usual address comes first; its counter is the one to predict.
    chain = max(chains, key=lambda each: len(each.ports))
    gaps = [gap for each in chains for gap in each.gaps]
    duration_s = sum(gap.seconds for gap in gaps)
    others_per_s = sum(gap.step_count for gap in gaps) / max(duration_s, 1e-3)
    if keeps_parity and duration_s > 0:
        # Every second mapping of ours wasted a step, which others did not take.
        interval = rate_interval(gaps, keeps_parity=True)
        others_per_s = sum(interval) / 2 if interval.low > 0 else 0.0
    counter = PortAllocation(
        AllocationLaw.SEQUENTIAL,
        step=chain.step,
        # Far beyond a million a second nothing was seen.
        others_per_s=min(round(others_per_s, 3), 1e6),
        last_port=chain.ports[-1],
    )
    grid = _counted_grid(chain)
    if grid is None:
        return counter
    block = _block(chain.ports, grid)
    newest = block.blocks[0]
    return replace(
        counter,
        low=max(newest, 1),
        high=newest + grid.size - 1,
        block_size=grid.size,
        blocks=block.blocks,
    )


# Ports at the edge of a block that nobody saw: echoes get lost.
EDGE_PORTS = 4


def _counted_grid(chain: Chain) -> _Grid | None:
    """Return the blocks that the counter goes round in, where it was seen to leave one.

    It leaves a block at its end and goes on at the start of one; where it passes from one cell of
    the grid to the next without a jump, the cells are none.
    """
    if not chain.jumps or abs(chain.step) != 1:
        return None
    jumped_to = {after for _, after in chain.jumps}
    fitting = []
    for grid in GRIDS:
        leaves_at_edges = all(
            _is_near_end(grid, before, chain.step) and _is_near_end(grid, after, -chain.step)
            for before, after in chain.jumps
        )
        crosses = any(
            grid.base_of(a) != grid.base_of(b)
            for a, b in pairwise(chain.ports)
            if b not in jumped_to
        )
        if leaves_at_edges and not crosses:
            fitting.append(grid)
    return max(fitting, key=lambda grid: grid.prior, default=None)


def _is_near_end(grid: _Grid, port: int, step: int) -> bool:
    offset = port - grid.base_of(port)
    return (grid.size - 1 - offset if step > 0 else offset) < EDGE_PORTS
