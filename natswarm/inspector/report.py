"""What an inspection came to: for each part what it found, or why it found nothing.

Data only. A part that failed is not an exception: the others are worth as much without it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.inspector.schema import report_as_json
from natswarm.nat.findings import Interval, NatTest
from natswarm.nat.path import PathReport
from natswarm.nat.profile import NatProfile
from natswarm.net.gateway import Gateway, ServiceReport
from natswarm.net.interfaces import Interface, InterfaceReport

__all__ = [
    "Evidence",
    "Finding",
    "GatewayFindings",
    "InspectionReport",
    "LocalTest",
    "ObserverReport",
    "Outcome",
    "Part",
    "Prospect",
    "ServiceFindings",
    "State",
    "Test",
]

ResultT_co = TypeVar("ResultT_co", covariant=True)


class LocalTest(enum.Enum):
    """What can be found out without asking a peer, besides the list of interfaces."""

    GATEWAY = "gateway"
    """Which port mapping services the gateway has; changes nothing there."""
    LEASE = "lease"
    """What lease they give: a mapping each, of a port that drops everything, and taken back."""
    PATH = "path"
    """Hops outward, and where private and shared addresses end."""


Test = LocalTest | NatTest


@dataclass(frozen=True, slots=True)
class Part(Generic[ResultT_co]):
    """One part of the report.

    Attributes:
        result: What was found; None where nothing was.
        reason: Why nothing was; empty otherwise.
        duration_s: How long it took.
    """

    result: ResultT_co | None
    reason: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServiceFindings(ServiceReport):
    """One protocol of the gateway, and the lease it gave.

    Attributes:
        lease_s: The lease it gave, seconds; infinity: without end. None: none was given or asked
            for.
        lease_problem: Why it gave none; empty where it did or was not asked.
    """

    lease_s: float | None = None
    lease_problem: str = ""


@dataclass(frozen=True, slots=True)
class GatewayFindings:
    """What the gateway offers; one entry for each protocol, best first."""

    gateway: Gateway
    services: tuple[ServiceFindings, ...]

    @property
    def external_ip(self) -> str | None:
        """What the gateway calls its external address, by the best protocol that says."""
        return next((each.external_ip for each in self.services if each.external_ip), None)


class Evidence(enum.Enum):
    """Where a finding comes from."""

    MEASURED = "measured"
    INFERRED = "inferred"
    """It follows from something else that was measured; `Finding.reason` says from what."""
    UNKNOWN = "unknown"
    """`Finding.reason` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One property of our NAT.

    Attributes:
        name: The field of `NatProfile`.
        value: Its value; None where unknown.
        evidence: Where it comes from.
        reason: Why it is unknown, or from what it was inferred; may be empty.
        intervals: Where its estimated figures lie with 90 %: the name of the figure, empty where
            the value itself is one, and the interval.
        test: The test it comes from.
    """

    name: str
    value: object
    evidence: Evidence
    reason: str
    intervals: tuple[tuple[str, Interval], ...]
    test: Test


class State(enum.Enum):
    """What became of a test."""

    RUNNING = "running"
    DONE = "done"
    LEFT_OUT = "left out"
    FAILED = "failed"
    """`Outcome.reason` says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One test.

    Attributes:
        test: Which.
        state: What became of it.
        reason: Why it was left out or failed; else empty.
        packet_count: Packets it sent; None where that is not counted.
        duration_s: How long it took.
    """

    test: Test
    state: State
    reason: str = ""
    packet_count: int | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ObserverReport:
    """Somebody who told us what they see of us.

    Attributes:
        peer_id: Who; None: a mainline node, which signs nothing.
        endpoint: Where, as we see it.
        echo_count: Echoes of it that count.
        is_neighbour: Whether we are connected.
    """

    peer_id: PeerId | None
    endpoint: Endpoint
    echo_count: int
    is_neighbour: bool


@dataclass(frozen=True, slots=True)
class Prospect:
    """How a puncture between us and a kind of peer would go.

    Attributes:
        peer: The kind, in words.
        strategy: What we would do, by its name; empty where it cannot be expected to work.
        probe_count: Probes of our side, on average; None where it cannot.
        reason: The plan in words, or why there is none.
    """

    peer: str
    strategy: str
    probe_count: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionReport:
    """Everything one inspection found.

    Attributes:
        peer_id: Who was inspected.
        inspected_at_s: When it began, seconds since 1970.
        duration_s: How long it took.
        interface: The interface that was inspected; None where that could not be told.
        interfaces: All interfaces of the machine.
        gateway: What the gateway of that interface offers.
        path: The way outward.
        profile: What the planner uses, the path's share included.
        findings: The same, each property with its evidence.
        observers: Who was asked.
        outcomes: What became of each test, in the order of asking.
        warnings: What to mind when reading this, in words.
        advice: What it means for puncturing, in words.
        prospects: The same for kinds of peers; empty while our NAT is not known.
    """

    peer_id: PeerId
    inspected_at_s: float
    duration_s: float
    interface: Interface | None
    interfaces: Part[InterfaceReport]
    gateway: Part[GatewayFindings]
    path: Part[PathReport]
    profile: NatProfile
    findings: tuple[Finding, ...]
    observers: tuple[ObserverReport, ...]
    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    prospects: tuple[Prospect, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it for programs: see `schema.py`."""
        return report_as_json(self)

    def finding(self, name: str) -> Finding:
        """Return the finding of a field of `NatProfile`.

        Raises:
            KeyError: It is no property of a NAT.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)
