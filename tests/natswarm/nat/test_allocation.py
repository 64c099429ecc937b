"""Laws of allocation: fitted to ports drawn from known laws, with the error rates they promise.

Run with `-s` to see the table that docs/puncturing.md quotes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.nat.allocation import (
    SAFE_RANGE,
    PortAllocation,
    PortRange,
    PortSample,
    predict_ports,
    shuffled_ports,
)
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.fit import fit_allocation
from natswarm.nat.shape import WEIGHT_MAX, WEIGHT_SLICES, port_weights, shape_density
from natswarm.puncture.odds import cheapest_prior_opened_count, expected_prior_probe_count

SEEDS = 250
OBSERVER = Endpoint("198.51.100.1", 4000)


def samples_of(ports: Sequence[int], first_local_port: int = 30_000) -> list[PortSample]:
    return [
        PortSample(first_local_port + index, OBSERVER, port, 0.015 * index)
        for index, port in enumerate(ports)
    ]


def fit(ports: Sequence[int]) -> PortAllocation:
    allocation = fit_allocation(samples_of(ports))
    assert allocation is not None
    return allocation


def wilson_low(successes: int, trials: int, z: float = 1.96) -> float:
    share = successes / trials
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return (share + z * z / (2 * trials) - spread) / (1 + z * z / trials)


Draw = Callable[[random.Random, int], list[int]]


def uniform(low: int, high: int) -> Draw:
    return lambda rng, count: [rng.randint(low, high) for _ in range(count)]


def beta(rng: random.Random, count: int) -> list[int]:
    return [round(4630.72 + 13937.38 * rng.betavariate(2.242, 5.008)) for _ in range(count)]


def blocks(size: int, owned: int = 1) -> Draw:
    def draw(rng: random.Random, count: int) -> list[int]:
        bases = [
            index * size for index in rng.sample(range(-(-1024 // size), 65_536 // size), owned)
        ]
        return rng.sample([base + offset for base in bases for offset in range(size)], count)

    return draw


def sequential(step: int = 1, others: float = 0.0, overtaken: int = 0) -> Draw:
    """`others`: mean of other subscribers' steps between two of ours; `overtaken`: reorderings."""

    def draw(rng: random.Random, count: int) -> list[int]:
        position, ports = rng.randrange(64_512), []
        for _ in range(count):
            while rng.random() < others / (1 + others):
                position += step
            position += step
            ports.append(1024 + position % 64_512)
        for _ in range(overtaken):
            moved = ports.pop(rng.randrange(count - 1))
            ports.insert(rng.randrange(count - 1), moved)
        return ports

    return draw


LAWS: dict[str, tuple[Draw, AllocationLaw]] = {
    "uniform 1024..65535": (uniform(1024, 65_535), AllocationLaw.UNIFORM),
    "uniform 15340..44360": (uniform(15_340, 44_360), AllocationLaw.UNIFORM),
    "scaled beta 4631..18508": (beta, AllocationLaw.UNIFORM),
    **{
        f"block {size}": (blocks(size), AllocationLaw.BLOCK)
        for size in (64, 128, 256, 512, 1024, 2048, 4096)
    },
    "2 blocks of 128": (blocks(128, 2), AllocationLaw.BLOCK),
    "2 blocks of 2048": (blocks(2048, 2), AllocationLaw.BLOCK),
    "sequential": (sequential(), AllocationLaw.SEQUENTIAL),
    "sequential -1": (sequential(-1, 1.0), AllocationLaw.SEQUENTIAL),
    "sequential, 10 others each": (sequential(1, 10.0), AllocationLaw.SEQUENTIAL),
    "sequential 2, 50 others each": (sequential(2, 50.0), AllocationLaw.SEQUENTIAL),
    "sequential, 2 of 16 overtaken": (sequential(1, 1.0, 2), AllocationLaw.SEQUENTIAL),
}


