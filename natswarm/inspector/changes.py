"""What is different between two inspections of one node, for whoever watches.

Estimates differ a little each time, and so do counts of what was seen; that is no news. Pure.
"""

from __future__ import annotations

from natswarm.inspector.evidence import COUNTS
from natswarm.inspector.report import Evidence, Finding, InspectionReport
from natswarm.nat.allocation import PortAllocation

__all__ = ["changes"]


def changes(before: InspectionReport, after: InspectionReport) -> tuple[str, ...]:
    """Return what changed: `interfaces`, `gateway`, `path`, and `nat.` with a field's name."""
    changed = [
        name
        for name, is_changed in (
            ("interfaces", before.interfaces.result != after.interfaces.result),
            ("gateway", _gateway(before) != _gateway(after)),
            ("path", _path(before) != _path(after)),
        )
        if is_changed
    ]
    changed += [
        f"nat.{new.name}"
        for old, new in zip(before.findings, after.findings, strict=True)
        if _is_news(old, new)
    ]
    return tuple(changed)


def _gateway(report: InspectionReport) -> object:
    found = report.gateway.result
    if found is None:
        return None
    return found.gateway.ip, [(each.is_available, each.external_ip) for each in found.services]


def _path(report: InspectionReport) -> object:
    """Return the hops up to where an opener dies; beyond, ways differ and routers keep silent."""
    found = report.path.result
    if found is None:
        return None
    return [hop.ip for hop in found.hops[: found.opener_ttl]]


def _is_news(old: Finding, new: Finding) -> bool:
    if old.name in COUNTS:
        return False
    if (old.evidence is Evidence.UNKNOWN) != (new.evidence is Evidence.UNKNOWN):
        return True
    if isinstance(old.value, PortAllocation) and isinstance(new.value, PortAllocation):
        return _essence(old.value) != _essence(new.value)
    intervals = dict(old.intervals).get(""), dict(new.intervals).get("")
    if intervals[0] is not None and intervals[1] is not None:
        return intervals[0].high < intervals[1].low or intervals[1].high < intervals[0].low
    return old.value != new.value


def _essence(allocation: PortAllocation) -> object:
    """Return what of a law holds from one look to the next."""
    return (
        allocation.law,
        allocation.block_size,
        frozenset(allocation.blocks),
        allocation.step,
    )
