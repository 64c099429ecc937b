"""Which of many ports got a mapping, and when: what a rush of them shows of a limit.

Loss strikes here and there. A limit strikes in a row: all is granted up to a *boundary*, and next
to nothing after it (a quota of live mappings), or less than is asked for (a rate of new ones).

Pure arithmetic: knows ports, answers and their times, not what is asked next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from natswarm.address import Endpoint
from natswarm.nat.asking import Answer

__all__ = ["Grant", "boundary_of", "is_more_than_loss", "most_at_once"]

# Refusals come in a row. At 10 % loss each way 12 of any 20 first tries fail once in 70 tests.
RUN, RUN_MISSES = 20, 12


class Grant(NamedTuple):
    """A mapping that we got.

    Attributes:
        answer: What the observer saw.
        destination: Whom the port sent to.
        first_sent_at: When it was asked for first.
    """

    answer: Answer
    destination: Endpoint
    first_sent_at: float

    @property
    def granted_at(self) -> float:
        """When the try was sent that was answered."""
        return self.answer.sent_at


def boundary_of(first_tries: Sequence[bool]) -> int | None:
    """Return the first of many first tries in a row that mostly got no answer; None without."""
    missed = [not each for each in first_tries]
    for start in range(len(missed) - RUN + 1):
        if missed[start] and sum(missed[start : start + RUN]) >= RUN_MISSES:
            return start
    return None


def is_more_than_loss(first_tries: Sequence[bool], *, lost: int, asked: int) -> bool:
    """Return whether more first tries failed than loss explains.

    Args:
        first_tries: Whether each was answered.
        lost: How many of another port failed, whose mapping lives.
        asked: How many that one sent.
    """
    expected = len(first_tries) * (lost + 3) / (asked + 5)
    return first_tries.count(False) > expected + 3 * math.sqrt(expected) + 2


def most_at_once(times: Sequence[float], lifetime_s: float) -> int:
    """Return how many of those granted at `times` lived at a time, if each lives for so long."""
    in_order = sorted(times)
    start = most = 0
    for index, time in enumerate(in_order):
        while in_order[start] < time - lifetime_s:
            start += 1
        most = max(most, index - start + 1)
    return most
