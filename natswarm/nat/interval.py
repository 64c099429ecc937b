"""Where an estimated figure lies: the form in which every estimate says how good it is."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Interval"]


class Interval(NamedTuple):
    """Where a figure lies with 90 %, both ends included."""

    low: float
    high: float
