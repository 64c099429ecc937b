"""Closed forms against exact fractions, against simulation, and against published numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.puncture.odds import (
    cheapest_opened_count,
    cheapest_prior_opened_count,
    expected_meeting_probe_count,
    expected_prior_probe_count,
    expected_probe_count,
    hit_probability,
    live_mapping_count,
    mean_meeting_time_s,
    meeting_probability,
    meeting_probe_count_quantile,
    prior_probe_count_quantile,
    probe_count_quantile,
    strict_block_probability,
)

ALL = 64_512


@given(st.integers(1, 200), st.data())
def test_one_dimension_equals_the_exact_fraction(port_count: int, data: st.DataObject) -> None:
    opened = data.draw(st.integers(0, port_count))
    probed = data.draw(st.integers(0, port_count))
    exact = 1 - Fraction(comb(port_count - opened, probed), comb(port_count, probed))
    chance = hit_probability(opened_count=opened, probed_count=probed, port_count=port_count)
    assert chance == pytest.approx(float(exact), abs=1e-9)
    assert 0.0 <= chance <= 1.0


@given(st.integers(1, ALL), st.data(), st.floats(0, 1))
def test_the_quantile_is_the_least_count_that_suffices(
    port_count: int, data: st.DataObject, probability: float
) -> None:
    opened = data.draw(st.integers(1, port_count))
    count = probe_count_quantile(probability, opened_count=opened, port_count=port_count)

    def chance(probed: int) -> float:
        return hit_probability(opened_count=opened, probed_count=probed, port_count=port_count)

    assert chance(count) >= probability
    assert count == 0 or chance(count - 1) < probability


def test_the_published_table() -> None:
    # least total and the M it is at, for each range: docs/puncturing.md section 4
    for port_count, total, opened in [
        (ALL, 507, 253),
        (2048, 90, 44),
        (512, 44, 22),
        (128, 22, 10),
    ]:
        best = cheapest_opened_count(port_count)
        assert best == opened
        cost = best + expected_probe_count(opened_count=best, port_count=port_count)
        assert round(cost) == pytest.approx(total, abs=1)
        for other in (best - 1, best + 1):
            assert cost <= other + expected_probe_count(opened_count=other, port_count=port_count)
    # with M = 256: mean and p99
    for port_count, mean, p99 in [(ALL, 251, 1148), (2048, 8, 35), (512, 2, 7)]:
        expected = expected_probe_count(opened_count=256, port_count=port_count)
        assert round(expected) == mean
        quantile = probe_count_quantile(0.99, opened_count=256, port_count=port_count)
        assert quantile == pytest.approx(p99, abs=1)
    # two dimensions: mean and p99 of each side
    for port_count, mean, p99 in [
        (ALL, 57_172, 138_441),
        (2048, 1815, 4395),
        (512, 454, 1099),
        (128, 113, 275),
    ]:
        assert round(expected_meeting_probe_count((port_count, port_count))) == mean
        quantile = meeting_probe_count_quantile(0.99, port_counts=(port_count, port_count))
        assert quantile == pytest.approx(p99, abs=1)


def test_kotlin_birthday_connect_sends_its_243587_packets_for_a_reason() -> None:
    # The author's bound for uniform x uniform: "99.9999 %".
    chance = meeting_probability(probe_counts=(243_587, 243_587), port_counts=(ALL, ALL))
    assert 1 - chance == pytest.approx(1e-6, rel=0.4)


@pytest.mark.parametrize(
    ("port_count", "opened", "probed"), [(256, 15, 30), (2048, 44, 60), (ALL, 253, 250)]
)
def test_one_dimension_by_simulation(port_count: int, opened: int, probed: int) -> None:
    trials = 600 if port_count == ALL else 2000
    rng = random.Random(7)
    hits = 0
    first_hits = 0
    for _ in range(trials):
        mappings = set(rng.sample(range(port_count), opened))
        order = rng.sample(range(port_count), min(port_count, 12 * port_count // opened))
        first = next((n for n, port in enumerate(order, 1) if port in mappings), len(order))
        hits += first <= probed
        first_hits += first
    chance = hit_probability(opened_count=opened, probed_count=probed, port_count=port_count)
    spread = 3.3 * math.sqrt(chance * (1 - chance) / trials)
    assert hits / trials == pytest.approx(chance, abs=spread), "seed 7"
    expected = expected_probe_count(opened_count=opened, port_count=port_count)
    assert first_hits / trials == pytest.approx(expected, rel=3.3 / math.sqrt(trials))


def test_a_flat_prior_is_drawing_with_repetition() -> None:
    # Mappings may share a port by a prior, so it takes a hair longer than without repetition.
    for opened in (5, 22):
        even = [(64, 1 / 8)] * 8
        expected = expected_prior_probe_count(even, opened)
        assert expected == pytest.approx(512 / (opened + 1), rel=0.01)
        assert prior_probe_count_quantile(0.99, even, opened) == pytest.approx(
            probe_count_quantile(0.99, opened_count=opened, port_count=512), rel=0.05
        )
    assert cheapest_prior_opened_count(even) == pytest.approx(cheapest_opened_count(512), abs=1)


def test_a_prior_by_simulation() -> None:
    slices = [(100, 0.5), (100, 0.3), (200, 0.15), (400, 0.05)]
    rng = random.Random(17)
    opened, trials = 12, 4000
    counts = []
    for _ in range(trials):
        firsts = []
        for _ in range(opened):
            (index,) = rng.choices(range(4), [mass for _, mass in slices])
            before = sum(ports for ports, _ in slices[:index])
            firsts.append(before + rng.randrange(slices[index][0]) + 1)
        counts.append(min(firsts))
    expected = expected_prior_probe_count(slices, opened)
    assert sum(counts) / trials == pytest.approx(expected, rel=4 / math.sqrt(trials)), "seed 17"
    for probability in (0.5, 0.9, 0.99):
        quantile = prior_probe_count_quantile(probability, slices, opened)
        share = sum(count <= quantile for count in counts) / trials
        # Counts are small and whole, so a quantile may hold a few per cent more.
        assert probability - 0.03 <= share <= probability + 0.06, "seed 17"


def meets_after(ports: tuple[int, int], rng: random.Random) -> int:
    """Probe in turn as two overloading APDM NATs do; return the probes of each side."""
    pairs: tuple[dict[int, set[int]], dict[int, set[int]]] = ({}, {})
    for count in range(1, 100_000):
        for side in (0, 1):
            drawn, guessed = rng.randrange(ports[side]), rng.randrange(ports[1 - side])
            if drawn in pairs[1 - side].get(guessed, ()):
                return count
            pairs[side].setdefault(drawn, set()).add(guessed)
    raise AssertionError("never met")


@pytest.mark.parametrize("ports", [(64, 64), (256, 256), (128, 512)])
def test_two_dimensions_by_simulation(ports: tuple[int, int]) -> None:
    trials = 1000
    rng = random.Random(11)
    counts = [meets_after(ports, rng) for _ in range(trials)]
    mean = expected_meeting_probe_count(ports)
    # The law is Rayleigh's: its standard deviation is 0.52 of its mean.
    assert sum(counts) / trials == pytest.approx(mean, rel=3.3 * 0.53 / math.sqrt(trials))
    for probability in (0.5, 0.9):
        quantile = meeting_probe_count_quantile(probability, port_counts=ports)
        share = sum(count <= quantile for count in counts) / trials
        assert share == pytest.approx(
            probability, abs=3.3 * math.sqrt(probability * (1 - probability) / trials) + 0.01
        ), "seed 11"


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_strict_block_by_simulation(fraction: float) -> None:
    size, trials = 256, 1500
    rng = random.Random(13)
    used = round(fraction * size)
    meetings = 0
    for _ in range(trials):
        # Each side: distinct external ports, each towards another guessed port.
        ours = dict(zip(rng.sample(range(size), used), rng.sample(range(size), used), strict=True))
        peers = dict(zip(rng.sample(range(size), used), rng.sample(range(size), used), strict=True))
        meetings += any(peers.get(guess) == port for port, guess in ours.items())
    chance = strict_block_probability(fraction)
    assert meetings / trials == pytest.approx(
        chance, abs=3.3 * math.sqrt(chance * (1 - chance) / trials)
    ), "seed 13"


def test_only_live_mappings_count() -> None:
    assert live_mapping_count(opened_per_s=100, lifetime_s=30, cap=10_000) == 3000
    assert live_mapping_count(opened_per_s=1000, lifetime_s=65, cap=4096) == 4096
    # orange-bg x orange-bg at 1,000/s and 65 s: 32 s on average, were the quota endless.
    assert mean_meeting_time_s(
        port_counts=(ALL, ALL), probes_per_s=1000, live_count=65_000
    ) == pytest.approx(32.0, abs=0.1)
    assert mean_meeting_time_s(
        port_counts=(ALL, ALL), probes_per_s=1000, live_count=4096
    ) == pytest.approx(508, abs=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: hit_probability(opened_count=-1, probed_count=0, port_count=5),
        lambda: hit_probability(opened_count=0, probed_count=6, port_count=5),
        lambda: hit_probability(opened_count=0, probed_count=0, port_count=0),
        lambda: expected_probe_count(opened_count=0, port_count=5),
        lambda: probe_count_quantile(0.5, opened_count=0, port_count=5),
        lambda: probe_count_quantile(1.1, opened_count=1, port_count=5),
        lambda: meeting_probe_count_quantile(1.0, port_counts=(5, 5)),
        lambda: meeting_probability(probe_counts=(1, 1), port_counts=(0, 5)),
        lambda: strict_block_probability(1.5),
    ],
)
def test_senseless_counts_are_errors(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        call()
