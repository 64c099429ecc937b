"""Commands that ask the node that runs with a state folder; `device/answers.py` answers."""

from __future__ import annotations

from typing import Annotated, Any

import trio
import typer
from rich.console import Group

from natswarm.cli.options import (
    DEFAULT_STATE,
    ExpiresOption,
    JsonOption,
    OneTimeOption,
    QrOption,
    StateOption,
    console,
    duration_s,
    print_json,
)
from natswarm.cli.show import show_qr
from natswarm.cli.status_view import peer_details, peer_line, peers_table, status_view
from natswarm.discovery.invite import Invite
from natswarm.identity import PeerId
from natswarm.net.control import ask_running_node

__all__ = ["find", "invite", "join", "peers", "status"]


def status(state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """Say how the running node is: its NAT, its peers, its part in routing and discovery."""
    found = trio.run(ask_running_node, state, {"do": "status"})
    if as_json:
        print_json(found)
    else:
        console.print(status_view(found))


def peers(
    state: StateOption = DEFAULT_STATE,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="With figures of each connection and path.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List whom the running node is connected to."""
    found = trio.run(ask_running_node, state, {"do": "peers"})["peers"]
    if as_json:
        print_json({"peers": found})
    elif not found:
        console.print("Nobody is connected.")
    elif verbose:
        console.print(Group(*map(peer_details, found)))
    else:
        console.print(peers_table(found))


def invite(
    state: StateOption = DEFAULT_STATE,
    expires: ExpiresOption = "7d",
    one_time: OneTimeOption = False,
    qr: QrOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print a new invite to the running node."""
    question = {"do": "invite", "lifetime_s": duration_s(expires), "one_time": one_time}
    made = trio.run(ask_running_node, state, question)
    if as_json:
        print_json(made)
        return
    console.print(made["invite"])
    if qr:
        show_qr(Invite.parse(made["invite"]))


def join(
    link: Annotated[str, typer.Argument(metavar="INVITE", help="Invite of a peer.")],
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Connect the running node to the peer of an invite."""
    Invite.parse(link)  # what is wrong with it can be said without a node
    _show_peer(trio.run(ask_running_node, state, {"do": "join", "invite": link}), as_json)


def find(
    peer: Annotated[str, typer.Argument(metavar="PEERID", help="Whom to find.")],
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Find a peer by its PeerId, wherever it is, and connect the running node to it."""
    peer_id = PeerId.parse(peer)
    _show_peer(trio.run(ask_running_node, state, {"do": "find", "peer": str(peer_id)}), as_json)


def _show_peer(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console.print(peer_line(found))
