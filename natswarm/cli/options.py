"""What the commands share: options, how a node is opened from them, and how JSON is printed."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import trio
import typer
from rich.console import Console

from natswarm.address import Endpoint
from natswarm.discovery.beacon import OPEN_SWARM_KEY
from natswarm.errors import ConfigurationError
from natswarm.identity import Identity
from natswarm.net.lan import Lan
from natswarm.net.mainline import MainlineConfig
from natswarm.net.notes import Notes
from natswarm.net.nursery import open_private_nursery
from natswarm.net.path import SystemPaths
from natswarm.net.peer_cache import PeerCache
from natswarm.net.udp import UdpNetwork
from natswarm.node import Node, NodeConfig, NodeEvent, open_node

__all__ = [
    "DEFAULT_STATE",
    "BindOption",
    "ExpiresOption",
    "InterfaceOption",
    "JoinOption",
    "JsonOption",
    "OneTimeOption",
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
    typer.Option("--state", help="Folder of the identity, one per device.", show_default=False),
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
JoinOption = Annotated[
    list[str] | None,
    typer.Option("--join", help="Invite of a peer that takes strangers; may be given twice."),
]
ExpiresOption = Annotated[
    str, typer.Option("--expires", help="How long the invite holds: 30m, 12h, 7d.")
]
OneTimeOption = Annotated[bool, typer.Option("--one-time", help="An invite for one guest alone.")]
QrOption = Annotated[bool, typer.Option("--qr", help="Show the invite as a QR code, too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# An invite must survive copy and paste: never wrapped, never styled.
console = Console(soft_wrap=True, highlight=False)


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
    name: str = "",
    bind: str = "0.0.0.0",
    port: int = 0,
    interface: str | None = None,
    lan: bool = False,
    mainline_nodes: Sequence[Endpoint] = (),
    swarm_key: bytes = OPEN_SWARM_KEY,
    traces_path: bool = False,
    on_event: Callable[[NodeEvent], None] = lambda _event: None,
) -> NodeConfig:
    """Return how to open this device's node, making its identity on the first call.

    Raises:
        IdentityError: The identity in `state` is damaged, unreadable or open to others.
    """
    return NodeConfig(
        identity=Identity.load_or_create(state / "identity"),
        network=UdpNetwork(interface=interface),
        name=name,
        bind_ip=bind,
        port=port,
        cache=PeerCache(state / "peers.sqlite3"),
        notes=Notes.load(state),
        mainline=MainlineConfig(tuple(mainline_nodes), swarm_key, publishes=True)
        if mainline_nodes
        else None,
        lan=Lan(interface, swarm_key) if lan else None,
        paths=SystemPaths(ip=bind, interface=interface) if traces_path else None,
        on_event=on_event,
    )


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
