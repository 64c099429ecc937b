"""A token bucket of one second's worth: how much strangers may make us do."""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """Allows `per_s` actions a second, and as many at once after a second of rest.

    Args:
        per_s: Actions a second, at least 1.
    """

    def __init__(self, *, per_s: float) -> None:
        self._per_s = per_s
        self._tokens = per_s
        self._at = float("-inf")

    def take(self, now: float) -> bool:
        """Return whether one more action is within the budget, and count it if so."""
        self._tokens = min(self._per_s, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
