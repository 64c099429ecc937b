"""How the commands of `llmload` take part in the mesh: their options, joining, and what they tell.

A device that serves or learns is a node like that of `natswarm up`: it has a state folder, routes
for its swarm, and is asked by `natswarm status --state FOLDER` and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import trio
import typer

from llmload.cli_shared import model_folder, output, print_json
from llmload.model_folder import Model
from llmload.swarm.draft import DraftModel, open_draft
from natswarm import (
    LINKS_MAX,
    LINKS_MIN,
    ConnectFailed,
    Identity,
    Invite,
    Node,
    NodeConfig,
    NodeEvent,
    PeerConnected,
    PeerLost,
    PunctureEnded,
    SystemPaths,
)

__all__ = [
    "DEFAULT_LINKS",
    "DEFAULT_STATE",
    "BindOption",
    "DhtFileOption",
    "DhtNodeOption",
    "DhtOption",
    "DraftOption",
    "GatewayOption",
    "InterfaceOption",
    "JoinOption",
    "LanOption",
    "LinksOption",
    "PortOption",
    "StateOption",
    "asking_config",
    "join_mesh",
    "open_draft_in_thread",
    "show_event",
    "stay_joined",
]

# A peer that restarts is back in about a minute; dialling costs one datagram a try.
REJOIN_INTERVAL_S = 15.0
DEFAULT_LINKS = LINKS_MAX
DEFAULT_STATE = platformdirs.user_state_path("llmload", appauthor=False)

StateOption = Annotated[
    Path,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder of this device's identity and of the peers it remembers.",
        show_default=False,
    ),
]
JoinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        metavar="INVITE",
        help="Invite of a peer of the mesh, natswarm:...; may be given more than once.",
        show_default=False,
    ),
]
BindOption = Annotated[
    str,
    typer.Option("--bind", metavar="IP", help="Local address, such as that of one interface."),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65_535, help="UDP port; 0 lets the system choose.")
]
InterfaceOption = Annotated[
    str | None,
    typer.Option(
        "--interface",
        help="Use this network interface alone, such as wwan0 for one SIM of several.",
        show_default=False,
    ),
]
LanOption = Annotated[bool, typer.Option("--lan/--no-lan", help="Find peers on the LAN, too.")]
GatewayOption = Annotated[
    bool,
    typer.Option(
        "--gateway/--no-gateway",
        help="Have the router forward our port while we run (PCP, NAT-PMP, UPnP).",
    ),
]
LinksOption = Annotated[
    int,
    typer.Option("--links", help="Connections to keep and route by, 16 to 128; 0: none."),
]
DhtOption = Annotated[
    bool,
    typer.Option("--dht", help="Take part in BitTorrent's DHT, from the nodes of last time on."),
]
DhtNodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dht-node",
        metavar="ADDRESS:PORT",
        help="Take part in it from this BitTorrent node on.",
        show_default=False,
    ),
]
DhtFileOption = Annotated[
    Path | None,
    typer.Option(
        "--dht-file",
        metavar="FILE",
        help="The same with dht.dat or a session file of a client.",
        show_default=False,
    ),
]
DraftOption = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        metavar="NAME|DIR",
        help="A smaller model with the same tokenizer that guesses on this device, to save trips; "
        "the answer is the same.",
        show_default=False,
    ),
]


async def open_draft_in_thread(draft: Path | None, model: Model) -> DraftModel | None:
    """Open the model that `--draft` names, to guess for `model`; None without one."""
    if draft is None:
        return None
    return await trio.to_thread.run_sync(open_draft, model_folder(draft), model)


def asking_config(invites: Sequence[Invite], bind: str) -> NodeConfig:
    """Return how to open a node that only asks.

    It needs no lasting name, and so may run on a device that serves, too.
    """
    return NodeConfig(
        identity=Identity.generate(),
        swarm=invites[0].swarm,
        bind_ip=bind,
        links_max=LINKS_MIN,  # or it would find only the neighbours of those who invited us
        paths=SystemPaths(ip=bind),
    )


async def join_mesh(node: Node, invites: Sequence[Invite]) -> None:
    """Connect to all who invited us, or whom we met last time; find out what our NAT does."""
    for invite in invites:
        await node.connect(invite)
    if not invites:
        await node.rejoin()
    if node.peers():
        await node.inspect()  # punctures to others are planned from what our NAT does


async def stay_joined(node: Node, invites: Sequence[Invite]) -> None:
    """Dial the peers that we joined by again and again; nothing happens while they are there.

    Who is alone tries those that it remembers, too.
    """
    while True:
        await trio.sleep(REJOIN_INTERVAL_S)
        if not node.peers():
            await node.rejoin()
        for invite in invites:
            # Their loss was shown as an event, and the next try comes soon.
            with suppress(ConnectFailed):
                await node.connect(invite)


def show_event(as_json: bool, event: NodeEvent) -> None:
    """Print what happened to a node; nothing for most events."""
    facts: dict[str, Any]
    match event:
        case PunctureEnded(peer_id, report):
            word, who = "punctured" if report.is_ok else "closed", peer_id
            facts = {
                "strategy": report.strategy,
                "probes": report.probe_count,
                "seconds": round(report.seconds, 4),
                "ok": report.is_ok,
                "reason": report.reason,
            }
        case PeerConnected(peer):
            word, who, facts = "connected", peer.peer_id, {"at": str(peer.seen_at)}
        case PeerLost(peer):
            word, who, facts = "lost", peer.peer_id, {"at": str(peer.seen_at)}
        case _:
            return
    if as_json:
        print_json({"event": word, "peer_id": str(who), **facts})
    else:
        text = ", ".join(f"{name} {value}" for name, value in facts.items() if value != "")
        output.print(f"{word:<10} {who.short} {text}", markup=False)
