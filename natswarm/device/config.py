"""How to open the node of a state folder: what a device is told once and keeps from run to run.

| file in the folder | what |
|---|---|
| identity | the private key; its public half is the PeerId |
| swarm | the key of a private swarm; none in the open one |
| peers.sqlite3 | whom it met, and who answered |
| others | `net/notes.py`, `net/control.py` |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from natswarm.address import Endpoint
from natswarm.discovery.invite import Invite
from natswarm.errors import ConfigurationError
from natswarm.identity import Identity
from natswarm.net.forwarder import SystemGateway
from natswarm.net.lan import Lan
from natswarm.net.mainline import MainlineConfig, read_mainline_nodes
from natswarm.net.notes import Notes
from natswarm.net.path import SystemPaths
from natswarm.net.peer_cache import PeerCache
from natswarm.net.tracing import Tracing
from natswarm.net.udp import UdpNetwork
from natswarm.node import NodeConfig, NodeEvent
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["IDENTITY_FILE", "SWARM_FILE", "DhtOptions", "device_config"]

IDENTITY_FILE, SWARM_FILE = "identity", "swarm"


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


def device_config(
    state: Path,
    *,
    invites: Sequence[Invite] = (),
    name: str = "",
    bind: str = "0.0.0.0",
    port: int = 0,
    interface: str | None = None,
    second_interface: str | None = None,
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
    """Return how to open the node of a state folder, making its identity on the first call.

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
        identity=Identity.load_or_create(state / IDENTITY_FILE),
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
        second_network=UdpNetwork(interface=second_interface) if second_interface else None,
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
