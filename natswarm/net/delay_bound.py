"""How much bulk may be under way beside messages before it only waits in somebody's queue.

QUIC's congestion control (CUBIC) sends more until something is lost. Where buffers are deep, a
message then waits behind hundreds of milliseconds of bulk: 33 ms instead of 1-2 were measured on
loopback alone. What a path carries is its rate times its round trip; more than twice that
does not arrive sooner. So the rate is taken from what was delivered, and while there are messages,
bulk is held back at twice the product. Messages are not held back.

The round trip must be that of a path without our own queue, so now and then bulk is held back to
half the product for a round trip, and what was measured then counts until the next time. The
lowest round trip ever would not do: it makes a path that became slower, a busy processor or Wi-Fi's
habit of saving packets up look like a queue of ours, and bulk would stand still.

Source: the idea of BBR (draft-cardwell-iccrg-bbr-congestion-control, 4.2 and 4.3.4), on top of
QUIC's own control, not in place of it. Pure: `now` is an argument.
"""

from __future__ import annotations

from collections import deque

__all__ = ["DelayBound"]

# 26 ms of 10 Mbit/s. Less would leave some 20 packets, too few to learn a rate from.
MIN_LIMIT_BYTES = 32 * 1024
GAIN = 2.0
# On the shortest paths it is processors that queue. There, many small portions cost more than they
# are worth: with 16 busy processes on 2 cores, 2 ms carried 8 MB/s, 8 ms 25, no bound 27.
MIN_QUEUE_S = 0.004
DRAIN_GAIN = 0.5
# Bulk that runs for less is not worth a measurement.
DRAIN_INTERVAL_S = 3.0
DRAIN_INTERVAL_ROUNDS = 30
# Of a drain, what was sent before must come in first, then a round trip is measured.
MIN_ROUND_S = 0.001


class DelayBound:
    """The bound for one QUIC connection's bulk."""

    def __init__(self) -> None:
        self._rates: deque[tuple[float, float]] = deque()  # (until when it counts, bytes/s)
        self._base_rtt_s: float | None = None
        self._delivered_bytes = 0
        self._round_started_at = 0.0
        self._round_bytes = 0
        self._drain_at = 0.0
        self._drain_until: float | None = None
        self._drain_rtts: list[float] = []

    @property
    def limit_bytes(self) -> float:
        """What may be under way or queued, bulk included."""
        if self._base_rtt_s is None:
            return MIN_LIMIT_BYTES
        if self._drain_until is not None:
            return max(MIN_LIMIT_BYTES, DRAIN_GAIN * self._rate * self._base_rtt_s)
        under_way_s = max(GAIN * self._base_rtt_s, self._base_rtt_s + MIN_QUEUE_S)
        return max(MIN_LIMIT_BYTES, self._rate * under_way_s)

    @property
    def delivered_bytes(self) -> int:
        """What the peer has acknowledged or QUIC has given up, so far."""
        return self._delivered_bytes

    @property
    def _rate(self) -> float:
        return self._rates[0][1] if self._rates else 0.0

    def forget(self) -> None:
        """Learn anew: the path is another."""
        self._rates.clear()
        self._base_rtt_s = None
        self._drain_until = None

    def on_delivered(
        self, count: int, rtt_s: float | None, now: float, *, is_held: bool = True
    ) -> None:
        """Take note of `count` bytes that arrived, and of the latest round trip.

        Args:
            count: Bytes.
            rtt_s: Seconds; None before the first was measured.
            now: Seconds.
            is_held: Whether bulk keeps to the limit. When it begins to, a measurement is due.
        """
        if count <= 0 or rtt_s is None:
            return
        if self._base_rtt_s is None:
            self._base_rtt_s = rtt_s
            self._drain_at = now + DRAIN_INTERVAL_S
            self._round_started_at = now
        self._delivered_bytes += count
        self._round_bytes += count
        if is_held:
            self._measure(rtt_s, now)
        else:
            self._drain_until = None
            self._drain_at = now
        round_s = now - self._round_started_at
        if round_s >= max(self._base_rtt_s, MIN_ROUND_S):
            self._learn_rate(self._round_bytes / round_s, now)
            self._round_started_at = now
            self._round_bytes = 0

    def _learn_rate(self, rate: float, now: float) -> None:
        """Keep the highest rate of the latest interval: front of a queue that falls."""
        assert self._base_rtt_s is not None
        rates = self._rates
        while rates and rates[0][0] <= now:
            rates.popleft()
        while rates and rates[-1][1] <= rate:
            rates.pop()
        rates.append((now + self._interval_s(), rate))

    def _interval_s(self) -> float:
        assert self._base_rtt_s is not None
        return max(DRAIN_INTERVAL_S, DRAIN_INTERVAL_ROUNDS * self._base_rtt_s)

    def _measure(self, rtt_s: float, now: float) -> None:
        """Hold bulk back for a while when it is time, and measure what is left of a round trip."""
        assert self._base_rtt_s is not None
        if self._drain_until is None:
            # Without bulk every round trip is one without our queue.
            if rtt_s < self._base_rtt_s:
                self._base_rtt_s += (rtt_s - self._base_rtt_s) / 8
            if now >= self._drain_at:
                # Two round trips: one for the queue to empty, one to measure.
                self._drain_until = now + 2 * rtt_s
                self._drain_rtts = []
            return
        self._drain_rtts.append(rtt_s)
        if now >= self._drain_until:
            late = sorted(self._drain_rtts[len(self._drain_rtts) // 2 :])
            self._base_rtt_s = late[len(late) // 2]
            self._drain_until = None
            self._drain_at = now + self._interval_s()
