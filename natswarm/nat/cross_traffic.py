"""How fast other subscribers move a NAT's counter on: the rate, and where it lies with 90 %.

Between two mappings of ours, `t` seconds apart, others take k steps; with a rate of r a second k is
Poisson with mean r*t. From Jeffreys' prior (density r^-1/2) the rate has a gamma law, whose central
90 % hold the truth 90 % of the time on average over rates (Brown, Cai & DasGupta 2003); Garwood's
exact interval is too wide. A NAT that keeps the parity of ports may waste a step of its own each
time: then k is what was seen or one less, both are possible, and the law is a mixture. So it is
integrated on a grid, which does for both.

Source: RFC 4787 section 4.2.2 for parity. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from natswarm.nat.interval import Interval

__all__ = ["Gap", "rate_interval"]

Gap = tuple[int, float]
"""Steps between two mappings of ours, and seconds."""

GRID_POINTS = 400


def rate_interval(gaps: Sequence[Gap], *, keeps_parity: bool) -> Interval:
    """Return where the rate of others' steps lies with 90 %, a second.

    Args:
        gaps: At least one that took time.
        keeps_parity: Whether one step of each gap may be the NAT's own.
    """
    most = sum(count for count, _ in gaps)
    least = sum(max(0, count - 1) for count, _ in gaps) if keeps_parity else most
    duration_s = sum(seconds for _, seconds in gaps)
    low = max(0.0, least - 6 * math.sqrt(least + 1)) / duration_s
    high = (most + 6 * math.sqrt(most + 1) + 6) / duration_s
    # Cells in the square root of the rate, where Jeffreys' prior is even.
    edges = (math.sqrt(low), math.sqrt(high))
    width = (edges[1] - edges[0]) / GRID_POINTS
    rates = [(edges[0] + (index + 0.5) * width) ** 2 for index in range(GRID_POINTS)]
    if keeps_parity:
        logs = [_log_likelihood_of_either(gaps, rate) for rate in rates]
    else:
        logs = [most * math.log(rate) - rate * duration_s for rate in rates]
    best = max(logs)
    weights = [math.exp(each - best) for each in logs]
    total = sum(weights)
    # No step of others at all may have been seen: then the rate may be 0 as well.
    below, above = (0.0, 0.90) if least == 0 else (0.05, 0.95)
    bounds: list[float] = []
    passed = 0.0
    for rate, weight in zip(rates, weights, strict=True):
        if len(bounds) == 0 and passed + weight > below * total:
            bounds.append(0.0 if least == 0 else rate)
        passed += weight
        if passed >= above * total:
            bounds.append(rate)
            break
    return Interval(bounds[0], bounds[1])


def _log_likelihood_of_either(gaps: Sequence[Gap], rate: float) -> float:
    """Return it for gaps of `count` steps of others, or one less, as likely beforehand."""
    total = 0.0
    for count, seconds in gaps:
        mean = max(rate * seconds, 1e-12)
        # Poisson at `count` and at one less, over their common factor.
        both = 1.0 if count == 0 else mean / count + 1.0
        total += math.log(both) + max(0, count - 1) * math.log(mean) - mean
    return total
