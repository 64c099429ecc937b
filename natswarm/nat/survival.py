"""How long something lives, from looking at many of its kind once each.

Each look at an age is an answer, which means life, or silence, which means death or loss. The
lifetime is taken to be one figure for all, as a timer of a NAT is, and before the first look any
factor is as likely as any other (a log-uniform prior). In the posterior each silence before a
lifetime costs it the probability of loss, and each answer after it that of a mistake: a port whose
number had another mapping just before may live longer than it should. With looks on a geometric
grid and little loss this is the bracket between the last that lived and the first that was silent,
and of its inner 90 % such intervals hold the truth in 90 % of cases.

Pure arithmetic: knows no NATs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise

from natswarm.nat.interval import Interval

__all__ = ["Survival", "geometric_grid"]

# Nothing shorter is told apart from a mapping that was never made.
SHORTEST_S = 1.0
# What silence everywhere above may stand for at most: a day.
LONGEST_S = 86_400.0
# 300 ports of one test and 100 of the next share a number out of 28,000 about once.
MISTAKE = 0.003


class Survival:
    """What was seen of one lifetime.

    Args:
        tried_s: The longest age at which it will be looked at, seconds.
    """

    def __init__(self, tried_s: float) -> None:
        self.tried_s = tried_s
        self._alive_s: list[float] = []
        self._silent_s: list[float] = []
        self._dead_s: list[float] = []

    @property
    def alive_s(self) -> float:
        """The greatest age at which one lived; 0 if none did."""
        return max(self._alive_s, default=0.0)

    @property
    def dead_count(self) -> int:
        """How many were found dead that were older than all that lived."""
        return sum(age > self.alive_s for age in self._dead_s)

    def add_alive(self, age_s: float) -> None:
        """Note that one answered at an age."""
        self._alive_s.append(age_s)

    def add_dead(self, ages_s: list[float]) -> None:
        """Note that one was silent at several ages in a row, and is taken for dead."""
        self._silent_s += ages_s
        self._dead_s.append(ages_s[0])

    def posterior(self, loss: float) -> tuple[float, Interval]:
        """Return the median and the inner 90 %; infinity where it lies beyond what was tried.

        Args:
            loss: Probability that one that lives does not answer a look, 0..1, both not included.
        """
        alive, silent = sorted(self._alive_s), sorted(self._silent_s)
        edges = sorted({SHORTEST_S, *alive, *silent})
        edges.append(max(LONGEST_S, 2 * edges[-1]))
        weights = []
        for before, after in pairwise(edges):
            mistakes = len(alive) - bisect_left(alive, after)
            losses = bisect_right(silent, before)
            exponent = mistakes * math.log(MISTAKE) + losses * math.log(loss)
            weights.append(math.log(math.log(after / before)) + exponent)
        best = max(weights)
        shares = [math.exp(weight - best) for weight in weights]
        low, middle, high = (_quantile(edges, shares, share) for share in (0.05, 0.5, 0.95))
        if low == math.inf:
            low = edges[-2]
        return middle, Interval(low, high)


def _quantile(edges: list[float], weights: list[float], share: float) -> float:
    """Return the quantile of a piecewise log-uniform law; infinity in its last piece."""
    wanted = share * sum(weights)
    for (before, after), weight in zip(pairwise(edges[:-1]), weights, strict=False):
        if wanted <= weight:
            return float(before * (after / before) ** (wanted / weight))
        wanted -= weight
    return math.inf


def geometric_grid(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return `count` figures from `low` to `high`, each greater than the last by one factor."""
    if count == 1:
        return (math.sqrt(low * high),)
    return tuple(low * (high / low) ** (index / (count - 1)) for index in range(count))