@pytest.mark.parametrize("name", LAWS)
def test_sixteen_echoes_show_the_law_and_hold_the_next_port(name: str) -> None:
    draw, law = LAWS[name]
    right = covered = right_size = 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        *seen, following = draw(rng, 17)
        allocation = fit(seen)
        right += allocation.law is law
        covered += any(part.low <= following <= part.high for part in allocation.ranges)
        right_size += f"block {allocation.block_size}" in name.replace("blocks of", "block")
    print(
        f"{name:30} law {right / SEEDS:.3f} (>= {wilson_low(right, SEEDS):.3f}), "
        f"next port covered {covered / SEEDS:.3f} (>= {wilson_low(covered, SEEDS):.3f})"
        f", seeds 0..{SEEDS - 1}"
    )
    assert wilson_low(right, SEEDS) >= 0.95
    assert covered / SEEDS >= 0.985
    if law is AllocationLaw.BLOCK:
        assert wilson_low(right_size, SEEDS) >= 0.93


@pytest.mark.parametrize("count", [4, 6, 8, 12])
@pytest.mark.parametrize("name", [name for name in LAWS if "overtaken" not in name])
def test_few_echoes_may_leave_the_law_open_but_exclude_no_port(name: str, count: int) -> None:
    draw, _ = LAWS[name]
    covered = 0
    for seed in range(100):
        *seen, following = draw(random.Random(seed), count + 1)
        covered += any(part.low <= following <= part.high for part in fit(seen).ranges)
    assert covered / 100 >= 0.96, f"{covered} of seeds 0..99"


def test_four_ports_of_a_large_block_are_ambiguous_and_so_stay_wide() -> None:
    # Any four ports inside one half of a 2048-block would fit a 1024-block.
    allocation = fit([20_480, 21_300, 20_911, 20_700])
    assert allocation.law is AllocationLaw.UNIFORM
    assert allocation.ranges == (SAFE_RANGE,)


def test_no_samples_no_law() -> None:
    assert fit_allocation([]) is None


def test_preserved_ports_are_recognised_at_once_and_with_collisions() -> None:
    assert fit([30_000]).law is AllocationLaw.PRESERVING
    collided = [30_000, 41_111, 30_002, 52_222, 30_004, 30_005]
    assert fit(collided).law is AllocationLaw.PRESERVING


def test_echoes_of_one_mapping_count_once() -> None:
    # An endpoint-independent NAT seen by three observers is one port, not three equal ones.
    samples = [
        PortSample(30_000, Endpoint("198.51.100.1", 4000 + index), 50_000, float(index))
        for index in range(3)
    ]
    allocation = fit_allocation(samples)
    assert allocation is not None
    assert allocation.sample_count == 1
    assert allocation.is_overloading is None


def test_one_external_port_for_two_mappings_shows_overloading() -> None:
    rng = random.Random(3)
    ports = [rng.randrange(20_480, 20_608) for _ in range(16)]
    assert fit([*ports, ports[0]]).is_overloading is True


def test_the_rate_of_other_subscribers_is_estimated() -> None:
    rates = []
    for seed in range(100):
        ports = sequential(1, others=0.6)(random.Random(seed), 16)  # each 15 ms: 40 a second
        allocation = fit(ports)
        assert allocation.law is AllocationLaw.SEQUENTIAL
        assert allocation.others_per_s is not None
        rates.append(allocation.others_per_s)
    assert 35 < sum(rates) / len(rates) < 45


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        (PortAllocation(AllocationLaw.UNIFORM), [(1024, 65_535)]),
        (
            PortAllocation(
                AllocationLaw.UNIFORM, low=5000, high=9000, seen_low=6000, seen_high=8000
            ),
            [(6000, 8000), (5000, 5999), (8001, 9000)],
        ),
        (
            PortAllocation(AllocationLaw.BLOCK, block_size=256, blocks=(2048, 1024)),
            [(2048, 2303), (1024, 1279)],
        ),
        (
            PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=5000),
            [(5001, 5064)],
        ),
        (
            PortAllocation(AllocationLaw.SEQUENTIAL, step=-1, last_port=5000),
            [(4936, 4999)],
        ),
        (
            PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=65_525),
            [(65_526, 65_535), (1024, 1077)],
        ),
        (
            PortAllocation(AllocationLaw.SEQUENTIAL, step=-1, last_port=1034),
            [(1024, 1033), (65_482, 65_535)],
        ),
        (
            PortAllocation(AllocationLaw.SEQUENTIAL, step=2, last_port=5000, others_per_s=10.0),
            [(5001, 5288)],
        ),
    ],
)
def test_ranges(allocation: PortAllocation, expected: list[tuple[int, int]]) -> None:
    assert [tuple(part) for part in allocation.ranges] == expected
    assert allocation.port_count == sum(high - low + 1 for low, high in expected)


