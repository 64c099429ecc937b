"""The classes of pairs that `tools/bench/puncture.py` measures, and the fewest probes each takes.

The optimum counts the probes of both sides up to the one that opens the path, with nothing under
way: openers and probes alike, no answers. To these every real puncture adds what it sends until the
answer is back (pace x round trip) and what is lost.

    known endpoints     a probe and a retry of each side: 4
    one dimension       M + (R+1)/(M+1), least at M = sqrt(R+1) - 1; p99 by the hypergeometric law;
                        of a quota of 64 mappings, 8 are left to other applications
    a prior p(port)     M + sum over n of (1 - p(S_n))^M, ports by descending p, least over M
    two dimensions      2 * sqrt(pi)/2 * sqrt(R_a R_b); p99 by Rayleigh's law
    a counter           M mappings in a row, then windows of M ports, likeliest first, least over M
    two counters        Klinec & Matyas 2014: the walks cross where i = b + (1+l/r)j, 2j = a +
                        (1+l/r)i, with the counters a and b ports further than was last seen and l
                        ports a second taken by others; plus r x 1.5 round trips under way, without
                        which the fastest r were best; least over the pace r

Formulas: docs/puncturing.md section 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.puncture.odds import (
    cheapest_opened_count,
    expected_meeting_probe_count,
    expected_probe_count,
    meeting_probe_count_quantile,
    probe_count_quantile,
)
from natswarm.puncture.plan import Limits
from natswarm.sim.nat_behaviour import NatBehaviour
from natswarm.sim.ports import (
    Allocation,
    Blocks,
    Preserving,
    ScaledBeta,
    Sequential,
    Uniform,
    poisson,
)
from natswarm.sim.rate import RateLimit

__all__ = ["CLASSES", "ECHO_AGE_MAX_S", "Optimum", "PairClass", "Side"]

# From the last echo to the start of a puncture: 0 to this, evenly, and neither side knows.
ECHO_AGE_MAX_S = 2.0
MEAN_ROUND_TRIP_S = 0.170
OTHERS_PER_S = 35.0  # flows of other subscribers through a counter: Klinec & Matyas's limit


@dataclass(frozen=True, slots=True)
class Optimum:
    """Probes of both sides: mean, median, 99th percentile."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class Side:
    """One side: its NAT, and the one above that, if any.

    Attributes:
        nat: The host's own NAT.
        is_home: At the customer's (the slow link is beyond it) or at the carrier.
        above: The carrier's NAT that it is behind.
        is_fitted: Whether its law is known from echoes alone, not as it is.
    """

    nat: NatBehaviour
    is_home: bool = False
    above: NatBehaviour | None = None
    is_fitted: bool = False

    @property
    def outer(self) -> NatBehaviour:
        """The NAT whose ports the world sees."""
        return self.nat if self.above is None else self.above


@dataclass(frozen=True, slots=True)
class PairClass:
    """A class of pairs.

    Attributes:
        name: For the table.
        sides: The two.
        optimum: Worked out when asked for.
        success_target: Share of punctures that must succeed.
        limits: Of our side.
        share: Of the seeds that are run: some take minutes each.
        deadline_s: After this it has failed, whatever the strategy hopes.
    """

    name: str
    sides: tuple[Side, Side]
    optimum: Callable[[], Optimum]
    success_target: float
    limits: Limits = field(default_factory=Limits)
    share: float = 1.0
    deadline_s: float = 60.0


def known() -> Optimum:
    """Both endpoints are known, or one side can be dialled."""
    return Optimum(4.0, 4.0, 4.0)


def one_dimension(port_count: int, opened_max: int | None = None) -> Optimum:
    """One side draws from `port_count` ports, and may hold `opened_max` mappings."""
    opened = cheapest_opened_count(port_count)
    if opened_max is not None:
        opened = min(opened, opened_max)

    def quantile(probability: float) -> int:
        return opened + probe_count_quantile(
            probability, opened_count=opened, port_count=port_count
        )

    mean = opened + expected_probe_count(opened_count=opened, port_count=port_count)
    return Optimum(mean, quantile(0.5), quantile(0.99))


