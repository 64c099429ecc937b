"""Quantiles of the gamma law: how often something happens, from how often it was seen to happen.

A rate of which `count` events were seen in a time T has, by Jeffreys' prior, the gamma law of shape
`count` + 1/2 and scale 1/T. Its central 90 % hold the true rate 90 % of the time on average over
rates (Brown, Cai & DasGupta 2003), where the exact interval of Garwood is too wide.

Source: Numerical Recipes, section 6.2, for the incomplete gamma function.
"""

from __future__ import annotations

import math

from natswarm.nat.interval import Interval

__all__ = ["poisson_mean_interval"]

TERMS_MAX = 1000
# Above this count the cube root of a gamma variable is normal to three digits (Wilson & Hilferty).
COUNT_MAX = 300


def poisson_mean_interval(count: int) -> Interval:
    """Return where the mean of a Poisson law lies with 90 %, having drawn `count` from it."""
    shape = count + 0.5
    if count == 0:
        return Interval(0.0, _gamma_quantile(shape, 0.90))
    return Interval(_gamma_quantile(shape, 0.05), _gamma_quantile(shape, 0.95))


def _gamma_quantile(shape: float, probability: float) -> float:
    if shape > COUNT_MAX:
        normal = 1.6449 * (1 if probability > 0.5 else -1)
        return shape * (1 - 1 / (9 * shape) + normal / (3 * math.sqrt(shape))) ** 3
    low, high = 0.0, shape + 10 * math.sqrt(shape) + 10
    for _ in range(60):
        middle = (low + high) / 2
        if _gamma_share_below(shape, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _gamma_share_below(shape: float, x: float) -> float:
    """Return the regularised lower incomplete gamma function by its series."""
    if x <= 0:
        return 0.0
    term = total = 1 / shape
    for index in range(1, TERMS_MAX):
        term *= x / (shape + index)
        total += term
        if term < total * 1e-12:
            break
    return min(1.0, total * math.exp(shape * math.log(x) - x - math.lgamma(shape)))
