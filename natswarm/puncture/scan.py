"""Plan the meeting of two counters: NATs that give out ports one after another.

Neither side's next port is known exactly, but both move along a line: so each side walks along the
other's, at different speeds, and the walks cross (Klinec & Matyas 2014, "Traversing symmetric NAT
with predictable port allocation function").

Pure arithmetic. Knows only the counters; blocks and random ports are `birthday.py`'s.
"""

from __future__ import annotations

import math

from natswarm.address import Endpoint
from natswarm.errors import PunctureFailed
from natswarm.nat.allocation import PortAllocation
from natswarm.puncture.strategy import (
    ANSWER_WAIT_S,
    START_SKEW_S,
    Burst,
    Limits,
    Plan,
    Strategy,
)

__all__ = ["plan_scan"]

# Steps of a scan between two counting NATs. Klinec & Matyas reach ~100 % within 1,000 steps up to
# 35 new flows a second; more flows take more steps.
SCAN_STEPS_MIN = 512
SCAN_STEPS_MAX = 8192
# Room for datagrams that never reached our own NAT, so that its counter stands behind.
SCAN_LEAD = 4
# From the last echo to the first probe: the end of an inspection, and an introduction.
SCAN_AGE_S = 2.0
# Below so many ports a second of other subscribers, loss is the greater danger.
SCAN_QUIET_PER_S = 20.0
# Measured on the emulator (docs/puncturing.md).
SCAN_SUCCESS = 0.95


def plan_scan(
    ips: tuple[str, ...],
    ours: PortAllocation,
    peers: PortAllocation,
    candidates: tuple[Endpoint, ...],
    limits: Limits,
    *,
    start_s: float,
    is_first: bool,
) -> Plan:
    """Plan the meeting of two counters (Klinec & Matyas 2014).

    Let the counters stand a and b ports further than the profiles say. Our i-th probe leaves from
    port a+i of ours to port i of theirs, their j-th from b+j to 2j-c. They meet at j = a+b+c and
    i = a+2b+c: one walks at double speed, so that the lines cross wherever they start, and the lead
    c keeps the crossing ahead of the first probe. The lines cross but once, so each probe is sent
    twice; unless others are taking ports meanwhile, when speed is worth more.
    """
    others_per_s = (ours.others_per_s or 0.0) + (peers.others_per_s or 0.0)
    copies = 2 if others_per_s < SCAN_QUIET_PER_S else 1
    drift = SCAN_LEAD + others_per_s * SCAN_AGE_S
    # Other subscribers' ports during the scan flatten the angle at which the lines cross.
    pace = limits.probes_per_s / copies
    slopes = (1 + (ours.others_per_s or 0.0) / pace) * (1 + (peers.others_per_s or 0.0) / pace)
    crossing = 2 * drift / max(2 - slopes, 0.1)
    steps = min(SCAN_STEPS_MIN + math.ceil(3 * crossing), SCAN_STEPS_MAX)
    time_left_s = max(0.0, limits.duration_s - start_s - START_SKEW_S - ANSWER_WAIT_S)
    in_time = int(limits.probes_per_s * time_left_s)
    steps = min(steps, limits.probe_count // copies, limits.mapping_count, in_time // copies)
    if steps < crossing:
        raise PunctureFailed(
            f"both NATs count, and others take {others_per_s:,.0f} ports a second: "
            f"{copies * crossing:,.0f} probes expected, budget {copies * steps:,}; allow more "
            "probes or time, or inspect again right before"
        )
    burst = Burst(
        ips=ips[:1],
        allocation=peers,
        port_indices=(1,),
        scan_stride=1 if is_first else 2,
        scan_lead=0 if is_first else SCAN_LEAD,
        copies=copies,
        probe_count=copies * steps,
        # At full speed: the faster the scan, the fewer ports others take in between.
        probes_per_s=limits.probes_per_s,
        start_s=start_s,
    )
    return Plan(
        strategy=Strategy.TWO_SIDED_BIRTHDAY,
        checks=candidates,
        burst=burst,
        probes_per_s=limits.probes_per_s,
        probe_count_max=limits.probe_count,
        duration_s=start_s + burst.duration_s + START_SKEW_S + ANSWER_WAIT_S,
        expected_probe_count=copies * crossing,
        p99_probe_count=copies * steps,
        success_probability=SCAN_SUCCESS if slopes < 1.5 else SCAN_SUCCESS / 2,
        reason=f"both NATs count: we follow the peer's ports in steps of {burst.scan_stride}",
    )
