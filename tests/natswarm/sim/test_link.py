"""Links: delay, order, and loss within its confidence interval."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natswarm.sim.link import HEADER_BYTES, IDEAL, BurstLoss, Link, LinkConditions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delay_s": -1}, "conditions of a link"),
        ({"delay_s": math.inf}, "conditions of a link"),
        ({"jitter_s": -1}, "conditions of a link"),
        ({"loss": -0.1}, "conditions of a link"),
        ({"loss": 1.1}, "conditions of a link"),
        ({"loss": math.nan}, "conditions of a link"),
        ({"duplication": 2.0}, "conditions of a link"),
        ({"reordering": 0.1}, "a delay to hold"),
        ({"reordering_delay_s": 0.1}, "a probability and"),
        ({"rate_bytes_per_s": 1e6}, "a queue in front"),
        ({"queue_bytes": 1000}, "a rate and"),
        ({"rate_bytes_per_s": 0.0, "queue_bytes": 1000}, "not a rate"),
        ({"rate_bytes_per_s": 1e6, "queue_bytes": 0}, "not a queue"),
    ],
)
def test_impossible_conditions_are_refused(values: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        LinkConditions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, math.nan), (1.0, 1.0, 0.0), (1.0, 1.0, 1.5)])
def test_impossible_fades_are_refused(values: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"state of a channel|loss of a fade"):
        BurstLoss(*values)


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


@pytest.mark.parametrize("interval_s", [0.001, 0.1, 5.0])
@pytest.mark.parametrize("burst", [BurstLoss(2.0, 0.25), BurstLoss(1.0, 0.5, 0.6)])
def test_fades_lose_their_share_whatever_the_pace(burst: BurstLoss, interval_s: float):
    seed, count = 5, 20_000
    print(f"seed {seed}")
    link = Link(LinkConditions(burst=burst), random.Random(seed))
    lost = [link.arrival_time(index * interval_s) is None for index in range(count)]
    # Datagrams of one cycle of both states share their fate: so many are independent.
    cycles = count * min(1.0, interval_s / (burst.mean_good_s + burst.mean_bad_s))
    share = burst.mean_loss
    assert abs(sum(lost) / count - share) <= 5 * math.sqrt(2 * share * (1 - share) / cycles)
    assert link.lost_count == sum(lost)


def test_a_fade_lasts_as_long_as_it_says():
    burst = BurstLoss(mean_good_s=2.0, mean_bad_s=0.25)
    link = Link(LinkConditions(burst=burst), random.Random(6))
    assert not link.is_constant
    lost = [link.arrival_time(index / 100) is None for index in range(200_000)]
    fades = [len(list(run)) / 100 for is_lost, run in itertools.groupby(lost) if is_lost]
    assert len(fades) > 500
    # Looked at every 10 ms, shorter fades are missed: some 4 % of 250 ms.
    assert sum(fades) / len(fades) == pytest.approx(0.25, rel=0.15)


def test_duplication_has_the_probability_asked_for():
    link = Link(LinkConditions(duplication=0.1), random.Random(7))
    assert link.may_duplicate
    assert link.is_constant
    doubled = sum(link.duplicates() for _ in range(10_000))
    assert abs(doubled - 1000) < 4 * 30
    assert link.duplicated_count == doubled
    assert not Link(IDEAL, random.Random(7)).may_duplicate


def test_reordering_holds_some_back_and_lets_the_others_overtake():
    conditions = LinkConditions(
        delay_s=0.02, jitter_s=0.001, reordering=0.2, reordering_delay_s=0.1
    )
    link = Link(conditions, random.Random(8))
    late = 0
    for index in range(5000):
        arrival = link.arrival_time(index * 0.01)
        assert arrival is not None
        delay_s = arrival - index * 0.01
        assert delay_s + 1e-9 >= 0.02
        assert delay_s <= 0.121 + 1e-9
        late += delay_s > 0.0211
    assert late == pytest.approx(5000 * 0.2, rel=0.15)


def test_a_rate_spaces_datagrams_and_its_queue_drops_at_the_tail():
    rate = 10_000.0  # 100 B with headers take 10 ms
    link = Link(LinkConditions(0.05, rate_bytes_per_s=rate, queue_bytes=510), random.Random(9))
    data = bytes(100 - HEADER_BYTES)
    arrivals = [link.arrival_time(1.0, data) for _ in range(8)]
    assert arrivals[:5] == pytest.approx([1.06, 1.07, 1.08, 1.09, 1.10])
    assert arrivals[5:] == [None] * 3
    assert (link.overflow_count, link.lost_count) == (3, 0)
    assert link.arrival_time(1.0085, data) is None
    assert link.arrival_time(1.0095, data) == pytest.approx(1.11)
    assert link.arrival_time(9.0, bytes(5000)) == pytest.approx(9.05 + 5028 / rate)  # at rest


@st.composite
def conditions(draw: st.DrawFn) -> LinkConditions:
    hold_s = draw(st.sampled_from([0.0, 0.05]))
    rate = draw(st.sampled_from([None, 20_000.0]))
    return LinkConditions(
        delay_s=draw(st.sampled_from([0.0, 0.02])),
        jitter_s=draw(st.sampled_from([0.0, 0.01])),
        loss=draw(st.sampled_from([0.0, 0.1])),
        burst=draw(st.sampled_from([None, BurstLoss(0.5, 0.1)])),
        duplication=draw(st.sampled_from([0.0, 0.1])),
        reordering=0.1 if hold_s else 0.0,
        reordering_delay_s=hold_s,
        rate_bytes_per_s=rate,
        queue_bytes=None if rate is None else 2000,
    )


@settings(max_examples=60, deadline=None)
@given(conditions(), st.integers(0, 1000), st.lists(st.integers(0, 1400), max_size=60))
def test_whatever_the_knobs_a_link_keeps_time_rate_and_order(
    conditions: LinkConditions, seed: int, sizes: list[int]
):
    links = [Link(conditions, random.Random(seed)) for _ in range(2)]
    times = [index * 0.002 for index in range(len(sizes))]
    runs = [
        [link.arrival_time(time, bytes(size)) for time, size in zip(times, sizes, strict=True)]
        for link in links
    ]
    assert runs[0] == runs[1]  # the seed decides
    arrived = [(sent, at, size) for sent, at, size in zip(times, runs[0], sizes, strict=True) if at]
    slack_s = 1e-9
    assert all(at + slack_s >= sent + conditions.delay_s for sent, at, _ in arrived)
    if not conditions.reordering:
        assert [at for _, at, _ in arrived] == sorted(at for _, at, _ in arrived)
    rate, queue_bytes = conditions.rate_bytes_per_s, conditions.queue_bytes
    if rate is None or queue_bytes is None:
        assert links[0].overflow_count == 0
        return
    longest_wait_s = max(queue_bytes, 1400 + HEADER_BYTES) / rate
    slowest_s = (
        conditions.delay_s + conditions.jitter_s + conditions.reordering_delay_s + longest_wait_s
    )
    assert all(at - sent <= slowest_s + slack_s for sent, at, _ in arrived)
    carried = sum(size + HEADER_BYTES for _, _, size in arrived)
    assert carried <= rate * times[-1] + queue_bytes + 1428 if times else carried == 0
