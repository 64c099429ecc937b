"""What the commands share: options, how a node is opened from them, and how JSON is printed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import trio
import typer
from rich.console import Console

from natswarm.address import Endpoint
from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError
from natswarm.identity import Identity
from natswarm.net.forwarder import SystemGateway
from natswarm.net.lan import Lan
from natswarm.net.mainline import MainlineConfig, read_mainline_nodes
from natswarm.net.notes import Notes
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path import SystemPaths
from natswarm.net.peer_cache import PeerCache
from natswarm.net.tracing import Tracing
from natswarm.net.udp import UdpNetwork
from natswarm.node import Node, NodeConfig, NodeEvent, open_node
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = [
    "DEFAULT_STATE",
    "IDENTITY_FILE",
    "SWARM_FILE",
    "BindOption",
    "DhtFileOption",
    "DhtNodeOption",
    "DhtOption",
    "DhtOptions",
    "ExpiresOption",
    "GatewayOption",
    "InterfaceOption",
    "JoinOption",
    "JsonOption",
    "KeylogOption",
    "OneTimeOption",
    "QlogOption",
    "QrOption",
    "StateOption",
    "console",
    "duration_s",
    "make_config",
    "print_json",
    "with_node",
]

TERMINATED = 128 + signal.SIGTERM  # as shells count

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

DEFAULT_STATE = platformdirs.user_state_path("natswarm", appauthor=False)

StateOption = Annotated[
    Path,
    typer.Option(
        "--state",
        help="Folder of the identity and all that is remembered; one for each node.",
        show_default=False,
    ),
]
BindOption = Annotated[
    str, typer.Option("--bind", help="Local address to use, such as that of one SIM's interface.")
]
InterfaceOption = Annotated[
    str | None,
    typer.Option(
        "--interface",
        help="Use this network interface alone, such as wwan0 for one SIM of several.",
        show_default=False,
    ),
]
GatewayOption = Annotated[
    bool,
    typer.Option(help="Have the router forward our port while we run (PCP, NAT-PMP, UPnP)."),
]
JoinOption = Annotated[
    list[str] | None,
    typer.Option("--join", help="Invite of a peer that takes strangers; may be given twice."),
]
ExpiresOption = Annotated[
    str, typer.Option("--expires", help="How long the invite holds: 30m, 12h, 7d.")
]
OneTimeOption = Annotated[bool, typer.Option("--one-time", help="An invite for one guest alone.")]
QlogOption = Annotated[
    Path | None,
    typer.Option("--qlog", metavar="FOLDER", help="Write a qlog file of each connection there."),
]
KeylogOption = Annotated[
    Path | None,
    typer.Option(
        "--keylog",
        metavar="FILE",
        envvar="SSLKEYLOGFILE",
        help="Add the connections' secrets there, for Wireshark to read what they carry.",
    ),
]
QrOption = Annotated[bool, typer.Option("--qr", help="Show the invite as a QR code, too.")]
DhtOption = Annotated[
    bool,
    typer.Option("--dht", help="Take part in BitTorrent's DHT, from the nodes of last time on."),
]
DhtNodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dht-node", metavar="ADDRESS:PORT", help="Take part in it from this BitTorrent node on."
    ),
]
DhtFileOption = Annotated[
    Path | None,
    typer.Option("--dht-file", help="The same with dht.dat or a session file of a client."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# Of the state folder.
IDENTITY_FILE, SWARM_FILE = "identity", "swarm"

# An invite must survive copy and paste: never wrapped, never styled.
console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True, slots=True)
class DhtOptions:
    """How the user wants to take part in the mainline DHT; by default not at all.

    Attributes:
        is_wanted: From the nodes of last time on.
        nodes: From these, too.
        file: And from those that this file names.
    """

    is_wanted: bool = False
    nodes: Sequence[str] = ()
    file: Path | None = None


NO_DHT = DhtOptions()


def print_json(value: dict[str, Any]) -> None:
    """Print one object on one line, at once."""
    print(json.dumps(value), flush=True)  # noqa: T201 - this is the command line's output


def duration_s(text: str) -> float:
    """Read `30m`, `12h` or `7d`.

    Raises:
        ConfigurationError: Not a duration.
    """
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise ConfigurationError(f"{text!r} is not a duration; write 90s, 30m, 12h or 7d")
    return int(number) * UNITS_S[unit]


def make_config(
    state: Path,
    *,
    invites: Sequence[Invite] = (),
    name: str = "",
    bind: str = "0.0.0.0",
    port: int = 0,
    interface: str | None = None,
    lan: bool = False,
    links: int = 0,
    dht: DhtOptions = NO_DHT,
    publishes: bool = False,
    traces_path: bool = False,
    qlog: Path | None = None,
    keylog: Path | None = None,
    asks_gateway: bool = False,
    on_event: Callable[[NodeEvent], None] = lambda _event: None,
) -> NodeConfig:
    """Return how to open this device's node, making its identity on the first call.

    A folder takes the swarm of its first invite, and stays in it.

    Raises:
        IdentityError: The identity in `state` is damaged, unreadable or open to others.
        InviteError: An invite is of another swarm.
        ConfigurationError: The swarm key in `state` is; or no mainline node is known.
    """
    swarm = _swarm_of(state, invites)
    notes = Notes.load(state)
    return NodeConfig(
        swarm=swarm,
        identity=Identity.load_or_create(state / "identity"),
        network=UdpNetwork(interface=interface),
        name=name,
        bind_ip=bind,
        port=port,
        links_max=links,
        cache=PeerCache(state / "peers.sqlite3"),
        notes=notes,
        mainline=_mainline_of(dht, notes, publishes=publishes),
        lan=Lan(interface) if lan else None,
        paths=SystemPaths(ip=bind, interface=interface) if traces_path else None,
        tracing=Tracing(qlog, keylog),
        gateway=SystemGateway(interface, bind) if asks_gateway else None,
        on_event=on_event,
    )


def _swarm_of(state: Path, invites: Sequence[Invite]) -> SwarmKey:
    path = state / SWARM_FILE
    swarm = SwarmKey.load(path)
    is_new = swarm is None and not (state / IDENTITY_FILE).exists()
    if swarm is None:
        # A PeerId that the open swarm knows would tell it who is in a private one.
        swarm = invites[0].swarm if is_new and invites else OPEN_SWARM
    for invite in invites:
        invite.check_swarm(swarm)
    if not is_new or swarm.is_open:
        return swarm
    invites[0].check(time.time())  # or it would bind the folder in vain
    return swarm.store_new(path)


def _mainline_of(dht: DhtOptions, notes: Notes, *, publishes: bool) -> MainlineConfig | None:
    if not (dht.is_wanted or dht.nodes or dht.file is not None):
        return None
    nodes = [*map(Endpoint.parse, dht.nodes), *notes.mainline.endpoints]
    if dht.file is not None:
        nodes += read_mainline_nodes(dht.file)
    if not nodes:
        raise ConfigurationError(
            "no mainline node is known from last time: name one with --dht-node ADDRESS:PORT, or a "
            "file of a BitTorrent client with --dht-file"
        )
    return MainlineConfig(tuple(nodes), publishes=publishes)


async def with_node(config: NodeConfig, body: Callable[[Node], Awaitable[None]]) -> None:
    """Run `body` with a node; leave as on Ctrl-C when a service manager says so.

    Raises:
        typer.Exit: It did.
    """
    with trio.CancelScope() as scope:
        async with open_private_nursery() as nursery, open_node(config) as node:
            nursery.start_soon(_cancel_on_terminate, scope)
            await body(node)
    if scope.cancelled_caught:
        raise typer.Exit(TERMINATED)


async def _cancel_on_terminate(scope: trio.CancelScope) -> None:
    """Peers are told goodbye on SIGTERM, too."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
