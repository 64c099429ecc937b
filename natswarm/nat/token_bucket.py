"""Read a token bucket from the times at which it gave something.

A rate of new mappings is one: so many at once, and so many a second when it is empty. It is empty
while many more ask than are given something; the times of what is given then count its rate, and
the rush before bounds its size.

Pure arithmetic: knows no NATs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["since_empty", "smallest_burst"]

# (grants in a row, tries for each): an empty bucket, of a slow rate and of a fast one. Loss makes
# it a quarter more than one try for each at worst.
EMPTY_RUNS = ((3, 6.0), (15, 2.2))
# Those that emptied it and whose answers were lost come with the next tries.
SETTLES_AFTER_S = 0.6


def since_empty(grants: Sequence[float], tries: Sequence[float]) -> list[float]:
    """Return the grants since soon after the bucket was first found empty, oldest first.

    Args:
        grants: When something was granted, seconds, in any order.
        tries: When anybody asked, ascending.
    """
    in_order = sorted(grants)
    for end, until in enumerate(in_order):
        for run, tries_per_grant in EMPTY_RUNS:
            if end < run:
                continue
            tried = bisect_right(tries, until) - bisect_right(tries, in_order[end - run])
            if tried >= run * tries_per_grant:
                return [each for each in in_order if each >= until + SETTLES_AFTER_S]
    return []


def smallest_burst(grants: Sequence[float], rate_per_s: float) -> int:
    """Return the size of the smallest bucket that could have granted all this, at least 1.

    For every span of time it must have held what was granted beyond what came in meanwhile.
    """
    needed = lowest = 0.0
    for index, time in enumerate(sorted(grants)):
        level = index - rate_per_s * time
        lowest = level if index == 0 else min(lowest, level)
        needed = max(needed, level + 1 - lowest)
    return max(round(needed), 1)
