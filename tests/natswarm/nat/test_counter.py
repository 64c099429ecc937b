"""Counters: followed through overtaking, wraps and new blocks; rates with honest intervals."""

from __future__ import annotations

import math
import random

import pytest

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortSample
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.counter import follow
from natswarm.nat.cross_traffic import Gap, rate_interval
from natswarm.nat.fit import allocation_intervals, fit_allocation
from natswarm.nat.shape import fit_shape

OBSERVER = Endpoint("198.51.100.1", 4000)
SPACING_S = 0.015


def times(count: int) -> list[float]:
    return [SPACING_S * index for index in range(count)]


def samples_of(ports: list[int], first_local_port: int = 30_001) -> list[PortSample]:
    return [
        PortSample(first_local_port + index, OBSERVER, port, SPACING_S * index)
        for index, port in enumerate(ports)
    ]


def poisson(rng: random.Random, mean: float) -> int:
    threshold, count, product = math.exp(-mean), 0, rng.random()
    while product > threshold:
        count += 1
        product *= rng.random()
    return count


def test_a_plain_counter() -> None:
    chain = follow(list(range(5000, 5030)), times(30))
    assert chain is not None
    assert (chain.step, chain.jumps, sum(gap.step_count for gap in chain.gaps)) == (1, (), 0)


@pytest.mark.parametrize("step", [1, -1, 2, -2, 4])
def test_a_counter_that_comes_to_its_end_goes_on(step: int) -> None:
    low, width = 20_000, 10_000
    ports = [low + (step * index - 3 * step) % width for index in range(30)]
    chain = follow(ports, times(30))
    assert chain is not None
    assert chain.step == step
    assert len(chain.jumps) == 1
    assert len(chain.ports) == 30


def test_overtaken_ports_are_out_of_place_but_not_steps_of_others() -> None:
    ports = list(range(5000, 5030))
    ports.insert(20, ports.pop(10))
    ports.insert(5, ports.pop(7))
    chain = follow(ports, times(30))
    assert chain is not None
    assert chain.step == 1
    assert len(chain.ports) == 28
    assert sum(gap.step_count for gap in chain.gaps) == 0


def test_ports_at_random_are_no_counter() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        allocation = fit_allocation(samples_of([rng.randint(1024, 65_535) for _ in range(24)]))
        assert allocation is not None
        assert allocation.law is AllocationLaw.UNIFORM, f"seed {seed}"


def test_a_counter_that_goes_round_in_a_block_shows_the_block() -> None:
    base, size = 41_216, 128
    ports = [base + (100 + index) % size for index in range(200)]
    # All local ports differ, so the second round is overloading.
    allocation = fit_allocation(samples_of(ports))
    assert allocation is not None
    assert allocation.law is AllocationLaw.SEQUENTIAL
    assert (allocation.block_size, allocation.blocks) == (size, (base,))
    assert (allocation.low, allocation.high) == (base, base + size - 1)
    assert allocation.is_overloading is True
    few = fit_allocation(samples_of(ports[:20]))
    assert few is not None
    assert few.law is AllocationLaw.SEQUENTIAL
    assert few.block_size is None


def test_counters_of_several_addresses_are_one_law() -> None:
    rng = random.Random(4)
    position = {"203.0.113.1": 5000, "203.0.113.2": 40_000}
    samples = []
    for index in range(24):
        ip = rng.choice(list(position))
        position[ip] += 2
        samples.append(PortSample(30_000 + index, OBSERVER, position[ip], SPACING_S * index, ip))
    allocation = fit_allocation(samples)
    assert allocation is not None
    assert (allocation.law, allocation.step) == (AllocationLaw.SEQUENTIAL, 2)
    assert allocation.is_overloading is None


def test_intervals_of_rates_hold_the_truth_nine_times_in_ten() -> None:
    held = {False: 0, True: 0}
    trials = 400
    for seed in range(trials):
        rng = random.Random(seed)
        rate = math.exp(rng.uniform(math.log(3), math.log(300)))
        # One in five follows a mapping of ours that was seen too late.
        gaps = [
            Gap(poisson(rng, rate * SPACING_S), SPACING_S, rng.choice((1, 1, 1, 1, 2)))
            for _ in range(35)
        ]
        wasted = [
            Gap(steps + sum(rng.randrange(2) for _ in range(own)), seconds, own)
            for steps, seconds, own in gaps
        ]
        for keeps_parity, seen in ((False, gaps), (True, wasted)):
            low, high = rate_interval(seen, keeps_parity=keeps_parity)
            held[keeps_parity] += low <= rate <= high
    for keeps_parity, count in held.items():
        # 90 % +- 3 standard deviations
        assert 0.855 < count / trials < 0.945, (keeps_parity, count / trials)


def test_nobody_else_seen_may_be_nobody() -> None:
    low, high = rate_interval([Gap(0, SPACING_S)] * 30, keeps_parity=False)
    assert low == 0
    assert 1 < high < 10


def test_intervals_of_ranges_hold_the_truth_nine_times_in_ten() -> None:
    low_held = high_held = trials = 0
    for seed in range(300):
        rng = random.Random(seed)
        width = rng.randint(9000, 60_000)
        low = rng.randint(1024, 65_536 - width)
        samples = samples_of([rng.randint(low, low + width - 1) for _ in range(36)])
        allocation = fit_allocation(samples)
        assert allocation is not None
        if allocation.law is not AllocationLaw.UNIFORM:
            continue
        intervals = allocation_intervals(samples, allocation)
        trials += 1
        lowest, highest = intervals["allocation.low"], intervals["allocation.high"]
        low_held += lowest.low <= low <= lowest.high
        high_held += highest.low <= low + width - 1 <= highest.high
    assert trials > 270
    for held in (low_held, high_held):
        assert 0.84 < held / trials < 0.96, (low_held, high_held, trials)


def test_hundreds_of_ports_show_an_uneven_range() -> None:
    uneven = even = 0
    for seed in range(12):
        rng = random.Random(seed)
        beta = [round(4631 + 13_937 * rng.betavariate(2.242, 5.008)) for _ in range(300)]
        flat = [rng.randint(4631, 18_568) for _ in range(300)]
        shape = fit_shape(beta)
        uneven += shape is not None and shape[0] < shape[1]
        even += fit_shape(flat) is None
    assert uneven >= 11
    assert even >= 11


def test_a_range_may_reach_the_last_port() -> None:
    rng = random.Random(2)
    ports = [1, 65_535, *(round(65_535 * rng.betavariate(3, 3)) for _ in range(300))]
    shape = fit_shape(ports)
    assert shape is not None
    assert (shape.low, shape.high) == (1, 65_535)


def test_a_crowd_in_a_range_is_no_pair_of_blocks() -> None:
    # Nine tenths of these lie within 4,600 ports: two blocks of 4096, were they drawn evenly.
    for seed in range(8):
        rng = random.Random(seed)
        ports = [round(20_000 + 8300 * rng.betavariate(4, 4)) for _ in range(300)]
        allocation = fit_allocation(samples_of(ports))
        assert allocation is not None
        assert allocation.law is AllocationLaw.UNIFORM, f"seed {seed}: {allocation}"
        assert allocation.shape is not None
        block = random.Random(seed).choices(range(20_480, 24_576), k=300)
        fitted = fit_allocation(samples_of(block))
        assert fitted is not None
        assert (fitted.law, fitted.block_size) == (AllocationLaw.BLOCK, 4096), f"seed {seed}"
