"""Which blocks should I serve? Those that the swarm lacks most.

A swarm answers as fast as its weakest block. A peer with room for some blocks takes the window in
which the slowest are slowest: of all windows that fit, the one whose block rates, in ascending
order, come first. Blocks that nobody serves have rate 0, so gaps come before everything else.

Later it moves if that makes the weakest block faster by a third, or makes fewer gaps; what it would
leave behind counts, so it never opens a gap as large as the one it fills.

Source: Petals (arXiv 2209.01188, section 3.2) for the rule and its 0.75.
Pure: rates and bytes. Knows neither peers nor how a rate is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["best_window", "better_window", "block_rates", "windows"]

# Moving costs: blocks are read, sessions go elsewhere.
MOVE_RATIO = 0.75


def block_rates(served: Iterable[tuple[range, float]], layer_count: int) -> list[float]:
    """Return how many positions a second each block can take.

    Args:
        served: For each peer its blocks, and the seconds of one position in one block.
        layer_count: Blocks of the model.
    """
    rates = [0.0] * layer_count
    for blocks, block_s in served:
        for block in blocks:
            # Of a range, all share the peer's time.
            rates[block] += 1 / (max(block_s, 1e-6) * len(blocks))
    return rates


def windows(block_bytes: Sequence[int], memory_bytes: int) -> list[range]:
    """Return the largest ranges of blocks that fit into memory, one for each first block.

    Args:
        block_bytes: Size of each block; the first and the last are larger by the embeddings.
        memory_bytes: What there is for weights.
    """
    found: list[range] = []
    for first in range(len(block_bytes)):
        end, taken = first, 0
        while end < len(block_bytes) and taken + block_bytes[end] <= memory_bytes:
            taken += block_bytes[end]
            end += 1
        if end > first and (not found or end > found[-1].stop):
            found.append(range(first, end))
    return found


def best_window(candidates: Sequence[range], rates: Sequence[float], tie: int = 0) -> range:
    """Return the window whose blocks are served worst.

    Args:
        candidates: Windows that fit, at least one.
        rates: Of all blocks, without us.
        tie: Any number; decides among equals, so that peers that come together spread.
    """

    def need(window: range) -> list[float]:
        # Where one window is the beginning of another's, the longer one comes first.
        return [*sorted(rates[block] for block in window), math.inf]

    least = min(need(window) for window in candidates)
    equals = [window for window in candidates if need(window) == least]
    return equals[tie % len(equals)]


def better_window(
    mine: range, block_s: float, candidates: Sequence[range], rates: Sequence[float], tie: int = 0
) -> range | None:
    """Return the window to move to, or None to stay.

    Args:
        mine: What we serve now.
        block_s: Our seconds of one position in one block.
        candidates: Windows that fit.
        rates: Of all blocks, without us.
        tie: See `best_window`.
    """

    def with_us(window: range) -> list[float]:
        return [
            rate + ours
            for rate, ours in zip(rates, block_rates([(window, block_s)], len(rates)), strict=True)
        ]

    best = best_window(candidates, rates, tie)
    now, after = with_us(mine), with_us(best)
    if now.count(0) != after.count(0):
        return best if after.count(0) < now.count(0) else None
    return best if min(now) < MOVE_RATIO * min(after) else None
