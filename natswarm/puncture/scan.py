"""Plan the meeting of two counters: NATs that give out ports one after another.

Neither side's next port is known exactly, but both move along a line. Let the counters stand a and
b ports further than the profiles say.

**Runs.** Each side sends from one socket after another, all to the same port: the one that the
peer's counter will reach at the end of its own run of as many. Our counter passes the port the
peer aims at with a mapping aimed at the port the peer passes. With runs as long as the uncertainty,
W ports, one run meets, in 2W probes at most; no order of probes can cover W x W places with fewer,
since N_a * N_b pairs cover one place each. What spoils it is another subscriber taking just that
port; then the next run is due. EasyTier does this with one run of 25 sockets.

**A scan**, where W is more than we have sockets: each walks along the other's ports, at different
speeds, and the walks cross (Klinec & Matyas 2014, "Traversing symmetric NAT with predictable port
allocation function"). Our i-th probe leaves from port a+i of ours to port i of theirs, their j-th
from b+j to 2j-c. They meet at j = a+b+c and i = a+2b+c, and the lead c keeps that ahead of the
first probe. The lines cross but once, so each probe is sent twice; unless others are taking ports
meanwhile, when speed is worth more.

Pure arithmetic. Knows only the counters; blocks and random ports are `birthday.py`'s.
"""

from __future__ import annotations

import math
from itertools import accumulate

from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.profile import NatProfile
from natswarm.puncture.bounds import (
    allocation_of,
    live_s,
    mapping_budget,
    mapping_pace,
    public_ips_of,
)
from natswarm.puncture.strategy import (
    ANSWER_WAIT_S,
    START_SKEW_S,
    Burst,
    Limits,
    Plan,
    Strategy,
)

__all__ = ["plan_sequential"]

# From the last echo to the first probe: the end of an inspection, and an introduction.
SCAN_AGE_S = 2.0
# Room for datagrams that never reached our own NAT, so that its counter stands behind.
SCAN_LEAD = 4

