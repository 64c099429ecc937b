"""Loss in bursts: a channel that is good for a while and bad for a while (Gilbert-Elliott).

A puncture that loses one probe in a hundred, each on its own, hardly notices; one that loses all
probes of the same 200 ms may fail. Radio does the latter: fades and handovers.

The two states change in time, not with every datagram as in Linux `netem` (`loss gemodel`): a fade
takes as long as it takes, whether we send a thousand probes through it or one keepalive. Both
states last exponentially long, so the state at any time follows from the last one looked at by one
draw, however long ago that was.

Source: E. N. Gilbert, "Capacity of a burst-noise channel", 1960; E. O. Elliott, "Estimates of error
rates for codes on burst-noise channels", 1963. Knows no link.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["BurstLoss", "Fade"]


@dataclass(frozen=True, slots=True)
class BurstLoss:
    """A channel that fades now and then.

    Attributes:
        mean_good_s: How long it is good on average, seconds.
        mean_bad_s: How long a fade lasts on average, seconds.
        loss: Probability that a datagram vanishes in a fade, 0..1.
    """

    mean_good_s: float
    mean_bad_s: float
    loss: float = 1.0

    def __post_init__(self) -> None:
        for mean_s in (self.mean_good_s, self.mean_bad_s):
            if not 0 < mean_s < math.inf:
                raise ValueError(f"a state of a channel cannot last {mean_s} s on average")
        if not 0 < self.loss <= 1:
            raise ValueError(f"not the loss of a fade, 0 < loss <= 1: {self.loss}")

    @property
    def mean_loss(self) -> float:
        """The share of datagrams that vanish in the long run."""
        return self.loss * self.mean_bad_s / (self.mean_good_s + self.mean_bad_s)


class Fade:
    """The state of one channel; starts as likely good or bad as it is in the long run."""

    def __init__(self, burst: BurstLoss, random: Callable[[], float]) -> None:
        self._loss = burst.loss
        self._random = random
        self._bad_share = burst.mean_bad_s / (burst.mean_good_s + burst.mean_bad_s)
        self._changes_per_s = 1 / burst.mean_good_s + 1 / burst.mean_bad_s
        self._is_bad = random() < self._bad_share
        self._time = 0.0

    def loses(self, time: float) -> bool:
        """Draw whether a datagram at `time`, seconds, which must not go back, vanishes."""
        passed_s = time - self._time
        if passed_s > 0:
            self._time = time
            remembered = math.exp(-self._changes_per_s * passed_s)
            is_bad = self._bad_share + (self._is_bad - self._bad_share) * remembered
            self._is_bad = self._random() < is_bad
        return self._is_bad and (self._loss >= 1 or self._random() < self._loss)
