"""Read a token bucket from the times at which it was asked, and gave something.

A rate of new mappings is one: so many at once, and so many a second when it is empty. It is empty
while many more ask than are given something; the times of what is given then count its rate, and
the rush before bounds its size.

Pure arithmetic: knows no NATs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from natswarm.nat.interval import Interval

__all__ = ["BucketRate", "count_rate", "smallest_burst", "while_empty"]

# (grants in a row, tries for each): an empty bucket, of a slow rate and of fast ones. Loss alone
# takes one try for each, and a quarter more at worst; by which the last is stretched.
EMPTY_RUNS = ((3, 6.0), (15, 2.2), (25, 1.5), (40, 1.35))
# At the end fewer ask, and what is left of the last run may be too few: then look at so many alone.
LAST_RUN = 5
# Of those that emptied it and whose answers were lost, some come with later tries. To wait for all
# leaves too little of a fast rate; those that are still to come make the interval wider.
SETTLES_AFTER_S = 0.2
# Grants of an empty bucket come evenly; loss makes a gap twice as long, or three times. After a
# longer one something else has ended them, and what comes then had been granted before.
GAP_RATIO = 10.0
DURATION_MIN_S = 0.4
# By how much the way out varies; a try may also come as late after a token as the one before.
JITTER_S = 0.02
NORMAL_90 = 1.645


class BucketRate(NamedTuple):
    """The rate of a bucket while it was empty.

    Attributes:
        per_s: Grants a second.
        interval: Where that lies with 90 %.
        ended_at: When the last one that was counted was granted.
    """

    per_s: float
    interval: Interval
    ended_at: float


def while_empty(grants: Sequence[float], tries: Sequence[float], loss: float) -> list[float]:
    """Return the grants from soon after the bucket was first found empty to the last time.

    Args:
        grants: When something was granted, seconds, in any order.
        tries: When anybody asked, ascending.
        loss: Share of tries that fail by themselves.

    Returns:
        Their times, ascending.
    """
    in_order = sorted(grants)

    fewest_tries = EMPTY_RUNS[-1][1] / (1 - loss)

    def has_tries(end: int, run: int, tries_per_grant: float) -> bool:
        if end < run:
            return False
        tried = bisect_right(tries, in_order[end]) - bisect_right(tries, in_order[end - run])
        return tried >= run * max(tries_per_grant, fewest_tries)

    def was_empty(end: int) -> bool:
        return any(has_tries(end, run, each) for run, each in EMPTY_RUNS)

    first = next((end for end in range(len(in_order)) if was_empty(end)), None)
    if first is None:
        return []
    last = next(
        end
        for end in reversed(range(first, len(in_order)))
        if end == first or (was_empty(end) and has_tries(end, LAST_RUN, fewest_tries))
    )
    begin = in_order[first] + SETTLES_AFTER_S
    steady = [each for each in in_order[: last + 1] if each >= begin]
    gaps = [after - before for before, after in pairwise(steady)]
    if gaps:
        longest = GAP_RATIO * max(median(gaps), JITTER_S / 2)
        for index, gap in enumerate(gaps):
            if gap > longest:
                return steady[: index + 1]
    return steady


def count_rate(
    grants: Sequence[float],
    tries: Sequence[float],
    *,
    loss: float,
    retry_s: float,
    fewest: int,
) -> BucketRate | None:
    """Return the rate of an empty bucket; None where too little was granted while it was empty.

    Args:
        grants: When something was granted, seconds, in any order.
        tries: When anybody asked, ascending.
        loss: Share of answers that do not come back.
        retry_s: After how long is asked again: by so much a lost answer shows a grant late.
        fewest: Gaps between grants that it takes.
    """
    counted = while_empty(grants, tries, loss)
    count = len(counted) - 1
    if count < fewest or (duration_s := counted[-1] - counted[0]) < DURATION_MIN_S:
        return None
    rate = count / duration_s
    tried = bisect_right(tries, counted[-1]) - bisect_right(tries, counted[0])
    waited_s = duration_s / max(tried - count, 1)  # a token, for the next try
    late = rate * retry_s * loss / 2  # at both ends of the count
    # Of the rush before, some answers come with the next tries, and seem to be granted then.
    early = tried / duration_s * max(retry_s - SETTLES_AFTER_S, 0.0) * loss / 2
    error = math.hypot(0.7 * rate * (waited_s + JITTER_S), NORMAL_90 * math.sqrt(2 * late + early))
    error = min(error + early, count / 2)
    interval = Interval((count - error) / duration_s, (count + error) / duration_s)
    return BucketRate(rate, interval, counted[-1])


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