def take(ports: Iterator[int], count: int) -> list[int]:
    return list(islice(ports, count))


def test_a_counter_is_predicted_port_by_port_or_in_strides() -> None:
    rng = random.Random(1)
    counter = PortAllocation(AllocationLaw.SEQUENTIAL, step=1, last_port=65_533)
    assert take(predict_ports(counter, rng=rng), 4) == [65_534, 65_535, 1024, 1025]
    backwards = PortAllocation(AllocationLaw.SEQUENTIAL, step=-2, last_port=1027)
    assert take(predict_ports(backwards, rng=rng), 3) == [1025, 65_535, 65_533]
    # Sixteen mappings in a row: wherever the run starts in the window, one of four tries is in it.
    strided = take(predict_ports(counter, rng=rng, run_length=16), 4)
    position = {port: index for index, port in enumerate(predict_ports(counter, rng=rng))}
    assert [position[port] for port in strided] == [15, 31, 47, 63]


@pytest.mark.parametrize(
    "allocation",
    [
        PortAllocation(AllocationLaw.UNIFORM, low=3000, high=9000, seen_low=4000, seen_high=5000),
        PortAllocation(AllocationLaw.BLOCK, block_size=64, blocks=(2048, 1024, 4096)),
        PortAllocation(AllocationLaw.PRESERVING, low=2000, high=4000),
        PortAllocation(AllocationLaw.SEQUENTIAL, low=2000, high=4000, step=1, last_port=3990),
        PortAllocation(AllocationLaw.SEQUENTIAL, low=2000, high=4000, step=-2, last_port=3990),
        PortAllocation(AllocationLaw.SEQUENTIAL, low=2000, high=3999, step=6, last_port=3990),
    ],
    ids=lambda allocation: str(allocation),
)
@pytest.mark.parametrize("run_length", [1, 7, 16])
def test_every_port_comes_exactly_once(allocation: PortAllocation, run_length: int) -> None:
    ports = list(
        predict_ports(allocation, rng=random.Random(5), local_port=2500, run_length=run_length)
    )
    assert len(ports) == len(set(ports))
    if allocation.law is AllocationLaw.SEQUENTIAL:
        assert sorted(ports) == list(range(allocation.low, allocation.high + 1))
    else:
        expected = {port for low, high in allocation.ranges for port in range(low, high + 1)}
        assert set(ports) == expected


def test_likelier_ports_come_first() -> None:
    rng = random.Random(9)
    two_blocks = PortAllocation(AllocationLaw.BLOCK, block_size=64, blocks=(2048, 1024))
    assert all(2048 <= port < 2112 for port in take(predict_ports(two_blocks, rng=rng), 64))
    narrow = PortAllocation(
        AllocationLaw.UNIFORM, low=3000, high=9000, seen_low=4000, seen_high=4999
    )
    assert all(4000 <= port < 5000 for port in take(predict_ports(narrow, rng=rng), 1000))
    keeping = PortAllocation(AllocationLaw.PRESERVING)
    assert next(predict_ports(keeping, rng=rng, local_port=4711)) == 4711


