"""What the commands share: options, how a node runs, and how JSON is printed."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import trio
import typer
from rich.console import Console

from natswarm.device import open_device
from natswarm.errors import ConfigurationError
from natswarm.net.nursery import open_private_nursery
from natswarm.node import Node, NodeConfig

__all__ = [
    "DEFAULT_STATE",
    "BindOption",
    "DhtFileOption",
    "DhtNodeOption",
    "DhtOption",
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
SecondInterfaceOption = Annotated[
    str | None,
    typer.Option(
        "--second-interface",
        help="Keep a path to each peer in use ready over this one, such as wwan0 beside Wi-Fi.",
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


async def with_node(
    state: Path, config: NodeConfig, body: Callable[[Node], Awaitable[None]]
) -> None:
    """Run `body` with the node of a folder; leave as on Ctrl-C when a service manager says so.

    Raises:
        typer.Exit: It did.
    """
    with trio.CancelScope() as scope:
        async with open_private_nursery() as nursery, open_device(state, config) as node:
            nursery.start_soon(_cancel_on_terminate, scope)
            await body(node)
    if scope.cancelled_caught:
        raise typer.Exit(TERMINATED)


async def _cancel_on_terminate(scope: trio.CancelScope) -> None:
    """Peers are told goodbye on SIGTERM, too."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
