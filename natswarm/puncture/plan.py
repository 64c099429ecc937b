"""Plan a puncture: two NAT profiles in, what this side does out.

Both sides plan for themselves, from the same two profiles, and their plans must fit together: who
opens, who probes, towards what. So the choice of a strategy looks only at what both know alike,
and treats the two sides by the order of their PeerIds where the profiles do not tell them apart:

    strategy               when                                 what happens
    direct                 one side lets in anybody, or lets    the other dials; an ADF side first
                           in an address it has sent to, at     sends one datagram to the dialler's
                           an endpoint that is known            address
    simultaneous-open      both endpoints are known             both send to the other's endpoint
    one-sided-birthday     one endpoint is known, the other     the unpredictable side opens M
                           side draws ports; or nobody's is,    mappings, the other probes the ports
                           but one filters by address alone     they may have got
    two-sided-birthday     both draw ports, both drop strangers both send from drawn ports to
                                                                guessed ones until two guesses meet

Every plan also tries the peer's host candidates, for two phones in one house and for IPv6. Bursts
go to the peer's public addresses alone, which the caller has from a third party that sees the peer
there (`introduction.profile_as_seen`): a peer cannot aim us at somebody else.

Sizes come from `odds.py` at 99.9 %: success is the rule, and what fails may be planned again with
fresh mappings. What cannot succeed within the limits is refused with the reason.

Pure: no clock, no randomness, no sockets. Source: docs/puncturing.md; Ford, Srisuresh &
Kegel 2005 (simultaneous open), Klinec & Matyas 2014 (sequential NATs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.profile import NatProfile
from natswarm.puncture.birthday import (
    CONFIDENCE,
    plan_opener,
    plan_prober,
    plan_two_sided,
    port_count_of,
    somewhere_at,
)
from natswarm.puncture.strategy import Burst, Limits, Openers, Plan, Strategy

__all__ = ["Burst", "Limits", "Openers", "Plan", "Strategy", "plan_direct", "plan_puncture"]

# A plan that only checks a few endpoints costs nearly nothing, so it is patient.
CHECK_DURATION_S = 10.0
# How long the checks of a simultaneous open keep to `Limits.opener_ttl`: the usual skew of two
# introduced sides, so that both NATs have their mappings when the first datagram arrives.
LOW_TTL_S = 1.5
# More host candidates than a laptop with a VPN has are noise.
CANDIDATES_MAX = 8


def plan_direct(endpoints: Sequence[Endpoint], *, limits: Limits | None = None) -> Plan:
    """Return a plan that probes known endpoints, such as those of an invite or of a HELLO."""
    return _checks_only(
        tuple(endpoints), limits or Limits(), Strategy.DIRECT, "the peer's endpoint is known"
    )


def plan_puncture(
    mine: NatProfile,
    theirs: NatProfile,
    *,
    my_id: PeerId,
    their_id: PeerId,
    limits: Limits | None = None,
) -> Plan:
    """Plan our side of a puncture; the peer plans the other side from the same profiles.

    Args:
        mine: What our NAT does.
        theirs: What the peer's does, its addresses vouched for by whoever sees the peer.
        my_id: Who we are; the order of the two ids settles ties.
        their_id: Who the peer is.
        limits: Our own bounds. Two sides with different limits still fit together.

    Raises:
        PunctureFailed: These NATs cannot be expected to open within the limits; says why, and what
            to try.
    """
    limits = limits or Limits()
    is_first = my_id < their_id
    choice = _choose(*((mine, theirs) if is_first else (theirs, mine)))
    candidates = _candidates(mine, theirs)
    try:
        match choice.strategy:
            case Strategy.DIRECT | Strategy.SIMULTANEOUS_OPEN:
                return _plan_known(mine, theirs, choice.strategy, candidates, limits)
            case Strategy.ONE_SIDED_BIRTHDAY:
                if choice.first_opens is is_first:
                    return plan_opener(mine, theirs, candidates, limits)
                return plan_prober(mine, theirs, candidates, limits)
            case Strategy.TWO_SIDED_BIRTHDAY:
                return plan_two_sided(mine, theirs, candidates, limits, is_first=is_first)
    except PunctureFailed:
        if candidates and _may_share_network(mine, theirs):
            return _checks_only(
                candidates, limits, Strategy.DIRECT, "both may be in one network behind the NAT"
            )
        raise


@dataclass(frozen=True, slots=True)
class _Choice:
    strategy: Strategy
    first_opens: bool | None = None


def _choose(first: NatProfile, second: NatProfile) -> _Choice:
    """Choose the cheapest strategy.

    Looks at no address: each side knows its own from its observers, but the peer's from whoever
    introduced them, and the two views must lead to one choice.
    """
    sides = (first, second)
    if any(side.accepts_strangers for side in sides):
        return _Choice(Strategy.DIRECT)
    if all(side.is_predictable for side in sides):
        return _Choice(Strategy.SIMULTANEOUS_OPEN)
    if any(side.is_predictable and side.accepts_address for side in sides):
        return _Choice(Strategy.DIRECT)
    if any(side.is_predictable for side in sides):
        return _Choice(Strategy.ONE_SIDED_BIRTHDAY, first_opens=second.is_predictable)
    # Nobody is predictable. A side that filters by address alone lets in a probe from whatever port
    # the other NAT draws, so only one port has to be guessed. (Its answer leaves by the port the
    # probe came in by: NATs keep sessions, as Linux does. One that does not stays closed.)
    if first.accepts_address and second.accepts_address:
        fewer = port_count_of(first) <= port_count_of(second)
        return _Choice(Strategy.ONE_SIDED_BIRTHDAY, first_opens=fewer)
    if first.accepts_address or second.accepts_address:
        return _Choice(Strategy.ONE_SIDED_BIRTHDAY, first_opens=first.accepts_address)
    return _Choice(Strategy.TWO_SIDED_BIRTHDAY)


def _plan_known(
    mine: NatProfile,
    theirs: NatProfile,
    strategy: Strategy,
    candidates: tuple[Endpoint, ...],
    limits: Limits,
) -> Plan:
    checks = candidates
    # A NAT that lets in strangers but draws a port for each destination must not speak first: the
    # peer expects our answers from where it dials, not from the port that our own packet would get.
    waits = mine.accepts_strangers and not mine.is_predictable and not theirs.accepts_strangers
    if theirs.main_endpoint is not None and not waits:
        checks += (theirs.main_endpoint,)
    if theirs.accepts_strangers:
        reason = "the peer lets in strangers, so we dial"
    elif mine.accepts_strangers:
        reason = "we let in strangers, so the peer dials"
    elif strategy is Strategy.SIMULTANEOUS_OPEN:
        reason = "both endpoints are known: both send to the other's"
    elif mine.is_predictable and mine.accepts_address:
        reason = "one datagram to the peer's address opens our filter for it, then the peer dials"
        checks += somewhere_at(theirs)
    else:
        reason = "the peer opens its filter for our address, then we dial"
    return _checks_only(checks, limits, strategy, reason)


def _checks_only(
    checks: tuple[Endpoint, ...], limits: Limits, strategy: Strategy, reason: str
) -> Plan:
    return Plan(
        strategy=strategy,
        checks=tuple(dict.fromkeys(checks)),
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        checks_ttl=limits.opener_ttl if strategy is Strategy.SIMULTANEOUS_OPEN else None,
        checks_ttl_s=LOW_TTL_S,
        duration_s=min(CHECK_DURATION_S, limits.duration_s),
        expected_probe_count=max(1, len(checks)),
        p99_probe_count=3 * max(1, len(checks)),  # two losses in a row come once in a hundred
        success_probability=CONFIDENCE,
        reason=reason,
    )


def _candidates(mine: NatProfile, theirs: NatProfile) -> tuple[Endpoint, ...]:
    """Return the peer's host candidates that we can send to at all."""
    my_families = {":" in endpoint.ip for endpoint in mine.local_endpoints}
    own_ips = {endpoint.ip for endpoint in mine.local_endpoints}
    usable = [
        endpoint
        for endpoint in theirs.local_endpoints
        if (":" in endpoint.ip) in my_families
        and endpoint.kind is not AddressKind.UNUSABLE
        # The loopback interface leads to the peer only if both are bound to it.
        and (endpoint.kind is not AddressKind.LOOPBACK or endpoint.ip in own_ips)
        # The same private address in two houses is ourselves, unless it is another port of ours.
        and (endpoint.ip not in own_ips or _may_share_network(mine, theirs))
        and endpoint not in mine.local_endpoints
    ]
    return tuple(usable[:CANDIDATES_MAX])


def _may_share_network(mine: NatProfile, theirs: NatProfile) -> bool:
    """Whether both may be behind one NAT, or reach each other without any."""
    if not mine.public_ips or not theirs.public_ips:
        return True
    if any(ip in theirs.public_ips for ip in mine.public_ips):
        return True
    return all(
        any(":" in e.ip and address_kind(e.ip) is AddressKind.GLOBAL for e in side.local_endpoints)
        for side in (mine, theirs)
    )
