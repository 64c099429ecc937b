"""Quantities as people write them: `25ms`, `1%`, `10mbit`. The words are those of tc(8)."""

from __future__ import annotations

import math
import re

from natswarm.errors import ConfigurationError

__all__ = ["parse_bytes", "parse_duration", "parse_rate", "parse_share"]

_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)", re.ASCII)

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_BYTES_PER_S = {"bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6}
_SHARES = {"%": 0.01, "": 1.0}


def parse_duration(text: str) -> float:
    """Read `25ms`, `1.5s`, `0`; return seconds.

    Raises:
        ConfigurationError: Not a duration with its unit.
    """
    return _parse(text, _SECONDS, "a duration, such as 25ms or 1.5s")


def parse_rate(text: str) -> float:
    """Read `10mbit`; return bytes a second.

    Raises:
        ConfigurationError: Not a rate above 0 with its unit.
    """
    rate = _parse(text, _BYTES_PER_S, "a rate, such as 10mbit or 512kbit")
    if rate <= 0:
        raise ConfigurationError(f"{text!r} carries nothing; give a rate above 0, such as 10mbit")
    return rate


def parse_bytes(text: str) -> int:
    """Read `64kB`; return bytes.

    Raises:
        ConfigurationError: Not a size with its unit.
    """
    return math.ceil(_parse(text, _BYTES, "a size, such as 64kB"))


def parse_share(text: str) -> float:
    """Read `1%` or `0.01`; return the share, 0..1.

    Raises:
        ConfigurationError: Not a share, or not from 0 to 1.
    """
    share = _parse(text, _SHARES, "a share, such as 1% or 0.01")
    if share > 1:
        raise ConfigurationError(f"{text!r} is more than all of it; a share is from 0 to 100%")
    return share


def _parse(text: str, units: dict[str, float], what: str) -> float:
    match = _NUMBER.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigurationError(f"{text!r} is not {what}")
    number, unit = float(match[1]), match[2]
    if unit not in units:
        if number == 0 and not unit:
            return 0.0
        known = ", ".join(unit for unit in units if unit)
        raise ConfigurationError(f"{text!r} is not {what}; the units are {known}")
    return number * units[unit]
