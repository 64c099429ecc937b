"""Find peers in our own networks: beacons by multicast, over IPv4 and IPv6, on every interface.

    interface with a LAN ── socket joined to the group ── BeaconSchedule ── PeerHeard ── connect
                        ◀── socket bound to our address there ── beacons

BEP 14's group would bring every beacon to every BitTorrent client of the house, whose text format
ours is not, and theirs to us; so group and port are our own. 239.192.0.0/14 is for organisations
(RFC 2365) and ff12::/16 ends at the link; with a hop limit of 1 no beacon leaves the LAN.

An interface takes part if people we know may be behind it: not a carrier's network, a VPN, or one
with a public address. Interfaces come and go; they are looked at every 5 s. A node bound to IPv4
takes strangers at IPv4 addresses alone, so it has links of that family alone; the same for IPv6.

Datagrams cost anything only within a rate, and dials go four at a time, to at most 32 LAN peers: a
larger LAN needs no star. What a beacon says is `discovery/beacon.py`'s, when one is sent
`beacon_schedule.py`'s. The virtual internet has no multicast.

Source: BEP 14, RFC 2365, RFC 4291 section 2.7; ip(7) and ipv6(7) for the options.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Protocol

import trio

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.discovery.beacon import BeaconCipher
from natswarm.discovery.beacon_schedule import (
    BeaconSchedule,
    BeaconStatistics,
    Link,
    PeerHeard,
)
from natswarm.errors import NatswarmError
from natswarm.identity import Identity, PeerId
from natswarm.net.budget import Budget, KeyedBudget
from natswarm.net.interfaces import Interface, InterfaceKind, inspect_interfaces
from natswarm.net.udp import endpoint_of
from natswarm.swarm_key import SwarmKey

__all__ = ["Home", "Lan", "LanService"]

logger = logging.getLogger("natswarm.lan")

GROUP_IPV4 = "239.192.110.115"  # "ns"; not BEP 14's 239.192.152.143
GROUP_IPV6 = "ff12::6e73"
GROUP_PORT = 26_773
HOP_LIMIT = 1

POLL_S = 5.0
KINDS = (InterfaceKind.LAN, InterfaceKind.MOBILE, InterfaceKind.VIRTUAL, InterfaceKind.UNKNOWN)
LINKS_MAX = 32  # a container host has hundreds of bridges

# Opening a beacon takes 5 us, its signature 0.1 ms: at the worst 1 % of a core.
BEACONS_PER_S = 100.0
BEACONS_PER_ADDRESS_PER_S = 5.0

DIALS_MAX = 4
# Several hear a newcomer at once; it should not have to answer all of them at once.
DIAL_JITTER_S = 0.5
LAN_PEERS_MAX = 32

# Linux, include/uapi/linux/in.h and in6.h; Python's socket module does not name them.
IP_MULTICAST_ALL = 49
IPV6_MULTICAST_ALL = 29
BEACON_BUFFER_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Lan:
    """Whom to look for on the LAN, and where.

    Attributes:
        interface: The only one to use; None uses every one that leads to a LAN.
    """

    interface: str | None = None


class Home(Protocol):
    """What the LAN service needs of its node."""

    def is_connected(self, peer_id: PeerId) -> bool:
        """Whether there is a connection to a peer."""
        ...

    async def connect_at(self, peer_id: PeerId, endpoints: tuple[Endpoint, ...]) -> object:
        """Connect to a peer that takes strangers at these endpoints.

        Raises:
            NatswarmError: It is not there.
        """
        ...


class LanService:
    """Beacons of one node, out and in.

    Args:
        home: The node.
        identity: Who we are.
        local: Where the main port is bound; `0.0.0.0` or `::` is any address of its family.
        config: What to look for.
        rng: Draws the jitter.
        swarm: Whose nodes alone hear us.
    """

    def __init__(
        self,
        home: Home,
        *,
        identity: Identity,
        local: Endpoint,
        config: Lan,
        rng: random.Random,
        swarm: SwarmKey,
    ) -> None:
        self._home = home
        self._local = local
        self._config = config
        self._rng = rng
        self._schedule = BeaconSchedule(
            identity,
            port=local.port,
            cipher=BeaconCipher(swarm),
            rng=rng,
            entropy=os.urandom,
        )
        self._links: dict[Link, _LinkSockets] = {}
        self._changed = trio.Event()
        self._budget = Budget(per_s=BEACONS_PER_S)
        self._address_budgets = KeyedBudget(per_s=BEACONS_PER_ADDRESS_PER_S)
        self._dials = trio.CapacityLimiter(DIALS_MAX)
        self._dialled: set[PeerId] = set()
        self._found: set[PeerId] = set()
        self.refused_count = 0
        """Datagrams that were over the budgets; they were not looked at."""

    def statistics(self) -> BeaconStatistics:
        """Return the counters so far."""
        return self._schedule.statistics()

    async def run(self) -> None:
        """Send and listen until cancelled; cancelled, it closes its sockets."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                while True:
                    self._look_at_interfaces(nursery)
                    await trio.sleep(POLL_S)
        finally:
            for sockets in self._links.values():
                sockets.close()

    # Links ----------------------------------------------------------------------------------------

    def _look_at_interfaces(self, nursery: trio.Nursery) -> None:
        there = self._wanted_links()
        for link, sockets in list(self._links.items()):
            if link not in there or not sockets.is_current():
                self._schedule.remove_link(link)
                self._links.pop(link).close()
                logger.info("%s is gone from %s", link.ip, link.interface)
        for link in there:
            if link in self._links or len(self._links) >= LINKS_MAX:
                continue
            try:
                sockets = _LinkSockets(link)
            except OSError as error:
                # No multicast there, or not yet: an IPv6 address is tested for 1 s after it came.
                logger.debug("no multicast on %s at %s: %s", link.interface, link.ip, error)
                continue
            self._links[link] = sockets
            self._schedule.add_link(link, trio.current_time())
            self._changed.set()
            nursery.start_soon(self._receive, link, sockets, nursery)

    def _wanted_links(self) -> list[Link]:
        links = []
        for interface in inspect_interfaces().interfaces:
            if interface.kind in KINDS and self._config.interface in (None, interface.name):
                ip = _reachable_at(interface, self._local.ip)
                if ip is not None:
                    links.append(Link(interface.name, ip))
        return links

    # Datagrams ------------------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            for link, data in self._schedule.datagrams_to_send(trio.current_time()):
                self._links[link].send(data)
            self._changed = trio.Event()
            timer = self._schedule.next_timer()
            with trio.move_on_at(float("inf") if timer is None else timer):
                await self._changed.wait()

    async def _receive(self, link: Link, sockets: _LinkSockets, nursery: trio.Nursery) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                data, source = await sockets.receive()
                now = trio.current_time()
                if not (self._address_budgets.take(source.ip, now) and self._budget.take(now)):
                    self.refused_count += 1
                    continue
                heard = self._schedule.receive_untrusted(data, source, link.interface, now)
                if heard is not None:
                    self._changed.set()
                    nursery.start_soon(self._connect, heard)

    async def _connect(self, heard: PeerHeard) -> None:
        peer_id = heard.peer_id
        self._found = {each for each in self._found if self._home.is_connected(each)}
        if peer_id in self._dialled or len(self._found | self._dialled) >= LAN_PEERS_MAX:
            return
        self._dialled.add(peer_id)
        try:
            await trio.sleep(self._rng.uniform(0, DIAL_JITTER_S))
            async with self._dials:
                if not self._home.is_connected(peer_id):
                    await self._home.connect_at(peer_id, (heard.endpoint,))
            self._found.add(peer_id)
        except NatswarmError as error:
            logger.info("%s is on our LAN, but: %s", peer_id.short, error)
        finally:
            self._dialled.discard(peer_id)


