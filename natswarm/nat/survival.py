"""How long something lives, from looking at many of its kind once each.

Each look at an age is an answer, which proves life, or silence, which is death or loss. The
lifetime is taken to be one figure for all, as a timer of a NAT is, and before the first look any
factor is as likely as any other (a log-uniform prior); what follows is the posterior: below the
oldest that lived it is zero, and each silence before a lifetime costs it the probability of loss.
With looks on a geometric grid and little loss this is the bracket between the last that lived and
the first that was silent, and of its inner 90 % such intervals hold the truth in 90 % of cases.

Pure arithmetic: knows no NATs.
"""

from __future__ import annotations

import math
from itertools import pairwise

from natswarm.nat.findings import Interval

__all__ = ["Survival", "geometric_grid"]

# Nothing shorter is told apart from a mapping that was never made.
SHORTEST_S = 1.0
# What silence everywhere above may stand for at most: a day.
LONGEST_S = 86_400.0


class Survival:
    """What was seen of one lifetime.

    Args:
        tried_s: The longest age at which it will be looked at, seconds.
    """

    def __init__(self, tried_s: float) -> None:
        self.tried_s = tried_s
        self._alive_s = SHORTEST_S
        self._silent_s: list[float] = []
        self._dead_s: list[float] = []

    @property
    def alive_s(self) -> float:
        """The greatest age at which one lived."""
        return self._alive_s

    @property
    def dead_count(self) -> int:
        """How many were found dead that were older than all that lived."""
        return sum(age > self._alive_s for age in self._dead_s)

    def add_alive(self, age_s: float) -> None:
        """Note that one answered at an age."""
        self._alive_s = max(self._alive_s, age_s)

    def add_dead(self, ages_s: list[float]) -> None:
        """Note that one was silent at several ages in a row, and is taken for dead."""
        self._silent_s += ages_s
        self._dead_s.append(ages_s[0])

    def posterior(self, loss: float) -> tuple[float, Interval]:
        """Return the median and the inner 90 %; infinity where it lies beyond what was tried.

        Args:
            loss: Probability that one that lives does not answer a look, 0..1, both not included.
        """
        # Pieces of the log-uniform prior between looks, each as likely as losing what was silent.
        edges = [self._alive_s, *sorted(age for age in self._silent_s if age > self._alive_s)]
        if len(edges) == 1:
            return math.inf, Interval(self._alive_s, math.inf)
        edges.append(max(LONGEST_S, 2 * edges[-1]))
        weights = [
            math.log(after / before) * loss**index
            for index, (before, after) in enumerate(pairwise(edges))
        ]
        low, middle, high = (self._quantile(edges, weights, share) for share in (0.05, 0.5, 0.95))
        return middle, Interval(low, high)

    def _quantile(self, edges: list[float], weights: list[float], share: float) -> float:
        wanted = share * sum(weights)
        for index, weight in enumerate(weights):
            if wanted <= weight:
                if index == len(weights) - 1:
                    break
                before, after = edges[index], edges[index + 1]
                return float(before * (after / before) ** (wanted / weight))
            wanted -= weight
        return math.inf


def geometric_grid(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return `count` figures from `low` to `high`, each greater than the last by one factor."""
    if count == 1:
        return (math.sqrt(low * high),)
    return tuple(low * (high / low) ** (index / (count - 1)) for index in range(count))
