"""One direction of a link: how long a datagram takes, and whether it arrives.

Delay is a constant plus uniform jitter, but a link never reorders: a datagram does not overtake the
one before it. Radio links deliver in order (3GPP TS 36.322, acknowledged mode) and so do queues;
jitter drawn freely for each datagram would look like heavy loss to QUIC, which nobody sees in the
field. There is no rate limit: congestion is not what this emulator is for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["IDEAL", "Link", "LinkConditions"]


@dataclass(frozen=True, slots=True)
class LinkConditions:
    """How one direction of a link treats datagrams.

    Attributes:
        delay_s: Least one-way delay, seconds.
        jitter_s: On top, uniform from 0 to this, seconds.
        loss: Probability that a datagram vanishes, each on its own, 0..1.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not (self.delay_s >= 0 and self.jitter_s >= 0 and 0 <= self.loss <= 1):
            raise ValueError(f"not the conditions of a link: {self}")


IDEAL = LinkConditions()
"""No delay, no loss: a cable in the same room."""


class Link:
    """One direction of a link.

    Attributes:
        lost_count: Datagrams that vanished here.
        is_constant: No jitter, so when a datagram arrives depends on its departure alone and may
            be worked out ahead, before others that depart earlier.
    """

    __slots__ = ("_conditions", "_latest_arrival", "_random", "is_constant", "lost_count")

    def __init__(self, conditions: LinkConditions, rng: random.Random) -> None:
        self.lost_count = 0
        self._latest_arrival = 0.0
        self._random = rng.random
        self.conditions = conditions

    @property
    def conditions(self) -> LinkConditions:
        """The conditions now; a scenario may worsen them while datagrams are under way."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: LinkConditions) -> None:
        self._conditions = conditions
        self.is_constant = conditions.jitter_s == 0

    def arrival_time(self, departure: float) -> float | None:
        """Return when a datagram that departs at `departure` arrives; None when it never does."""
        conditions = self._conditions
        if conditions.loss and self._random() < conditions.loss:
            self.lost_count += 1
            return None
        arrival = departure + conditions.delay_s
        if not conditions.jitter_s:
            return arrival
        arrival = max(arrival + conditions.jitter_s * self._random(), self._latest_arrival)
        self._latest_arrival = arrival
        return arrival
