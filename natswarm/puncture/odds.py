"""How likely a birthday puncture is to succeed, and how many probes it takes: closed forms.

Notation of docs/puncturing.md: R ports a NAT draws from; M mappings the unpredictable side holds
open (one dimension); n distinct ports the other side probes; N probes of each side where both are
unpredictable (two dimensions). Checked against simulation in tests/natswarm/puncture/test_odds.py.

Source: drawing without replacement (hypergeometric law) for one dimension; for two, each pair of
probes meets with 1/(R_a * R_b), rare and nearly independent events, hence a Poisson count of
meetings. RFC 4787 for the terms. Pure arithmetic: knows ports and probabilities, not NATs or time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "cheapest_opened_count",
    "cheapest_prior_opened_count",
    "expected_meeting_probe_count",
    "expected_prior_probe_count",
    "expected_probe_count",
    "hit_probability",
    "live_mapping_count",
    "mean_meeting_time_s",
    "meeting_probability",
    "meeting_probe_count_quantile",
    "prior_probe_count_quantile",
    "probe_count_quantile",
    "strict_block_probability",
]


def hit_probability(*, opened_count: int, probed_count: int, port_count: int) -> float:
    """Return the chance that at least one of n distinct probed ports is an open mapping.

    P = 1 - C(R-M, n) / C(R, n).

    Args:
        opened_count: M, 0..port_count.
        probed_count: n, 0..port_count.
        port_count: R, at least 1.

    Raises:
        ValueError: A count is out of range.
    """
    _check_counts(port_count, opened_count, probed_count)
    closed_count = port_count - opened_count
    if probed_count > closed_count:
        return 1.0
    # By logarithms of factorials: the binomials have thousands of digits.
    log_miss = (
        math.lgamma(closed_count + 1)
        - math.lgamma(closed_count - probed_count + 1)
        - math.lgamma(port_count + 1)
        + math.lgamma(port_count - probed_count + 1)
    )
    # Both pairs nearly cancel; rounding may leave a miss a hair above certain.
    return -math.expm1(min(log_miss, 0.0))


def expected_probe_count(*, opened_count: int, port_count: int) -> float:
    """Return how many ports are probed on average until one is an open mapping: (R+1)/(M+1).

    Raises:
        ValueError: `opened_count` is not in 1..port_count.
    """
    if opened_count < 1:
        raise ValueError("without an open mapping no probe can hit")
    _check_counts(port_count, opened_count)
    return (port_count + 1) / (opened_count + 1)


def probe_count_quantile(probability: float, *, opened_count: int, port_count: int) -> int:
    """Return how many probes hit an open mapping with at least `probability`, 0..1.

    Raises:
        ValueError: `opened_count` is not in 1..port_count, or `probability` not in 0..1.
    """
    if opened_count < 1 or not 0 <= probability <= 1:
        raise ValueError("no number of probes reaches that probability")
    _check_counts(port_count, opened_count)
    low, high = 0, port_count - opened_count + 1  # so many hit for certain
    while low < high:
        middle = (low + high) // 2
        chance = hit_probability(
            opened_count=opened_count, probed_count=middle, port_count=port_count
        )
        if chance >= probability:
            high = middle
        else:
            low = middle + 1
    return low


def cheapest_opened_count(port_count: int) -> int:
    """Return the M at which opening M mappings and probing for one costs least: sqrt(R+1) - 1.

    It minimises M + (R+1)/(M+1), where each opener counts as much as a probe.
    """
    _check_counts(port_count)
    return max(1, round(math.sqrt(port_count + 1)) - 1)


def expected_prior_probe_count(slices: Sequence[tuple[int, float]], opened_count: int) -> float:
    """Return how many ports are probed on average until one is an open mapping, by a prior.

    Ports are probed in descending probability. What is left of it after n probes misses with its
    complement's power M, so E = sum over n of (1 - p(S_n))^M; within a slice, where the probability
    is even, the sum is an integral.

    Args:
        slices: (ports, probability that a mapping lies there), the densest first; sum 1.
        opened_count: M, at least 1.
    """
    expected, left = 0.0, 1.0
    for ports, probability in slices:
        after = max(left - probability, 0.0)
        if left > after:
            missed = left ** (opened_count + 1) - after ** (opened_count + 1)
            expected += ports * missed / ((opened_count + 1) * (left - after))
        left = after
    return expected


def prior_probe_count_quantile(
    probability: float, slices: Sequence[tuple[int, float]], opened_count: int
) -> int:
    """Return how many probes, likeliest ports first, hit with at least `probability`, below 1."""
    wanted = -math.expm1(math.log1p(-probability) / opened_count)
    count, covered = 0, 0.0
    for ports, mass in slices:
        if covered + mass >= wanted:
            return count + math.ceil(ports * (wanted - covered) / mass)
        count += ports
        covered += mass
    return count


def cheapest_prior_opened_count(slices: Sequence[tuple[int, float]]) -> int:
    """Return the M at which opening M mappings and probing for one by a prior costs least."""
    port_count = sum(ports for ports, _ in slices)
    return min(
        range(1, cheapest_opened_count(port_count) + 2),
        key=lambda opened: opened + expected_prior_probe_count(slices, opened),
    )


def meeting_probability(
    *, probe_counts: tuple[float, float], port_counts: tuple[int, int]
) -> float:
    """Return the chance that two unpredictable sides meet: 1 - exp(-N_a N_b / (R_a R_b)).

    A probe of one side opens a mapping at a random port of its own NAT towards a guessed port of
    the other's; two probes meet when each guess is the other's port.

    Args:
        probe_counts: N_a, N_b: mappings each side has alive at the same time.
        port_counts: R_a, R_b: ports each NAT draws from.
    """
    _check_counts(port_counts[0])
    _check_counts(port_counts[1])
    return -math.expm1(-_product(probe_counts) / _product(port_counts))


def expected_meeting_probe_count(port_counts: tuple[int, int]) -> float:
    """Return the probes of each side until both meet, on average: sqrt(pi)/2 * sqrt(R_a R_b)."""
    return math.sqrt(math.pi) / 2 * math.sqrt(_product(port_counts))


def meeting_probe_count_quantile(probability: float, *, port_counts: tuple[int, int]) -> int:
    """Return the probes of each side that meet with at least `probability`, 0 <= p < 1."""
    if not 0 <= probability < 1:
        raise ValueError("no number of probes reaches that probability")
    return math.ceil(math.sqrt(-math.log1p(-probability) * _product(port_counts)))


def strict_block_probability(used_fraction: float) -> float:
    """Return the chance to meet when both sides use up the fraction f of a block: 1 - exp(-f^2).

    A NAT that gives each port of a block to one mapping at a time ends there: with the whole block
    used, 63 % is all there is until mappings expire.
    """
    if not 0 <= used_fraction <= 1:
        raise ValueError(f"not a fraction: {used_fraction}")
    return -math.expm1(-(used_fraction**2))


def live_mapping_count(*, opened_per_s: float, lifetime_s: float, cap: int) -> float:
    """Return how many mappings are alive in the long run: min(rate * tau, subscriber's cap)."""
    return min(opened_per_s * lifetime_s, cap)


def mean_meeting_time_s(
    *, port_counts: tuple[int, int], probes_per_s: float, live_count: float
) -> float:
    """Return how long two unpredictable sides take on average: R_a R_b / (2 * rate * live).

    In the long run, when mappings die as fast as new ones open: each new one, of either side, meets
    the other's `live_count`, hence the 2.
    """
    return _product(port_counts) / (2 * probes_per_s * live_count)


def _product(pair: tuple[float, float]) -> float:
    return pair[0] * pair[1]


def _check_counts(port_count: int, *counts: int) -> None:
    if port_count < 1 or any(not 0 <= count <= port_count for count in counts):
        raise ValueError(f"not counts among {port_count} ports: {counts}")
