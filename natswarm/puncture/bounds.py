"""What a NAT's profile bounds in a puncture: how many mappings, how fast, for how long, how far.

Carriers cap the mappings of a subscriber and the rate of new ones (RFC 6888 REQ-4); a puncture that
asks for more gets silence, and the user's other applications with it. So a plan takes what the
profile leaves, less a reserve for those.

Pure: profiles in, numbers out. Source: RFC 6888; lifetimes: Richter et al., IMC 2016.
"""

from __future__ import annotations

import math

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import SAFE_RANGE, PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Poison, Pooling
from natswarm.nat.profile import NatProfile
from natswarm.puncture.strategy import OPENER_REFRESH_S, Limits

__all__ = [
    "allocation_of",
    "live_s",
    "mapping_budget",
    "mapping_pace",
    "opener_refresh_s",
    "opener_ttl",
    "port_count_of",
    "public_ips_of",
    "somewhere_at",
]

# Of a subscriber's quota of mappings, this share and at least so many are left to others.
QUOTA_RESERVE_SHARE = 1 / 8
QUOTA_RESERVE_MIN = 4
# Just below a carrier's rate of new mappings: those of other applications count, too.
RATE_SHARE = 0.9
# Mappings are refreshed when so much of their lifetime is over.
REFRESH_SHARE = 0.7
# Median idle lifetime of UDP mappings in cellular networks (Richter et al., IMC 2016); 10..200 s.
LIFETIME_ASSUMED_S = 65.0


def allocation_of(profile: NatProfile) -> PortAllocation:
    """Return the law a NAT draws by; where nothing is known, from all ports."""
    return profile.allocation or PortAllocation(AllocationLaw.UNIFORM)


def port_count_of(profile: NatProfile) -> int:
    """Return how many ports a NAT draws from, at one address."""
    return allocation_of(profile).port_count


def public_ips_of(profile: NatProfile) -> tuple[str, ...]:
    """Return the addresses that a peer's mappings may have.

    Raises:
        PunctureFailed: Nobody has seen any.
    """
    if not profile.public_ips:
        raise PunctureFailed(
            "nobody has seen the peer's public address yet; connect it to one more peer first"
        )
    # With paired pooling all mappings of a subscriber share one address; others were seen before it
    # moved, or by a liar.
    if profile.pooling is Pooling.PAIRED:
        return profile.public_ips[:1]
    return profile.public_ips


def somewhere_at(profile: NatProfile) -> tuple[Endpoint, ...]:
    """Return an endpoint at each of the peer's addresses, whose port does not matter."""
    # Inside the range the peer's NAT uses, where a firewall would look least.
    port = max(allocation_of(profile).low, SAFE_RANGE.low)
    return tuple(Endpoint(ip, port) for ip in public_ips_of(profile))


def mapping_budget(profile: NatProfile, limits: Limits) -> int:
    """Return how many mappings a puncture may hold in this NAT at once, at least 1."""
    quota = profile.max_mappings
    if quota is None:
        return limits.mapping_count
    reserve = max(QUOTA_RESERVE_MIN, math.ceil(quota * QUOTA_RESERVE_SHARE))
    return max(1, min(quota - reserve, limits.mapping_count))


def mapping_pace(profile: NatProfile, count: float, pace: float) -> float:
    """Return the pace, up to `pace` a second, at which `count` new mappings are all made.

    A NAT that limits the rate allows some at once before: spread over the whole, they make it
    faster than the rate.
    """
    rate = profile.mapping_rate_per_s
    burst = profile.mapping_burst or 0
    if rate is None or math.isinf(rate) or count <= burst * RATE_SHARE:
        return pace
    return min(pace, RATE_SHARE * rate * count / (count - burst * RATE_SHARE))


def live_s(profile: NatProfile) -> float:
    """Return how long an unanswered mapping lives."""
    known = [
        lifetime_s
        for lifetime_s in (profile.idle_unreplied_s, profile.absolute_lifetime_s)
        if lifetime_s is not None
    ]
    if profile.idle_unreplied_s is None:
        known.append(
            LIFETIME_ASSUMED_S if profile.idle_lifetime_s is None else profile.idle_lifetime_s
        )
    return min(known)


def opener_refresh_s(profile: NatProfile) -> float:
    """Return how often an opener is to be sent again."""
    if profile.idle_unreplied_s is None:
        return OPENER_REFRESH_S
    return max(1.0, min(REFRESH_SHARE * profile.idle_unreplied_s, 60.0))


def opener_ttl(mine: NatProfile, theirs: NatProfile, limits: Limits) -> int | None:
    """Return the hop limit of what shall open our NAT alone; None: the system's.

    An early datagram does no harm to a NAT that is known not to mind.
    """
    if theirs.poison is Poison.NONE or theirs.is_translated is False:
        return None
    return mine.opener_ttl if limits.opener_ttl is None else limits.opener_ttl
