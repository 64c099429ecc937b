"""Over how many lanes bulk should go: more only while packets are lost, and only if it helps.

CUBIC takes every loss for a full path. At 1 % loss and 20 ms it carries 1.2 MB/s where 12 would
fit; several connections side by side are hit one at a time, and carry several times as much. Where
packets are lost because the path is full, more lanes only push others aside; so each step up is on
trial, and taken back where the bulk did not become clearly faster.

Pure: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["LANES_MAX", "Progress", "Striping"]

# One lane, or this many beside it. 8 carried 7 times what one did at 1 % loss and 20 ms; browsers
# used 6 connections to a server for 15 years.
LEVELS = (1, 4, 8)
LANES_MAX = 1 + LEVELS[-1]

# Long enough for CUBIC to settle between losses; a trial is judged by the second interval, since
# the first has the handshakes and slow starts in it.
MIN_INTERVAL_S = 0.5
INTERVAL_ROUND_TRIPS = 10
SETTLING_INTERVALS = 1
# Bulk waits off and on; after so long without, there is none.
IDLE_S = 0.5

LOSS_SEEN = 0.002
MIN_LOST = 3  # one lost packet is no rate
INTERVALS_MAX = 3  # where that many take longer: 2 % of a slow lane's 100 packets are two
LOSSY_INTERVALS = 2  # in a row: slow start ends with one that is lossy on any path
WORTH_IT = 1.25
PAUSE_S = 60.0
CLEAN_INTERVALS = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters over all lanes, that only grow."""

    delivered_bytes: int
    sent_count: int
    lost_count: int


class Striping:
    """Decides for one connection's bulk.

    Attributes:
        lane_count: How many lanes bulk should have: 1, or so many beside the first.
    """

    def __init__(self) -> None:
        self.lane_count = LEVELS[0]
        self._level = 0
        self._interval_ends_at: float | None = None
        self._bulk_at = 0.0
        self._started_at = 0.0
        self._start = Progress(0, 0, 0)
        self._trial_rate: float | None = None  # of the level below, while this one is on trial
        self._settling = 0
        self._pause_until = 0.0
        self._clean_count = 0
        self._lossy_count = 0

    def observe(
        self, progress: Callable[[], Progress], rtt_s: float, now: float, *, is_bulk: bool
    ) -> None:
        """Look at the counters where it is time to; `lane_count` may change.

        Args:
            progress: Returns the counters.
            rtt_s: Round trip of the path.
            now: Seconds.
            is_bulk: Whether bulk waits at the moment.
        """
        if is_bulk:
            self._bulk_at = now
        elif now > self._bulk_at + IDLE_S:
            self._interval_ends_at = None
        if self._interval_ends_at is None:
            if not is_bulk:
                return
        elif now < self._interval_ends_at:
            return
        else:
            so_far = progress()
            sent_count = so_far.sent_count - self._start.sent_count
            lost_count = so_far.lost_count - self._start.lost_count
            is_vague = LOSS_SEEN * sent_count <= lost_count < MIN_LOST and lost_count > 0
            if is_vague and now < self._started_at + INTERVALS_MAX * _interval_s(rtt_s):
                self._interval_ends_at = now + _interval_s(rtt_s)
                return
            self._judge(so_far, now)
        self._start = progress()
        self._started_at = now
        self._interval_ends_at = now + _interval_s(rtt_s)

    def forget(self) -> None:
        """Judge nothing of what was before: the path is another, or was away."""
        self._interval_ends_at = None
        self._settling = SETTLING_INTERVALS
        self._pause_until = 0.0

    def _judge(self, progress: Progress, now: float) -> None:
        start = self._start
        rate = (progress.delivered_bytes - start.delivered_bytes) / (now - self._started_at)
        sent_count = progress.sent_count - start.sent_count
        lost_count = progress.lost_count - start.lost_count
        is_lossy = lost_count >= max(MIN_LOST, LOSS_SEEN * sent_count)
        if self._settling:
            self._settling -= 1
            return
        if self._trial_rate is not None:
            if rate < WORTH_IT * self._trial_rate:
                self._set_level(self._level - 1)
                self._pause_until = now + PAUSE_S
            self._trial_rate = None
            return
        self._clean_count = 0 if is_lossy else self._clean_count + 1
        self._lossy_count = self._lossy_count + 1 if is_lossy else 0
        if self._clean_count >= CLEAN_INTERVALS and self._level:
            self._set_level(0)
        elif (
            self._lossy_count >= LOSSY_INTERVALS
            and now >= self._pause_until
            and self._level + 1 < len(LEVELS)
        ):
            self._trial_rate = rate
            self._set_level(self._level + 1)

    def _set_level(self, level: int) -> None:
        self._level = level
        self.lane_count = LEVELS[level]
        self._settling = SETTLING_INTERVALS
        self._clean_count = self._lossy_count = 0


def _interval_s(rtt_s: float) -> float:
    return max(MIN_INTERVAL_S, INTERVAL_ROUND_TRIPS * rtt_s)