def two_dimensions(port_count: int) -> Optimum:
    """Both sides draw from `port_count` ports."""
    ports = (port_count, port_count)
    median, p99 = (
        2 * meeting_probe_count_quantile(probability, port_counts=ports)
        for probability in (0.5, 0.99)
    )
    return Optimum(2 * expected_meeting_probe_count(ports), median, p99)


def prior(law: ScaledBeta) -> Optimum:
    """One side draws from a law that is not flat."""
    weights = []
    for port in range(law.low, law.high + 1):
        share = min(max((port - law.offset) / law.span, 1e-9), 1 - 1e-9)
        weights.append(share ** (law.alpha - 1) * (1 - share) ** (law.beta - 1))
    weights.sort(reverse=True)
    total = math.fsum(weights)
    return min(
        (_prior_optimum([weight / total for weight in weights], opened) for opened in _OPENED),
        key=lambda optimum: optimum.mean,
    )


_OPENED = range(40, 240, 10)


def _prior_optimum(probabilities: Sequence[float], opened: int) -> Optimum:
    mean, missed, left = 0.0, 1.0, 1.0
    quantiles: list[int] = []
    for count, probability in enumerate(probabilities, 1):
        mean += missed
        left -= probability
        missed = max(left, 0.0) ** opened
        for index, chance in enumerate((0.5, 0.99)):
            if len(quantiles) == index and 1 - missed >= chance:
                quantiles.append(count)
    return Optimum(opened + mean, opened + quantiles[0], opened + quantiles[1])


@lru_cache(maxsize=1)
def _drifts() -> tuple[int, ...]:
    """Return how far a counter moved since the last echo, in many cases.

    The echo goes on to the observer, and the first datagram of the puncture to the NAT: half of a
    round trip in all.
    """
    rng = random.Random(1)
    way_s = MEAN_ROUND_TRIP_S / 2
    ages_s = (way_s + rng.uniform(0, ECHO_AGE_MAX_S) for _ in range(20_000))
    return tuple(poisson(OTHERS_PER_S * age_s, rng) for age_s in ages_s)


def one_counter() -> Optimum:
    """One side counts, others take ports in between."""
    return min((_windows(opened) for opened in range(1, 33)), key=lambda each: each.mean)


