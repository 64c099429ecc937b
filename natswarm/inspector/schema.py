"""The report as plain dictionaries, for programs: docs/inspect.md describes every key.

Keys are only ever added; one that changes its meaning raises the version. A number that is beyond
what was tried is the string "inf", since JSON has no infinity.
"""

from __future__ import annotations

import datetime
import enum
import math
from typing import TYPE_CHECKING, Any

from natswarm.address import Endpoint
from natswarm.nat.allocation import PortAllocation

if TYPE_CHECKING:
    from natswarm.inspector.report import (
        Finding,
        GatewayFindings,
        InspectionReport,
        Outcome,
        Part,
        Prospect,
    )
    from natswarm.nat.path import PathReport
    from natswarm.net.interfaces import Interface, InterfaceReport

__all__ = ["SCHEMA_VERSION", "plain", "report_as_json", "utc_text"]

SCHEMA_VERSION = 1


def report_as_json(report: InspectionReport) -> dict[str, Any]:
    """Return a report as dictionaries, lists, text, numbers, booleans and None."""
    return {
        "version": SCHEMA_VERSION,
        "peer_id": str(report.peer_id),
        "at": utc_text(report.inspected_at_s),
        "duration_s": round(report.duration_s, 3),
        "interface": None if report.interface is None else report.interface.name,
        "interfaces": _part(report.interfaces) | _interfaces(report.interfaces.result),
        "gateway": _part(report.gateway) | _gateway(report.gateway.result),
        "path": _part(report.path) | _path(report.path.result),
        "nat": {finding.name: _finding(finding) for finding in report.findings},
        "observers": [
            {
                "peer_id": None if observer.peer_id is None else str(observer.peer_id),
                "endpoint": str(observer.endpoint),
                "neighbour": observer.is_neighbour,
                "echoes": observer.echo_count,
            }
            for observer in report.observers
        ],
        "tests": {outcome.test.value: _outcome(outcome) for outcome in report.outcomes},
        "warnings": list(report.warnings),
        "advice": list(report.advice),
        "prospects": [_prospect(prospect) for prospect in report.prospects],
    }


def _part(part: Part[Any]) -> dict[str, Any]:
    return {"reason": part.reason or None, "duration_s": round(part.duration_s, 3)}


def _interfaces(report: InterfaceReport | None) -> dict[str, Any]:
    return {"found": [] if report is None else [_interface(each) for each in report.interfaces]}


def _interface(interface: Interface) -> dict[str, Any]:
    return {
        "name": interface.name,
        "kind": interface.kind.value,
        "evidence": list(interface.evidence),
        "addresses": [
            {"ip": each.ip, "prefix_length": each.prefix_length, "space": each.space.value}
            for each in interface.addresses
        ],
        "gateway_ipv4": interface.gateway_ipv4,
        "gateway_ipv6": interface.gateway_ipv6,
        "default_ipv4": interface.is_default_ipv4,
        "default_ipv6": interface.is_default_ipv6,
    }


def _gateway(found: GatewayFindings | None) -> dict[str, Any]:
    if found is None:
        return {"ip": None, "external_ip": None, "services": []}
    return {
        "ip": found.gateway.ip,
        "external_ip": found.external_ip,
        "services": [
            {
                "protocol": service.protocol.value,
                "available": service.is_available,
                "detail": service.detail,
                "external_ip": service.external_ip,
                "lease_s": plain(service.lease_s),
                "lease_problem": service.lease_problem or None,
            }
            for service in found.services
        ],
    }


def _path(found: PathReport | None) -> dict[str, Any]:
    if found is None:
        return {
            "destination": None,
            "reached": None,
            "hops": [],
            "inside_hops": None,
            "opener_ttl": None,
        }
    return {
        "destination": plain(found.destination),
        "reached": found.reached,
        "hops": [
            {
                "ttl": hop.ttl,
                "ip": hop.ip,
                "rtt_s": None if hop.rtt_s is None else round(hop.rtt_s, 4),
            }
            for hop in found.hops
        ],
        "inside_hops": found.inside_hop_count,
        "opener_ttl": found.opener_ttl,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "value": plain(finding.value),
        "evidence": finding.evidence.value,
        "reason": finding.reason or None,
        "intervals": {
            name or "value": [plain(interval.low), plain(interval.high)]
            for name, interval in finding.intervals
        },
        "test": finding.test.value,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "state": outcome.state.value,
        "reason": outcome.reason or None,
        "packets": outcome.packet_count,
        "duration_s": round(outcome.duration_s, 3),
    }


def _prospect(prospect: Prospect) -> dict[str, Any]:
    probe_count = prospect.probe_count
    return {
        "peer": prospect.peer,
        "strategy": prospect.strategy or None,
        "probes": None if probe_count is None else round(probe_count, 1),
        "reason": prospect.reason,
    }


def utc_text(seconds: float) -> str:
    """Return a time since 1970 in ISO 8601."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def plain(value: object) -> Any:
    """Return a value of a profile as JSON has it."""
    match value:
        case float() if math.isinf(value):
            return "inf"
        case float():
            return round(value, 6)
        case enum.Enum():
            return value.value
        case Endpoint():
            return str(value)
        case tuple():
            return [plain(each) for each in value]
        case PortAllocation():
            return _allocation(value)
        case _:
            return value


def _allocation(allocation: PortAllocation) -> dict[str, Any]:
    return {
        "text": str(allocation),
        "law": allocation.law.value,
        "low": allocation.low,
        "high": allocation.high,
        "block_size": allocation.block_size,
        "blocks": list(allocation.blocks),
        "step": allocation.step,
        "others_per_s": plain(allocation.others_per_s),
        "last_port": allocation.last_port,
        "shape": plain(allocation.shape),
        "law_probability": plain(allocation.law_probability),
        "overloading": allocation.is_overloading,
        "ports": allocation.port_count,
        "samples": allocation.sample_count,
    }
