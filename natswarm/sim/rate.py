"""How many new mappings a NAT makes in a while: token buckets, for each subscriber and for all.

A puncture that opens hundreds of mappings at once looks like a port scan to a carrier, and its NAT
answers by dropping what goes beyond a rate. RFC 6888 REQ-4 (C) recommends just this.

Pure; time is an argument and never goes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["RateLimit", "TokenBuckets"]


@dataclass(frozen=True, slots=True)
class RateLimit:
    """So many at once, and so many a second in the long run.

    Attributes:
        per_s: New mappings a second.
        burst: New mappings at once after a rest of `burst` / `per_s` seconds.
    """

    per_s: float
    burst: int

    def __post_init__(self) -> None:
        if not 0 < self.per_s < math.inf or self.burst < 1:
            raise ValueError(
                f"not a rate of new mappings, which takes a burst of 1 or more: {self}"
            )


class TokenBuckets:
    """The rates of one NAT at work.

    One bucket for each subscriber that ever came; there are no more of those than addresses inside.
    """

    def __init__(self, subscriber: RateLimit | None, nat: RateLimit | None) -> None:
        self._subscriber = subscriber
        self._nat = nat
        # (tokens, as of when), by subscriber; the NAT's own under the name nobody has.
        self._levels: dict[str, tuple[float, float]] = {}

    def allow(self, subscriber: str, now: float) -> bool:
        """Return whether `subscriber` may make a mapping now; takes nothing."""
        return _has_token(self._subscriber, self._levels.get(subscriber), now) and _has_token(
            self._nat, self._levels.get(""), now
        )

    def take(self, subscriber: str, now: float) -> None:
        """Count the mapping that `subscriber` makes now."""
        for limit, name in ((self._subscriber, subscriber), (self._nat, "")):
            if limit is not None:
                self._levels[name] = (_level(limit, self._levels.get(name), now) - 1.0, now)

    def check(self) -> None:
        """Assert that no bucket is below empty or more than full.

        Raises:
            AssertionError: One is.
        """
        for name, (tokens, _) in self._levels.items():
            limit = self._subscriber if name else self._nat
            assert limit is not None
            assert -1e-6 <= tokens <= limit.burst, "more new mappings than the rate allows"


def _level(limit: RateLimit, level: tuple[float, float] | None, now: float) -> float:
    if level is None:
        return float(limit.burst)
    tokens, time = level
    return min(float(limit.burst), tokens + (now - time) * limit.per_s)


def _has_token(limit: RateLimit | None, level: tuple[float, float] | None, now: float) -> bool:
    # A hair below 1 counts: ten times a tenth of a second must make a second.
    return limit is None or _level(limit, level, now) >= 1.0 - 1e-9
