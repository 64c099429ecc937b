"""Run an inspection: every part at its time, and none of them able to take the others along.

    interfaces                       at once
    gateway, lease                   ask our own router, which disturbs nobody: beside the rest
    path                             beside it, too: its mappings are made in its first moment
    peers are joined, then asked     one test after another, `natswarm/nat/inspection.py`

Whatever fails becomes the reason in its part. What comes out as an exception is a mistake of the
caller's or a node that was closed.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import trio

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError, NatswarmError
from natswarm.inspector.advice import advise, prospects
from natswarm.inspector.evidence import Evidences, reason_of
from natswarm.inspector.gateway import ask_leases, ask_services
from natswarm.inspector.offers import FULL
from natswarm.inspector.report import (
    GatewayFindings,
    InspectionReport,
    LocalTest,
    ObserverReport,
    Outcome,
    Part,
    State,
    Test,
)
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.path import PathReport
from natswarm.net.gateway import Gateway, Reach
from natswarm.net.interfaces import (
    Interface,
    InterfaceReport,
    InterfaceSource,
    inspect_interfaces,
)
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path import PathNetwork, SystemPaths, trace_path
from natswarm.net.udp import UdpNetwork
from natswarm.node import Node

__all__ = ["ProgressCallback", "Surroundings", "inspect"]

# A peer that takes strangers answers within a second; one that has to be punctured takes longer.
JOIN_TIMEOUT_S = 15.0
# Of a limited time, the share that joining peers may take; the rest is for asking them.
JOIN_SHARE = 0.4
# How often progress is looked at: it is for people.
PROGRESS_INTERVAL_S = 0.1
# The same for the gateway, which is near: silence must not last until the very end.
GATEWAY_SHARE = 0.7
LEFT_OUT = "it was left out"

ProgressCallback = Callable[[Outcome], None]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is around the node, for the parts that ask no peer.

    Attributes:
        source: Whom to ask for interfaces; None: this machine.
        reach: The way to the gateway.
        paths: Where the path outward is traced from.
    """

    source: InterfaceSource | None = None
    reach: Reach = field(default_factory=Reach)
    paths: PathNetwork = field(default_factory=SystemPaths)

    @classmethod
    def of_machine(cls, *, bind_ip: str, interface: str | None) -> Surroundings:
        """Return those of a node on this machine that is bound to an address and interface."""
        return cls(
            reach=Reach(network=UdpNetwork(interface=interface)),
            paths=SystemPaths(ip=bind_ip, interface=interface),
        )


async def inspect(
    node: Node,
    *,
    invites: Sequence[Invite] = (),
    tests: Collection[Test] = FULL,
    interface: str | None = None,
    time_limit_s: float | None = None,
    surroundings: Surroundings | None = None,
    on_progress: ProgressCallback = lambda _outcome: None,
) -> InspectionReport:
    """Find out everything there is to know of our NAT, and put it into the node's profile.

    Cancelled, it leaves nothing behind but connections to peers.

    Args:
        node: Who asks; its neighbours are asked, and theirs who are public.
        invites: Peers to connect to first.
        tests: What to find out; `NatTest.BEHAVIOUR` comes with every other `NatTest`, and
            `LocalTest.GATEWAY` with `LocalTest.LEASE`.
        interface: The interface that the node's network is tied to; None: it follows the routes.
        time_limit_s: What is not finished by then is unknown; None: no limit.
        surroundings: For a node that is not on this machine's own network.
        on_progress: Called as tests begin and end, at once; must return quickly and not raise.

    Raises:
        ConfigurationError: There is no such interface.
        ConnectFailed: The node was closed meanwhile.
    """
    if surroundings is None:
        surroundings = Surroundings.of_machine(bind_ip=node.local_endpoint.ip, interface=interface)
    run = _Run(node, tests, surroundings, on_progress, time_limit_s)
    return await run.report(invites, interface)


