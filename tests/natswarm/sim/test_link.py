"""Links: delay, order, and loss within its confidence interval."""

from __future__ import annotations

import math
import random

import pytest

from natswarm.sim.link import IDEAL, Link, LinkConditions


@pytest.mark.parametrize(
    "values", [{"delay_s": -1}, {"jitter_s": -1}, {"loss": -0.1}, {"loss": 1.1}, {"loss": math.nan}]
)
def test_impossible_conditions_are_refused(values: dict[str, float]):
    with pytest.raises(ValueError, match="conditions of a link"):
        LinkConditions(**values)


def test_an_ideal_link_takes_no_time():
    assert Link(IDEAL, random.Random(1)).arrival_time(3.5) == 3.5


def test_jitter_stays_in_its_range_and_keeps_order():
    link = Link(LinkConditions(delay_s=0.025, jitter_s=0.020), random.Random(2))
    arrivals = [link.arrival_time(index / 1000) for index in range(2000)]
    times = [arrival for arrival in arrivals if arrival is not None]
    assert len(times) == 2000
    assert times == sorted(times)
    delays = [time - index / 1000 for index, time in enumerate(times)]
    assert min(delays) >= 0.025
    assert max(delays) <= 0.045 + 1e-9
    assert max(delays) - min(delays) > 0.010


@pytest.mark.parametrize("loss", [0.001, 0.02, 0.3, 1.0])
def test_loss_has_the_probability_asked_for(loss: float):
    seed, count = 3, 100_000
    print(f"seed {seed}")
    link = Link(LinkConditions(loss=loss), random.Random(seed))
    lost = sum(link.arrival_time(0.0) is None for _ in range(count))
    # 4 standard deviations of a binomial: one false alarm in 16,000 seeds.
    assert abs(lost - count * loss) <= 4 * math.sqrt(count * loss * (1 - loss))
    assert link.lost_count == lost


def test_conditions_can_worsen_on_the_way():
    link = Link(LinkConditions(delay_s=0.010, jitter_s=0.005), random.Random(4))
    assert not link.is_constant
    link.conditions = LinkConditions(loss=1.0)
    assert link.is_constant
    assert link.arrival_time(1.0) is None
    link.conditions = LinkConditions(delay_s=0.010)
    assert link.arrival_time(1.0) == pytest.approx(1.010)
