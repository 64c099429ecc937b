"""Size the birthday plans: how many mappings, which ports, at what pace, for how long.

One side draws its ports (one dimension): it opens M mappings towards the other's known endpoint,
and the other probes. Both draw (two dimensions): both send from drawn ports to guessed ones. Sizes
are the 99.9 % quantiles of `odds.py`. Two NATs that count are `scan.py`'s.

Pure arithmetic. Source: docs/puncturing.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import SAFE_RANGE, PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.odds import (
    cheapest_opened_count,
    expected_probe_count,
    hit_probability,
    live_mapping_count,
    probe_count_quantile,
)
from natswarm.puncture.scan import plan_scan
from natswarm.puncture.strategy import (
    ANSWER_WAIT_S,
    START_SKEW_S,
    Burst,
    Limits,
    Openers,
    Plan,
    Strategy,
)

__all__ = ["plan_opener", "plan_prober", "plan_two_sided", "port_count_of", "somewhere_at"]

# Bursts and budgets are sized so that one puncture in a thousand runs dry.
CONFIDENCE = 0.999
# Of the datagrams, in one direction; mobile networks in motion. A meeting needs two to arrive.
LOSS_ASSUMED = 0.1

# Host candidates come first: in one house they answer within milliseconds and spare the burst. With
# a public address in common the house is likely, and worth waiting for the other phone to wake up.
CANDIDATE_HEAD_START_S = 0.25
SAME_ADDRESS_HEAD_START_S = 2.0

# A small burst is spread over a second: it gains nothing from haste, and short bursts at full speed
# are what rate limiters of new mappings drop.
BURST_DURATION_MIN_S = 1.0
PROBES_PER_S_MIN = 50.0
# A counter that moved on further than expected is caught up with, sixteen ports a probe.
SEQUENTIAL_PROBES_PER_S_MIN = 250.0

# Median idle lifetime of UDP mappings in cellular networks (Richter et al., IMC 2016); 10..200 s.
LIFETIME_ASSUMED_S = 65.0
# Mappings opened in a row against a counter: the probes' stride. More would overrun small blocks.
SEQUENTIAL_RUN = 16
# Sockets of an address-dependent NAT in a two-sided puncture: it draws one port for each socket,
# not for each probe. 64 sockets and N/64 probes from each make as many pairs as N mappings would.
ADDRESS_DEPENDENT_SOCKETS = 64
# Two-sided rounds over strict blocks: 63 % each; 95 % after three.
STRICT_ROUNDS_MAX = 4


@dataclass(frozen=True, slots=True)
class _OneSided:
    """The numbers both sides of a one-sided birthday work out alike."""

    opened_count: int
    port_count: int
    probes_per_s: float
    probe_count: int
    """Of the prober: one pass at 99.9 %, one more for what was lost or came too early, and what it
    sends while the opener may not have started."""
    start_s: float

    @property
    def duration_s(self) -> float:
        return self.start_s + self.probe_count / self.probes_per_s + ANSWER_WAIT_S

    @property
    def success_probability(self) -> float:
        return hit_probability(
            opened_count=self.opened_count,
            probed_count=min(self.probe_count, self.port_count),
            port_count=self.port_count,
        )


def _size_one_sided(
    opener: NatProfile, prober: NatProfile, candidates: tuple[Endpoint, ...], limits: Limits
) -> _OneSided:
    allocation = _allocation(opener)
    port_count = port_count_of(opener)
    opened_count = min(cheapest_opened_count(port_count), limits.socket_count)
    if allocation.law is AllocationLaw.SEQUENTIAL:
        opened_count = min(opened_count, SEQUENTIAL_RUN)
    elif allocation.law is AllocationLaw.BLOCK:
        # Half a block is left for what the subscriber does besides.
        opened_count = min(opened_count, port_count // 2)
    # Each of several addresses takes its share of the mappings, and all of the probes.
    port_count *= max(1, len(opener.public_ips))
    enough = probe_count_quantile(CONFIDENCE, opened_count=opened_count, port_count=port_count)
    slowest = PROBES_PER_S_MIN
    if allocation.law is AllocationLaw.SEQUENTIAL:
        slowest = SEQUENTIAL_PROBES_PER_S_MIN
    probes_per_s = min(max(_pace(enough, limits), slowest), limits.probes_per_s)
    probe_count = 2 * enough + math.ceil(probes_per_s * START_SKEW_S)
    start_s = head_start_s(opener, prober, candidates)
    time_left_s = max(0.0, limits.duration_s - start_s - ANSWER_WAIT_S)
    probe_count = min(probe_count, limits.probe_count, int(probes_per_s * time_left_s))
    return _OneSided(opened_count, port_count, probes_per_s, probe_count, start_s)


def plan_opener(
    mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...], limits: Limits
) -> Plan:
    """Plan the unpredictable side of a one-sided birthday: open M mappings and wait.

    Raises:
        PunctureFailed: The peer's endpoint and address are not known.
    """
    sized = _size_one_sided(mine, theirs, candidates, limits)
    if theirs.is_predictable and theirs.main_endpoint is not None:
        destinations: tuple[Endpoint, ...] = (theirs.main_endpoint,)
    else:
        destinations = somewhere_at(theirs)
    expected = expected_probe_count(opened_count=sized.opened_count, port_count=sized.port_count)
    return Plan(
        strategy=Strategy.ONE_SIDED_BIRTHDAY,
        checks=candidates,
        openers=Openers(
            destinations=destinations, port_count=sized.opened_count, ttl=limits.opener_ttl
        ),
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=sized.duration_s,
        expected_probe_count=len(candidates) + sized.opened_count * len(destinations),
        p99_probe_count=3 * (len(candidates) + sized.opened_count * len(destinations)),
        success_probability=min(sized.success_probability, CONFIDENCE),
        reason=(
            f"we open {sized.opened_count} mappings among {sized.port_count:,} ports, the peer "
            f"finds one with {expected:,.0f} probes on average"
        ),
    )


def plan_prober(
    mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...], limits: Limits
) -> Plan:
    """Plan the other side: probe the ports that the peer's M mappings may have.

    Raises:
        PunctureFailed: The peer's address is not known, or the limits are too narrow.
    """
    sized = _size_one_sided(theirs, mine, candidates, limits)
    ips = _public_ips(theirs)
    allocation = _allocation(theirs)
    expected = expected_probe_count(opened_count=sized.opened_count, port_count=sized.port_count)
    if expected > sized.probe_count:
        raise PunctureFailed(
            f"the peer's NAT draws from {sized.port_count:,} ports: {expected:,.0f} probes "
            f"expected, budget {sized.probe_count:,}; allow more probes or time"
        )
    burst = Burst(
        ips=ips,
        allocation=allocation,
        # The known endpoint is the main port's; where none is known, any port will do, and the main
        # port is spared hundreds of mappings.
        port_indices=(0,) if mine.is_predictable else (1,),
        run_length=sized.opened_count,
        probe_count=sized.probe_count,
        probes_per_s=sized.probes_per_s,
        start_s=sized.start_s,
    )
    return Plan(
        strategy=Strategy.ONE_SIDED_BIRTHDAY,
        checks=candidates,
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=sized.duration_s,
        expected_probe_count=expected,
        p99_probe_count=probe_count_quantile(
            0.99, opened_count=sized.opened_count, port_count=sized.port_count
        ),
        success_probability=min(sized.success_probability, CONFIDENCE),
        reason=(
            f"the peer opens {sized.opened_count} mappings, we probe {sized.port_count:,} ports "
            f"({allocation}): {expected:,.0f} probes on average"
        ),
    )


def plan_two_sided(
    mine: NatProfile,
    theirs: NatProfile,
    candidates: tuple[Endpoint, ...],
    limits: Limits,
    *,
    is_first: bool,
) -> Plan:
    """Plan either side of a two-sided birthday.

    Args:
        mine: Our profile.
        theirs: The peer's.
        candidates: Its host candidates.
        limits: Our bounds.
        is_first: Whether our PeerId is the lower one: it decides who scans at which speed.

    Raises:
        PunctureFailed: The peer's address is not known, or the limits are too narrow.
    """
    ips = _public_ips(theirs)
    ours, peers = _allocation(mine), _allocation(theirs)
    start_s = head_start_s(mine, theirs, candidates)
    counts_each_probe = mine.mapping is not Mapping.ADM and theirs.mapping is not Mapping.ADM
    if ours.law is peers.law is AllocationLaw.SEQUENTIAL and counts_each_probe:
        return plan_scan(ips, ours, peers, candidates, limits, start_s=start_s, is_first=is_first)

    sized = _size_two_sided(mine, theirs, limits, start_s=start_s)
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
        probes_per_s=_pace(sized.our_count, limits),
        start_s=start_s,
        round_count=sized.round_count,
        round_interval_s=sized.round_interval_s,
    )
    return Plan(
        strategy=Strategy.TWO_SIDED_BIRTHDAY,
        checks=candidates,
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=start_s + sized.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=sized.expected_count,
        p99_probe_count=math.ceil(sized.p99_count),
        success_probability=min(sized.success_probability, CONFIDENCE),
        reason=(
            f"we draw from {sized.port_counts[0]:,} ports ({ours}), the peer from "
            f"{sized.port_counts[1]:,} ({peers}): {sized.expected_count:,.0f} probes of ours meet "
            "one of theirs on average"
        ),
    )


@dataclass(frozen=True, slots=True)
class _TwoSided:
    """The numbers of a two-sided birthday; pairs are (ours, the peer's)."""

    port_counts: tuple[int, int]
    our_count: int
    """Probes of ours in one round."""
    round_count: int
    round_interval_s: float
    duration_s: float
    expected_count: float
    p99_count: float
    success_probability: float


def _size_two_sided(
    mine: NatProfile, theirs: NatProfile, limits: Limits, *, start_s: float
) -> _TwoSided:
    laws = (_allocation(mine), _allocation(theirs))
    port_counts = (
        port_count_of(mine) * max(1, len(mine.public_ips)),
        port_count_of(theirs) * len(theirs.public_ips),
    )
    product = port_counts[0] * port_counts[1]
    caps = (_useful_count(laws[0]), _useful_count(laws[1]))
    expected = _split(math.pi / 4 * product, caps)
    if expected[0] != expected[1]:
        # One side's few mappings stand early: as in one dimension, 1 in place of pi/4.
        expected = _split(product, caps)
    time_left_s = max(0.0, limits.duration_s - start_s - START_SKEW_S - ANSWER_WAIT_S)
    budget = min(limits.probe_count, limits.mapping_count, int(limits.probes_per_s * time_left_s))
    if max(expected) > budget:
        raise _refusal(port_counts, max(expected), budget)

    arrives = (1 - LOSS_ASSUMED) ** 2
    enough = _split(-math.log1p(-CONFIDENCE) / arrives * product, caps)
    counts = (min(math.ceil(enough[0]), budget), min(math.ceil(enough[1]), budget))
    round_s = max(count / _pace(count, limits) for count in counts)
    # A strict block is used up by one round, and only expiry gives it new ports to draw.
    is_strict = any(law.law is AllocationLaw.BLOCK and not law.is_overloading for law in laws)
    lifetime_s = min(
        LIFETIME_ASSUMED_S if side.idle_lifetime_s is None else side.idle_lifetime_s
        for side in (mine, theirs)
    )
    interval_s = max(lifetime_s + BURST_DURATION_MIN_S, round_s)
    round_count = 1
    if is_strict:
        by_time = 1 + int(max(0.0, time_left_s - round_s) / interval_s)
        round_count = min(STRICT_ROUNDS_MAX, by_time, max(1, limits.probe_count // max(counts)))

    used = [
        min(count, ports) if is_strict else count
        for count, ports in zip(counts, port_counts, strict=True)
    ]
    live = [
        live_mapping_count(opened_per_s=_pace(count, limits), lifetime_s=lifetime_s, cap=used[side])
        for side, count in enumerate(counts)
    ]
    # Each mapping meets what of the other side's is alive with it; both views count the pairs of
    # those alive at one time.
    pairs = used[0] * live[1] + live[0] * used[1] - live[0] * live[1]
    meeting = -math.expm1(-pairs / product)
    return _TwoSided(
        port_counts=port_counts,
        our_count=counts[0],
        round_count=round_count,
        round_interval_s=interval_s if round_count > 1 else 0.0,
        duration_s=(round_count - 1) * interval_s + round_s,
        expected_count=expected[0],
        p99_count=_split(-math.log(0.01) * product, caps)[0],
        success_probability=1 - (1 - meeting) ** round_count,
    )


def _pace(probe_count: float, limits: Limits) -> float:
    return min(max(probe_count / BURST_DURATION_MIN_S, PROBES_PER_S_MIN), limits.probes_per_s)


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


def _allocation(profile: NatProfile) -> PortAllocation:
    return profile.allocation or PortAllocation(AllocationLaw.UNIFORM)


def port_count_of(profile: NatProfile) -> int:
    """Return how many ports a NAT draws from, at one address; all where nothing is known."""
    return _allocation(profile).port_count


def _public_ips(profile: NatProfile) -> tuple[str, ...]:
    if not profile.public_ips:
        raise PunctureFailed(
            "nobody has seen the peer's public address yet; connect it to one more peer first"
        )
    return profile.public_ips


def somewhere_at(profile: NatProfile) -> tuple[Endpoint, ...]:
    """Return an endpoint at each of the peer's addresses, whose port does not matter."""
    # Inside the range the peer's NAT uses, where a firewall would look least.
    port = max(_allocation(profile).low, SAFE_RANGE.low)
    return tuple(Endpoint(ip, port) for ip in _public_ips(profile))


def head_start_s(mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...]) -> float:
    if any(ip in theirs.public_ips for ip in mine.public_ips):
        return SAME_ADDRESS_HEAD_START_S
    return CANDIDATE_HEAD_START_S if candidates else 0.0
