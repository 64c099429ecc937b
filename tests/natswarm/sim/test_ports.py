"""The laws of external ports, without a NAT around them."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean

import pytest

from natswarm.nat.behaviour import AllocationLaw
from natswarm.sim.ports import (
    Allocation,
    Blocks,
    Preserving,
    ScaledBeta,
    Sequential,
    Uniform,
    make_allocator,
)

LAWS: list[Allocation] = [
    Preserving(3000, 3127),
    Uniform(3000, 3127),
    ScaledBeta(3000, 127, 2.0, 5.0),
    Sequential(3000, 3127, step=1, cross_traffic_per_s=5.0),
    Sequential(3000, 3127, step=-3),
    Blocks(2950, 3210, size=64, max_blocks=2),
    Blocks(3000, 3127, size=64, max_blocks=2, is_aligned=False, is_sequential=True),
]


class Table:
    """Which ports are in use, as a NAT with exclusive ports would say."""

    def __init__(self, law: Allocation, seed: int) -> None:
        print(f"seed {seed}")
        self.allocator = make_allocator(law, random.Random(seed))
        self.used: dict[int, str] = {}
        self.now = 0.0

    def allocate(self, subscriber: str = "10.0.0.1", port: int = 40_000) -> int | None:
        self.now += 0.01
        found = self.allocator.allocate(subscriber, port, lambda p: p not in self.used, self.now)
        if found is not None:
            assert found not in self.used
            self.used[found] = subscriber
        return found

    def release(self, port: int) -> None:
        self.allocator.release(self.used.pop(port), port)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_port_of_the_range_is_given_once_and_then_none(law: Allocation):
    table = Table(law, seed=11)
    ports = [table.allocate() for _ in range(128)]
    assert None not in ports
    assert len(set(ports)) == 128
    assert all(law.low <= port <= law.high for port in ports if port is not None)
    assert table.allocate() is None
    first = ports[0]
    assert first is not None
    table.release(first)
    assert table.allocate() == first


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_same_seed_gives_the_same_ports(law: Allocation):
    first, again, other = (Table(law, seed) for seed in (5, 5, 6))
    ports = [first.allocate() for _ in range(60)]
    assert [again.allocate() for _ in range(60)] == ports
    assert [other.allocate() for _ in range(60)] != ports


def test_preserving_keeps_the_port_where_it_can():
    table = Table(Preserving(1024, 65_535), seed=1)
    assert table.allocate(port=40_000) == 40_000
    moved = table.allocate(port=40_000)
    assert moved not in (None, 40_000)
    outside = table.allocate(port=80)
    assert outside is not None
    assert outside >= 1024


def test_sequential_steps_over_what_is_taken_and_round_at_the_end():
    table = Table(Sequential(1000, 1009, step=2), seed=2)
    ports = [table.allocate() for _ in range(5)]
    steps = {(after - before) % 10 for before, after in itertools.pairwise(ports)}  # type: ignore[operator]
    assert steps == {2}
    table = Table(Sequential(1000, 1009, step=1), seed=2)
    first = table.allocate()
    assert first is not None
    following = 1000 + (first - 1000 + 1) % 10
    table.used[following] = "somebody"
    assert table.allocate() == 1000 + (first - 1000 + 2) % 10


def test_cross_traffic_is_poisson():
    seed, rate, count = 7, 35.0, 4000
    print(f"seed {seed}")
    law = Sequential(1, 65_535, cross_traffic_per_s=rate)
    allocator = make_allocator(law, random.Random(seed))
    ports = [allocator.allocate("a", 1, lambda port: True, index * 0.1) for index in range(count)]
    gaps = [
        (after - before) % 65_535 - 1
        for before, after in itertools.pairwise(ports)
        if before is not None and after is not None
    ]
    mean = fmean(gaps)
    assert abs(mean - 3.5) < 4 * math.sqrt(3.5 / count)
    variance = fmean((gap - mean) ** 2 for gap in gaps)
    assert abs(variance - 3.5) < 0.4  # a Poisson law's variance is its mean


def test_long_idle_times_cost_little_and_still_count():
    allocator = make_allocator(Sequential(1, 65_535, cross_traffic_per_s=10.0), random.Random(8))
    first = allocator.allocate("a", 1, lambda port: True, 0.0)
    later = allocator.allocate("a", 1, lambda port: True, 1000.0)
    assert first is not None
    assert later is not None
    passed = (later - first) % 65_535
    assert abs(passed - 10_001) < 500


def test_uniform_draws_evenly():
    seed, count = 9, 64_000
    print(f"seed {seed}")
    allocator = make_allocator(Uniform(2048, 2111), random.Random(seed))
    counts = [0] * 64
    for _ in range(count):
        port = allocator.allocate("a", 1, lambda port: True, 0.0)
        assert port is not None
        counts[port - 2048] += 1
    chi_square = sum((seen - 1000) ** 2 / 1000 for seen in counts)
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)


def test_the_beta_law_has_the_mean_of_its_source():
    law = ScaledBeta(4630.72, 13_937.38, 2.242, 5.008)
    assert (law.low, law.high) == (4631, 18_568)
    allocator = make_allocator(law, random.Random(10))
    ports = [allocator.allocate("a", 1, lambda port: True, 0.0) for _ in range(4000)]
    mean = fmean(port for port in ports if port is not None)
    expected = 4630.72 + 13_937.38 * 2.242 / (2.242 + 5.008)
    assert abs(mean - expected) < 4 * 2254 / math.sqrt(4000)  # 2254: standard deviation of the law


def test_a_block_belongs_to_one_subscriber():
    table = Table(Blocks(1024, 65_535, size=256, max_blocks=4), seed=12)
    for _ in range(300):
        table.allocate("10.0.0.1")
        table.allocate("10.0.0.2")
    blocks: dict[int, set[str]] = {}
    for port, subscriber in table.used.items():
        blocks.setdefault(port // 256, set()).add(subscriber)
    assert len(blocks) == 4  # 300 ports are two blocks for each
    assert all(len(owners) == 1 for owners in blocks.values())


def test_a_subscriber_gets_no_more_than_its_blocks():
    table = Table(Blocks(1024, 65_535, size=128, max_blocks=2), seed=13)
    assert None not in [table.allocate() for _ in range(256)]
    assert table.allocate() is None
    assert table.allocate("10.0.0.2") is not None


def test_subscribers_share_the_range_until_no_block_is_left():
    table = Table(Blocks(1024, 1535, size=128, max_blocks=2), seed=14)
    for index in range(4):
        assert table.allocate(f"10.0.0.{index}") is not None
    assert table.allocate("10.0.0.9") is None
    [port] = [port for port, owner in table.used.items() if owner == "10.0.0.2"]
    table.release(port)
    found = table.allocate("10.0.0.9")
    assert found is not None
    assert found // 128 == port // 128


def test_the_newest_block_can_stay_for_ever():
    law = Blocks(1024, 65_535, size=16, max_blocks=2, keeps_newest=True)
    table = Table(law, seed=15)
    first = table.allocate()
    assert first is not None
    for _ in range(50):
        table.release(next(iter(table.used)))
        port = table.allocate()
        assert port is not None
        assert port // 16 == first // 16


def test_blocks_inside_are_sequential_when_asked():
    table = Table(Blocks(1024, 65_535, size=128, is_sequential=True), seed=16)
    ports = [table.allocate() for _ in range(128)]
    first = ports[0]
    assert first is not None
    assert first % 128 == 0
    assert ports == list(range(first, first + 128))


@pytest.mark.parametrize(
    ("is_aligned", "bases"), [(True, [1024, 1152, 1280]), (False, [1000, 1128, 1256])]
)
def test_blocks_are_aligned_to_multiples_or_to_the_range(is_aligned: bool, bases: list[int]):
    assert Blocks(1000, 1450, size=128, is_aligned=is_aligned).bases() == bases


def test_the_laws_have_the_names_that_profiles_use():
    assert Preserving.law is AllocationLaw.PRESERVING
    assert Sequential.law is AllocationLaw.SEQUENTIAL
    assert Blocks.law is AllocationLaw.BLOCK
    assert Uniform.law is ScaledBeta.law is AllocationLaw.UNIFORM


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0, 10),
        lambda: Uniform(11, 10),
        lambda: Preserving(1, 65_536),
        lambda: Sequential(1, 10, step=0),
        lambda: Sequential(1, 10, cross_traffic_per_s=-1.0),
        lambda: Blocks(1024, 1100, size=256),
        lambda: Blocks(max_blocks=0),
        lambda: ScaledBeta(60_000, 10_000, 1, 1),
    ],
)
def test_impossible_laws_are_refused(make):
    with pytest.raises(ValueError, match=r"not (a|blocks)"):
        make()