@given(
    st.lists(st.integers(1, 6000), min_size=2, max_size=8, unique=True).map(sorted),
    st.integers(0, 2**32),
)
def test_a_lazy_shuffle_is_a_permutation(ends: list[int], seed: int) -> None:
    ranges = [PortRange(low, high) for low, high in zip(ends[::2], ends[1::2], strict=False)]
    ports = list(shuffled_ports(ranges, random.Random(seed)))
    assert sorted(ports) == [port for low, high in ranges for port in range(low, high + 1)]


def test_a_lazy_shuffle_is_fair() -> None:
    # First and last place of each of six ports, 3,000 shuffles: 500 +- 5 standard deviations.
    counts = {(place, port): 0 for place in (0, 5) for port in range(1, 7)}
    for seed in range(3000):
        order = list(shuffled_ports([PortRange(1, 2), PortRange(3, 6)], random.Random(seed)))
        counts[0, order[0]] += 1
        counts[5, order[5]] += 1
    assert all(abs(count - 500) < 102 for count in counts.values()), counts


def test_few_ports_say_where_to_begin() -> None:
    # What is drawn about the middle of a range is not known to be; it is tried first all the same.
    rng = random.Random(3)
    crowd = [round(10_000 + 20_000 * rng.betavariate(4, 4)) for _ in range(30)]
    allocation = fit(crowd)
    assert allocation.law is AllocationLaw.UNIFORM
    assert allocation.shape is None
    first = take(predict_ports(allocation, rng=rng), 2000)
    assert sum(17_000 <= port <= 23_000 for port in first) > 1500
    (densest, share), *_ = allocation.slices
    assert densest.low <= first[0] <= densest.high
    assert share > 1.5 * densest.port_count / allocation.port_count
    assert sum(share for _, share in allocation.slices) == pytest.approx(1.0)
    assert sum(part.port_count for part, _ in allocation.slices) == allocation.port_count


@pytest.mark.parametrize("ports", [[2000] * 29 + [60_000], [2000, 2001] * 3, [1024, 65_535]])
def test_weights_are_bounded_whatever_the_ports(ports: list[int]) -> None:
    weights = port_weights(ports, 1024, 65_535)
    assert len(weights) == WEIGHT_SLICES
    assert max(weights) == WEIGHT_MAX
    assert min(weights) >= 1


def test_a_range_without_weights_has_no_slices() -> None:
    assert PortAllocation(AllocationLaw.UNIFORM).slices == ()
    # Narrower than its slices: some hold no port.
    narrow = PortAllocation(AllocationLaw.UNIFORM, low=5000, high=5009, weights=(1,) * 32)
    assert sorted(part.low for part, _ in narrow.slices) == [*range(5000, 5010)]


def test_few_ports_are_nearly_as_good_as_the_law() -> None:
    """Openers and probes of a puncture in the order of 30 ports' weights, by the true Beta law."""

    def mass(part: PortRange) -> float:
        shares = ((port - 4630.72) / 13937.38 for port in range(part.low, part.high + 1, 8))
        return sum(shape_density(2.242, 5.008, share) for share in shares if 0 < share < 1)

    def cost(order: Sequence[tuple[PortRange, float]]) -> float:
        opened = cheapest_prior_opened_count([(part.port_count, p) for part, p in order])
        masses = [mass(part) for part, _ in order]
        truth = [
            (part.port_count, each / sum(masses))
            for (part, _), each in zip(order, masses, strict=True)
        ]
        return opened + expected_prior_probe_count(truth, opened)

    law = PortAllocation(AllocationLaw.UNIFORM, low=4631, high=18_568, shape=(2.242, 5.008))
    fits = [fit(beta(random.Random(seed), 30)) for seed in range(20)]
    by_weights = sum(cost(each.slices) for each in fits) / len(fits)
    by_range = sum(cost([(PortRange(each.low, each.high), 1.0)]) for each in fits) / len(fits)
    print(f"exact {cost(law.slices):.0f}, by weights {by_weights:.0f}, by range {by_range:.0f}")
    assert by_weights < 1.08 * cost(law.slices)
    assert by_range > 1.3 * cost(law.slices)
