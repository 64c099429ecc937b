"""Size the birthday plans: how many mappings, which ports, at what pace, for how long.

One side draws its ports (one dimension): it opens M mappings towards the other's known endpoint, or
with leave for its address, and the other probes. Both draw (two dimensions): both send from drawn
ports to guessed ones. Sizes are the 99.9 % quantiles of `odds.py`. Two NATs that count are
`scan.py`'s.

**Pace.** What is under way when the path opens was sent in vain: pace x round trip in one
dimension, half as much again in two (the side that is hit learns it after one way, the other after
both). So the pace is what keeps that to `Limits.overshoot` of the probes expected: a puncture takes
some ten round trips, whatever the ports. For a hit that is as likely at any time an even pace takes
the least time; who has sent half as much again as expected hurries, though, since the few punctures
that come so far decide what the slowest hundredth takes, and hardly what the average costs.

Pure arithmetic. Source: docs/puncturing.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.nat.shape import shape_density
from natswarm.puncture.bounds import (
    allocation_of,
    live_s,
    mapping_budget,
    mapping_pace,
    opener_refresh_s,
    opener_ttl,
    port_count_of,
    public_ips_of,
    somewhere_at,
)
from natswarm.puncture.odds import (
    cheapest_opened_count,
    cheapest_prior_opened_count,
    expected_prior_probe_count,
    expected_probe_count,
    hit_probability,
    live_mapping_count,
    prior_probe_count_quantile,
    probe_count_quantile,
)
from natswarm.puncture.strategy import (
    ANSWER_WAIT_S,
    START_SKEW_S,
    Burst,
    Limits,
    Openers,
    Plan,
    Strategy,
)

__all__ = [
    "CONFIDENCE",
    "OneSided",
    "TwoSided",
    "plan_opener",
    "plan_prober",
    "plan_two_sided",
    "size_one_sided",
    "size_two_sided",
]

# Bursts and budgets are sized so that one puncture in a thousand runs dry.
CONFIDENCE = 0.999
# Of the datagrams, in one direction; mobile networks in motion. A meeting needs two to arrive.
LOSS_ASSUMED = 0.1
# From the first probe that comes through to the path: the answer, and the choice.
ANSWER_ROUND_TRIPS = 1.5
# Two dimensions: the one side goes on for a round trip, the other for half of one.
UNDER_WAY_TWO_SIDED = 1.5
# See above: when to hurry, and how much.
HURRY_AFTER = 1.5
HURRY = 2.0
# Below this even the smallest search would take longer than users wait.
PROBES_PER_S_MIN = 5.0

# Mappings opened in a row against a counter: the probes' stride. More would overrun small blocks.
SEQUENTIAL_RUN_MAX = 16
SEQUENTIAL_RUN_MIN = 4
# From the last echo to the openers: the end of an inspection, and an introduction.
SEQUENTIAL_AGE_S = 2.0
# Sockets of an address-dependent NAT in a two-sided puncture: it draws one port for each socket,
# not for each probe. 64 sockets and N/64 probes from each make as many pairs as N mappings would.
ADDRESS_DEPENDENT_SOCKETS = 64
# Two-sided rounds over strict blocks: 63 % each; 95 % after three.
ROUNDS_MAX = 4
TFTP_PORT = 69
# Of a law that is not flat: even within each.
SLICES = 64


@dataclass(frozen=True, slots=True)
class OneSided:
    """The numbers of a one-sided birthday.

    Attributes:
        opened_count: M.
        port_count: R, at all addresses.
        expected_count: Probes of the prober until one hits, on average.
        openers_per_s: Pace of the openers.
        probes_per_s: Pace of the prober.
        hurry_per_s: Its pace when it has sent more than most would.
        probe_count: Of the prober: one pass at 99.9 %, one more for what was lost or came too
            early, and what it sends while the opener may not have started.
        start_s: When the prober starts: its first probe arrives when the last mapping stands.
        expected_s: Until the path.
    """

    opened_count: int
    port_count: int
    expected_count: float
    openers_per_s: float
    probes_per_s: float
    hurry_per_s: float
    probe_count: int
    start_s: float
    expected_s: float

    @property
    def hurry_count(self) -> int:
        """After how many probes the prober hurries."""
        return math.ceil(HURRY_AFTER * self.expected_count)

    @property
    def duration_s(self) -> float:
        """How long both sides go on."""
        early = min(self.probe_count, self.hurry_count)
        late = self.probe_count - early
        return self.start_s + early / self.probes_per_s + late / self.hurry_per_s + ANSWER_WAIT_S

    @property
    def success_probability(self) -> float:
        """Within the plan, if the profiles are right."""
        chance = hit_probability(
            opened_count=self.opened_count,
            probed_count=min(self.probe_count, self.port_count),
            port_count=self.port_count,
        )
        return min(chance, CONFIDENCE)


def size_one_sided(
    opener: NatProfile, prober: NatProfile, limits: Limits, round_trip_s: float
) -> OneSided:
    """Return the numbers that both sides of a one-sided birthday work out alike.

    Raises:
        PunctureFailed: The probes expected exceed the limits.
    """
    allocation = allocation_of(opener)
    port_count = _drawn_from(opener)
    opened_max = min(limits.socket_count, mapping_budget(opener, limits))
    if allocation.law is AllocationLaw.SEQUENTIAL:
        drift = (allocation.others_per_s or 0.0) * SEQUENTIAL_AGE_S
        # M + drift / 2M is least at M = sqrt(drift / 2).
        opened = min(max(round(math.sqrt(drift / 2)), SEQUENTIAL_RUN_MIN), SEQUENTIAL_RUN_MAX)
        opened = min(opened, opened_max)
        expected = 1 + drift / 2 / opened  # one in `opened` ports is probed, from the last one up
        enough = math.ceil(port_count / opened) + opened
    elif allocation.shape is not None and port_count == port_count_of(opener):
        slices = _slices(allocation)
        opened = min(cheapest_prior_opened_count(slices), opened_max)
        expected = expected_prior_probe_count(slices, opened)
        enough = prior_probe_count_quantile(CONFIDENCE, slices, opened)
    else:
        opened = cheapest_opened_count(port_count)
        if allocation.law is AllocationLaw.BLOCK:
            # Half of it is left for what the subscriber does besides.
            opened = min(opened, port_count // 2)
        opened = min(opened, opened_max)
        expected = expected_probe_count(opened_count=opened, port_count=port_count)
        enough = probe_count_quantile(CONFIDENCE, opened_count=opened, port_count=port_count)

    openers_per_s = mapping_pace(opener, opened, limits.probes_per_s)
    start_s = max(0.0, opened / openers_per_s - round_trip_s / 2)
    time_left_s = max(1e-3, limits.duration_s - start_s - ANSWER_WAIT_S)
    # Courtesy ends where it would cost the puncture.
    pace = max(
        _pace(opened + expected, round_trip_s, limits),
        min(enough / time_left_s, limits.probes_per_s),
    )
    hurry = min(HURRY * pace, limits.probes_per_s)
    if not prober.is_predictable:  # each probe makes a mapping
        most = max(mapping_budget(prober, limits) / live_s(prober), PROBES_PER_S_MIN)
        pace, hurry = (mapping_pace(prober, enough, min(each, most)) for each in (pace, hurry))
    probe_count = min(
        2 * enough + math.ceil(hurry * START_SKEW_S), limits.probe_count, int(pace * time_left_s)
    )
    if expected > probe_count:
        raise PunctureFailed(
            f"one NAT draws from {port_count:,} ports: {expected:,.0f} probes expected, budget "
            f"{probe_count:,}; allow more probes or time"
        )
    expected_s = start_s + expected / pace + ANSWER_ROUND_TRIPS * round_trip_s
    return OneSided(
        opened,
        port_count,
        expected,
        openers_per_s,
        pace,
        hurry,
        probe_count,
        start_s,
        expected_s,
    )


def plan_opener(
    mine: NatProfile,
    theirs: NatProfile,
    limits: Limits,
    round_trip_s: float,
    strategy: Strategy = Strategy.ONE_SIDED_BIRTHDAY,
) -> Plan:
    """Plan the unpredictable side of a one-sided birthday: open M mappings and wait.

    Args:
        mine: Our profile.
        theirs: The peer's.
        limits: Our bounds.
        round_trip_s: To the peer and back, roughly.
        strategy: With TFTP_HELPER the mappings are opened by requests that make our NAT let in any
            port of the peer's address.

    Raises:
        PunctureFailed: The peer's endpoint and address are not known, or the limits are too narrow.
    """
    sized = size_one_sided(mine, theirs, limits, round_trip_s)
    is_tftp = strategy is Strategy.TFTP_HELPER
    if is_tftp:
        destinations = tuple(Endpoint(ip, TFTP_PORT) for ip in public_ips_of(theirs))
    elif theirs.is_predictable and theirs.main_endpoint is not None:
        destinations = (theirs.main_endpoint,)
    else:
        destinations = somewhere_at(theirs)
    sent_count = sized.opened_count * len(destinations)
    return Plan(
        strategy=strategy,
        checks=(),
        openers=Openers(
            destinations=destinations,
            port_count=sized.opened_count,
            probes_per_s=sized.openers_per_s,
            refresh_s=opener_refresh_s(mine),
            ttl=None if is_tftp else opener_ttl(mine, theirs, limits),
            is_tftp=is_tftp,
        ),
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=sized.duration_s,
        expected_probe_count=sent_count,
        p99_probe_count=2 * sent_count,
        success_probability=sized.success_probability,
        expected_s=sized.expected_s,
        reason=(
            f"we open {sized.opened_count} mappings among {sized.port_count:,} ports"
            + (" that let in the peer's address" if is_tftp else "")
            + f", the peer finds one with {sized.expected_count:,.0f} probes on average"
        ),
    )


def plan_prober(
    mine: NatProfile,
    theirs: NatProfile,
    limits: Limits,
    round_trip_s: float,
    strategy: Strategy = Strategy.ONE_SIDED_BIRTHDAY,
) -> Plan:
    """Plan the other side: probe the ports that the peer's M mappings may have.

    Raises:
        PunctureFailed: The peer's address is not known, or the limits are too narrow.
    """
    ips = public_ips_of(theirs)
    sized = size_one_sided(theirs, mine, limits, round_trip_s)
    allocation = allocation_of(theirs)
    sequential = allocation.law is AllocationLaw.SEQUENTIAL
    burst = Burst(
        ips=ips,
        allocation=allocation,
        # The known endpoint is the main port's; where none is known, any port will do, and the main
        # port is spared hundreds of mappings.
        port_indices=(0,) if mine.is_predictable else (1,),
        run_length=sized.opened_count,
        near_count=_near_count(allocation) if sequential else 0,
        probe_count=sized.probe_count,
        probes_per_s=sized.probes_per_s,
        hurry_count=sized.hurry_count,
        hurry_per_s=sized.hurry_per_s,
        start_s=sized.start_s,
    )
    if sequential:
        p99 = math.ceil(2 * sized.expected_count)
    elif allocation.shape is not None:
        p99 = prior_probe_count_quantile(0.99, _slices(allocation), sized.opened_count)
    else:
        p99 = probe_count_quantile(
            0.99, opened_count=sized.opened_count, port_count=sized.port_count
        )
    return Plan(
        strategy=strategy,
        checks=(),
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=sized.duration_s,
        expected_probe_count=sized.expected_count,
        p99_probe_count=p99,
        success_probability=sized.success_probability,
        expected_s=sized.expected_s,
        reason=(
            f"the peer opens {sized.opened_count} mappings, we probe {sized.port_count:,} ports "
            f"({allocation}): {sized.expected_count:,.0f} probes on average"
        ),
    )


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
    port_counts = (_drawn_from(mine), _drawn_from(theirs))
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
        _pace(sum(expected), UNDER_WAY_TWO_SIDED * round_trip_s, limits),
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


def _pace(expected_count: float, under_way_s: float, limits: Limits) -> float:
    """Return the pace at which `limits.overshoot` of the probes expected are under way."""
    pace = limits.overshoot * expected_count / under_way_s
    return min(max(pace, PROBES_PER_S_MIN), limits.probes_per_s)


def _near_count(allocation: PortAllocation) -> int:
    """Return within how many ports a counter is, as good as certainly."""
    drift = (allocation.others_per_s or 0.0) * SEQUENTIAL_AGE_S
    return SEQUENTIAL_RUN_MAX + math.ceil(drift + 3 * math.sqrt(drift))


def _slices(allocation: PortAllocation) -> list[tuple[int, float]]:
    """Return a law that is not flat as (ports, probability) of slices, the densest first."""
    assert allocation.shape is not None
    alpha, beta = allocation.shape
    count = allocation.high - allocation.low + 1
    edges = [count * index // SLICES for index in range(SLICES + 1)]
    parts = [
        (high - low, (high - low) * shape_density(alpha, beta, (low + high) / 2 / count))
        for low, high in pairwise(edges)
        if high > low
    ]
    total = math.fsum(weight for _, weight in parts)
    found = [(ports, weight / total) for ports, weight in parts]
    return sorted(found, key=lambda part: part[1] / part[0], reverse=True)


def _drawn_from(profile: NatProfile) -> int:
    """Return how many ports a NAT draws from, at all its addresses together."""
    addresses = len(public_ips_of(profile)) if profile.public_ips else 1
    return port_count_of(profile) * addresses


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
