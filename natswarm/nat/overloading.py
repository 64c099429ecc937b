"""Do mappings share external ports? Seen by a pair that does, or by the absence of any.

A NAT that overloads ports (RFC 4787 section 4.2.1) draws a port that has a mapping already like any
other, as long as the filter can tell the remotes of the two apart. So among n mappings to different
remotes drawn from R ports some n(n-1)/2R pairs share one. Where that is five or more and there is
none, the NAT does not overload.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering

__all__ = ["overloading_of"]

OVERLOADING_DOUBT_MAX = 0.01


def overloading_of(
    mappings: Sequence[tuple[Endpoint, Endpoint]],
    allocation: PortAllocation,
    filtering: Filtering | None,
) -> bool | None:
    """Return whether live mappings share external ports; None if that cannot be told.

    Args:
        mappings: External endpoint and remote of each, all alive at once, of different ports.
        allocation: Where their ports come from.
        filtering: What tells mappings of one port apart: only such may share it.
    """
    if len({external for external, _ in mappings}) < len(mappings):
        return True
    if allocation.law in (AllocationLaw.PRESERVING, AllocationLaw.SEQUENTIAL):
        return None  # these never come back to a port
    if filtering is Filtering.EIF:
        return False  # there is nothing to tell two mappings of one port apart by
    groups: dict[object, int] = {}
    for _, remote in mappings:
        key = remote.ip if filtering is Filtering.ADF else remote
        groups[key] = groups.get(key, 0) + 1
    count = len(mappings)
    pairs = (count**2 - sum(size**2 for size in groups.values())) / 2
    ips = len({external.ip for external, _ in mappings}) or 1
    none_by_chance = math.exp(-pairs / (ips * allocation.port_count))
    return False if none_by_chance < OVERLOADING_DOUBT_MAX else None
