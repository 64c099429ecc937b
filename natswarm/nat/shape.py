"""Is a range drawn from evenly? Where ports crowd, and whether that is more than chance.

Some carriers' ports crowd together inside their range (one was fitted by a Beta law of parameters
2.2 and 5.0). A puncture then meets a mapping sooner if it probes the crowded ports first.

**Where** they seem to crowd may be acted upon without knowing whether they do: if a law is even
after all, one order of ports is as good as any other. So a few ports have their weights, by kernel
density, against the half of a flat law for what chance does to the rest.

**Whether** they do is another question, answered by fitting a Beta law. It takes many ports to see:
such a law differs from an even one over the ports that were seen by about 0.15 nats a port, and its
two parameters have to be paid with log(n) nats and a doubt of 2 % with another 4: some 24 ports,
all that the quick part sees, tell it in one of four cases, some 100 nearly always
(`tools/bench/classify.py` counts). So fewer ports than `fit.SHAPE_SAMPLES_MIN` have no shape.

Source: Johnson, Kotz & Balakrishnan 1995, chapter 25, for the estimate by moments; Silverman 1986,
section 3.4.2, for the width of a kernel.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["WEIGHT_MAX", "WEIGHT_SLICES", "Shape", "fit_shape", "port_weights", "shape_density"]

# Narrower slices tell no more of some thirty ports.
WEIGHT_SLICES = 32
# Weights travel in profiles: up to 127 each takes a byte.
WEIGHT_MAX = 100
# Kernels half as wide again as Silverman's. Of Beta, even, skewed and two-humped laws known by 30
# ports, the probes of a puncture were 1.00 to 1.07 times those with the law known exactly, and 1.00
# to 1.44 times by the range alone (docs/puncturing.md, section 4).
KERNEL_WIDTH = 1.5 * 0.9
EVEN_SHARE = 0.5

# How far beyond the ports that were seen the range may end, in spans: the tails of a Beta law are
# thin, so more than twice what an even one leaves.
STRETCHES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
# Above, ports are one heap, which a block or a counter explains.
PARAMETER_MAX = 20.0
DOUBT_NATS = math.log(50)


class Shape(NamedTuple):
    """A Beta law over a range.

    Attributes:
        alpha: Its first parameter, above 1.
        beta: Its second, above 1.
        low: The lowest port.
        high: The highest.
        advantage: Natural logarithm of how much better it explains the ports than an even law.
    """

    alpha: float
    beta: float
    low: int
    high: int
    advantage: float


def fit_shape(ports: Sequence[int]) -> Shape | None:
    """Return the likeliest Beta law; None where an even one explains the ports as well.

    Args:
        ports: External ports of distinct mappings.
    """
    count = len(ports)
    lowest, highest = min(ports), max(ports)
    span = highest - lowest
    if span < 16:
        return None
    even = -count * math.log(span * (count + 1) / (count - 1))
    best: tuple[float, tuple[float, float, int, int]] | None = None
    for left in STRETCHES:
        for right in STRETCHES:
            # Ends that no port lies on: there the density is 0.
            low = max(0, lowest - 1 - round(left * span))
            high = min(65_536, highest + 1 + round(right * span))
            fitted = _moments(ports, low, high)
            if fitted is None:
                continue
            likelihood = _log_likelihood(ports, *fitted, low, high)
            if best is None or likelihood > best[0]:
                best = likelihood, (*fitted, low, high)
    if best is None:
        return None
    advantage = best[0] - even - math.log(count) - DOUBT_NATS
    if advantage < 0:
        return None
    alpha, beta, low, high = best[1]
    return Shape(round(alpha, 3), round(beta, 3), max(low, 1), min(high, 65_535), advantage)


def shape_density(alpha: float, beta: float, share: float) -> float:
    """Return the unnormalised density at `share` of the range, between 0 and 1."""
    return math.exp((alpha - 1) * math.log(share) + (beta - 1) * math.log(1 - share))


def port_weights(ports: Sequence[int], low: int, high: int) -> tuple[int, ...]:
    """Return how likely a port of each of 32 equal slices of `low`..`high` is, 1 to 100.

    Args:
        ports: External ports of distinct mappings, at least two.
        low: The lowest that a mapping may get.
        high: The highest.
    """
    width = (high - low + 1) / WEIGHT_SLICES
    quarter, _, three_quarters = statistics.quantiles(ports, n=4)
    spread = min(statistics.stdev(ports), (three_quarters - quarter) / 1.34) or width
    kernel = math.sqrt(2) * KERNEL_WIDTH * spread * len(ports) ** -0.2
    edges = [low + width * index for index in range(WEIGHT_SLICES + 1)]
    below = [math.fsum(math.erf((edge - port) / kernel) for port in ports) for edge in edges]
    masses = [after - before for before, after in pairwise(below)]
    even = EVEN_SHARE / (1 - EVEN_SHARE) * math.fsum(masses) / WEIGHT_SLICES
    most = max(masses) + even
    return tuple(max(1, round(WEIGHT_MAX * (mass + even) / most)) for mass in masses)


def _moments(ports: Sequence[int], low: int, high: int) -> tuple[float, float] | None:
    width = high - low
    shares = [(port - low) / width for port in ports]
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    if variance <= 0:
        return None
    total = mean * (1 - mean) / variance - 1
    alpha, beta = mean * total, (1 - mean) * total
    # With a parameter of 1 or less the crowd is at an end, and the ends are what is not known.
    if not (1 < alpha <= PARAMETER_MAX and 1 < beta <= PARAMETER_MAX):
        return None
    return alpha, beta


def _log_likelihood(ports: Sequence[int], alpha: float, beta: float, low: int, high: int) -> float:
    width = high - low
    constant = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta) - math.log(width)
    return sum(
        constant
        + (alpha - 1) * math.log((port - low) / width)
        + (beta - 1) * math.log((high - port) / width)
        for port in ports
    )
