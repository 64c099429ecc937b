"""How a report looks: every label is there at any width, and strangers' text is text."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from natswarm import Identity, LocalTest, NatTest, inspect
from natswarm.cli.inspect_view import LABELS, offers_table, profile_view, report_view
from natswarm.inspector import (
    FULL,
    QUICK,
    Evidence,
    Finding,
    GatewayFindings,
    Part,
    SignedProfile,
    all_offers,
)
from natswarm.inspector.evidence import TESTS_OF_FIELDS
from natswarm.inspector.report import ServiceFindings
from natswarm.nat.behaviour import Poison
from natswarm.nat.findings import Interval
from natswarm.nat.profile import NatProfile
from natswarm.net.gateway import Gateway, MappingProtocol

SECTIONS = ["Interfaces", "Gateway", "Path", "NAT", "Observers", "Advice", "Warnings"]


def shown(renderable, width=400) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
async def report(open_swarm, autojump_clock, surround):
    async with open_swarm() as swarm:
        invites = [await each.invite() for each in await swarm.add_observers()]
        node = await swarm.add("me", "linux-home")
        around = surround(swarm.hosts["me"])
        return await inspect(node, invites=invites, tests=QUICK, surroundings=around)


def test_every_property_has_a_label():
    assert set(LABELS) == set(TESTS_OF_FIELDS)
    assert len(set(LABELS.values())) == len(LABELS)


async def test_sections_and_labels(autojump_clock, report):
    text = shown(report_view(report))
    lines = text.splitlines()
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    for label in LABELS.values():
        assert label in text
    assert any(line.split()[:2] == [">", "eth0"] for line in lines)
    assert "openers die here, outside of your NATs" in text
    assert "EIM: the same port for everybody" in text


@pytest.mark.parametrize("width", [40, 80, 100])
async def test_narrow_screens_lose_nothing(autojump_clock, report, width):
    text = shown(report_view(report), width)
    assert max(map(len, text.splitlines())) <= width
    wanted = shown(report_view(report)).split()
    assert sorted("".join(text.split())) == sorted("".join(wanted))


def with_finding(report, name, value, *intervals):
    findings = tuple(
        Finding(name, value, Evidence.MEASURED, "", intervals, each.test)
        if each.name == name
        else each
        for each in report.findings
    )
    return replace(report, findings=findings)


def line_of(report, label) -> str:
    lines = shown(report_view(report)).splitlines()
    return " ".join(next(line for line in lines if line.strip().startswith(label)).split())


@pytest.mark.parametrize(
    ("name", "value", "intervals", "line"),
    [
        ("idle_lifetime_s", 65.0, [("", Interval(62, 68.4))], "65 s measured 62..68.4 s"),
        ("idle_lifetime_s", float("inf"), [], "more than was tried measured"),
        (
            "absolute_lifetime_s",
            float("inf"),
            [("", Interval(102, float("inf")))],
            "more than was tried measured 102 s or more",
        ),
        ("hairpinning", False, [], "no measured"),
        ("tftp_helper", True, [], "yes measured"),
        (
            "poison",
            Poison.TAKES_PORT,
            [],
            "takes port: a refused packet moves your port measured",
        ),
        ("mapping_rate_per_s", 98.123, [("", Interval(95, 101))], "98.1 measured 95..101"),
        ("max_mappings", 2000, [], "2000 measured"),
    ],
)
async def test_values(autojump_clock, report, name, value, intervals, line):
    assert line_of(with_finding(report, name, value, *intervals), LABELS[name]).startswith(
        f"{LABELS[name]} {line}"
    )


async def test_what_changed_is_marked(autojump_clock, report):
    assert "changed" not in line_of(report, "mapping")
    text = shown(report_view(report, ("nat.mapping", "path")))
    marked = [line.strip() for line in text.splitlines() if "changed" in line]
    assert [line.split()[0] for line in marked] == ["Path", "mapping"]


async def test_what_a_gateway_says_is_no_markup(autojump_clock, report):
    detail = "[bold]nice[/] try [/]"
    services = (
        ServiceFindings(MappingProtocol.PCP, True, detail, "203.0.113.1", 3600.0),
        ServiceFindings(MappingProtocol.NAT_PMP, True, detail, lease_problem=detail),
        ServiceFindings(MappingProtocol.UPNP_IGD, True, "", lease_s=float("inf")),
    )
    gateway = Part(GatewayFindings(Gateway("192.168.1.1", "192.168.1.7"), services))
    text = shown(report_view(replace(report, gateway=gateway)))
    assert text.count(detail) == 3
    assert "3600 s" in text
    assert "no end" in text


async def test_parts_that_failed_say_why(autojump_clock, report):
    failed = replace(
        report,
        interfaces=Part(None, "the system does not tell"),
        gateway=Part(None, "no interface leads out"),
        path=Part(None, "nobody [to] trace to"),
    )
    text = shown(report_view(failed))
    for why in ("the system does not tell", "no interface leads out", "nobody [to] trace to"):
        assert f"unknown: {why}" in text


def test_a_profile_of_somebody_else():
    profile = NatProfile(is_translated=True, nat_count=2, inferred=("nat_count",))
    peer_id = Identity(b"p" * 32).peer_id
    text = shown(profile_view(SignedProfile(peer_id, 0.0, profile)))
    assert str(peer_id) in text
    assert "1970-01-01 00:00 UTC" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "NAT on the way yes measured" in rows
    assert "NATs at least 2 inferred" in rows
    assert not any(row.startswith(LABELS["mapping"]) for row in rows)


def test_every_test_has_a_cost():
    offers = all_offers()
    assert [each.test for each in offers][:3] == list(LocalTest)
    text = shown(offers_table(offers, QUICK))
    for offer in offers:
        assert offer.packet_count > 0
        assert offer.duration_s > 0
        assert f"<= {offer.packet_count}" in text
    assert sum(each.duration_s for each in offers if each.test in QUICK - {LocalTest.GATEWAY}) < 6
    # Under three minutes: the router's share runs beside the rest.
    asked = [each for each in offers if each.test in FULL and isinstance(each.test, NatTest)]
    assert sum(each.duration_s for each in asked) < 180