class _Run:
    """One inspection under way."""

    def __init__(
        self,
        node: Node,
        tests: Collection[Test],
        surroundings: Surroundings,
        on_progress: ProgressCallback,
        time_limit_s: float | None,
    ) -> None:
        self._node = node
        self._wanted = tests
        self._surroundings = surroundings
        self._on_progress = on_progress
        self._began_at = trio.current_time()
        self._limit_s = math.inf if time_limit_s is None else time_limit_s
        self._outcomes: dict[Test, Outcome] = {
            test: Outcome(test, State.LEFT_OUT, LEFT_OUT) for test in (*LocalTest, *NatTest)
        }
        self._gateway: Part[GatewayFindings] = Part(None, LEFT_OUT)
        self._path: Part[PathReport] = Part(None, LEFT_OUT)
        self._unreachable: dict[str, str] = {}
        self._began: dict[NatTest, float] = {}

    async def report(self, invites: Sequence[Invite], name: str | None) -> InspectionReport:
        inspected_at_s = time.time()
        interfaces = self._look_at_interfaces()
        interface = self._choose_interface(interfaces.result, name)
        # The outer one takes off the groups that the inner ones wrap around errors.
        async with open_private_nursery(), trio.open_nursery() as nursery:
            if LocalTest.GATEWAY in self._wanted or LocalTest.LEASE in self._wanted:
                nursery.start_soon(self._ask_gateway, interface)
            if LocalTest.PATH in self._wanted:
                nursery.start_soon(self._trace_path, self._far_end(invites))
            findings = await self._ask_peers(invites)
        evidences = Evidences(
            findings=findings,
            outcomes=tuple(self._outcomes.values()),
            interface=interface,
            interfaces=interfaces,
            gateway=self._gateway,
            path=self._path,
            unreachable=self._unreachable,
            vanished=self._what_vanished(interface),
        )
        profile = evidences.profile()
        self._node.adopt_profile(profile)
        return InspectionReport(
            peer_id=self._node.peer_id,
            inspected_at_s=inspected_at_s,
            duration_s=trio.current_time() - self._began_at,
            interface=interface,
            interfaces=interfaces,
            gateway=self._gateway,
            path=self._path,
            profile=profile,
            findings=evidences.list_findings(),
            observers=_observers(findings),
            outcomes=tuple(self._outcomes.values()),
            warnings=evidences.warnings(),
            advice=advise(profile, was_asked=bool(findings.observers or findings.observations)),
            prospects=prospects(profile),
        )

    # Interfaces -----------------------------------------------------------------------------------

    def _look_at_interfaces(self) -> Part[InterfaceReport]:
        began_at = trio.current_time()
        try:
            found = inspect_interfaces(self._surroundings.source)
        except OSError as error:
            return Part(None, f"the system does not tell: {error}")
        return Part(found, duration_s=trio.current_time() - began_at)

    def _choose_interface(
        self, report: InterfaceReport | None, name: str | None
    ) -> Interface | None:
        if report is None:
            return None
        if name is not None:
            return report.find(name)
        bound_ip = self._node.local_endpoint.ip
        if ipaddress.ip_address(bound_ip).is_unspecified:
            return report.default_ipv6 if ":" in bound_ip else report.default_ipv4
        for interface in report.interfaces:
            if any(address.ip == bound_ip for address in interface.addresses):
                return interface
        return None

    def _what_vanished(self, before: Interface | None) -> str:
        """Return what became of the inspected interface meanwhile; empty if it is still there."""
        now = self._look_at_interfaces().result
        if before is None or now is None:
            return ""
        after = next((each for each in now.interfaces if each.name == before.name), None)
        if after is None:
            return (
                f"the interface {before.name} vanished during the inspection: what is unknown may "
                "be so for that reason; inspect again once it is back"
            )
        gone = [each.ip for each in before.addresses if each not in after.addresses]
        if gone:
            return (
                f"{before.name} lost its address {gone[0]} during the inspection: what was found "
                "may belong to the old one; inspect again"
            )
        return ""

    # Gateway and path -----------------------------------------------------------------------------

    async def _ask_gateway(self, interface: Interface | None) -> None:
        reach = self._surroundings.reach

        async def ask() -> GatewayFindings:
            if interface is None:
                raise ConfigurationError("no interface leads out, so there is no gateway")
            timeout_s = GATEWAY_SHARE * self._limit_s
            return await ask_services(Gateway.of(interface), reach, timeout_s=timeout_s)

        self._gateway = services = await self._carry_out(LocalTest.GATEWAY, ask)
        if services.result is not None and LocalTest.LEASE in self._wanted:
            leases = await self._carry_out(
                LocalTest.LEASE, partial(ask_leases, services.result, reach)
            )
            if leases.result is not None:
                duration_s = services.duration_s + leases.duration_s
                self._gateway = replace(leases, duration_s=duration_s)

    async def _trace_path(self, destination: Endpoint | None) -> None:
        async def trace() -> PathReport:
            found = await trace_path(self._surroundings.paths, destination)
            if found.trouble:
                raise ConfigurationError(found.trouble)
            return found

        self._path = await self._carry_out(LocalTest.PATH, trace)

    def _far_end(self, invites: Sequence[Invite]) -> Endpoint | None:
        """Return a peer's endpoint to trace towards, on the internet if there is one."""
        invited = [invite.record.profile.main_endpoint for invite in invites]
        known = [peer.seen_at for peer in self._node.peers()]
        known += [endpoint for endpoint in invited if endpoint is not None]
        known.sort(key=lambda endpoint: endpoint.kind is not AddressKind.GLOBAL)
        return next((endpoint for endpoint in known if ":" not in endpoint.ip), None)

    async def _carry_out(
        self, test: LocalTest, work: Callable[[], Awaitable[ResultT]]
    ) -> Part[ResultT]:
        """Run one test to its end, within the limit, and note what became of it."""
        began_at = trio.current_time()
        self._note(Outcome(test, State.RUNNING))
        result, reason = None, self._out_of_time
        with trio.move_on_at(self._deadline):
            try:
                result, reason = await work(), ""
            except ConfigurationError as error:
                reason = str(error)
        part = Part(result, reason, trio.current_time() - began_at)
        state = State.DONE if result is not None else State.FAILED
        self._note(Outcome(test, state, reason, duration_s=part.duration_s))
        return part

    # Peers ----------------------------------------------------------------------------------------

    async def _ask_peers(self, invites: Sequence[Invite]) -> Findings:
        tests = [test for test in NatTest if test in self._wanted]
        if not tests:
            return Findings(observers=(), profile=self._node.record().profile)
        earlier = self._node.inspection
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_tests, earlier)
            with trio.move_on_at(self._deadline) as scope:
                await self._join_all(invites)
                await self._node.inspect(tests)
            nursery.cancel_scope.cancel()
        findings = self._node.inspection
        if findings is None or findings is earlier:
            findings = Findings(observers=(), profile=self._node.record().profile)
        out_of_time = ""
        if scope.cancelled_caught and self._node.profile is not findings.profile:
            findings.refit()
            out_of_time = self._out_of_time
        self._note_progress(findings)
        for test in tests:
            self._conclude(test, findings, out_of_time)
        return findings

    async def _watch_tests(self, earlier: Findings | None) -> None:
        """Note as tests begin, which shows in the packets that the inspection counts."""
        while True:
            await trio.sleep(PROGRESS_INTERVAL_S)
            findings = self._node.inspection
            if findings is not None and findings is not earlier:
                self._note_progress(findings)

    def _note_progress(self, findings: Findings) -> None:
        now = trio.current_time()
        for test, count in findings.packet_counts.items():
            if test not in self._began:
                self._began[test] = now
            outcome = Outcome(test, State.RUNNING, packet_count=count)
            if outcome != self._outcomes[test]:
                self._note(outcome)

    def _conclude(self, test: NatTest, findings: Findings, out_of_time: str) -> None:
        count = findings.packet_counts.get(test, 0)
        following = [at for at in self._began.values() if at > self._began.get(test, math.inf)]
        ended_at = min(following, default=trio.current_time())
        duration_s = ended_at - self._began.get(test, ended_at)
        if count and not (out_of_time and not following):
            self._note(Outcome(test, State.DONE, "", count, duration_s))
            return
        reason = out_of_time or reason_of(test, findings)
        self._note(Outcome(test, State.FAILED, reason, count, duration_s))

    async def _join_all(self, invites: Sequence[Invite]) -> None:
        async with trio.open_nursery() as nursery:
            for invite in invites:
                nursery.start_soon(self._join, invite)

    async def _join(self, invite: Invite) -> None:
        timeout_s = min(JOIN_TIMEOUT_S, JOIN_SHARE * self._limit_s)
        peer = invite.record.name or invite.record.peer_id.short
        try:
            with trio.fail_after(timeout_s):
                await self._node.connect(invite)
        except trio.TooSlowError:
            self._unreachable[peer] = f"no connection within {timeout_s:.3g} s"
        except (NatswarmError, trio.BrokenResourceError) as error:
            self._unreachable[peer] = str(error)

    # Bookkeeping ----------------------------------------------------------------------------------

    @property
    def _deadline(self) -> float:
        return self._began_at + self._limit_s

    @property
    def _out_of_time(self) -> str:
        return f"not finished within {self._limit_s:g} s"

    def _note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.test] = outcome
        self._on_progress(outcome)


def _observers(findings: Findings) -> tuple[ObserverReport, ...]:
    usable = [
        each for each in findings.observations if each.observed.ip in findings.profile.public_ips
    ]
    # In an order of their own: who was connected first is chance.
    ranked = sorted(findings.observers, key=lambda each: (not each.is_neighbour, each.endpoint))
    peers = (
        ObserverReport(
            observer.peer_id,
            observer.endpoint,
            sum(each.observer == observer.peer_id for each in usable),
            observer.is_neighbour,
        )
        for observer in ranked
    )
    told = sorted({each.destination for each in findings.observations if each.observer is None})
    counted = {each.destination for each in usable if each.observer is None}
    mainline = (ObserverReport(None, each, int(each in counted), False) for each in told)
    return (*peers, *mainline)