# Ports that others take while a counter's age is unknown are Poisson: so many of its standard
# deviations beyond the mean hold 99 %.
WINDOW_DEVIATIONS = 2.5
# Oldest profile that the first run allows for.
WINDOW_AGE_S = 3.0
# Longest run; both sides must agree on it, whatever their own limits.
RUN_MAX = 256
# Each run is longer than the first by so much: if a counter was further ahead than its window, as
# with profiles older than `WINDOW_AGE_S`, all runs of one length would miss alike.
RUN_GROWTH = (1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
RUN_GROWTH_MIN = 1.5
# Both sides of a run keep the same pace, so it rests on no measured round trip.
RUN_ROUND_TRIP_S = 0.2
RUN_PROBES_PER_S_MIN = 50.0

# Steps of a scan. Klinec & Matyas reach ~100 % within 1,000 steps up to 35 new flows a second; more
# flows take more steps.
SCAN_STEPS_MIN = 512
SCAN_STEPS_MAX = 8192
# Below so many ports a second of other subscribers, loss is the greater danger.
SCAN_QUIET_PER_S = 20.0
# Measured on the emulator (docs/puncturing.md).
SCAN_SUCCESS = 0.95


def plan_sequential(
    mine: NatProfile,
    theirs: NatProfile,
    limits: Limits,
    round_trip_s: float,
    *,
    is_first: bool,
) -> Plan:
    """Plan the meeting of two counters.

    Args:
        mine: Our profile.
        theirs: The peer's.
        limits: Our bounds.
        round_trip_s: To the peer and back, roughly.
        is_first: Whether our PeerId is the lower one: it decides who scans at which speed.

    Raises:
        PunctureFailed: The peer's address is not known, or the limits are too narrow.
    """
    windows = [_window(allocation_of(side)) for side in (mine, theirs)]
    if max(windows) * RUN_GROWTH_MIN <= RUN_MAX:
        return _plan_runs(mine, theirs, windows, limits, round_trip_s)
    return _plan_scan(mine, theirs, limits, round_trip_s, is_first=is_first)


def _window(allocation: PortAllocation) -> int:
    """Return how many ports ahead a counter may stand by now."""
    moved = (allocation.others_per_s or 0.0) * WINDOW_AGE_S
    return SCAN_LEAD + math.ceil(moved + WINDOW_DEVIATIONS * math.sqrt(moved))


def _targets(window: int, growth: list[float]) -> list[tuple[int, int]]:
    """Return, for each run, its window and how far its port is from that of the run before.

    A run goes on for `SCAN_LEAD` ports after it has reached its port, in case that datagrams got
    lost before they could move the counter; so the next port is that much further.
    """
    found: list[tuple[int, int]] = []
    for factor in growth:
        wide = math.ceil(window * factor)
        target = wide + SCAN_LEAD if found else wide
        found.append((wide, target))
    return found


def _plan_runs(
    mine: NatProfile,
    theirs: NatProfile,
    windows: list[int],
    limits: Limits,
    round_trip_s: float,
) -> Plan:
    rates = [allocation_of(side).others_per_s or 0.0 for side in (mine, theirs)]
    # A port is lost to others with rate / (rate + pace); what is under way costs the round trip x
    # pace. The sum is least where both cost the same.
    best = math.sqrt(sum(windows) * sum(rates) / 2 / RUN_ROUND_TRIP_S)
    pace = min(max(best, RUN_PROBES_PER_S_MIN), limits.probes_per_s)
    growth = [min(factor, RUN_MAX / max(windows)) for factor in RUN_GROWTH]
    pace = min(mapping_pace(side, sum(windows), pace) for side in (mine, theirs))
    # Others move the counter on, too: so many probes of ours take it over a run.
    own = pace / (pace + rates[0])
    runs = tuple(
        (math.ceil((steps + SCAN_LEAD) * own), target)
        for (steps, _), (_, target) in zip(
            _targets(windows[0], growth), _targets(windows[1], growth), strict=True
        )
    )
    budget = min(limits.probe_count, mapping_budget(mine, limits), int(pace * live_s(mine)))
    runs = runs[: sum(total <= budget for total in accumulate(count for count, _ in runs))]
    longest = max((count for count, _ in runs), default=0)
    if not 0 < longest <= limits.socket_count:
        raise PunctureFailed(
            f"both NATs count, and a run takes {longest} mappings of {budget:,} from as many "
            "sockets; allow more probes or sockets, or close other applications"
        )
    run = runs[0][0]
    kept = math.prod(pace / (pace + rate) for rate in rates)
    # Of two runs that start anywhere in their windows the longer takes two thirds.
    expected = 2 / 3 * max(windows) * own + (1 / kept - 1) * run
    burst = Burst(
        ips=public_ips_of(theirs)[:1],
        allocation=allocation_of(theirs),
        port_indices=tuple(range(1, longest + 1)),
        runs=runs,
        probe_count=sum(count for count, _ in runs),
        probes_per_s=pace,
        start_s=0.0,
    )
    return Plan(
        strategy=Strategy.SEQUENTIAL_PREDICTION,
        checks=(),
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=burst.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=expected,
        p99_probe_count=math.ceil(run * (1 + math.log(0.01) / min(math.log1p(-kept), -1e-9)))
        if kept < 1
        else run,
        success_probability=min(1 - (1 - kept) ** len(runs), SCAN_SUCCESS),
        expected_s=expected / pace + 1.5 * round_trip_s,
        reason=(
            f"both NATs count: a run of {run} ports of ours is aimed at the port that the peer's "
            f"run passes, {windows[1]} ahead"
        ),
    )


def _plan_scan(
    mine: NatProfile,
    theirs: NatProfile,
    limits: Limits,
    round_trip_s: float,
    *,
    is_first: bool,
) -> Plan:
    ours, peers = allocation_of(mine), allocation_of(theirs)
    others_per_s = (ours.others_per_s or 0.0) + (peers.others_per_s or 0.0)
    copies = 2 if others_per_s < SCAN_QUIET_PER_S else 1
    drift = SCAN_LEAD + others_per_s * SCAN_AGE_S
    # At full speed: other subscribers' ports during the scan flatten the angle at which the lines
    # cross.
    full = min(mapping_pace(side, SCAN_STEPS_MAX, limits.probes_per_s) for side in (mine, theirs))
    pace = full / copies
    slopes = (1 + (ours.others_per_s or 0.0) / pace) * (1 + (peers.others_per_s or 0.0) / pace)
    crossing = 2 * drift / max(2 - slopes, 0.1)
    steps = min(SCAN_STEPS_MIN + math.ceil(3 * crossing), SCAN_STEPS_MAX)
    time_left_s = max(0.0, limits.duration_s - START_SKEW_S - ANSWER_WAIT_S)
    budget = min(limits.probe_count, mapping_budget(mine, limits), int(full * time_left_s))
    steps = min(steps, budget // copies)
    if steps < crossing:
        raise PunctureFailed(
            f"both NATs count, and others take {others_per_s:,.0f} ports a second: "
            f"{copies * crossing:,.0f} probes expected, budget {copies * steps:,}; allow more "
            "probes or time, or inspect again right before"
        )
    burst = Burst(
        ips=public_ips_of(theirs)[:1],
        allocation=peers,
        port_indices=(1,),
        scan_stride=1 if is_first else 2,
        scan_lead=0 if is_first else SCAN_LEAD,
        copies=copies,
        probe_count=copies * steps,
        probes_per_s=full,
        start_s=0.0,
    )
    return Plan(
        strategy=Strategy.SEQUENTIAL_PREDICTION,
        checks=(),
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=burst.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=copies * crossing,
        p99_probe_count=copies * steps,
        success_probability=SCAN_SUCCESS if slopes < 1.5 else SCAN_SUCCESS / 2,
        expected_s=copies * crossing / full + 1.5 * round_trip_s,
        reason=f"both NATs count: we follow the peer's ports in steps of {burst.scan_stride}",
    )