def _windows(opened: int) -> Optimum:
    masses: dict[int, int] = {}
    for drift in _drifts():
        masses[drift // opened] = masses.get(drift // opened, 0) + 1
    return _of_counts(
        [
            opened + rank
            for rank, mass in enumerate(sorted(masses.values(), reverse=True), 1)
            for _ in range(mass)
        ]
    )


def two_counters() -> Optimum:
    """Both sides count."""
    return min((_crossings(pace) for pace in range(100, 1001, 50)), key=lambda each: each.mean)


def _crossings(pace: float) -> Optimum:
    drifts = _drifts()
    half = len(drifts) // 2
    slope = 1 + OTHERS_PER_S / pace
    counts = []
    for a, b in zip(drifts[:half], drifts[half:], strict=True):
        j = (a + slope * b) / (2 - slope * slope)
        counts.append(round(b + slope * j + j + 2 + pace * 1.5 * MEAN_ROUND_TRIP_S))
    return _of_counts(counts)


def _of_counts(counts: list[int]) -> Optimum:
    counts.sort()
    return Optimum(
        sum(counts) / len(counts), counts[len(counts) // 2], counts[int(0.99 * len(counts))]
    )


def drawing(
    allocation: Allocation,
    *,
    max_mappings: int | None = None,
    subscriber_rate: RateLimit | None = None,
    tftp_helper: bool = False,
) -> Side:
    """An APDM/APDF carrier."""
    return Side(
        NatBehaviour(
            mapping=Mapping.APDM,
            filtering=Filtering.APDF,
            allocation=allocation,
            max_mappings=max_mappings,
            subscriber_rate=subscriber_rate,
            tftp_helper=tftp_helper,
        )
    )


BETA = ScaledBeta(4630.72, 13937.38, 2.242, 5.008)
HOME_NAT = NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.APDF, allocation=Preserving())
HOME = Side(HOME_NAT, is_home=True)
OPEN_TO_ADDRESS = Side(
    NatBehaviour(mapping=Mapping.EIM, filtering=Filtering.ADF, allocation=Uniform())
)
UNIFORM = drawing(Uniform())
COUNTER = drawing(Sequential(cross_traffic_per_s=OTHERS_PER_S))
BIG = Limits(probes_per_s=7500.0, probe_count=250_000, mapping_count=250_000, duration_s=120.0)


def _block(size: int) -> Side:
    return drawing(Blocks(size=size))


CLASSES = (
    PairClass("EIM x EIM", (HOME, HOME), known, 0.999),
    PairClass("EIM/ADF x APDM", (OPEN_TO_ADDRESS, UNIFORM), known, 0.999),
    PairClass("EIM x uniform", (HOME, UNIFORM), lambda: one_dimension(64_512), 0.999),
    PairClass("EIM x block 2048", (HOME, _block(2048)), lambda: one_dimension(2048), 0.999),
    PairClass("EIM x block 512", (HOME, _block(512)), lambda: one_dimension(512), 0.999),
    PairClass("EIM x block 128", (HOME, _block(128)), lambda: one_dimension(128), 0.999),
    PairClass("EIM x Beta", (HOME, drawing(BETA)), lambda: prior(BETA), 0.999),
    PairClass(
        "EIM x Beta, by 30 echoes",
        (HOME, replace(drawing(BETA), is_fitted=True)),
        lambda: prior(BETA),
        0.999,
    ),
    PairClass("EIM x counter 35/s", (HOME, COUNTER), one_counter, 0.999),
    PairClass(
        "EIM x double NAT, block 512",
        (HOME, Side(HOME_NAT, is_home=True, above=_block(512).nat)),
        lambda: one_dimension(512),
        0.999,
    ),
    PairClass(
        "EIM x uniform, 64 mappings",
        (HOME, drawing(Uniform(), max_mappings=64)),
        lambda: one_dimension(64_512, 56),
        0.999,
    ),
    PairClass(
        "EIM x block 512, 20 mappings/s",
        (HOME, drawing(Blocks(size=512), subscriber_rate=RateLimit(per_s=20, burst=10))),
        lambda: one_dimension(512),
        0.999,
    ),
    PairClass(
        "block 2048 x block 2048",
        (_block(2048), _block(2048)),
        lambda: two_dimensions(2048),
        0.99,
        deadline_s=10.0,
    ),
    PairClass(
        "block 512 x block 512",
        (_block(512), _block(512)),
        lambda: two_dimensions(512),
        0.99,
        deadline_s=10.0,
    ),
    PairClass(
        "block 128 x block 128",
        (_block(128), _block(128)),
        lambda: two_dimensions(128),
        0.99,
        deadline_s=10.0,
    ),
    PairClass("counter x counter, 35/s", (COUNTER, COUNTER), two_counters, 0.99, deadline_s=10.0),
    PairClass(
        "uniform + TFTP x uniform",
        (drawing(Uniform(), tftp_helper=True), UNIFORM),
        lambda: one_dimension(64_512),
        0.99,
        deadline_s=10.0,
    ),
    PairClass(
        "block 2048 + TFTP x uniform",
        (drawing(Blocks(size=2048), tftp_helper=True), UNIFORM),
        lambda: one_dimension(2048),
        0.99,
        deadline_s=10.0,
    ),
    PairClass(
        "uniform x uniform, big budget",
        (UNIFORM, UNIFORM),
        lambda: two_dimensions(64_512),
        0.99,
        limits=BIG,
        share=0.02,
        deadline_s=120.0,
    ),
)
