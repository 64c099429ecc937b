"""Bulk is held back at twice what a path carries, whatever the path is or becomes."""

from __future__ import annotations

import pytest

from natswarm.net.delay_bound import MIN_LIMIT_BYTES, DelayBound


def run_path(bound, *, rate, rtt_s, start, seconds, step_s=0.001, extra_s=0.0):
    """Send as much as the bound lets over a path with an endless queue.

    Return, of the second half, the longest queue in seconds, and the share of the time in which the
    path was full.

    `extra_s` is a delay that is nobody's queue.
    """
    queue_bytes = 0.0
    longest_s = 0.0
    full_count = half_count = 0
    now = start
    for _ in range(round(seconds / step_s)):
        now += step_s
        in_path = rate * (rtt_s + extra_s)
        queue_bytes = max(0.0, bound.limit_bytes - in_path)
        delivered = min(rate, bound.limit_bytes / (rtt_s + extra_s)) * step_s
        queue_s = queue_bytes / rate
        if now > start + seconds / 2:
            longest_s = max(longest_s, queue_s)
            half_count += 1
            full_count += bound.limit_bytes >= in_path
        bound.on_delivered(round(delivered), rtt_s + extra_s + queue_s, now)
    return longest_s, full_count / half_count


@pytest.mark.parametrize(
    ("mbit_per_s", "rtt_s"), [(100, 0.02), (1000, 0.002), (50, 0.1), (20, 0.3)]
)
def test_fills_the_path_and_queues_little(mbit_per_s, rtt_s):
    bound = DelayBound()
    rate = mbit_per_s * 1e6 / 8
    longest_s, full_share = run_path(bound, rate=rate, rtt_s=rtt_s, start=0.0, seconds=40)
    assert full_share > 0.85  # a drain each 9 s takes two of these round trips
    assert longest_s <= max(1.2 * rtt_s, 0.005)


def test_a_path_that_became_slower_is_no_queue_of_ours():
    bound = DelayBound()
    run_path(bound, rate=12.5e6, rtt_s=0.02, start=0.0, seconds=10)
    _, full_share = run_path(bound, rate=12.5e6, rtt_s=0.02, extra_s=0.1, start=10.0, seconds=30)
    assert full_share > 0.85  # a drain each 9 s takes two of these round trips


def test_knows_nothing_at_first_and_after_forgetting():
    bound = DelayBound()
    assert bound.limit_bytes == MIN_LIMIT_BYTES
    run_path(bound, rate=12.5e6, rtt_s=0.02, start=0.0, seconds=5)
    assert bound.limit_bytes > MIN_LIMIT_BYTES
    bound.forget()
    assert bound.limit_bytes == MIN_LIMIT_BYTES
    bound.on_delivered(1000, None, 6.0)
    bound.on_delivered(0, 0.02, 6.0)
    assert bound.limit_bytes == MIN_LIMIT_BYTES
