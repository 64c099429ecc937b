"""What all tests share: the same run each time, unless asked to look for new ones.

`NATSWARM_FUZZ=1 pytest` lets Hypothesis draw new examples and Trio order its tasks anew.
"""

from __future__ import annotations

import os
import signal

import pytest
import trio
from hypothesis import HealthCheck, settings

# A shell that starts us in the background has us ignore Ctrl-C, and so would the commands that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FUZZ = bool(os.environ.get("NATSWARM_FUZZ"))

settings.register_profile(
    "replay", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", settings.get_profile("replay"), derandomize=False)
settings.load_profile("search" if FUZZ else "replay")


@pytest.fixture(autouse=True)
def _same_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed the order in which Trio runs ready tasks; by itself it shuffles them each turn.

    Private names, but those that Trio keeps for Hypothesis's plugin.
    """
    if not FUZZ:
        monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        trio._core._run._r.seed(0)
