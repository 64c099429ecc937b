"""The learning rate at the corners of its curve."""

from __future__ import annotations

import pytest

from llmload.learn.schedule import LearningRateSchedule


def test_the_corners():
    schedule = LearningRateSchedule(peak=2.0, warmup_steps=4, decay_steps=14, floor=0.1)
    assert [schedule.rate_at(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert schedule.rate_at(9) == pytest.approx(1.1)  # half of the way: the mean of both ends
    assert schedule.rate_at(14) == pytest.approx(0.2)
    assert schedule.rate_at(1000) == pytest.approx(0.2)
    rates = [schedule.rate_at(step) for step in range(4, 20)]
    assert rates == sorted(rates, reverse=True)


def test_without_decay_it_stays_at_the_peak():
    assert LearningRateSchedule(peak=0.5).rate_at(0) == 0.5
    assert LearningRateSchedule(peak=0.5, warmup_steps=2).rate_at(10**9) == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak": 0},
        {"floor": 1.1},
        {"warmup_steps": -1},
        {"warmup_steps": 5, "decay_steps": 5},
    ],
)
def test_what_makes_no_curve_is_refused(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        LearningRateSchedule(**{"peak": 1.0, **wrong})