def _reachable_at(interface: Interface, bound_ip: str) -> str | None:
    """Return the address of an interface at which a port bound to `bound_ip` takes strangers."""
    is_ipv6 = ":" in bound_ip
    usable = (AddressKind.PRIVATE, AddressKind.LINK_LOCAL, AddressKind.GLOBAL)
    ips = [
        address.ip
        for address in interface.addresses
        if (":" in address.ip) == is_ipv6 and address_kind(address.ip) in usable
    ]
    if bound_ip in ips:
        return bound_ip
    if bound_ip not in ("0.0.0.0", "::"):
        return None
    # IPv6: the link-local address is there without a router, and stays when prefixes change.
    ips.sort(key=lambda ip: (address_kind(ip) is AddressKind.LINK_LOCAL) != is_ipv6)
    return ips[0] if ips else None


class _LinkSockets:
    """What one link is heard by and sent from.

    Raises:
        OSError: The interface does not take part in multicast, or is gone.
    """

    def __init__(self, link: Link) -> None:
        self._is_ipv6 = ":" in link.ip
        self._interface = link.interface
        self._index = index = socket.if_nametoindex(link.interface)
        self._group = (
            (GROUP_IPV6, GROUP_PORT, 0, index) if self._is_ipv6 else (GROUP_IPV4, GROUP_PORT)
        )
        with contextlib.ExitStack() as stack:
            self._in = stack.enter_context(self._open())
            self._out = stack.enter_context(self._open())
            self._listen(index)
            self._prepare_sending(link.ip, index)
            stack.pop_all()

    def _open(self) -> socket.socket:
        sock = socket.socket(
            socket.AF_INET6 if self._is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM
        )
        sock.setblocking(False)
        return sock

    def _listen(self, index: int) -> None:
        # Other nodes of this machine listen, too; everybody gets a copy.
        self._in.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT") and sys.platform != "linux":
            self._in.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sys.platform != "win32":
            self._in.bind(self._group)  # so that nothing but the group's datagrams comes in
        else:
            self._in.bind(("::" if self._is_ipv6 else "0.0.0.0", GROUP_PORT))
        if self._is_ipv6:
            membership = socket.inet_pton(socket.AF_INET6, GROUP_IPV6) + struct.pack("@I", index)
            self._in.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
        else:
            membership = socket.inet_aton(GROUP_IPV4) + struct.pack("@4xi", index)
            self._in.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        if sys.platform == "linux":
            # Else it would hear what any program of the machine has joined, on any interface.
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL)
                if self._is_ipv6
                else (socket.IPPROTO_IP, IP_MULTICAST_ALL)
            )
            with contextlib.suppress(OSError):  # IPv6: since Linux 4.20
                self._in.setsockopt(level, option, 0)

    def _prepare_sending(self, ip: str, index: int) -> None:
        if self._is_ipv6:
            self._out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            self._out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, HOP_LIMIT)
            # Only a link-local address needs to be told its interface.
            is_link_local = address_kind(ip) is AddressKind.LINK_LOCAL
            self._out.bind((ip, 0, 0, index if is_link_local else 0))
        else:
            interface = struct.pack("@8xi", index)
            self._out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            self._out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, HOP_LIMIT)
            self._out.bind((ip, 0))

    def is_current(self) -> bool:
        """Whether the interface is still that of its name: a modem plugged in again is another."""
        try:
            return socket.if_nametoindex(self._interface) == self._index
        except OSError:
            return False

    def send(self, data: bytes) -> None:
        """Send one datagram to the group; one that the system refuses is lost."""
        with contextlib.suppress(OSError):
            self._out.sendto(data, self._group)

    async def receive(self) -> tuple[bytes, Endpoint]:
        """Wait for one datagram to the group.

        Raises:
            trio.ClosedResourceError: The link was closed.
        """
        while True:
            if self._in.fileno() < 0:
                raise trio.ClosedResourceError("the link is gone")
            await trio.lowlevel.wait_readable(self._in)
            with contextlib.suppress(OSError):  # a bad checksum, or an interface that went down
                data, address = self._in.recvfrom(BEACON_BUFFER_BYTES)
                return data, endpoint_of(*address)

    def close(self) -> None:
        """Close both sockets; who waits in `receive` is told."""
        trio.lowlevel.notify_closing(self._in)
        self._in.close()
        self._out.close()
