"""How fast other subscribers move a NAT's counter on: the rate, and where it lies with 90 %.

Between two mappings of ours, `t` seconds apart, others take k steps; with a rate of r a second k is
Poisson with mean r*t. From Jeffreys' prior (density r^-1/2) the rate has a gamma law, whose central
90 % hold the truth 90 % of the time on average over rates (Brown, Cai & DasGupta 2003); Garwood's
exact interval is too wide. A NAT that keeps the parity of ports wastes a step of its own for every
second mapping: then k is less than what was seen by as many as were wasted, and the law is a
mixture. So it is integrated on a grid, which does for both.

Source: RFC 4787 section 4.2.2 for parity. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from natswarm.nat.interval import Interval

__all__ = ["Gap", "rate_interval"]


class Gap(NamedTuple):
    """What lies between two mappings of ours.

    Attributes:
        step_count: Steps that were not ours.
        seconds: How long it took.
        own_count: Mappings of ours that were made until the second, it included.
    """

    step_count: int
    seconds: float
    own_count: int = 1


GRID_POINTS = 400


def rate_interval(gaps: Sequence[Gap], *, keeps_parity: bool) -> Interval:
    """Return where the rate of others' steps lies with 90 %, a second.

    Args:
        gaps: At least one that took time.
        keeps_parity: Whether each mapping of ours may have wasted a step.
    """
    most = sum(gap.step_count for gap in gaps)
    least = most
    if keeps_parity:
        least = sum(max(0, gap.step_count - gap.own_count) for gap in gaps)
    duration_s = sum(gap.seconds for gap in gaps)
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
    """Return it where each mapping of ours wasted a step or not, as likely beforehand."""
    total = 0.0
    for count, seconds, own_count in gaps:
        mean = max(rate * seconds, 1e-12)
        wasted_most = min(own_count, count)
        # Poisson at what is left over Poisson at the least, from there on by recurrence.
        mixture = float(math.comb(own_count, wasted_most))
        left = count - wasted_most
        term = 1.0
        for wasted in range(wasted_most - 1, -1, -1):
            term *= mean / (count - wasted)
            mixture += math.comb(own_count, wasted) * term
        total += math.log(mixture) + left * math.log(mean) - math.lgamma(left + 1) - mean
    return total
