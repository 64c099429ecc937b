"""How an inspection looks on a screen: sections of tables, in words a newcomer can look up.

Every label here stands in docs/inspect.md, too; a test compares them.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Collection, Iterable

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from natswarm.address import AddressKind, address_kind
from natswarm.inspector import (
    Evidence,
    Finding,
    InspectionReport,
    Offer,
    Outcome,
    Part,
    ServiceFindings,
    SignedProfile,
    is_known,
)
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping, Poison, Pooling
from natswarm.nat.findings import Interval
from natswarm.net.interfaces import Interface

__all__ = ["LABELS", "finding_row", "offers_table", "profile_view", "report_view"]

LABELS = {
    "is_translated": "NAT on the way",
    "public_ips": "public address",
    "mapping": "mapping",
    "filtering": "filtering",
    "allocation": "law of ports",
    "main_endpoint": "your endpoint",
    "pooling": "pooling",
    "nat_count": "NATs at least",
    "opener_ttl": "opener's hop limit",
    "hairpinning": "hairpinning",
    "poison": "poison",
    "tftp_helper": "TFTP helper",
    "max_mappings": "mappings at once",
    "mappings_seen": "mappings seen",
    "mapping_rate_per_s": "new mappings a second",
    "mapping_burst": "new mappings at once",
    "remotes_seen": "remotes at once",
    "idle_unreplied_s": "idle lifetime unanswered",
    "idle_lifetime_s": "idle lifetime answered",
    "absolute_lifetime_s": "absolute lifetime",
    "inbound_refreshes": "inbound refreshes",
}
_MEANINGS: dict[enum.Enum, str] = {
    Mapping.EIM: "the same port for everybody",
    Mapping.ADM: "another port for each address",
    Mapping.APDM: "another port for each remote",
    Filtering.EIF: "anybody gets in",
    Filtering.ADF: "addresses you sent to get in",
    Filtering.APDF: "only whom you sent to gets in",
    Pooling.PAIRED: "one public address for all ports",
    Pooling.ARBITRARY: "public addresses vary",
    Poison.NONE: "a refused packet does nothing",
    Poison.TAKES_PORT: "a refused packet moves your port",
    Poison.RETIRES_MAPPING: "after one, new remotes see another port",
    Poison.BURNS_MAPPING: "a refused packet ends the mapping",
}
_SECONDS = ("idle_unreplied_s", "idle_lifetime_s", "absolute_lifetime_s")
_CHANGED = "[bold reverse]changed[/]"


def report_view(report: InspectionReport, changed: Collection[str] = ()) -> RenderableType:
    """Return a report for people; what is named in `changed` is marked."""
    at = datetime.datetime.fromtimestamp(report.inspected_at_s).astimezone()
    title = f"[bold]Inspected[/] {at:%Y-%m-%d %H:%M:%S}, in {report.duration_s:.1f} s"
    parts: list[RenderableType] = [title]
    for name, section in (
        ("Interfaces", _interfaces(report)),
        ("Gateway", _gateway(report)),
        ("Path", _path(report)),
        ("NAT", _nat(report, changed)),
        ("Observers", _observers(report)),
        ("Advice", _advice(report)),
        ("Warnings", _sentences(report.warnings)),
    ):
        if section is not None:
            mark = f" {_CHANGED}" if name.lower() in changed else ""
            parts += [f"\n[bold cyan]{name}[/]{mark}", Padding(section, (0, 0, 0, 2))]
    return Group(*parts)


def _grid(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=bool(headers), header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _why(part: Part[object]) -> Text:
    return Text(f"unknown: {part.reason}", style="dim")


def _sentences(texts: Iterable[str]) -> RenderableType | None:
    grid = _grid()
    for text in texts:
        grid.add_row("-", Text(text))
    return grid if grid.row_count else None


# Sections -----------------------------------------------------------------------------------------


def _interfaces(report: InspectionReport) -> RenderableType:
    if report.interfaces.result is None:
        return _why(report.interfaces)
    grid = _grid("", "name", "leads to", "addresses", "gateway")
    for each in report.interfaces.result.interfaces:
        is_inspected = report.interface is not None and each.name == report.interface.name
        grid.add_row(
            "[bold green]>[/]" if is_inspected else "",
            Text(each.name),
            each.kind.value,
            Text("\n".join(f"{address} ({address.space.value})" for address in each.addresses)),
            _gateways(each),
        )
    return grid


def _gateways(interface: Interface) -> str:
    gateways = [
        f"{ip}{' (default)' if is_default else ''}"
        for ip, is_default in (
            (interface.gateway_ipv4, interface.is_default_ipv4),
            (interface.gateway_ipv6, interface.is_default_ipv6),
        )
        if ip is not None
    ]
    if not gateways and interface.is_default:
        return "none needed (default)"
    return "\n".join(gateways)


def _gateway(report: InspectionReport) -> RenderableType:
    found = report.gateway.result
    if found is None:
        return _why(report.gateway)
    grid = _grid("asked", "mappings", "lease", "external address", "what it said")
    for each in found.services:
        grid.add_row(
            each.protocol.value,
            "[green]yes[/]" if each.is_available else "no",
            _lease(each),
            each.external_ip or "",
            Text(each.detail),
        )
    return grid


def _lease(service: ServiceFindings) -> Text:
    if service.lease_problem:
        return Text(f"refused: {service.lease_problem}")
    if service.lease_s is None:
        return Text("")
    return Text("no end" if service.lease_s == float("inf") else f"{service.lease_s:g} s")


def _path(report: InspectionReport) -> RenderableType:
    found = report.path.result
    if found is None:
        return _why(report.path)
    grid = _grid("hop", "address", "", "round trip", "")
    for hop in found.hops:
        is_opener = hop.ttl == found.opener_ttl
        grid.add_row(
            str(hop.ttl),
            hop.ip or "silent",
            "" if hop.ip is None else _space(hop.ip),
            "" if hop.rtt_s is None else f"{1000 * hop.rtt_s:.1f} ms",
            "openers die here, outside of your NATs" if is_opener else "",
        )
    if found.reached:
        return grid
    return Group(grid, Text("and nobody further on answers, as usual", style="dim"))


def _space(ip: str) -> str:
    kind = address_kind(ip)
    return "shared, a carrier's" if kind is AddressKind.SHARED else kind.value


def _nat(report: InspectionReport, changed: Collection[str]) -> RenderableType:
    table = _grid("property", "value", "evidence", "90 % interval, or why", "cost")
    outcomes = {outcome.test: outcome for outcome in report.outcomes}
    test = None
    unknown: dict[str, list[str]] = {}
    for finding in report.findings:
        mark = f" {_CHANGED}" if f"nat.{finding.name}" in changed else ""
        label, value, evidence, sure = finding_row(finding)
        if finding.evidence is Evidence.UNKNOWN:
            unknown.setdefault(finding.reason, []).append(label + mark)
            continue
        is_first, test = finding.test is not test, finding.test
        cost = _cost(outcomes[test]) if is_first else ""
        style = "green" if finding.evidence is Evidence.MEASURED else "yellow"
        table.add_row(label, escape(value) + mark, Text(evidence, style=style), Text(sure), cost)
    reasons = _grid("", "not known", "why")
    for reason, labels in unknown.items():
        reasons.add_row("-", ", ".join(labels), Text(reason))
    parts = [each for each in (table, reasons) if each.row_count]
    return Group(*(parts if len(parts) == 1 else (table, "", reasons)))


def finding_row(finding: Finding) -> tuple[str, str, str, str]:
    """Return a finding's label, value, evidence, and how sure it is, as on the screen."""
    sure = [
        f"{name.replace('_', ' ')} {_interval(finding.name, interval)}".strip()
        for name, interval in finding.intervals
    ]
    if isinstance(finding.value, PortAllocation) and finding.value.law_probability is not None:
        probability = finding.value.law_probability
        text = "over 99.9 %" if probability > 0.999 else f"{100 * probability:.1f} %"
        sure.insert(0, f"{text} sure of the law")
    return (
        LABELS[finding.name],
        "" if finding.value is None else _value(finding.name, finding.value),
        finding.evidence.value,
        "; ".join(each for each in (*sure, finding.reason) if each),
    )


