"""The commands of `natswarm`, one function each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated

import trio
import typer

from natswarm.cli.field_test import field_test_app
from natswarm.cli.inspect import inspect
from natswarm.cli.lab import lab_app
from natswarm.cli.options import (
    DEFAULT_STATE,
    BindOption,
    DhtFileOption,
    DhtNodeOption,
    DhtOption,
    ExpiresOption,
    GatewayOption,
    InterfaceOption,
    JoinOption,
    JsonOption,
    KeylogOption,
    OneTimeOption,
    QlogOption,
    QrOption,
    SecondInterfaceOption,
    StateOption,
    console,
    duration_s,
    print_json,
    with_node,
)
from natswarm.cli.recipes import recipes_app
from natswarm.cli.running import find, invite, join, peers, status
from natswarm.cli.show import event_as_json, event_as_text, show_qr
from natswarm.cli.status_view import show_live
from natswarm.cli.swarm import swarm_app
from natswarm.device import DhtOptions, device_config
from natswarm.device.facts import status_as_json
from natswarm.discovery.invite import Invite
from natswarm.identity import Identity, PeerId
from natswarm.node import Node, NodeEvent
from natswarm.routing.table import LINKS_MAX

__all__ = ["app"]

app = typer.Typer(
    name="natswarm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab_app)
app.add_typer(field_test_app)
app.add_typer(recipes_app)
app.add_typer(swarm_app)

NameOption = Annotated[str, typer.Option("--name", help="What other peers see, 64 characters.")]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65_535, help="UDP port; 0 lets the system choose.")
]


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
    interface: InterfaceOption = None,
    second_interface: SecondInterfaceOption = None,
    port: PortOption = 0,
    join: JoinOption = None,
    lan: Annotated[bool, typer.Option(help="Find peers on the LAN by multicast.")] = True,
    gateway: GatewayOption = True,
    links: Annotated[
        int,
        typer.Option("--links", help="Connections to keep and route by, 16 to 128; 0: none."),
    ] = LINKS_MAX,
    dht: DhtOption = False,
    dht_node: DhtNodeOption = None,
    dht_file: DhtFileOption = None,
    qr: QrOption = False,
    expires: ExpiresOption = "7d",
    one_time: OneTimeOption = False,
    live: Annotated[
        bool, typer.Option(help="On a terminal, keep the peers in view below what happens.")
    ] = True,
    qlog: QlogOption = None,
    keylog: KeylogOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a node until interrupted: print its invite, then what happens.

    Meanwhile `natswarm status`, `peers`, `invite`, `join` and `find` ask this node. It routes for
    its swarm: it connects to some 30 others by itself, so that any peer finds any other.

    A node that others can reach (a public address, or a NAT that lets strangers in) is all that a
    new swarm needs: give its invite to the others.
    """
    lifetime_s = duration_s(expires)
    invites = [Invite.parse(text) for text in join or ()]
    config = device_config(
        state,
        invites=invites,
        name=name,
        bind=bind,
        port=port,
        interface=interface,
        second_interface=second_interface,
        lan=lan,
        links=links,
        dht=DhtOptions(dht, dht_node or (), dht_file),
        publishes=True,
        traces_path=True,
        qlog=qlog,
        keylog=keylog,
        asks_gateway=gateway,
        on_event=_event_printer(as_json),
    )

    async def body(node: Node) -> None:
        await _meet(node, invites)
        invite = await node.invite(lifetime_s=lifetime_s, is_one_time=one_time)
        if as_json:
            print_json({"event": "up", "peer_id": str(node.peer_id), "invite": str(invite)})
        else:
            console.print(f"PeerId  {node.peer_id}\nInvite  {invite}\nPress Ctrl-C to stop.")
            if qr:
                show_qr(invite)
        if live and console.is_terminal and not as_json:
            await show_live(console, partial(status_as_json, node))
        await trio.sleep_forever()

    trio.run(with_node, state, config, body)


app.command()(inspect)
for command in (status, peers, invite, join, find):
    app.command()(command)


@app.command()
def connect(
    peer: Annotated[str, typer.Argument(help="PeerId, or the peer's invite.")],
    join: JoinOption = None,
    state: StateOption = DEFAULT_STATE,
    bind: BindOption = "0.0.0.0",
    interface: InterfaceOption = None,
    gateway: GatewayOption = True,
    by_clock: Annotated[
        bool,
        typer.Option(
            "--by-clock",
            help="Meet a peer from before with nobody in between; it must do the same now.",
        ),
    ] = False,
    dht: DhtOption = False,
    dht_node: DhtNodeOption = None,
    dht_file: DhtFileOption = None,
    qlog: QlogOption = None,
    keylog: KeylogOption = None,
    as_json: JsonOption = False,
) -> None:
    """Puncture to one peer and report how it went."""
    target = Invite.parse(peer) if peer.startswith("natswarm:") else PeerId.parse(peer)
    invites = [Invite.parse(text) for text in join or ()]
    config = device_config(
        state,
        invites=[*invites, target] if isinstance(target, Invite) else invites,
        bind=bind,
        interface=interface,
        dht=DhtOptions(dht, dht_node or (), dht_file),
        publishes=by_clock,  # the other side looks for us there, too
        traces_path=True,
        qlog=qlog,
        keylog=keylog,
        asks_gateway=gateway,
        on_event=_event_printer(as_json),
    )

    async def body(node: Node) -> None:
        await _meet(node, invites)
        if by_clock:
            peer_id = target if isinstance(target, PeerId) else target.record.peer_id
            await node.meet_again(peer_id)
        else:
            await node.connect(target)

    trio.run(with_node, state, config, body)


def _event_printer(as_json: bool) -> Callable[[NodeEvent], None]:
    def print_event(event: NodeEvent) -> None:
        # A reader that has gone is noticed by the command itself; the node goes on till then.
        with contextlib.suppress(BrokenPipeError):
            if as_json:
                print_json(event_as_json(event))
            else:
                console.print(event_as_text(event))

    return print_event


async def _meet(node: Node, invites: Sequence[Invite]) -> None:
    """Meet who was named, or whom the cache remembers; then have them say what they see."""
    for each in invites:
        await node.connect(each)
    if not invites:
        await node.rejoin()
    if node.peers() or node.mainline is not None:
        await node.inspect()
