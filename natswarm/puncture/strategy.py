"""What a plan is made of: checks, openers and bursts, and the limits it keeps to.

Data only: made by `plan.py`, `birthday.py` and `scan.py`, carried out by `puncturer.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation

__all__ = ["Burst", "Limits", "Openers", "Plan", "Strategy"]

# Openers are sent again before the shortest lifetime seen is over (10 s, Richter et al., IMC 2016).
# Not earlier, for those that were lost: one mapping less in a hundred costs less than all again.
OPENER_REFRESH_S = 7.0

# First retry of a check where the round trip is not known: DCUtR's spacing (arXiv 2604.12484).
CHECK_RETRY_S = 0.1

# RFC 6888 REQ-4 has carriers limit the rate of new mappings, but names no number.
GENTLE_PROBES_PER_S = 100.0
# Where our own path is not known: what hyperdht uses. Two routers before a carrier's NAT, the NAT,
# and two beyond.
OPENER_TTL = 5

# How far apart two sides may start: an introduction takes one way through a neighbour, a slow phone
# takes a second to wake up.
START_SKEW_S = 4.0
# How long after the last probe an answer may still come.
ANSWER_WAIT_S = 2.0


class Strategy(enum.Enum):
    """What kind of puncture."""

    IPV6 = "ipv6"
    SAME_NETWORK = "same-network"
    GATEWAY_MAPPING = "gateway-mapping"
    DIRECT = "direct"
    SIMULTANEOUS_OPEN = "simultaneous-open"
    TFTP_HELPER = "tftp-helper"
    ONE_SIDED_BIRTHDAY = "one-sided-birthday"
    SEQUENTIAL_PREDICTION = "sequential-prediction"
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
        opener_ttl: Hop limit of datagrams that shall open our NAT and not reach the peer's, 1..255:
            the last private or 100.64/10 hop of our own path + 1. For peers whose NAT an early
            datagram poisons, as Linux routers whose own firewall accepts it. None: the system's,
            as a low one costs a simultaneous open a second and a half.
        strategies: Those that alone may be used, for measuring; empty: any. Both sides of a
            puncture must say the same.
    """

    probes_per_s: float = 1000.0
    probe_count: int = 30_000
    socket_count: int = 256
    mapping_count: int = 16_384
    duration_s: float = 120.0
    opener_ttl: int | None = None
    overshoot: float = 0.05
    strategies: tuple[Strategy, ...] = ()

    def gentler(self) -> Limits:
        """Return limits for another try after one that met nobody.

        Slower, for NATs that limit how many mappings a subscriber opens in a second, and with
        openers that do not arrive, for NATs that an early datagram poisons.
        """
        return replace(
            self,
            probes_per_s=min(self.probes_per_s, GENTLE_PROBES_PER_S),
            opener_ttl=OPENER_TTL if self.opener_ttl is None else self.opener_ttl,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Openers:
    """Open one mapping from each of our extra ports, and keep them open.

    Attributes:
        destinations: Each port sends to each of these.
        port_count: Extra ports 1..port_count send.
        probes_per_s: Pace.
        refresh_s: Seconds from one opener of a port to the next.
        ttl: Hop limit; None: the system's.
        is_tftp: Whether they are TFTP read requests, which a NAT with a TFTP helper takes as leave
            to let in the answer from any port of that address.
    """

    destinations: tuple[Endpoint, ...]
    port_count: int
    probes_per_s: float
    refresh_s: float = OPENER_REFRESH_S
    ttl: int | None = None
    is_tftp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Probe ports that the peer's mappings may have.

    Attributes:
        ips: The peer's public addresses; each port is tried at each.
        allocation: The law its ports follow.
        port_indices: Our ports that send, in turn; each has an order of its own, so that no pair of
            our port and their port comes twice before all have been tried.
        is_shuffled: Whether all ports come in random order instead of the likeliest first.
        run_length: Mappings the peer opens in a row, for the stride against a counter.
        near_count: Of a counter, the next so many ports are tried in all places before any other.
        scan_stride: 0, or for two counting NATs: our probes follow the peer's ports with this
            stride.
        scan_lead: How many steps before the peer's last port the scan starts from.
        copies: How often a scan sends each probe.
        runs: For two counting NATs: (probes of ours, steps) of each run. The probes come from as
            many ports and go to one port of the peer's, so many steps after that of the run before.
        is_kept: Whether every round sends the same pairs again, to keep few mappings alive while
            the peer looks for them.
        probe_count: Probes of one round.
        round_count: Rounds.
        round_interval_s: From the start of a round to the next, if it is over by then.
        probes_per_s: Pace.
        hurry_count: After so many probes of a round, `hurry_per_s` is the pace: few punctures come
            that far, so what is then under way weighs little. 0: never.
        hurry_per_s: That pace.
        start_s: Since the start of the plan.
    """

    ips: tuple[str, ...]
    allocation: PortAllocation
    port_indices: tuple[int, ...]
    probe_count: int
    probes_per_s: float
    start_s: float
    hurry_count: int = 0
    hurry_per_s: float = 0.0
    is_shuffled: bool = False
    run_length: int = 1
    near_count: int = 0
    scan_stride: int = 0
    scan_lead: int = 0
    copies: int = 1
    runs: tuple[tuple[int, int], ...] = ()
    is_kept: bool = False
    round_count: int = 1
    round_interval_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """How long the burst takes if nothing is found."""
        round_s = self.probe_count / self.probes_per_s
        if 0 < self.hurry_count < self.probe_count:
            late_count = self.probe_count - self.hurry_count
            round_s = self.hurry_count / self.probes_per_s + late_count / self.hurry_per_s
        return (self.round_count - 1) * max(round_s, self.round_interval_s) + round_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one side does.

    Attributes:
        strategy: The kind.
        checks: Endpoints that the main port probes, again and again until the end: host candidates,
            the peer's known endpoint, or any port at its address to open an ADF filter.
        checks_ttl: Hop limit of the checks during the first `checks_ttl_s`; None: the system's.
        checks_ttl_s: How long.
        retry_s: From the first to the second try of a check; later ones take longer. A round trip,
            or an answer under way would find us asking again.
        tftp_targets: Endpoints that the main port sends a TFTP read request to, along with each
            check: see `Openers.is_tftp`.
        openers: Mappings to open and keep; None: none.
        burst: Ports to probe; None: none.
        probes_per_s: Highest pace of everything together.
        probe_count_max: Probes in all.
        duration_s: After this the plan has failed.
        expected_probe_count: Probes of our side until a path is found, on average, if both sides
            start together.
        p99_probe_count: The same, 99 times in 100.
        success_probability: Within the plan, if the profiles are right and the NATs strict (each
            port of a block serves one mapping). Below 0.999 where limits cut the plan short.
        expected_s: Seconds until a path is found, on average, if both sides start together.
        reason: The plan in words.
        fallback: What follows if this finds nothing, in the same puncture; None: nothing does.
    """

    strategy: Strategy
    checks: tuple[Endpoint, ...]
    checks_ttl: int | None = None
    checks_ttl_s: float = 0.0
    retry_s: float = CHECK_RETRY_S
    tftp_targets: tuple[Endpoint, ...] = ()
    openers: Openers | None = None
    burst: Burst | None = None
    probes_per_s: float
    probe_count_max: int
    duration_s: float
    expected_probe_count: float
    p99_probe_count: int
    success_probability: float
    expected_s: float
    reason: str
    fallback: Plan | None = None

    @property
    def guesses(self) -> bool:
        """Whether it guesses ports, or has the peer guess ours."""
        return self.burst is not None or self.openers is not None

    @property
    def steps(self) -> Iterator[Plan]:
        """This plan and what follows it, in order."""
        step: Plan | None = self
        while step is not None:
            yield step
            step = step.fallback

    @property
    def total_duration_s(self) -> float:
        """After this the puncture has failed."""
        return sum(step.duration_s for step in self.steps)

    @property
    def extra_port_count(self) -> int:
        """How many ports to open beside the main port, for all steps."""
        return max(step.step_port_count for step in self.steps)

    @property
    def step_port_count(self) -> int:
        """The same for this step alone."""
        return max(
            0 if self.openers is None else self.openers.port_count,
            0 if self.burst is None else max(self.burst.port_indices),
        )

    @property
    def targets(self) -> tuple[Endpoint, ...]:
        """Endpoints where the peer may be reached without guessing."""
        return self.checks + (() if self.openers is None else self.openers.destinations)

    @staticmethod
    def chain(steps: Sequence[Plan]) -> Plan:
        """Return the first of some steps, each followed by the next; at least one."""
        *before, chained = steps
        chained = replace(chained, fallback=None)
        for step in reversed(before):
            chained = replace(step, fallback=chained)
        return chained

    def __str__(self) -> str:
        return "; else ".join(f"{step.strategy.value}: {step.reason}" for step in self.steps)
