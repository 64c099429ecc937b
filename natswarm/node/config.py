"""How a node is opened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from natswarm.address import address_kind
from natswarm.discovery.introduction import complaint_about
from natswarm.errors import AddressError, ConfigurationError
from natswarm.identity import Identity
from natswarm.net.forwarder import GatewaySource
from natswarm.net.lan import Lan
from natswarm.net.mainline import MainlineConfig
from natswarm.net.notes import Notes
from natswarm.net.path import PathNetwork
from natswarm.net.peer_cache import PeerStore
from natswarm.net.port import Network
from natswarm.net.tracing import Tracing
from natswarm.net.udp import UdpNetwork
from natswarm.node.events import NodeEvent
from natswarm.puncture.plan import Limits
from natswarm.routing.table import LINKS_MIN
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["PEERS_MAX", "NodeConfig", "check_presentable"]

# Peers a node keeps; reference section 4: a phone keeps about 30, a laptop has room for more.
PEERS_MAX = 256


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How to open a node.

    Attributes:
        identity: Who we are.
        network: Where UDP ports come from; the real network by default.
        name: What the user calls this node, at most 64 printable characters; peers see it.
        swarm: Which swarm it is in: nodes of others get no answer, and see no name.
        bind_ip: Address to bind, such as that of one interface; `0.0.0.0` is any.
        port: UDP port of the main port p; 0 lets the system choose.
        services: Names of what we serve, for others to find; 16 of at most 128 characters.
        limits: Bounds of a puncture.
        links_max: Connections to keep for routing, 16 to 128; a phone keeps 30. With 0 the node
            takes no part in routing: it finds only its neighbours' neighbours.
        outage_s: How long a connection outlives its last path, at most 600: a phone that changes
            networks needs seconds, one that sleeps minutes. Streams wait meanwhile.
        cache: Where to remember peers, such as a `PeerCache`; None: nowhere.
        notes: What else to remember from run to run, such as which invites are used up.
        mainline: How to take part in BitTorrent's DHT; None: not at all.
        lan: Find peers in our own networks by multicast, on the real network alone; None: do not.
        paths: Where the path outward is traced from whenever our NAT is inspected, such as
            `SystemPaths()`: openers then have the hop limit that spares the peer's NAT. None: it is
            not traced.
        gateway: Which gateway to have the main port forwarded by (PCP, NAT-PMP, UPnP-IGD), such as
            `SystemGateway()`: strangers then reach it while the node runs. None: it is not asked.
        second_network: Another interface, such as `UdpNetwork(interface="wwan0")`: each connection
            in use is kept a path ready there, for when the first network dies. None: there is none.
        seed: Seed of the node's random behaviour; None draws one. Keys never depend on it.
        tracing: What of each connection to write into files, for whoever looks for a fault.
        utc: The clock on the wall: seconds since 1970.
        on_event: Called with every NodeEvent, at once; must return quickly and not raise.
    """

    identity: Identity
    network: Network = field(default_factory=UdpNetwork)
    name: str = ""
    swarm: SwarmKey = OPEN_SWARM
    bind_ip: str = "0.0.0.0"
    port: int = 0
    services: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    links_max: int = 0
    seed: int | None = None
    outage_s: float = 60.0
    cache: PeerStore | None = None
    notes: Notes = field(default_factory=Notes)
    mainline: MainlineConfig | None = None
    lan: Lan | None = None
    paths: PathNetwork | None = None
    gateway: GatewaySource | None = None
    second_network: Network | None = None
    tracing: Tracing = field(default_factory=Tracing)
    utc: Callable[[], float] = time.time
    on_event: Callable[[NodeEvent], None] = lambda _event: None

    def check(self) -> None:
        """Complain of what cannot be.

        Raises:
            ConfigurationError: Peers would refuse our record, or a value is out of bounds.
        """
        check_presentable(self.name, self.services)
        if self.links_max and not LINKS_MIN <= self.links_max <= PEERS_MAX // 2:
            raise ConfigurationError(
                f"links_max is 0 or {LINKS_MIN} to {PEERS_MAX // 2}, not {self.links_max}: with "
                "fewer links a node is not found, with more there is no room for peers of your own"
            )
        try:
            address_kind(self.bind_ip)
        except AddressError as error:
            raise ConfigurationError(str(error)) from error


def check_presentable(name: str, services: tuple[str, ...]) -> None:
    """Complain of what peers would refuse in our record.

    Raises:
        ConfigurationError: What is wrong with it.
    """
    if (complaint := complaint_about(name, services)) is not None:
        raise ConfigurationError(complaint)
