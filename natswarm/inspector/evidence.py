"""Weigh what the parts of an inspection say of one NAT, and say for each property what it rests on.

Peers see the outermost NAT; the path and the gateway show how many there are before it. No part is
sure by itself: routers keep silent, gateways tell tales, and a carrier may use private addresses
without translating. So each lower bound of the number of NATs is kept with its reason, and the
highest counts.

Pure: reads parts, asks nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from natswarm.address import AddressKind, address_kind
from natswarm.inspector.report import (
    Evidence,
    Finding,
    GatewayFindings,
    LocalTest,
    Outcome,
    Part,
    State,
    Test,
)
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.path import PathReport
from natswarm.nat.profile import NatProfile
from natswarm.nat.votes import prefix_of
from natswarm.net.interfaces import Interface, InterfaceKind, InterfaceReport

__all__ = ["Evidences", "is_known", "reason_of"]

# Whose property is what: the order is that of the report.
TESTS_OF_FIELDS: dict[str, Test] = {
    "is_translated": NatTest.BEHAVIOUR,
    "public_ips": NatTest.BEHAVIOUR,
    "mapping": NatTest.BEHAVIOUR,
    "filtering": NatTest.BEHAVIOUR,
    "allocation": NatTest.BEHAVIOUR,
    "main_endpoint": NatTest.BEHAVIOUR,
    "pooling": NatTest.BEHAVIOUR,
    "nat_count": LocalTest.PATH,
    "opener_ttl": LocalTest.PATH,
    "hairpinning": NatTest.HAIRPINNING,
    "poison": NatTest.POISON,
    "tftp_helper": NatTest.TFTP_HELPER,
    "max_mappings": NatTest.QUOTA,
    "mappings_seen": NatTest.QUOTA,
    "mapping_rate_per_s": NatTest.QUOTA,
    "mapping_burst": NatTest.QUOTA,
    "remotes_seen": NatTest.QUOTA,
    "idle_unreplied_s": NatTest.LIFETIMES,
    "idle_lifetime_s": NatTest.LIFETIMES,
    "absolute_lifetime_s": NatTest.LIFETIMES,
    "inbound_refreshes": NatTest.LIFETIMES,
}

# How much was looked at, not what is there: none means that nobody looked.
COUNTS = ("mappings_seen", "remotes_seen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidences:
    """Everything that was found, before it is weighed.

    Attributes:
        findings: What peers see.
        outcomes: What became of each test.
        interface: The interface that was inspected.
        interfaces: All of them.
        gateway: What the gateway offers.
        path: The way outward.
        unreachable: Peers that should have been asked, and why they could not be.
        vanished: Why the inspected interface is no longer what it was; empty if it is.
    """

    findings: Findings
    outcomes: Sequence[Outcome]
    interface: Interface | None
    interfaces: Part[InterfaceReport]
    gateway: Part[GatewayFindings]
    path: Part[PathReport]
    unreachable: Mapping[str, str]
    vanished: str

    # What the parts say together ------------------------------------------------------------------

    def nat_counts(self) -> list[tuple[int, str]]:
        """Return lower bounds of the number of NATs on our way out, each with what it rests on."""
        profile = self.findings.profile
        if profile.is_translated is False and profile.echo_count:
            return [(0, "observers see our own address and port")]
        bounds = []
        if profile.is_translated:
            bounds.append((1, "observers see another endpoint than ours"))
        shared = [ip for ip in self._local_ips() if address_kind(ip) is AddressKind.SHARED]
        if shared and not self._is_vpn:
            bounds.append((1, f"our own address {shared[0]} is a carrier's (100.64.0.0/10)"))
        if (external := self._router_ip()) is not None:
            if address_kind(external) is not AddressKind.GLOBAL:
                bounds.append((2, f"the router's external address {external} is not global"))
            elif profile.public_ips and external not in profile.public_ips:
                bounds.append(
                    (2, f"the router calls itself {external}, peers see {profile.public_ips[0]}")
                )
            else:
                bounds.append((1, f"the router's external address {external} is global"))
        if (path := self.path.result) is not None and path.nat_count_at_least:
            count = path.nat_count_at_least
            times = {1: "once", 2: "twice"}.get(count, f"{count} times")
            bounds.append((count, f"the addresses on the way change their kind {times}"))
        return bounds

    def profile(self) -> NatProfile:
        """Return the profile with what the path and the gateway add."""
        profile = self.findings.profile
        bounds = self.nat_counts()
        inferred = [name for name in profile.inferred if name != "nat_count" or not bounds]
        if bounds and not self._is_count_measured():
            inferred.append("nat_count")
        # What was not looked at now, stays as it was known.
        path = self.path.result
        return replace(
            profile,
            nat_count=max((count for count, _ in bounds), default=profile.nat_count),
            opener_ttl=profile.opener_ttl if path is None else path.opener_ttl,
            inferred=tuple(inferred),
        )

    def _is_count_measured(self) -> bool:
        """Whether the highest bound is one that was seen, not concluded from somebody's address."""
        profile, path = self.findings.profile, self.path.result
        if profile.is_translated is False and profile.echo_count:
            return True
        highest = max((count for count, _ in self.nat_counts()), default=0)
        return (
            path is not None and path.opener_ttl is not None and path.nat_count_at_least == highest
        )

    # Each property --------------------------------------------------------------------------------

    def list_findings(self) -> tuple[Finding, ...]:
        """Return every property with its evidence."""
        profile = self.profile()
        return tuple(self._finding(profile, name, test) for name, test in TESTS_OF_FIELDS.items())

    def _finding(self, profile: NatProfile, name: str, test: Test) -> Finding:
        value = getattr(profile, name)
        intervals = tuple(
            (figure.removeprefix(name).removeprefix("."), interval)
            for figure, interval in self.findings.intervals.items()
            if figure == name or figure.startswith(f"{name}.")
        )
        if not is_known(profile, name):
            why = self._why_unknown(name, test)
            return Finding(name, None, Evidence.UNKNOWN, why, (), test)
        reason = ""
        evidence = Evidence.MEASURED
        if name in profile.inferred:
            evidence = Evidence.INFERRED
        if name == "nat_count":
            # Of equal bounds the path's, which comes last.
            bounds = sorted(self.nat_counts(), key=lambda bound: bound[0])
            reason = bounds[-1][1] if bounds else "found earlier"
        elif not profile.echo_count and test is NatTest.BEHAVIOUR:
            evidence, reason = Evidence.INFERRED, "the interface has a global address"
        return Finding(name, value, evidence, reason, intervals, test)

    def _why_unknown(self, name: str, test: Test) -> str:
        profile = self.findings.profile
        if name == "opener_ttl" and self.path.result is not None:
            return self.path.result.reason
        if test is LocalTest.PATH:
            return self.path.reason
        outcome = next((each for each in self.outcomes if each.test is test), None)
        if outcome is not None and outcome.state is not State.DONE:
            return outcome.reason
        if (reason := self.findings.unknown.get(name)) is not None:
            return reason
        if name == "max_mappings" and profile.mappings_seen:
            return f"no limit was met with {profile.mappings_seen} at once"
        if name == "mapping_burst" and profile.mapping_rate_per_s == math.inf:
            return "no limit was met"
        if profile.is_translated is False:
            return "there is no NAT"
        return "the answers did not tell"

    # What to mind ---------------------------------------------------------------------------------

    def warnings(self) -> tuple[str, ...]:
        """Return what to mind when reading the report, in words."""
        return (
            *self._warnings_of_interfaces(),
            *self._warnings_of_the_router(),
            *self._warnings_of_observers(),
        )

    def _warnings_of_interfaces(self) -> list[str]:
        found = []
        if self.vanished:
            found.append(self.vanished)
        if self.interface is None:
            return found
        if self._is_vpn:
            found.append(
                f"{self.interface.name} is a VPN: what peers see is the NAT at its far end, not "
                "that of your line; --interface inspects another one"
            )
        others = [
            each.name
            for each in (self.interfaces.result.interfaces if self.interfaces.result else ())
            if each.name != self.interface.name and each.gateway_ipv4 is not None
        ]
        if others:
            found.append(
                f"only {self.interface.name} was inspected; {', '.join(others)} "
                f"{'leads' if len(others) == 1 else 'lead'} out, too: name it with --interface"
            )
        return found

    def _warnings_of_the_router(self) -> list[str]:
        external, seen = self._router_ip(), self.findings.profile.public_ips
        kind = None if external is None else address_kind(external)
        warning = ""
        if kind is AddressKind.GLOBAL and seen and external not in seen:
            warning = (
                f"the router calls {external} its external address, but peers see {seen[0]}: "
                "another NAT follows, or the router is wrong"
            )
        elif kind is AddressKind.SHARED:
            warning = (
                f"the router's WAN address {external} is shared: a carrier's NAT follows, so port "
                "mappings at the router do not reach the internet"
            )
        elif kind is AddressKind.PRIVATE:
            warning = (
                f"the router's WAN address {external} is private: another NAT follows, so port "
                "mappings at the router do not reach the internet"
            )
        return [warning] if warning else []

    def _warnings_of_observers(self) -> list[str]:
        profile = self.findings.profile
        found = [f"{peer} could not be asked: {why}" for peer, why in self.unreachable.items()]
        elsewhere = sorted(
            {
                each.observed.ip
                for each in self.findings.observations
                if each.observed.kind is not AddressKind.GLOBAL
            }
        )
        if elsewhere:
            found.append(
                f"peers that see you at {' and '.join(elsewhere)} are on your own network, or on "
                "this machine: what they say shows nothing of your NAT and does not count"
            )
        # An observer this near may stand behind the same NAT or filter as we do.
        own_prefixes = {prefix_of(ip) for ip in profile.public_ips}
        near = sorted(
            {
                each.destination.ip
                for each in self.findings.observations
                if prefix_of(each.destination.ip) in own_prefixes
            }
        )
        if near and profile.is_translated:
            found.append(
                f"your public address is in the same /24 as the observer {near[0]}: between "
                "neighbours of one network NATs and filters may do otherwise than towards the "
                "internet"
            )
        if profile.observer_count == 1 and profile.is_translated:
            found.append(
                "all observers have one address: EIM cannot be told from ADM, and nobody outvotes "
                "a liar; join a second peer at another address"
            )
        return found

    # Small questions ------------------------------------------------------------------------------

    @property
    def _is_vpn(self) -> bool:
        return self.interface is not None and self.interface.kind is InterfaceKind.VPN

    def _local_ips(self) -> list[str]:
        return [] if self.interface is None else [each.ip for each in self.interface.addresses]

    def _router_ip(self) -> str | None:
        """Return what the gateway calls its IPv4 address outside, if it translates at all."""
        gateway = self.gateway.result
        if gateway is None or gateway.gateway.is_ipv6:
            return None
        external = gateway.external_ip
        return None if external is None or external in self._local_ips() else external


def is_known(profile: NatProfile, name: str) -> bool:
    """Return whether a profile says anything of a property."""
    value = getattr(profile, name)
    return value not in (None, ()) and not (value == 0 and name in COUNTS)


def reason_of(test: NatTest, findings: Findings) -> str:
    """Return why a test came to nothing."""
    reasons = [
        findings.unknown[name]
        for name, its_test in TESTS_OF_FIELDS.items()
        if its_test is test and name in findings.unknown
    ]
    return reasons[0] if reasons else "it could not be carried out"
