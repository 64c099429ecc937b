"""The commands of `natswarm`, one function each."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import segno
import trio
import typer
from rich.console import Console

from natswarm.cli.lab import lab_app
from natswarm.cli.show import event_as_json, event_as_text, profile_as_json, profile_table
from natswarm.discovery.invite import Invite
from natswarm.identity import Identity, PeerId
from natswarm.net.nursery import open_private_nursery
from natswarm.node import Node, NodeConfig, NodeEvent, open_node

__all__ = ["app"]

app = typer.Typer(
    name="natswarm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab_app)

TERMINATED = 128 + signal.SIGTERM  # as shells count

DEFAULT_STATE = platformdirs.user_state_path("natswarm", appauthor=False)

StateOption = Annotated[
    Path,
    typer.Option("--state", help="Folder of the identity, one per device.", show_default=False),
]
NameOption = Annotated[str, typer.Option("--name", help="What other peers see, 64 characters.")]
BindOption = Annotated[
    str, typer.Option("--bind", help="Local address to use, such as that of one SIM's interface.")
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65_535, help="UDP port; 0 lets the system choose.")
]
JoinOption = Annotated[
    list[str] | None,
    typer.Option("--join", help="Invite of a peer that takes strangers; may be given twice."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

# An invite must survive copy and paste: never wrapped, never styled.
console = Console(soft_wrap=True, highlight=False)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(version("natswarm"))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """A serverless swarm behind carrier NATs: know your NAT, find peers, puncture, connect."""


@app.command("id")
def show_identity(state: StateOption = DEFAULT_STATE) -> None:
    """Print this device's PeerId, making an identity on the first call."""
    typer.echo(str(Identity.load_or_create(state / "identity").peer_id))


@app.command()
def up(
    state: StateOption = DEFAULT_STATE,
    name: NameOption = "",
    bind: BindOption = "0.0.0.0",
    port: PortOption = 0,
    join: JoinOption = None,
    qr: Annotated[bool, typer.Option("--qr", help="Show the invite as a QR code, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a node until interrupted: print its invite, then what happens.

    A node that others can reach (a public address, or a NAT that lets strangers in) is all that a
    new swarm needs: give its invite to the others.
    """
    config = _config(state, name, bind, port, _event_printer(as_json))

    async def body(node: Node) -> None:
        invite = await node.invite()
        if as_json:
            print_json({"event": "up", "peer_id": str(node.peer_id), "invite": str(invite)})
        else:
            console.print(f"PeerId  {node.peer_id}\nInvite  {invite}\nPress Ctrl-C to stop.")
            if qr:
                segno.make(str(invite), error="l").terminal(compact=True)
        await trio.sleep_forever()

    trio.run(_with_node, config, join, body)


@app.command()
def inspect(
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
    bind: BindOption = "0.0.0.0",
    as_json: JsonOption = False,
) -> None:
    """Find out what the NATs between here and the swarm do, by asking ordinary peers."""
    config = _config(state, "", bind, 0, lambda _event: None)

    async def body(node: Node) -> None:
        profile = node.profile or await node.inspect()
        if not join:
            typer.echo("Nobody was asked: give --join the invite of a reachable peer.", err=True)
        if as_json:
            print_json(profile_as_json(profile))
        else:
            console.print(profile_table(profile))

    trio.run(_with_node, config, join, body)


@app.command()
def connect(
    peer: Annotated[str, typer.Argument(help="PeerId, or the peer's invite.")],
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
    bind: BindOption = "0.0.0.0",
    as_json: JsonOption = False,
) -> None:
    """Puncture to one peer and report how it went."""
    target = Invite.parse(peer) if peer.startswith("natswarm:") else PeerId.parse(peer)
    config = _config(state, "", bind, 0, _event_printer(as_json))

    async def body(node: Node) -> None:
        await node.connect(target)

    trio.run(_with_node, config, join, body)


def print_json(value: dict[str, Any]) -> None:
    """Print one object on one line, at once."""
    print(json.dumps(value), flush=True)  # noqa: T201 - this is the command line's output


def _config(
    state: Path, name: str, bind: str, port: int, on_event: Callable[[NodeEvent], None]
) -> NodeConfig:
    return NodeConfig(
        identity=Identity.load_or_create(state / "identity"),
        name=name,
        bind_ip=bind,
        port=port,
        on_event=on_event,
    )


def _event_printer(as_json: bool) -> Callable[[NodeEvent], None]:
    def print_event(event: NodeEvent) -> None:
        # A reader that has gone is noticed by the command itself; the node goes on till then.
        with contextlib.suppress(BrokenPipeError):
            if as_json:
                print_json(event_as_json(event))
            else:
                console.print(event_as_text(event))

    return print_event


async def _with_node(
    config: NodeConfig, join: list[str] | None, body: Callable[[Node], Any]
) -> None:
    invites = [Invite.parse(text) for text in join or ()]
    with trio.CancelScope() as scope:
        async with open_private_nursery() as nursery, open_node(config) as node:
            nursery.start_soon(_cancel_on_terminate, scope)
            for invite in invites:
                await node.connect(invite)
            if invites:
                await node.inspect()
            await body(node)
    if scope.cancelled_caught:
        raise typer.Exit(TERMINATED)


async def _cancel_on_terminate(scope: trio.CancelScope) -> None:
    """Leave as on Ctrl-C when a service manager says so: peers are told goodbye."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
