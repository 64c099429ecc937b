"""What the keeping of paths goes by, out of what is known of a NAT.

Knows neither paths nor punctures.
"""

from __future__ import annotations

import math
from dataclasses import replace

from natswarm.nat.profile import NatProfile
from natswarm.net.path_keeper import Lifetimes

__all__ = ["foundations_of", "is_search_void", "lifetimes_of", "with_lifetimes_of"]


def lifetimes_of(profile: NatProfile) -> Lifetimes:
    """Return how long a NAT keeps a mapping that is in use, as far as its profile tells."""
    if profile.is_translated is False and profile.idle_lifetime_s is None:
        return Lifetimes(idle_s=math.inf if profile.accepts_strangers else None)
    idle_s = profile.idle_lifetime_s
    return Lifetimes(
        idle_s=profile.idle_unreplied_s if idle_s is None else idle_s,
        absolute_s=profile.absolute_lifetime_s,
    )


def with_lifetimes_of(profile: NatProfile, earlier: NatProfile) -> NatProfile:
    """Return a profile with the lifetimes that an earlier look at the same NAT has found."""
    if profile.mapping != earlier.mapping or profile.public_ips != earlier.public_ips:
        return profile
    found = {
        name: getattr(earlier, name)
        for name in ("idle_unreplied_s", "idle_lifetime_s", "absolute_lifetime_s")
        if getattr(profile, name) is None
    }
    return replace(profile, **found)


def foundations_of(profile: NatProfile) -> object:
    """Return what searches go by."""
    if profile.is_predictable:
        return profile.main_endpoint
    allocation = profile.allocation
    return None if allocation is None else (allocation.law, allocation.blocks)


def is_search_void(before: NatProfile, profile: NatProfile) -> bool:
    """Whether a search by an earlier profile had better begin anew; else what it opened counts."""
    if profile.is_counter:
        return not before.is_counter
    if before.is_predictable or profile.is_predictable:
        ends = [each.main_endpoint if each.is_predictable else None for each in (before, profile)]
        return ends[0] != ends[1]
    blocks = [set(() if p.allocation is None else p.allocation.blocks) for p in (before, profile)]
    return bool(blocks[1]) and blocks[0].isdisjoint(blocks[1])
