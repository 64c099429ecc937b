"""More lanes only while packets are lost, and only where they help."""

from __future__ import annotations

import pytest

from natswarm.net.striping import CLEAN_INTERVALS, LEVELS, PAUSE_S, Progress, Striping

RTT_S = 0.02


class Transfer:
    """Bulk that waits all the time, at rates and losses of the test's choice."""

    def __init__(self):
        self.striping = Striping()
        self.now = 0.0
        self.counts = []
        self._delivered = self._sent = self._lost = 0.0

    def run(self, seconds, *, rate, loss, is_bulk=True):
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            packets = rate(self.striping.lane_count) * 0.05 / 1200
            self._delivered += packets * 1200
            self._sent += packets
            self._lost += packets * loss
            self.striping.observe(self._progress, RTT_S, self.now, is_bulk=is_bulk)
            self.counts.append(self.striping.lane_count)
        return self.striping.lane_count

    def _progress(self):
        return Progress(int(self._delivered), int(self._sent), int(self._lost))


def side_by_side(lane_count):
    return 1.2e6 * lane_count


def full(lane_count):
    return 12e6


def test_climbs_while_it_helps_and_comes_down_when_nothing_is_lost():
    transfer = Transfer()
    assert transfer.run(10, rate=side_by_side, loss=0.01) == LEVELS[-1]
    assert transfer.run(3 + 0.5 * CLEAN_INTERVALS, rate=side_by_side, loss=0.0) == 1


def test_a_slow_lane_loses_few_and_still_enough():
    """At 2 % and 200 ms CUBIC sends 80 packets in half a second; one or two of them are lost."""
    transfer = Transfer()
    assert transfer.run(15, rate=lambda lane_count: 0.2e6 * lane_count, loss=0.02) == LEVELS[-1]


@pytest.mark.parametrize("loss", [0.0, 0.0005])
def test_a_path_that_loses_next_to_nothing_has_one_lane(loss):
    transfer = Transfer()
    transfer.run(60, rate=side_by_side, loss=loss)
    assert set(transfer.counts) == {1}


def test_takes_back_what_does_not_help_and_waits_before_it_tries_again():
    transfer = Transfer()
    transfer.run(PAUSE_S, rate=full, loss=0.01)
    assert max(transfer.counts) == LEVELS[1]
    assert transfer.counts[-1] == 1
    assert sum(count > 1 for count in transfer.counts) < 40  # two seconds of sixty


def test_without_bulk_nothing_is_judged():
    transfer = Transfer()
    transfer.run(20, rate=side_by_side, loss=0.05, is_bulk=False)
    assert set(transfer.counts) == {1}