def _value(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float() if value == float("inf"):
            return "more than was tried"
        case float():
            return f"{value:.3g}{' s' if name in _SECONDS else ''}"
        case enum.Enum():
            return f"{value.value}: {_MEANINGS[value]}"
        case tuple():
            return ", ".join(map(str, value))
        case PortAllocation():
            return _law(value)
        case _:
            return str(value)


def _law(allocation: PortAllocation) -> str:
    text = str(allocation)
    if allocation.law is AllocationLaw.SEQUENTIAL and allocation.others_per_s is not None:
        text += f", others take {allocation.others_per_s:.2g} a second"
    if allocation.is_overloading:
        text += ", overloading"
    return text


def _interval(name: str, interval: Interval) -> str:
    unit = " s" if name in _SECONDS else ""
    if interval.high == float("inf"):
        return f"{interval.low:.5g}{unit} or more"
    return f"{interval.low:.5g}..{interval.high:.5g}{unit}"


def _cost(outcome: Outcome) -> str:
    if outcome.packet_count is None:
        return f"{outcome.duration_s:.1f} s"
    return f"{outcome.packet_count} packets, {outcome.duration_s:.1f} s"


def _observers(report: InspectionReport) -> RenderableType | None:
    if not report.observers:
        return None
    grid = _grid("peer", "at", "answers that count")
    for each in report.observers:
        peer = "mainline" if each.peer_id is None else each.peer_id.short
        grid.add_row(peer, str(each.endpoint), str(each.echo_count))
    return grid


def _advice(report: InspectionReport) -> RenderableType:
    sentences = _sentences(report.advice)
    assert sentences is not None, "there is always something to say"
    if not report.prospects:
        return sentences
    grid = _grid("a peer", "meets you by", "your probes")
    for each in report.prospects:
        probes = "" if each.probe_count is None else f"about {each.probe_count:,.0f}"
        grid.add_row(each.peer, Text(each.strategy or each.reason), probes)
    return Group(sentences, "", grid)


def offers_table(offers: Iterable[Offer], quick: Collection[object]) -> Table:
    """Return the tests there are, for `--costs`."""
    table = _grid("test", "finds out", "asks", "packets", "seconds", "when")
    for offer in offers:
        when = "always" if offer.test in quick else "not with --quick"
        if offer.test.value == "lifetimes":
            when = "with --lifetimes"
        table.add_row(
            offer.test.value,
            offer.text,
            offer.recipient,
            f"<= {offer.packet_count}",
            f"<= {offer.duration_s:g}",
            when,
        )
    return table


def profile_view(signed: SignedProfile) -> RenderableType:
    """Return a profile that somebody handed over."""
    at = datetime.datetime.fromtimestamp(signed.inspected_at_s, datetime.UTC)
    table = _grid("property", "value", "evidence")
    for name, label in LABELS.items():
        if is_known(signed.profile, name):
            value = getattr(signed.profile, name)
            is_inferred = name in signed.profile.inferred
            evidence = Evidence.INFERRED if is_inferred else Evidence.MEASURED
            table.add_row(label, _value(name, value), evidence.value)
    title = f"[bold]The NAT of[/] {signed.peer_id}\nas it said, {at:%Y-%m-%d %H:%M} UTC\n"
    return Group(title, table)
