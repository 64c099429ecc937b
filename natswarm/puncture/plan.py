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

Pure: no clock, no randomness, no sockets. Source: docs/puncturing.md; reference: Ford, Srisuresh &
Kegel 2005 (simultaneous open), Klinec & Matyas 2014 (sequential NATs).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import PunctureFailed
from natswarm.identity import PeerId
from natswarm.nat.allocation import SAFE_RANGE, SEQUENTIAL_WINDOW, PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Mapping
from natswarm.nat.profile import NatProfile
from natswarm.puncture.odds import (
    cheapest_opened_count,
    expected_probe_count,
    hit_probability,
    live_mapping_count,
    meeting_probability,
    probe_count_quantile,
)

__all__ = ["Burst", "Limits", "Openers", "Plan", "Strategy", "plan_direct", "plan_puncture"]

# Bursts and budgets are sized so that one puncture in a thousand runs dry.
CONFIDENCE = 0.999
# Of the datagrams, in one direction; mobile networks in motion. A meeting needs two to arrive.
LOSS_ASSUMED = 0.1

# How far apart two sides may start: an introduction takes one way through a neighbour, a slow phone
# takes a second to wake up.
START_SKEW_S = 4.0
# How long after the last probe an answer may still come.
ANSWER_WAIT_S = 2.0
# A plan that only checks a few endpoints costs nearly nothing, so it is patient.
CHECK_DURATION_S = 10.0
# Host candidates come first: in one house they answer within milliseconds and spare the burst. With
# a public address in common the house is likely, and worth waiting for the other phone to wake up.
CANDIDATE_HEAD_START_S = 0.25
SAME_ADDRESS_HEAD_START_S = 2.0
CANDIDATES_MAX = 8

# A small burst is spread over a second: it gains nothing from haste, and short bursts at full speed
# are what rate limiters of new mappings drop.
BURST_DURATION_MIN_S = 1.0
PROBES_PER_S_MIN = 50.0

# Median idle lifetime of UDP mappings in cellular networks (Richter et al., IMC 2016); 10..200 s.
LIFETIME_ASSUMED_S = 65.0
# Openers are sent again well before the shortest lifetime seen (10 s), and early once, as the first
# may be lost.
OPENER_REFRESH_S = (0.5, 4.0)

# Mappings opened in a row against a counter: the probes' stride. More would overrun small blocks.
SEQUENTIAL_RUN = 16
# Steps of a scan between two counting NATs: Klinec & Matyas reach ~100 % within 1,000.
SCAN_STEPS = 1000
# Sockets of an address-dependent NAT in a two-sided puncture: it draws one port for each socket,
# not for each probe. 64 sockets and N/64 probes from each make as many pairs as N mappings would.
ADDRESS_DEPENDENT_SOCKETS = 64
# Two-sided rounds over strict blocks: 63 % each; 95 % after three.
STRICT_ROUNDS_MAX = 4


