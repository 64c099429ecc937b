"""Size the two-sided birthday: both sides send from drawn ports to guessed ones until two meet.

The pace is that of `birthday.py`. Two NATs that count are `scan.py`'s.

Pure arithmetic. Source: docs/puncturing.md section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.birthday import (
    ANSWER_ROUND_TRIPS,
    CONFIDENCE,
    HURRY,
    HURRY_AFTER,
    courteous_pace,
    drawn_port_count,
)
from natswarm.puncture.bounds import (
    allocation_of,
    live_s,
    mapping_budget,
    mapping_pace,
    opener_refresh_s,
    public_ips_of,
)
from natswarm.puncture.odds import live_mapping_count
from natswarm.puncture.strategy import (
    ANSWER_WAIT_S,
    START_SKEW_S,
    Burst,
    Limits,
    Plan,
    Strategy,
)

__all__ = ["TwoSided", "plan_two_sided", "size_two_sided"]

# Of the datagrams, in one direction; mobile networks in motion. A meeting needs two to arrive.
LOSS_ASSUMED = 0.1
# Two dimensions: the one side goes on for a round trip, the other for half of one.
UNDER_WAY_TWO_SIDED = 1.5
# Sockets of an address-dependent NAT in a two-sided puncture: it draws one port for each socket,
# not for each probe. 64 sockets and N/64 probes from each make as many pairs as N mappings would.
ADDRESS_DEPENDENT_SOCKETS = 64
# Two-sided rounds over strict blocks: 63 % each; 95 % after three.
ROUNDS_MAX = 4


@dataclass(frozen=True, slots=True)
class TwoSided:
    """The numbers of a two-sided birthday; pairs are (ours, the peer's).

    Attributes:
        port_counts: R of each.
        our_count: Probes of ours in one round.
        probes_per_s: Our pace.
        hurry_per_s: Our pace when more was sent than most would take.
        is_kept: Whether our NAT allows so few mappings that we keep them alive instead of new ones.
        round_count: Rounds.
        round_interval_s: From one to the next.
        duration_s: Of all rounds.
        expected_count: Probes of ours until a meeting, on average.
        p99_count: The same, 99 times in 100.
        success_probability: Within the rounds.
        expected_s: Until the path.
    """

    port_counts: tuple[int, int]
    our_count: int
    probes_per_s: float
    hurry_per_s: float
    is_kept: bool
    round_count: int
    round_interval_s: float
    duration_s: float
    expected_count: float
    p99_count: float
    success_probability: float
    expected_s: float


def plan_two_sided(
    mine: NatProfile, theirs: NatProfile, limits: Limits, round_trip_s: float
) -> Plan:
    """Plan either side of a two-sided birthday.

    Raises:
        PunctureFailed: The peer's address is not known, or the limits are too narrow.
    """
    ips = public_ips_of(theirs)
    ours, peers = allocation_of(mine), allocation_of(theirs)
    sized = size_two_sided(mine, theirs, limits, round_trip_s)
    sockets = math.ceil(sized.our_count / sized.port_counts[1])
    if mine.mapping is Mapping.ADM:
        sockets = max(sockets, ADDRESS_DEPENDENT_SOCKETS)
    burst = Burst(
        ips=ips,
        allocation=peers,
        # All over the window of a counter, not at its near end from every socket.
        is_shuffled=peers.law is AllocationLaw.SEQUENTIAL,
        port_indices=tuple(range(1, min(sockets, limits.socket_count) + 1)),
        probe_count=sized.our_count,
        probes_per_s=sized.probes_per_s,
        hurry_count=math.ceil(HURRY_AFTER * sized.expected_count),
        hurry_per_s=sized.hurry_per_s,
        start_s=0.0,
        is_kept=sized.is_kept,
        round_count=sized.round_count,
        round_interval_s=sized.round_interval_s,
    )
    return Plan(
        strategy=Strategy.TWO_SIDED_BIRTHDAY,
        checks=(),
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=sized.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=sized.expected_count,
        p99_probe_count=math.ceil(sized.p99_count),
        success_probability=min(sized.success_probability, CONFIDENCE),
        expected_s=sized.expected_s,
        reason=(
            f"we draw from {sized.port_counts[0]:,} ports ({ours}), the peer from "
            f"{sized.port_counts[1]:,} ({peers}): {sized.expected_count:,.0f} probes of ours meet "
            "one of theirs on average"
        ),
    )


def size_two_sided(
    mine: NatProfile, theirs: NatProfile, limits: Limits, round_trip_s: float
) -> TwoSided:
    """Return the numbers of our side of a two-sided birthday.

    Raises:
        PunctureFailed: The probes expected exceed the limits.
    """
    sides = (mine, theirs)
    laws = (allocation_of(mine), allocation_of(theirs))
    port_counts = (drawn_port_count(mine), drawn_port_count(theirs))
    product = port_counts[0] * port_counts[1]
    quotas = (_quota(mine, limits), _quota(theirs, limits))
    caps = (min(_useful_count(laws[0]), quotas[0]), min(_useful_count(laws[1]), quotas[1]))
    expected = _split(math.pi / 4 * product, caps)
    if expected[0] != expected[1]:
        # One side's few mappings stand early: as in one dimension, 1 in place of pi/4.
        expected = _split(product, caps)
    arrives = (1 - LOSS_ASSUMED) ** 2
    enough = _split(-math.log1p(-CONFIDENCE) / arrives * product, caps)
    time_left_s = max(1e-3, limits.duration_s - START_SKEW_S - ANSWER_WAIT_S)
    # Courtesy ends where it would cost the puncture.
    pace = max(
        courteous_pace(sum(expected), UNDER_WAY_TWO_SIDED * round_trip_s, limits),
        min(max(enough) / time_left_s, limits.probes_per_s),
    )
    paces = [mapping_pace(side, count, pace) for side, count in zip(sides, expected, strict=True)]
    budget = min(limits.probe_count, limits.mapping_count, int(min(paces) * time_left_s))
    if max(expected) > budget:
        raise _refusal(port_counts, max(expected), budget)
    counts = [
        int(min(math.ceil(count), budget, quota))
        for count, quota in zip(enough, quotas, strict=True)
    ]
    round_s = max(count / pace for count, pace in zip(counts, paces, strict=True))
    lifetime_s = min(live_s(side) for side in sides)
    # A strict block is used up by one round, a quota too: only expiry gives new ports to draw. One
    # side with a quota keeps what it has, and the other goes on looking.
    is_strict = any(law.law is AllocationLaw.BLOCK and not law.is_overloading for law in laws)
    is_kept = counts[0] == quotas[0] and counts[1] < quotas[1]
    has_no_quota_left = all(count == quota for count, quota in zip(counts, quotas, strict=True))
    used = [
        min(count, ports) if is_strict else count
        for count, ports in zip(counts, port_counts, strict=True)
    ]
    round_count, interval_s = 1, 0.0
    if is_strict or has_no_quota_left:
        interval_s = max(lifetime_s + 1.0, round_s)
        by_time = 1 + int(max(0.0, time_left_s - round_s) / interval_s)
        round_count = min(ROUNDS_MAX, by_time, max(1, limits.probe_count // max(counts)))
    live = [
        live_mapping_count(opened_per_s=pace, lifetime_s=lifetime_s, cap=used[side])
        for side, pace in enumerate(paces)
    ]
    # Each mapping meets what of the other side's is alive with it; both views count the pairs of
    # those alive at one time.
    pairs = used[0] * live[1] + live[0] * used[1] - live[0] * live[1]
    chance = 1 - math.exp(-pairs / product) ** round_count
    if has_no_quota_left and chance < 0.5:
        raise _refusal(port_counts, max(expected), round(round_count * max(used)))
    duration_s = (round_count - 1) * interval_s + round_s
    if is_kept:
        interval_s = opener_refresh_s(mine)
        round_count = max(1, math.ceil(duration_s / interval_s))
    return TwoSided(
        port_counts=port_counts,
        our_count=counts[0],
        probes_per_s=paces[0],
        hurry_per_s=mapping_pace(mine, expected[0], min(HURRY * paces[0], limits.probes_per_s)),
        is_kept=is_kept,
        round_count=round_count,
        round_interval_s=interval_s if round_count > 1 else 0.0,
        duration_s=duration_s,
        expected_count=expected[0],
        p99_count=_split(-math.log(0.01) * product, caps)[0],
        success_probability=chance,
        expected_s=max(count / pace for count, pace in zip(expected, paces, strict=True))
        + ANSWER_ROUND_TRIPS * round_trip_s,
    )


def _quota(profile: NatProfile, limits: Limits) -> float:
    """Return the mappings we may use of a quota; no bound where none is known."""
    return math.inf if profile.max_mappings is None else mapping_budget(profile, limits)


def _split(product: float, caps: tuple[float, float]) -> tuple[float, float]:
    """Return probe counts of two sides with this product: equal where both caps allow it."""
    equal = math.sqrt(product)
    if caps[0] < equal and caps[0] <= caps[1]:
        return caps[0], product / caps[0]
    if caps[1] < equal:
        return product / caps[1], caps[1]
    return equal, equal


def _useful_count(allocation: PortAllocation) -> float:
    """Return how many mappings of one side can be where the other looks for them."""
    if allocation.law is AllocationLaw.SEQUENTIAL:
        return allocation.window_steps / 2  # the other half is for others' mappings
    return math.inf


def _refusal(port_counts: tuple[int, int], expected: float, budget: int) -> PunctureFailed:
    ours, theirs = port_counts
    who = (
        f"both NATs draw from {ours:,} ports"
        if ours == theirs
        else f"our NAT draws from {ours:,} ports, the peer's from {theirs:,},"
    )
    return PunctureFailed(
        f"{who} and drop strangers: {expected:,.0f} probes expected, budget {budget:,}; try home "
        "Wi-Fi, another SIM or IPv6 on one side, or more echoes, which may show blocks of ports"
    )
