"""How a running node looks: in `natswarm status`, `peers`, and live below the events of `up`.

Everything is drawn from the plain dictionaries of `show.py`, since the commands are told no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import trio
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

__all__ = ["peer_details", "peer_line", "peers_table", "show_live", "status_view"]

REFRESH_S = 1.0
SHOWN_PEERS_MAX = 16  # of the live view, which must fit on the screen


def status_view(status: dict[str, Any], *, peers_max: int | None = None) -> RenderableType:
    """Draw a status.

    Args:
        status: From `status_as_json`.
        peers_max: Of more peers, the rest is counted only.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_row("[bold]node[/]", _node_text(status))
    facts.add_row("[bold]NAT[/]", escape(status["nat"]["text"]))
    if (routing := status["routing"]) is not None:
        facts.add_row("[bold]routing[/]", _routing_text(routing))
    if (mainline := status["mainline"]) is not None:
        facts.add_row(
            "[bold]mainline[/]",
            f"{mainline['nodes']} nodes known, {mainline['votes']} say where they see us",
        )
    peers = status["peers"]
    facts.add_row("[bold]peers[/]", f"{len(peers)}" if peers else "nobody is connected")
    shown = peers[:peers_max]
    parts: list[RenderableType] = [facts]
    if shown:
        parts.append(peers_table(shown))
    if len(shown) < len(peers):
        parts.append(f"... and {len(peers) - len(shown)} more: natswarm peers")
    return Group(*parts)


def peers_table(peers: list[dict[str, Any]]) -> Table:
    """Draw a line for each peer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("peer", "network", "NAT", "path", "trip", "sent", "got", "for"):
        table.add_column(heading, no_wrap=True)
    for each in peers:
        name = f" {escape(each['name'])}" if each["name"] else ""
        table.add_row(
            each["peer_id"][:8] + name,
            escape(each["network"] or "?"),
            escape((each["nat"] or "?").partition(",")[0]),
            _path_text(each),
            "" if each["rtt_ms"] is None else f"{each['rtt_ms']:.0f} ms",
            _bytes_text(each["sent_bytes"]),
            _bytes_text(each["received_bytes"]),
            _duration_text(each["connected_s"]),
        )
    return table


def peer_details(peer: dict[str, Any]) -> RenderableType:
    """Draw all figures of a peer, from `peer_details_as_json`."""
    connection, probes = peer["connection"], peer["probes"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "connection",
        f"{_milliseconds_text(connection['rtt_s'])} round trip, "
        f"window {_bytes_text(connection['congestion_window_bytes'])}, "
        f"{connection['lost_packet_count']} packets lost, "
        f"{connection['rejected_batch_count']} batches rejected",
    )
    facts.add_row(
        "streams",
        f"{connection['stream_count']} open, {connection['call_count']} calls of ours, "
        f"{_bytes_text(connection['buffered_bytes'])} not read yet",
    )
    facts.add_row(
        "probes",
        f"{probes['sent_count']} sent, {probes['answered_count']} answered, "
        f"{probes['forged_count']} forged, {probes['replayed_count']} replayed, "
        f"{probes['stray_count']} stray",
    )
    for each in peer["paths"]:
        state = "active" if each["is_active"] else "spare" if each["is_spare"] else "ready"
        if each["is_dead"]:
            state = "[yellow]dead[/]"
        silence = "never heard" if each["silent_s"] is None else f"silent {each['silent_s']:.1f} s"
        facts.add_row(
            "path",
            f"{each['local']} - {each['remote']}: {state}, "
            f"{_milliseconds_text(each['rtt_s'])} round trip, {silence}, "
            f"{_duration_text(each['age_s'])} old",
        )
        facts.add_row(
            "",
            f"sent {_bytes_text(each['sent_bytes'])} in {each['sent_datagram_count']} datagrams, "
            f"got {_bytes_text(each['received_bytes'])} in {each['received_datagram_count']}",
        )
    return Group(peer_line(peer), facts)


def peer_line(peer: dict[str, Any]) -> str:
    """Return one line of rich markup for a peer."""
    name = f" ({escape(peer['name'])})" if peer["name"] else ""
    return f"[bold green]connected[/]  {peer['peer_id']}{name} {_path_text(peer)}"


async def show_live(console: Console, status: Callable[[], dict[str, Any]]) -> NoReturn:
    """Keep a status at the bottom of a terminal, below what else is printed, until cancelled."""
    # Not by the thread that rich offers: nodes are looked at from Trio's alone.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(status_view(status(), peers_max=SHOWN_PEERS_MAX), refresh=True)
            await trio.sleep(REFRESH_S)


def _node_text(status: dict[str, Any]) -> str:
    name = f" ({escape(status['name'])})" if status["name"] else ""
    swarm = "" if status["swarm"] == "open" else f" in the private swarm {status['swarm']}"
    return f"{status['peer_id'][:8]}{name} at {status['local']}{swarm}"


def _routing_text(routing: dict[str, Any]) -> str:
    buckets = ", ".join(f"{index}: {count}" for index, count in routing["buckets"].items())
    return (
        f"{routing['links']} links, by bucket {buckets or 'none'}; "
        f"the swarm has about {routing['swarm_size']:.0f} nodes"
    )


def _path_text(peer: dict[str, Any]) -> str:
    if not peer["reachable"]:
        return "[yellow]none now[/]"
    how = f" by {peer['strategy']}" if peer["strategy"] else ""
    return f"{peer['at']}{how}"


def _milliseconds_text(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1000 * seconds:.0f} ms"


def _bytes_text(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000 or unit == "GB":
            break
    return f"{value:.1f} {unit}"


def _duration_text(seconds: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
