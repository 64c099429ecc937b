"""How events of the node look: rich text for people, plain dictionaries for programs."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import segno
from rich.markup import escape

from natswarm.device.facts import profile_as_json
from natswarm.discovery.invite import Invite
from natswarm.node import (
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
    "show_qr",
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


def _peer_text(peer: Peer) -> str:
    name = f" ({escape(peer.record.name)})" if peer.record is not None and peer.record.name else ""
    return f"{peer.peer_id.short}{name} at {peer.seen_at}"
