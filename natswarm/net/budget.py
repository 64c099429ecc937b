"""Token buckets of one second's worth: how much strangers may make us do."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Budget", "KeyedBudget"]

# Buckets of a second are full again after a second of rest, and then nobody misses them; more keys
# than this in one second are a flood with forged sources, which only the budget of all bounds.
KEYS_MAX = 4096


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


class KeyedBudget:
    """A `Budget` for each key, such as an address; remembers the last `KEYS_MAX` keys.

    Args:
        per_s: Actions a second for each key, at least 1.
    """

    def __init__(self, *, per_s: float) -> None:
        self._per_s = per_s
        self._budgets: OrderedDict[str, Budget] = OrderedDict()

    def __len__(self) -> int:
        return len(self._budgets)

    def take(self, key: str, now: float) -> bool:
        """Return whether one more action for `key` is within its budget, and count it if so."""
        budget = self._budgets.pop(key, None) or Budget(per_s=self._per_s)
        self._budgets[key] = budget
        if len(self._budgets) > KEYS_MAX:
            self._budgets.popitem(last=False)
        return budget.take(now)
