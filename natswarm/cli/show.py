"""How things of the node look: rich text for people, plain dictionaries for programs."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict
from typing import Any

import segno
import trio
from rich.markup import escape

from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError
from natswarm.nat.profile import NatProfile
from natswarm.nat.votes import prefix_of
from natswarm.node import (
    Node,
    NodeEvent,
    PathChanged,
    Peer,
    PeerConnected,
    PeerLost,
    ProfileLearned,
    PunctureEnded,
    PunctureStarted,
)

__all__ = [
    "event_as_json",
    "event_as_text",
    "peer_as_json",
    "peer_details_as_json",
    "profile_as_json",
    "show_qr",
    "status_as_json",
]

# Lines of half a module: a camera wants four blank modules around (ISO/IEC 18004), two do.
QR_BORDER = 2


def show_qr(invite: Invite) -> None:
    """Print an invite as a QR code of half blocks, two modules a line."""
    code = segno.make(invite.qr_text, error="l")
    needed = code.symbol_size(border=QR_BORDER)[0]
    if (columns := shutil.get_terminal_size().columns) < needed:
        print(  # noqa: T201 - this is the command line's output
            f"The QR code needs {needed} columns, this terminal has {columns}: make it wider, or "
            "the letters smaller."
        )
        return
    code.terminal(out=sys.stdout, border=QR_BORDER, compact=True)


def event_as_text(event: NodeEvent) -> str:
    """Return one line of rich markup."""
    match event:
        case ProfileLearned(profile):
            return f"[cyan]NAT[/]        {escape(str(profile))}"
        case PunctureStarted(peer_id, plan):
            return f"[yellow]puncture[/]   {peer_id.short}: {escape(str(plan))}"
        case PunctureEnded(peer_id, report) if report.is_ok:
            return (
                f"[green]open[/]       {peer_id.short}: {report.strategy}, "
                f"{report.probe_count} probes, {report.seconds:.2f} s"
            )
        case PunctureEnded(peer_id, report):
            return f"[red]closed[/]     {peer_id.short}: {escape(report.reason)}"
        case PeerConnected(peer):
            return f"[bold green]connected[/]  {_peer_text(peer)}"
        case PathChanged(peer, _, None, reason):
            return f"[yellow]no path[/]    {peer.peer_id.short}: {escape(reason)}"
        case PathChanged(peer, _, new, reason):
            return f"[cyan]path[/]       {peer.peer_id.short} at {new}: {escape(reason)}"
        case PeerLost(peer):
            return f"[red]lost[/]       {_peer_text(peer)}"


def event_as_json(event: NodeEvent) -> dict[str, Any]:
    """Return the same for programs; `event` names it."""
    match event:
        case ProfileLearned(profile):
            return {"event": "profile", **profile_as_json(profile)}
        case PunctureStarted(peer_id, plan):
            return {"event": "puncture", "peer_id": str(peer_id), "strategy": plan.strategy.value}
        case PunctureEnded(peer_id, report):
            return {
                "event": "punctured",
                "peer_id": str(peer_id),
                "strategy": report.strategy,
                "probes": report.probe_count,
                "seconds": round(report.seconds, 4),
                "ok": report.is_ok,
                "reason": report.reason,
            }
        case PeerConnected(peer):
            return {"event": "connected", "peer_id": str(peer.peer_id), "at": str(peer.seen_at)}
        case PathChanged(peer, old, new, reason):
            return {
                "event": "path",
                "peer_id": str(peer.peer_id),
                "old": None if old is None else str(old),
                "new": None if new is None else str(new),
                "reason": reason,
            }
        case PeerLost(peer):
            return {"event": "lost", "peer_id": str(peer.peer_id), "at": str(peer.seen_at)}


def profile_as_json(profile: NatProfile) -> dict[str, Any]:
    """Return what is known of a NAT; null is what is not known."""
    allocation = profile.allocation
    return {
        "translated": profile.is_translated,
        "mapping": profile.mapping.value if profile.mapping else None,
        "filtering": profile.filtering.value if profile.filtering else None,
        "allocation": str(allocation) if allocation is not None else None,
        "public_ips": list(profile.public_ips),
        "endpoint": str(profile.main_endpoint) if profile.main_endpoint else None,
        "echoes": profile.echo_count,
        "observers": profile.observer_count,
    }


def peer_as_json(peer: Peer) -> dict[str, Any]:
    """Return what is known of a peer we are connected to; null is what is not known."""
    record, statistics = peer.record, peer.statistics()
    profile = None if record is None else record.profile
    # Of the paths' round trips the active one's, which probes measure; QUIC's own lags behind.
    active = next((path for path in peer.paths.paths if path.endpoint == peer.seen_at), None)
    return {
        "peer_id": str(peer.peer_id),
        "name": "" if record is None else record.name,
        "services": [] if record is None else list(record.services),
        "at": str(peer.seen_at),
        "network": prefix_of(peer.seen_at.ip.partition("%")[0]),
        "nat": None if profile is None or profile.is_translated is None else str(profile),
        "reachable": peer.is_reachable,
        "strategy": "" if peer.puncture is None else peer.puncture.strategy,
        "rtt_ms": None if active is None or active.rtt_s is None else 1000 * active.rtt_s,
        "sent_bytes": statistics.sent_bytes,
        "received_bytes": statistics.received_bytes,
        "connected_s": trio.current_time() - peer.connected_at,
    }


def peer_details_as_json(peer: Peer) -> dict[str, Any]:
    """Return the same with the figures of the connection, its paths and the probes that keep them.

    Seconds, bytes and counts; a figure that is not known is null.
    """
    probes = peer.paths.probe_statistics()
    return {
        **peer_as_json(peer),
        "connection": asdict(peer.statistics()) | {"call_count": peer.calls.call_count},
        "paths": [
            {
                **asdict(each),
                "local": str(each.local),
                "remote": str(each.remote),
                "silent_s": each.silent_s if math.isfinite(each.silent_s) else None,
            }
            for each in peer.paths.statistics()
        ],
        "probes": asdict(probes),
    }


def status_as_json(node: Node) -> dict[str, Any]:
    """Return how a node is; null is what it takes no part in."""
    record = node.record()
    routing = mainline = None
    try:
        overlay = node.overlay
    except ConfigurationError:
        pass
    else:
        buckets = overlay.neighbours_by_bucket()
        routing = {
            "links": sum(map(len, buckets.values())),
            "buckets": {str(index): len(links) for index, links in buckets.items()},
            "swarm_size": overlay.size_estimate(),
        }
    if node.mainline is not None:
        mainline = {"nodes": len(node.mainline.contacts()), "votes": len(node.mainline.votes())}
    return {
        "peer_id": str(node.peer_id),
        "name": record.name,
        "swarm": "open" if node.swarm.is_open else node.swarm.label,
        "local": str(node.local_endpoint),
        "nat": {"text": str(record.profile), **profile_as_json(record.profile)},
        "routing": routing,
        "mainline": mainline,
        "peers": [peer_as_json(peer) for peer in node.peers()],
    }


def _peer_text(peer: Peer) -> str:
    name = f" ({escape(peer.record.name)})" if peer.record is not None and peer.record.name else ""
    return f"{peer.peer_id.short}{name} at {peer.seen_at}"
