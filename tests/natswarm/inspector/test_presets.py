"""What `inspect` says of every preset, on the virtual internet, with two observers."""

from __future__ import annotations

import pytest

from natswarm import (
    PRESETS,
    AllocationLaw,
    Evidence,
    Filtering,
    LocalTest,
    Mapping,
    NatTest,
    inspect,
)
from natswarm.inspector import QUICK, QUICK_LIMIT_S, State, all_offers
from natswarm.nat.behaviour import Pooling

EIM, APDM = Mapping.EIM, Mapping.APDM
EIF, ADF, APDF = Filtering.EIF, Filtering.ADF, Filtering.APDF
PRESERVING, SEQUENTIAL = AllocationLaw.PRESERVING, AllocationLaw.SEQUENTIAL
UNIFORM = AllocationLaw.UNIFORM

# mapping, filtering, law of ports or size of a block, hop limit of an opener
EXPECTED = {
    "vodafone-nl": (EIM, ADF, UNIFORM, 4),
    "kpn-nl": (APDM, APDF, 256, 4),
    "lebara-nl": (EIM, ADF, 256, 4),
    "lyca-nl": (EIM, EIF, UNIFORM, 4),
    "mycall-no": (EIM, EIF, UNIFORM, 4),
    "lyca-bg": (EIM, ADF, UNIFORM, 4),
    "telia-no": (EIM, ADF, UNIFORM, 4),
    "orange-bg": (APDM, APDF, UNIFORM, 4),
    "o2-uk-4g": (APDM, APDF, UNIFORM, 4),
    "sky-uk-dsl": (EIM, APDF, PRESERVING, 2),
    "tmobile-us": (APDM, APDF, UNIFORM, 4),
    "juniper-pba": (APDM, APDF, SEQUENTIAL, 4),
    "linux-home": (EIM, APDF, PRESERVING, 2),
    "linux-random": (APDM, APDF, UNIFORM, 2),
    "cloud-natgw": (APDM, APDF, UNIFORM, 2),
}


async def quick_report(swarm, surround, name="me"):
    invites = [await node.invite() for node in await swarm.add_observers()]
    return await inspect(
        swarm.nodes[name],
        invites=invites,
        tests=QUICK,
        time_limit_s=QUICK_LIMIT_S,
        surroundings=surround(swarm.hosts[name]),
    )


def test_every_preset_is_expected():
    assert set(EXPECTED) | {"public"} == set(PRESETS)


@pytest.mark.parametrize("kind", EXPECTED)
async def test_preset(kind, open_swarm, autojump_clock, surround):
    mapping, filtering, law, opener_ttl = EXPECTED[kind]
    async with open_swarm() as swarm:
        node = await swarm.add("me", kind)
        report = await quick_report(swarm, surround)
        profile = report.profile
        assert node.profile == profile
        assert profile.public_ips == (swarm.hosts["me"].nat.external_ip,)
    assert (profile.is_translated, profile.mapping, profile.filtering) == (True, mapping, filtering)
    found = profile.allocation
    assert (found.block_size if isinstance(law, int) else found.law) == law
    assert (profile.pooling, profile.nat_count, profile.opener_ttl) == (
        Pooling.PAIRED,
        1,
        opener_ttl,
    )
    quick_tests = (NatTest.BEHAVIOUR, LocalTest.PATH)
    for finding in report.findings:
        is_quick = finding.test in quick_tests
        # Where a NAT gives every peer another port, there is no endpoint to know.
        is_known = is_quick and (finding.name != "main_endpoint" or mapping is EIM)
        assert (finding.evidence is Evidence.UNKNOWN) != is_known, finding
        assert bool(finding.reason) != is_known or finding.name == "nat_count", finding
    assert [observer.echo_count > 10 for observer in report.observers] == [True, True]
    outcome = next(each for each in report.outcomes if each.test is NatTest.BEHAVIOUR)
    assert outcome.state is State.DONE
    assert outcome.packet_count <= 60
    assert report.duration_s < 3
    assert report.interface.gateway_ipv4 == report.gateway.result.gateway.ip
    assert not any(service.is_available for service in report.gateway.result.services)
    with_home_router = "simultaneous-open" if mapping is EIM else "one-sided-birthday"
    assert report.prospects[0].strategy == ("direct" if filtering is EIF else with_home_router)
    # The virtual internet numbers its hosts one by one.
    [warning] = report.warnings
    assert "is in the same /24 as the observer" in warning


@pytest.mark.parametrize("kind", EXPECTED)
async def test_all_tests_but_lifetimes(kind, open_swarm, autojump_clock, surround):
    """Whatever is not asked for in a hurry: right or unknown with its reason, never wrong."""
    async with open_swarm() as swarm:
        invites = [await node.invite() for node in await swarm.add_observers()]
        node = await swarm.add("me", kind)
        report = await inspect(node, invites=invites, surroundings=surround(swarm.hosts["me"]))
        behaviour = swarm.hosts["me"].nat.preset.behaviour
    assert report.duration_s < 180
    most = {offer.test: offer.packet_count for offer in all_offers()}
    for outcome in report.outcomes:
        assert (outcome.packet_count or 0) <= most[outcome.test], outcome
    found = {each.name: each.value for each in report.findings}
    assert found["hairpinning"] in (behaviour.hairpinning, None)
    assert found["poison"] in (behaviour.poison, None)
    assert found["tftp_helper"] in (behaviour.tftp_helper, None)
    if behaviour.mapping is EIM:
        assert found["hairpinning"] is not None
        if behaviour.filtering is APDF:
            assert None not in (found["poison"], found["tftp_helper"])
    for finding in report.findings:
        assert (finding.evidence is not Evidence.UNKNOWN) or finding.reason


async def test_without_a_nat(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        await swarm.add("me", "public")
        report = await quick_report(swarm, surround)
    profile = report.profile
    assert (profile.is_translated, profile.nat_count) == (False, 0)
    assert profile.accepts_strangers
    assert report.finding("nat_count").evidence is Evidence.MEASURED
    assert report.gateway.reason.endswith("no IPv4 gateway: nobody to ask for a mapping")
    assert "There is no NAT. Anybody can dial you at" in report.advice[0]


async def test_a_home_behind_a_carrier(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        cgn = swarm.internet.add_nat("cgn", "o2-uk-4g")
        home = swarm.internet.add_nat("home", "linux-home", behind=cgn)
        swarm.hosts["me"] = swarm.internet.add_host("me", behind=home)
        await swarm.add("me")
        report = await quick_report(swarm, surround)
    profile = report.profile
    assert (profile.mapping, profile.filtering) == (APDM, APDF)
    assert profile.allocation.law is UNIFORM
    assert profile.public_ips == (cgn.external_ip,)
    # Home router, two routers of the carrier's, its NAT; what is one further on is outside.
    assert (profile.nat_count, profile.opener_ttl) == (2, 5)
    assert report.finding("nat_count").evidence is Evidence.MEASURED
    assert "change their kind twice" in report.finding("nat_count").reason
    assert [hop.ip for hop in report.path.result.hops[:4:3]] == [home.inside_ip, cgn.inside_ip]
