"""What all tests share: Hypothesis replays the same examples, unless asked to look for new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "replay", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", settings.get_profile("replay"), derandomize=False)
settings.load_profile("search" if os.environ.get("NATSWARM_FUZZ") else "replay")
