"""Size the one-sided birthday: how many mappings, which ports, at what pace, for how long.

One side draws its ports: it opens M mappings towards the other's known endpoint, or with leave for
its address, and the other probes. Sizes are the 99.9 % quantiles of `odds.py`. Where both draw it
is `two_sided.py`'s, where both count `scan.py`'s.

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

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw
from natswarm.nat.profile import NatProfile
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
from natswarm.wire import TFTP_PORT

__all__ = [
    "ANSWER_ROUND_TRIPS",
    "CONFIDENCE",
    "HURRY",
    "HURRY_AFTER",
    "OneSided",
    "courteous_pace",
    "drawn_port_count",
    "plan_opener",
    "plan_prober",
    "size_one_sided",
]

# Bursts and budgets are sized so that one puncture in a thousand runs dry.
CONFIDENCE = 0.999
# From the first probe that comes through to the path: the answer, and the choice.
ANSWER_ROUND_TRIPS = 1.5
# See above: when to hurry, and how much.
HURRY_AFTER = 1.5
HURRY = 2.0
# Below this even the smallest search would take longer than users wait.
PROBES_PER_S_MIN = 4.0

# Ports of a block where nobody has seen any: what of presets have blocks have 128 or 256.
BLOCK_USUAL = 256

# Mappings opened in a row against a counter: the probes' stride. More would overrun small blocks.
SEQUENTIAL_RUN_MAX = 16
SEQUENTIAL_RUN_MIN = 4
# From the last echo to the openers: the end of an inspection, and an introduction.
SEQUENTIAL_AGE_S = 2.0


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
    port_count = drawn_port_count(opener)
    opened_max = min(limits.socket_count, mapping_budget(opener, limits))
    if allocation.law is AllocationLaw.SEQUENTIAL:
        drift = (allocation.others_per_s or 0.0) * SEQUENTIAL_AGE_S
        # M + drift / 2M is least at M = sqrt(drift / 2).
        opened = min(max(round(math.sqrt(drift / 2)), SEQUENTIAL_RUN_MIN), SEQUENTIAL_RUN_MAX)
        opened = min(opened, opened_max)
        expected = 1 + drift / 2 / opened  # one in `opened` ports is probed, from the last one up
        enough = math.ceil(port_count / opened) + opened
    elif slices := _slices(opener):
        opened = min(cheapest_prior_opened_count(slices), opened_max)
        expected = expected_prior_probe_count(slices, opened)
        enough = prior_probe_count_quantile(CONFIDENCE, slices, opened)
    else:
        opened = cheapest_opened_count(port_count)
        if allocation.law is AllocationLaw.BLOCK:
            # Half of it is left for what the subscriber does besides.
            opened = min(opened, port_count // 2)
        elif opener.allocation is None:
            # It may be a block, and one that is used up tells nothing of where the next is.
            opened = min(opened, BLOCK_USUAL // 2)
        opened = min(opened, opened_max)
        expected = expected_probe_count(opened_count=opened, port_count=port_count)
        enough = probe_count_quantile(CONFIDENCE, opened_count=opened, port_count=port_count)

    openers_per_s = mapping_pace(opener, opened, limits.probes_per_s)
    start_s = max(0.0, opened / openers_per_s - round_trip_s / 2)
    time_left_s = max(1e-3, limits.duration_s - start_s - ANSWER_WAIT_S)
    # Courtesy ends where it would cost the puncture.
    pace = max(
        courteous_pace(opened + expected, round_trip_s, limits),
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
    elif slices := _slices(theirs):
        p99 = prior_probe_count_quantile(0.99, slices, sized.opened_count)
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


def courteous_pace(expected_count: float, under_way_s: float, limits: Limits) -> float:
    """Return the pace at which `limits.overshoot` of the probes expected are under way."""
    # A coarse clock measures a round trip of nothing.
    pace = limits.overshoot * expected_count / max(under_way_s, 0.001)
    return min(max(pace, PROBES_PER_S_MIN), limits.probes_per_s)


def _near_count(allocation: PortAllocation) -> int:
    """Return within how many ports a counter is, as good as certainly."""
    drift = (allocation.others_per_s or 0.0) * SEQUENTIAL_AGE_S
    return SEQUENTIAL_RUN_MAX + math.ceil(drift + 3 * math.sqrt(drift))


def _slices(profile: NatProfile) -> list[tuple[int, float]]:
    """Return a law that is not flat as (ports, probability) of slices, the densest first.

    Empty where it is flat; at several addresses it counts as such.
    """
    if drawn_port_count(profile) != port_count_of(profile):
        return []
    return [(part.port_count, share) for part, share in allocation_of(profile).slices]


def drawn_port_count(profile: NatProfile) -> int:
    """Return how many ports a NAT draws from, at all its addresses together."""
    addresses = len(public_ips_of(profile)) if profile.public_ips else 1
    return port_count_of(profile) * addresses