class Strategy(enum.Enum):
    """What kind of puncture."""

    DIRECT = "direct"
    SIMULTANEOUS_OPEN = "simultaneous-open"
    ONE_SIDED_BIRTHDAY = "one-sided-birthday"
    TWO_SIDED_BIRTHDAY = "two-sided-birthday"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one puncture, for courtesy and for the user's data plan.

    Attributes:
        probes_per_s: Highest pace. 1,000 probes are 77 kB with their headers: 0.6 Mbit/s, a tenth
            of a poor uplink; kotlin-birthday-connect went up to 7,500, hyperdht stays at 50.
        probe_count: Probes of our side in all: 30,000 are 2.3 MB. An Android phone was seen to stop
            sending silently at about 29,000 (Tribler issue 7258).
        socket_count: Ports to open at a time. 256 as in hyperdht and frp; a process may commonly
            have 1,024 files open.
        mapping_count: Mappings, or table entries towards distinct endpoints, that a burst may leave
            in our NAT. Small home routers hold 16,384 for the whole home.
        duration_s: Longest puncture.
        opener_ttl: Hop limit of openers that are not meant to arrive, 1..255; None: the system's.
            It keeps the peer's NAT from seeing them, in case an early datagram moves or burns its
            mapping: the last private or 100.64/10 hop of our own path + 1.
    """

    probes_per_s: float = 1000.0
    probe_count: int = 30_000
    socket_count: int = 256
    mapping_count: int = 16_384
    duration_s: float = 120.0
    opener_ttl: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Openers:
    """Open one mapping from each of our extra ports, and keep them open.

    Attributes:
        destinations: Each port sends to each of these.
        port_count: Extra ports 1..port_count send.
        refresh_s: Seconds after the first opener of a port until the second, and between later
            ones.
        ttl: Hop limit; None: the system's.
    """

    destinations: tuple[Endpoint, ...]
    port_count: int
    refresh_s: tuple[float, float] = OPENER_REFRESH_S
    ttl: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Probe ports that the peer's mappings may have.

    Attributes:
        ips: The peer's public addresses; each port is tried at each.
        allocation: The law its ports follow.
        port_indices: Our ports that send, in turn; each has an order of its own, so that no pair of
            our port and their port comes twice before all have been tried.
        run_length: Mappings the peer opens in a row, for the stride against a counter.
        scan_stride: 0, or for two counting NATs: our i-th probe goes to the peer's (stride*i)-th
            next port, in the same order in every round.
        probe_count: Probes of one round.
        round_count: Rounds.
        round_interval_s: From the start of a round to the next, if it is over by then.
        probes_per_s: Pace.
        start_s: Since the start of the plan.
    """

    ips: tuple[str, ...]
    allocation: PortAllocation
    port_indices: tuple[int, ...]
    probe_count: int
    probes_per_s: float
    start_s: float
    run_length: int = 1
    scan_stride: int = 0
    round_count: int = 1
    round_interval_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """How long the burst takes if nothing is found."""
        round_s = self.probe_count / self.probes_per_s
        return (self.round_count - 1) * max(round_s, self.round_interval_s) + round_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one side does.

    Attributes:
        strategy: The kind.
        checks: Endpoints that the main port probes, again and again until the end: host candidates,
            the peer's known endpoint, or any port at its address to open an ADF filter.
        openers: Mappings to open and keep; None: none.
        burst: Ports to probe; None: none.
        probes_per_s: Highest pace of everything together.
        probe_count_max: Probes in all.
        duration_s: After this the puncture has failed.
        expected_probe_count: Probes of our side until a path is found, on average, if both sides
            start together.
        p99_probe_count: The same, 99 times in 100.
        success_probability: Within the plan, if the profiles are right and the NATs strict (each
            port of a block serves one mapping). Below 0.999 where limits cut the plan short.
        reason: The plan in words.
    """

    strategy: Strategy
    checks: tuple[Endpoint, ...]
    openers: Openers | None = None
    burst: Burst | None = None
    probes_per_s: float
    probe_count_max: int
    duration_s: float
    expected_probe_count: float
    p99_probe_count: int
    success_probability: float
    reason: str

    @property
    def extra_port_count(self) -> int:
        """How many ports to open beside the main port."""
        opened = 0 if self.openers is None else self.openers.port_count
        probing = 0 if self.burst is None else max(self.burst.port_indices)
        return max(opened, probing)

    @property
    def targets(self) -> tuple[Endpoint, ...]:
        """Endpoints where the peer may be reached without guessing."""
        return self.checks + (() if self.openers is None else self.openers.destinations)

    @property
    def expected_s(self) -> float:
        """Seconds until a path is found, on average, if both start together and nothing is far."""
        if self.burst is None:
            return 0.0
        return self.burst.start_s + self.expected_probe_count / self.burst.probes_per_s

    def __str__(self) -> str:
        return f"{self.strategy.value}: {self.reason}"


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
                    return _plan_opener(mine, theirs, candidates, limits)
                return _plan_prober(mine, theirs, candidates, limits)
            case Strategy.TWO_SIDED_BIRTHDAY:
                return _plan_two_sided(mine, theirs, candidates, limits, is_first=is_first)
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
        fewer = _port_count(first) <= _port_count(second)
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
    if theirs.main_endpoint is not None:
        checks += (theirs.main_endpoint,)
    if theirs.accepts_strangers:
        reason = "the peer lets in strangers, so we dial"
    elif mine.accepts_strangers:
        reason = "we let in strangers, so the peer dials"
    elif strategy is Strategy.SIMULTANEOUS_OPEN:
        reason = "both endpoints are known: both send to the other's"
    elif mine.is_predictable and mine.accepts_address:
        reason = "one datagram to the peer's address opens our filter for it, then the peer dials"
        checks += _somewhere_at(theirs)
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
        duration_s=min(CHECK_DURATION_S, limits.duration_s),
        expected_probe_count=max(1, len(checks)),
        p99_probe_count=3 * max(1, len(checks)),  # two losses in a row come once in a hundred
        success_probability=CONFIDENCE,
        reason=reason,
    )


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
    port_count = _port_count(opener)
    opened_count = min(cheapest_opened_count(port_count), limits.socket_count)
    if allocation.law is AllocationLaw.SEQUENTIAL:
        opened_count = min(opened_count, SEQUENTIAL_RUN)
    elif allocation.law is AllocationLaw.BLOCK:
        # Half a block is left for what the subscriber does besides.
        opened_count = min(opened_count, port_count // 2)
    # Each of several addresses takes its share of the mappings, and all of the probes.
    port_count *= max(1, len(opener.public_ips))
    enough = probe_count_quantile(CONFIDENCE, opened_count=opened_count, port_count=port_count)
    probes_per_s = min(max(enough / BURST_DURATION_MIN_S, PROBES_PER_S_MIN), limits.probes_per_s)
    probe_count = 2 * enough + math.ceil(probes_per_s * START_SKEW_S)
    start_s = _head_start_s(opener, prober, candidates)
    time_left_s = max(0.0, limits.duration_s - start_s - ANSWER_WAIT_S)
    probe_count = min(probe_count, limits.probe_count, int(probes_per_s * time_left_s))
    return _OneSided(opened_count, port_count, probes_per_s, probe_count, start_s)


def _plan_opener(
    mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...], limits: Limits
) -> Plan:
    sized = _size_one_sided(mine, theirs, candidates, limits)
    if theirs.is_predictable and theirs.main_endpoint is not None:
        destinations: tuple[Endpoint, ...] = (theirs.main_endpoint,)
    else:
        destinations = _somewhere_at(theirs)
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


def _plan_prober(
    mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...], limits: Limits
) -> Plan:
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


def _plan_two_sided(
    mine: NatProfile,
    theirs: NatProfile,
    candidates: tuple[Endpoint, ...],
    limits: Limits,
    *,
    is_first: bool,
) -> Plan:
    ips = _public_ips(theirs)
    ours, peers = _allocation(mine), _allocation(theirs)
    start_s = _head_start_s(mine, theirs, candidates)
    if ours.law is peers.law is AllocationLaw.SEQUENTIAL:
        return _plan_scan(ips, peers, candidates, limits, start_s=start_s, is_first=is_first)

    port_counts = (
        _port_count(mine) * max(1, len(mine.public_ips)),
        _port_count(theirs) * len(ips),
    )
    lifetime_s = min(
        LIFETIME_ASSUMED_S if side.idle_lifetime_s is None else side.idle_lifetime_s
        for side in (mine, theirs)
    )
    caps = (_mapping_cap(ours, limits), _mapping_cap(peers, limits))
    expected = _split(math.pi / 4 * port_counts[0] * port_counts[1], caps)
    budget = min(limits.probe_count, limits.mapping_count)
    if max(expected) > budget:
        raise _refusal(port_counts, max(expected), budget)
    arrives = (1 - LOSS_ASSUMED) ** 2
    enough = _split(-math.log1p(-CONFIDENCE) / arrives * port_counts[0] * port_counts[1], caps)
    counts = (min(math.ceil(enough[0]), budget), min(math.ceil(enough[1]), budget))
    most = max(counts)
    probes_per_s = min(max(most / BURST_DURATION_MIN_S, PROBES_PER_S_MIN), limits.probes_per_s)
    round_s = most / probes_per_s
    # A strict block is used up by one round, and only expiry gives it new ports to draw.
    is_strict = any(
        side.law is AllocationLaw.BLOCK and not side.is_overloading for side in (ours, peers)
    )
    interval_s = lifetime_s + BURST_DURATION_MIN_S
    room_s = limits.duration_s - start_s - START_SKEW_S - ANSWER_WAIT_S - round_s
    round_count = 1
    if is_strict:
        by_time = 1 + max(0, int(room_s / max(interval_s, round_s)))
        round_count = min(STRICT_ROUNDS_MAX, by_time, max(1, limits.probe_count // most))
    # Probes that outlive their mappings meet only what is still alive.
    live = [
        live_mapping_count(
            opened_per_s=probes_per_s,
            lifetime_s=lifetime_s,
            cap=min(count, ports) if is_strict else count,
        )
        for count, ports in zip(counts, port_counts, strict=True)
    ]
    meeting = meeting_probability(probe_counts=(live[0], live[1]), port_counts=port_counts)
    sockets = math.ceil(counts[0] / port_counts[1])
    if mine.mapping is Mapping.ADM:
        sockets = max(sockets, ADDRESS_DEPENDENT_SOCKETS)
    sockets = min(sockets, limits.socket_count)
    burst = Burst(
        ips=ips,
        allocation=peers,
        port_indices=tuple(range(1, sockets + 1)),
        probe_count=counts[0],
        probes_per_s=counts[0] / round_s,
        start_s=start_s,
        round_count=round_count,
        round_interval_s=interval_s if round_count > 1 else 0.0,
    )
    return Plan(
        strategy=Strategy.TWO_SIDED_BIRTHDAY,
        checks=candidates,
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=start_s + burst.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=expected[0],
        p99_probe_count=math.ceil(
            _split(-math.log(0.01) * port_counts[0] * port_counts[1], caps)[0]
        ),
        success_probability=min(1 - (1 - meeting) ** round_count, CONFIDENCE),
        reason=(
            f"we draw from {port_counts[0]:,} ports ({ours}), the peer from {port_counts[1]:,} "
            f"({peers}): {expected[0]:,.0f} probes of ours meet one of theirs on average"
        ),
    )


def _plan_scan(
    ips: tuple[str, ...],
    peers: PortAllocation,
    candidates: tuple[Endpoint, ...],
    limits: Limits,
    *,
    start_s: float,
    is_first: bool,
) -> Plan:
    """Plan the meeting of two counters (Klinec & Matyas 2014).

    Let the counters stand a and b ports further than the profiles say. Our i-th probe leaves from
    port a+i of ours to port i of theirs, their j-th from b+j to 2j. They meet at j = a+b, i = a+2b:
    one walks once, the other at double speed, so that the lines cross wherever they start. The
    round is sent again as it was, through the same mappings, for what got lost.
    """
    count = min(SCAN_STEPS, limits.probe_count // 2, limits.mapping_count)
    probes_per_s = min(limits.probes_per_s, count / BURST_DURATION_MIN_S)
    burst = Burst(
        ips=ips[:1],
        allocation=peers,
        port_indices=(1,),
        scan_stride=1 if is_first else 2,
        probe_count=count,
        probes_per_s=probes_per_s,
        start_s=start_s,
        round_count=2,
    )
    return Plan(
        strategy=Strategy.TWO_SIDED_BIRTHDAY,
        checks=candidates,
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=start_s + burst.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        # Where the counters stand is anybody's guess; a third of the way, when they are shared.
        expected_probe_count=count / 3,
        p99_probe_count=2 * count,
        success_probability=1 - 2 * LOSS_ASSUMED,
        reason=f"both NATs count: we follow the peer's ports in steps of {burst.scan_stride}",
    )


def _split(product: float, caps: tuple[float, float]) -> tuple[float, float]:
    """Return probe counts of two sides with this product: equal if the caps allow."""
    equal = math.sqrt(product)
    if equal <= min(caps):
        return equal, equal
    if caps[0] <= caps[1]:
        return caps[0], product / caps[0]
    return product / caps[1], caps[1]


def _mapping_cap(allocation: PortAllocation, limits: Limits) -> float:
    """Return how many mappings of one side can be where the other looks for them."""
    if allocation.law is AllocationLaw.SEQUENTIAL:
        return SEQUENTIAL_WINDOW / 2  # more would leave the window, whose half is drift
    return limits.mapping_count


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


def _port_count(profile: NatProfile) -> int:
    return _allocation(profile).port_count


def _public_ips(profile: NatProfile) -> tuple[str, ...]:
    if not profile.public_ips:
        raise PunctureFailed(
            "nobody has seen the peer's public address yet; connect it to one more peer first"
        )
    return profile.public_ips


def _somewhere_at(profile: NatProfile) -> tuple[Endpoint, ...]:
    """Return an endpoint at each of the peer's addresses, whose port does not matter."""
    # Inside the range the peer's NAT uses, where a firewall would look least.
    port = max(_allocation(profile).low, SAFE_RANGE.low)
    return tuple(Endpoint(ip, port) for ip in _public_ips(profile))


def _candidates(mine: NatProfile, theirs: NatProfile) -> tuple[Endpoint, ...]:
    """Return the peer's host candidates that we can send to at all."""
    my_families = {":" in endpoint.ip for endpoint in mine.local_endpoints}
    own_ips = {endpoint.ip for endpoint in mine.local_endpoints}
    usable = [
        endpoint
        for endpoint in theirs.local_endpoints
        if (":" in endpoint.ip) in my_families
        and endpoint.kind not in (AddressKind.UNUSABLE, AddressKind.LOOPBACK)
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


def _head_start_s(mine: NatProfile, theirs: NatProfile, candidates: tuple[Endpoint, ...]) -> float:
    if any(ip in theirs.public_ips for ip in mine.public_ips):
        return SAME_ADDRESS_HEAD_START_S
    return CANDIDATE_HEAD_START_S if candidates else 0.0
