"""One direction of a link: how long a datagram takes, and whether it arrives.

Delay is a constant plus uniform jitter, and unless `reordering` is asked for a link never reorders:
a datagram does not overtake the one before it. Radio links deliver in order (3GPP TS 36.322,
acknowledged mode) and so do queues; jitter drawn freely for each datagram would look like heavy
loss to QUIC, which nobody sees in the field.

Loss comes singly (`loss`) or in fades (`burst`, `natswarm/sim/fade.py`). With a rate, datagrams
wait in a bounded queue that drops at its tail. Duplication and reordering are those of Linux
`netem`, whose words these knobs follow where they can (tc-netem(8)).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from natswarm.sim.fade import BurstLoss, Fade

__all__ = ["HEADER_BYTES", "IDEAL", "BurstLoss", "Link", "LinkConditions"]

# What each datagram takes of a rate on top of its payload: IPv4 and UDP headers. IPv6 takes 20 more
# and radio layers compress both; the difference is lost in what a link's rate is known to.
HEADER_BYTES = 20 + 8


@dataclass(frozen=True, slots=True)
class LinkConditions:
    """How one direction of a link treats datagrams.

    Attributes:
        delay_s: Least one-way delay, seconds.
        jitter_s: On top, uniform from 0 to this, seconds.
        loss: Probability that a datagram vanishes, each on its own, 0..1.
        burst: Fades in which datagrams vanish besides; None for none.
        duplication: Probability that a datagram arrives twice, the copy right behind it, 0..1.
        reordering: Probability that a datagram is held back, so that later ones overtake it, 0..1.
        reordering_delay_s: How long it is held back, uniform from 0 to this, seconds.
        rate_bytes_per_s: What the link carries, headers (28 B a datagram) included; None where
            that never matters.
        queue_bytes: What may wait for a link with a rate, the datagram on its way included; one
            more is dropped. A link at rest takes any datagram.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    burst: BurstLoss | None = None
    duplication: float = 0.0
    reordering: float = 0.0
    reordering_delay_s: float = 0.0
    rate_bytes_per_s: float | None = None
    queue_bytes: int | None = None

    def __post_init__(self) -> None:
        for delay_s in (self.delay_s, self.jitter_s, self.reordering_delay_s):
            if not 0 <= delay_s < math.inf:
                raise ValueError(f"not the conditions of a link, a delay is {delay_s} s: {self}")
        for probability in (self.loss, self.duplication, self.reordering):
            if not 0 <= probability <= 1:
                raise ValueError(
                    f"not the conditions of a link, a probability is {probability}: {self}"
                )
        if (self.reordering > 0) != (self.reordering_delay_s > 0):
            raise ValueError(
                "reordering takes a probability and a delay to hold datagrams back for: "
                f"{self.reordering} and {self.reordering_delay_s} s"
            )
        if (self.rate_bytes_per_s is None) != (self.queue_bytes is None):
            raise ValueError("a link has a rate and a queue in front of it, or neither")
        if self.rate_bytes_per_s is not None and not 0 < self.rate_bytes_per_s < math.inf:
            raise ValueError(f"not a rate: {self.rate_bytes_per_s} B/s")
        if self.queue_bytes is not None and self.queue_bytes < 1:
            raise ValueError(f"not a queue: {self.queue_bytes} B")


IDEAL = LinkConditions()
"""No delay, no loss: a cable in the same room."""


class Link:
    """One direction of a link.

    Attributes:
        lost_count: Datagrams that vanished here, singly or in a fade.
        overflow_count: Datagrams that found the queue full.
        duplicated_count: Copies made.
        is_constant: When a datagram arrives depends on nothing that passed before it, so it may be
            worked out ahead, before others that depart earlier.
        may_duplicate: Whether to ask `duplicates` at all.
    """

    __slots__ = (
        "_conditions",
        "_fade",
        "_idle_from",
        "_is_rough",
        "_latest_arrival",
        "_random",
        "duplicated_count",
        "is_constant",
        "lost_count",
        "may_duplicate",
        "overflow_count",
    )

    def __init__(self, conditions: LinkConditions, rng: random.Random) -> None:
        self.lost_count = 0
        self.overflow_count = 0
        self.duplicated_count = 0
        self._latest_arrival = 0.0
        self._idle_from = 0.0  # when the last datagram taken into the queue will have left it
        self._random = rng.random
        self.conditions = conditions

    @property
    def conditions(self) -> LinkConditions:
        """The conditions now; a scenario may worsen them while datagrams are under way."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: LinkConditions) -> None:
        self._conditions = conditions
        self._fade = None if conditions.burst is None else Fade(conditions.burst, self._random)
        has_memory = self._fade is not None or conditions.rate_bytes_per_s is not None
        self._is_rough = has_memory or conditions.reordering > 0
        self.is_constant = conditions.jitter_s == 0 and not has_memory
        self.may_duplicate = conditions.duplication > 0

    def arrival_time(self, departure: float, data: bytes = b"") -> float | None:
        """Return when a datagram that departs at `departure` arrives; None when it never does.

        Unless the link `is_constant`, departures must not go back.
        """
        if self._is_rough:
            return self._rough_arrival_time(departure, data)
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

    def duplicates(self) -> bool:
        """Draw whether the datagram that just arrived does so twice."""
        if self._random() >= self._conditions.duplication:
            return False
        self.duplicated_count += 1
        return True

    def _rough_arrival_time(self, departure: float, data: bytes) -> float | None:
        """As `arrival_time`, for the knobs that few links have."""
        sent = self._queue(departure, data)
        if sent is None:
            self.overflow_count += 1
            return None
        conditions = self._conditions
        is_lost = self._fade is not None and self._fade.loses(sent)
        if is_lost or (conditions.loss and self._random() < conditions.loss):
            self.lost_count += 1
            return None
        arrival = sent + conditions.delay_s
        if conditions.jitter_s:
            arrival = max(arrival + conditions.jitter_s * self._random(), self._latest_arrival)
            self._latest_arrival = arrival
        if conditions.reordering and self._random() < conditions.reordering:
            arrival += conditions.reordering_delay_s * self._random()
        return arrival

    def _queue(self, departure: float, data: bytes) -> float | None:
        """Return when the datagram has left the queue; None when that was full."""
        rate, queue_bytes = self._conditions.rate_bytes_per_s, self._conditions.queue_bytes
        if rate is None or queue_bytes is None:
            return departure
        size = len(data) + HEADER_BYTES
        start = max(self._idle_from, departure)
        if start > departure and (start - departure) * rate + size > queue_bytes:
            return None
        self._idle_from = start + size / rate
        return self._idle_from
