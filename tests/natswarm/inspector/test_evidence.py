"""What the parts of an inspection say together, from made-up parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from natswarm.address import Endpoint
from natswarm.identity import PeerId
from natswarm.inspector import Evidence, GatewayFindings, LocalTest, Outcome, Part, State
from natswarm.inspector.evidence import Evidences
from natswarm.inspector.report import ServiceFindings
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.classify import Observation
from natswarm.nat.findings import Findings, Interval, NatTest
from natswarm.nat.path import Hop, PathReport
from natswarm.nat.profile import NatProfile
from natswarm.net.gateway import Gateway, MappingProtocol
from natswarm.net.interfaces import (
    AddressSpace,
    Interface,
    InterfaceAddress,
    InterfaceKind,
    InterfaceReport,
)

PUBLIC_IP = "203.0.113.9"
BEHIND_NAT = NatProfile(
    mapping=Mapping.EIM,
    filtering=Filtering.APDF,
    public_ips=(PUBLIC_IP,),
    main_endpoint=Endpoint(PUBLIC_IP, 4000),
    is_translated=True,
    echo_count=20,
    observer_count=2,
)
NO_NAT = replace(BEHIND_NAT, is_translated=False)


def interface(ip="192.168.1.7", kind=InterfaceKind.LAN, name="wlan0"):
    address = InterfaceAddress(ip, 24, AddressSpace.HOME)
    return Interface(name, kind, ("made up",), (address,), "192.168.1.1", is_default_ipv4=True)


def gateway(external_ip):
    service = ServiceFindings(MappingProtocol.PCP, True, "version 2", external_ip)
    return Part(GatewayFindings(Gateway("192.168.1.1", "192.168.1.7"), (service,)))


def path(*ips, local_ip="192.168.1.7"):
    hops = tuple(Hop(ttl, ip) for ttl, ip in enumerate(ips, 1))
    return Part(PathReport(Endpoint("198.51.100.1", 4000), local_ip, hops, reached=False))


def evidences(profile=BEHIND_NAT, **options):
    inspected = options.pop("interface", interface())
    others = options.pop("others", ())
    return Evidences(
        **{
            "findings": Findings(observers=(), profile=profile),
            "outcomes": (),
            "interface": inspected,
            "interfaces": Part(InterfaceReport((inspected, *others))),
            "gateway": Part(None, "nobody answered"),
            "path": Part(None, "nobody to trace to"),
            "unreachable": {},
            "vanished": "",
        }
        | options
    )


@pytest.mark.parametrize(
    ("options", "count", "evidence", "reason"),
    [
        ({"profile": NatProfile()}, None, Evidence.UNKNOWN, "nobody to trace to"),
        ({}, 1, Evidence.INFERRED, "observers see another endpoint"),
        ({"profile": NO_NAT}, 0, Evidence.MEASURED, "observers see our own address"),
        (
            {"profile": NatProfile(), "interface": interface("100.64.3.4")},
            1,
            Evidence.INFERRED,
            "our own address 100.64.3.4 is a carrier's",
        ),
        (
            {
                "profile": NatProfile(),
                "interface": interface("100.64.3.4", InterfaceKind.VPN, "tailscale0"),
            },
            None,
            Evidence.UNKNOWN,
            "nobody to trace to",
        ),
        ({"gateway": gateway(PUBLIC_IP)}, 1, Evidence.INFERRED, ""),
        ({"gateway": gateway("100.70.1.2")}, 2, Evidence.INFERRED, "100.70.1.2 is not global"),
        ({"gateway": gateway("10.1.2.3")}, 2, Evidence.INFERRED, "10.1.2.3 is not global"),
        ({"gateway": gateway("203.0.113.77")}, 2, Evidence.INFERRED, "peers see 203.0.113.9"),
        # A router that hands our own address on translates nothing.
        ({"gateway": gateway("192.168.1.7")}, 1, Evidence.INFERRED, "observers see another"),
        (
            {"path": path("192.168.1.1", "100.64.0.1", "198.51.100.254", "198.51.100.253")},
            2,
            Evidence.MEASURED,
            "change their kind twice",
        ),
        (
            {"path": path("192.168.1.1", "100.64.0.1")},
            1,
            Evidence.INFERRED,
            "",
        ),
        # The path saw one, the router knows of a second.
        (
            {
                "path": path("192.168.1.1", "198.51.100.254", "198.51.100.253"),
                "gateway": gateway("100.70.1.2"),
            },
            2,
            Evidence.INFERRED,
            "100.70.1.2 is not global",
        ),
    ],
)
def test_the_number_of_nats(options, count, evidence, reason):
    weighed = evidences(**options)
    profile = weighed.profile()
    assert profile.nat_count == count
    assert ("nat_count" in profile.inferred) == (evidence is Evidence.INFERRED)
    finding = next(each for each in weighed.list_findings() if each.name == "nat_count")
    assert (finding.value, finding.evidence) == (count, evidence)
    assert reason in finding.reason


def test_the_hop_limit_of_openers():
    seen = evidences(path=path("192.168.1.1", "100.64.0.1", "198.51.100.254", "198.51.100.253"))
    assert seen.profile().opener_ttl == 3
    silent = evidences(path=path("192.168.1.1", None, None, "100.64.0.1"))
    finding = next(each for each in silent.list_findings() if each.name == "opener_ttl")
    assert finding.evidence is Evidence.UNKNOWN
    assert "nobody answers: there may be one more NAT" in finding.reason


def test_why_something_is_unknown():
    findings = Findings(
        observers=(),
        profile=replace(BEHIND_NAT, idle_lifetime_s=65.0, inferred=("mapping",)),
        intervals={"idle_lifetime_s": Interval(62, 69)},
        unknown={"hairpinning": "the observer does not answer fresh ports"},
    )
    outcomes = (
        Outcome(NatTest.HAIRPINNING, State.DONE),
        Outcome(NatTest.POISON, State.FAILED, "not finished within 2 s"),
        Outcome(NatTest.QUOTA, State.LEFT_OUT, "it was left out"),
        Outcome(LocalTest.PATH, State.FAILED, "nobody to trace to"),
    )
    listed = evidences(findings=findings, outcomes=outcomes).list_findings()
    found = {each.name: each for each in listed}
    assert found["hairpinning"].reason == "the observer does not answer fresh ports"
    assert found["poison"].reason == "not finished within 2 s"
    assert found["max_mappings"].reason == "it was left out"
    assert found["mapping"].evidence is Evidence.INFERRED
    assert found["idle_lifetime_s"].intervals == (("", Interval(62, 69)),)


def warnings(**options):
    return evidences(**options).warnings()


def test_nothing_to_mind():
    assert warnings() == warnings(gateway=gateway(PUBLIC_IP)) == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gateway": gateway("100.70.1.2")}, "100.70.1.2 is shared: a carrier's NAT follows"),
        ({"gateway": gateway("10.1.2.3")}, "10.1.2.3 is private: another NAT follows"),
        ({"gateway": gateway("203.0.113.77")}, "calls 203.0.113.77 its external address, but"),
        ({"interface": interface(kind=InterfaceKind.VPN, name="wg0")}, "wg0 is a VPN"),
        ({"others": (interface(name="wwan0"),)}, "wwan0 leads out, too"),
        (
            {"others": (interface(name="wwan0"), interface(name="wwan1"))},
            "wwan0, wwan1 lead out, too",
        ),
        ({"unreachable": {"hub": "no connection within 15 s"}}, "hub could not be asked: no conn"),
        ({"vanished": "the interface wlan0 vanished"}, "wlan0 vanished"),
        ({"profile": replace(BEHIND_NAT, observer_count=1)}, "EIM cannot be told from ADM"),
    ],
)
def test_a_warning(options, text):
    [warning] = warnings(**options)
    assert text in warning


def observation(destination_ip, observed_ip):
    return Observation(
        port_index=0,
        local_port=5000,
        observer=PeerId(bytes(32)),
        destination=Endpoint(destination_ip, 4000),
        observed=Endpoint(observed_ip, 5000),
        sent_at=0.0,
    )


@pytest.mark.parametrize(
    ("observations", "text"),
    [
        ([observation("192.168.1.8", "192.168.1.7")], "at 192.168.1.7 are on your own network"),
        ([observation("127.0.0.1", "127.0.0.1")], "at 127.0.0.1 are on your own network, or on"),
        ([observation("203.0.113.20", PUBLIC_IP)], "same /24 as the observer 203.0.113.20"),
        ([observation("198.51.100.1", PUBLIC_IP)], None),
    ],
)
def test_warnings_of_observers(observations, text):
    findings = Findings(observers=(), profile=BEHIND_NAT, observations=observations)
    found = warnings(findings=findings)
    assert [text is not None and text in each for each in found] == [True] * (text is not None)
