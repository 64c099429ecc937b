"""A virtual internet: a core, NATs behind it or behind each other, and hosts with UDP ports.

It is a tree. The core forwards by global address; every NAT is a router with one realm inside; a
host or NAT hangs on the realm above it by a link with an upload and a download direction. Routers
count hops down, so that an opener with a low TTL dies between two NATs as it does in life. Private
addresses mean something only in their realm, and two homes may use the same ones.

    internet = Internet(World(seed=7))
    phone = internet.add_host("phone", "kpn-nl")                # its own carrier NAT
    cgn = internet.add_nat("cgn", "vodafone-nl")
    home = internet.add_nat("home", "linux-home", behind=cgn)   # double NAT
    laptop = internet.add_host("laptop", behind=home)

A datagram costs one event for each link that takes time. Knows no Trio: `natswarm/net/virtual.py`
puts real nodes on a host; here a port is a callback. IPv4 only; no fragmentation, no ICMP.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.sim.link import IDEAL, Link, LinkConditions
from natswarm.sim.nat import Nat, NatBehaviour
from natswarm.sim.packet import Packet
from natswarm.sim.presets import PRESETS, Preset, Site
from natswarm.sim.world import World

__all__ = ["Attachment", "Host", "Internet", "InternetCounters", "NatRouter", "SimPort"]

GLOBAL_NETWORKS = ("198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15")
CARRIER_NETWORK = "100.64.0.0/10"  # RFC 6598

DEFAULT_TTL = 64  # Linux; RFC 1700

# Between the borders of two access networks, inside one continent: assumed. What matters is that a
# TTL of 5 (hyperdht's opener) leaves home and dies on the way.
DEFAULT_CORE_HOPS = 8
DEFAULT_CORE_DELAY_S = 0.010

EPHEMERAL_PORTS = (32_768, 60_999)  # Linux `ip_local_port_range`


@dataclass(slots=True)
class InternetCounters:
    """What became of datagrams, apart from what the NATs and links count themselves."""

    sent_count: int = 0
    delivered_count: int = 0
    """To an open port."""
    lost_count: int = 0
    """On a link."""
    dropped_ttl: int = 0
    """The hop limit ran out."""
    dropped_nat: int = 0
    """By a NAT, which counts why."""
    dropped_no_route: int = 0
    """Nobody has the address."""
    dropped_closed: int = 0
    """The host has no such port."""


class Internet:
    """The core, and the maker of everything that hangs on it.

    Attributes:
        world: Time and randomness.
        counters: What became of datagrams.
        core_hops: Routers in the core, on every way.
        core_delay_s: One-way delay of the core.
        hosts: By name, in order of making.
        nats: By name, in order of making.
    """

    def __init__(
        self,
        world: World,
        *,
        core_hops: int = DEFAULT_CORE_HOPS,
        core_delay_s: float = DEFAULT_CORE_DELAY_S,
    ) -> None:
        self.world = world
        self.counters = InternetCounters()
        self.core_hops = core_hops
        self.core_delay_s = core_delay_s
        self.hosts: dict[str, Host] = {}
        self.nats: dict[str, NatRouter] = {}
        self.realm: dict[str, Attachment] = {}
        self._addresses = _addresses(*GLOBAL_NETWORKS)
        self._home_count = 0

    def add_nat(
        self,
        name: str,
        kind: str | Preset | NatBehaviour,
        *,
        behind: NatRouter | None = None,
        inside: str | None = None,
    ) -> NatRouter:
        """Add a NAT, for several hosts or for another NAT.

        Args:
            name: Not in use yet.
            kind: The name of a preset, a preset, or a behaviour (at home, with ideal links).
            behind: The NAT it is behind; None for the core.
            inside: Its inner network. By default 100.64.0.0/10 for every carrier, and for homes
                192.168.1.0/24, 192.168.2.0/24, ... in order of making.
        """
        preset = _preset(kind)
        if preset.behaviour is None:
            raise ValueError(f"{kind} has no NAT: add a host")
        if name in self.nats:
            raise ValueError(f"there is a NAT {name!r} already")
        if inside is None and preset.site is Site.CARRIER:
            inside = CARRIER_NETWORK
        elif inside is None:
            self._home_count += 1
            inside = f"192.168.{self._home_count % 256}.0/24"
        router = NatRouter(self, name, preset, inside, self._place(name, preset, behind))
        self.nats[name] = router
        return router

    def add_host(
        self,
        name: str,
        kind: str | Preset | NatBehaviour = "public",
        *,
        behind: NatRouter | None = None,
    ) -> Host:
        """Add a host, and where `kind` has a NAT one of its own, named `<name>-nat`.

        Args:
            name: Not in use yet.
            kind: The name of a preset, a preset, or a behaviour (at home, with ideal links).
            behind: The NAT the host is behind, or the host's own NAT is; None for the core.
        """
        if name in self.hosts:
            raise ValueError(f"there is a host {name!r} already")
        preset = _preset(kind)
        if preset.behaviour is not None:
            behind = self.add_nat(f"{name}-nat", preset, behind=behind)
        host = Host(self, name, behind, self._place(name, preset, behind))
        self.hosts[name] = host
        return host

    def route(self, packet: Packet, ttl: int, departure: float) -> None:
        """Carry a packet through the core, which it enters at `departure`."""
        ttl -= self.core_hops
        if ttl <= 0:
            self.drop_expired(packet, "core")
            return
        target = self.realm.get(packet.destination.ip)
        if target is None:
            self.drop_unroutable(packet, "core")
            return
        target.send_down(packet, ttl, departure + self.core_delay_s)

    def drop_expired(self, packet: Packet, where: str) -> None:
        """Count a packet whose hop limit ran out."""
        self.counters.dropped_ttl += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "expired", where, packet)

    def drop_unroutable(self, packet: Packet, where: str) -> None:
        """Count a packet to an address that nobody has."""
        self.counters.dropped_no_route += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "unroutable", where, packet)

    def drop_lost(self, packet: Packet, where: str) -> None:
        """Count a packet that a link lost."""
        self.counters.lost_count += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "lost", where, packet)

    def _place(self, name: str, preset: Preset, behind: NatRouter | None) -> Attachment:
        """Make the way up of a new device: address, link, router above."""
        if behind is None:
            ip = next(self._addresses)
            # What is behind a carrier's NAT has the slow link, not the NAT itself.
            has_access = preset.site is Site.HOME
        else:
            ip = behind.next_address()
            preset = behind.preset
            has_access = preset.site is Site.CARRIER
        conditions, hops = (preset.access, preset.access_hops) if has_access else (IDEAL, 0)
        return Attachment(self, name, ip, behind, conditions, hops)


class Attachment:
    """A device's place: its address in the realm above, and the link up to it.

    Attributes:
        ip: The device's address there.
        parent: The NAT above; None is the core.
        upload: The link's direction up.
        download: The link's direction down.
        hops: Routers on the link, both ends not counted.
    """

    def __init__(
        self,
        internet: Internet,
        name: str,
        ip: str,
        parent: NatRouter | None,
        conditions: LinkConditions,
        hops: int,
    ) -> None:
        self.ip = ip
        self.parent = parent
        self.hops = hops
        self.upload = Link(conditions, internet.world.stream(f"upload/{name}"))
        self.download = Link(conditions, internet.world.stream(f"download/{name}"))
        self._internet = internet
        self._world = internet.world
        self._name = name
        self._receive: Callable[[Packet, int], None] = _nobody_there

    def connect(self, receive: Callable[[Packet, int], None]) -> None:
        """Put the device there, which takes packets from above by `receive(packet, ttl)`."""
        self._receive = receive
        realm = self._internet.realm if self.parent is None else self.parent.realm
        realm[self.ip] = self

    def send_up(self, packet: Packet, ttl: int) -> None:
        """Send a packet of the device to the realm above."""
        ttl -= self.hops
        if ttl <= 0:
            self._internet.drop_expired(packet, self._name)
            return
        now = self._world.now
        arrival = self.upload.arrival_time(now)
        if arrival is None:
            self._internet.drop_lost(packet, self._name)
        elif self.parent is None:
            self._internet.route(packet, ttl, arrival)
        elif arrival == now:
            self.parent.receive_from_inside(packet, ttl)
        else:
            self._world.at(arrival, self.parent.receive_from_inside, packet, ttl)

    def send_down(self, packet: Packet, ttl: int, departure: float) -> None:
        """Send a packet from the realm above to the device, leaving at `departure`.

        Always by an event, so that two hosts on ideal links do not answer each other for ever in
        one call.
        """
        if departure > self._world.now and not self.download.is_constant:
            # The link keeps packets in order of departure, so it must see them in that order.
            self._world.at(departure, self.send_down, packet, ttl, departure)
            return
        ttl -= self.hops
        if ttl <= 0:
            self._internet.drop_expired(packet, self._name)
            return
        arrival = self.download.arrival_time(departure)
        if arrival is None:
            self._internet.drop_lost(packet, self._name)
        else:
            self._world.at(arrival, self._receive, packet, ttl)

    def hand_down(self, packet: Packet, ttl: int) -> None:
        """As `send_down` now, from inside an event: an ideal link then costs none of its own."""
        if self.download.conditions is IDEAL:
            self._receive(packet, ttl)
        else:
            self.send_down(packet, ttl, self._world.now)


class NatRouter:
    """A NAT at its place: a router between the realm above and the one inside.

    Attributes:
        name: Unique among the NATs.
        preset: What kind it is.
        nat: Its table and counters.
        uplink: Its place in the realm above.
        realm: What is inside, by address.
    """

    def __init__(
        self, internet: Internet, name: str, preset: Preset, inside: str, uplink: Attachment
    ) -> None:
        assert preset.behaviour is not None
        self.name = name
        self.preset = preset
        self.nat = Nat(preset.behaviour, uplink.ip, internet.world.stream(f"nat/{name}"))
        self.uplink = uplink
        self.realm: dict[str, Attachment] = {}
        self._internet = internet
        self._world = internet.world
        self._inside_addresses = _addresses(inside)
        next(self._inside_addresses)  # the router's own
        uplink.connect(self.receive_from_outside)

    @property
    def external_ip(self) -> str:
        """The address the outside sees."""
        return self.uplink.ip

    def next_address(self) -> str:
        """Hand out the next inner address."""
        return next(self._inside_addresses)

    def receive_from_inside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet of the realm inside: within it, round, or translated and up."""
        local = self.realm.get(packet.destination.ip)
        if local is not None:
            local.send_down(packet, ttl, self._world.now)  # switched, not routed
            return
        if ttl <= 1:
            # Before the table: Linux makes no mapping for a packet it will not forward.
            self._internet.drop_expired(packet, self.name)
            return
        nat = self.nat
        if packet.destination.ip == nat.external_ip:
            self._turn_round(packet, ttl)
            return
        translated = nat.outbound(packet, self._world.now)
        if translated is None:
            self._drop(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "out", self.name, translated)
        self.uplink.send_up(translated, ttl - 1)

    def receive_from_outside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet from above, if the table has someone for it. Only inside events."""
        if ttl <= 1:
            self._internet.drop_expired(packet, self.name)
            return
        translated = self.nat.inbound(packet, self._world.now)
        if translated is None:
            self._drop(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "in", self.name, translated)
        target = self.realm.get(translated.destination.ip)
        if target is None:
            self._internet.drop_unroutable(translated, self.name)
            return
        target.hand_down(translated, ttl - 1)

    def _turn_round(self, packet: Packet, ttl: int) -> None:
        """Hairpinning with external source address and port (RFC 4787 REQ-9)."""
        nat, now = self.nat, self._world.now
        if not nat.behaviour.hairpinning:
            nat.counters.dropped_hairpin += 1
            self._drop(packet)
            return
        translated = nat.outbound(packet, now)
        turned = None if translated is None else nat.inbound(translated, now)
        target = None if turned is None else self.realm.get(turned.destination.ip)
        if turned is None or target is None:
            self._drop(packet)
            return
        target.send_down(turned, ttl - 1, now)

    def _drop(self, packet: Packet) -> None:
        self._internet.counters.dropped_nat += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "refused", self.name, packet)


class Host:
    """A host with UDP ports.

    Attributes:
        name: Unique among the hosts.
        internet: Where it is.
        nat: The NAT it is behind; None on the core.
        uplink: Its place: address and link.
        ports: Open ports by number.
    """

    def __init__(
        self, internet: Internet, name: str, nat: NatRouter | None, uplink: Attachment
    ) -> None:
        self.name = name
        self.internet = internet
        self.nat = nat
        self.uplink = uplink
        self.ports: dict[int, SimPort] = {}
        self._rng = internet.world.stream(f"host/{name}")
        uplink.connect(self._receive)

    @property
    def ip(self) -> str:
        """Its own address; private behind a NAT."""
        return self.uplink.ip

    def open_port(self, port: int = 0) -> SimPort:
        """Open a UDP port; 0 draws a free ephemeral one.

        Raises:
            ConfigurationError: The port is taken, or all ephemeral ones are.
        """
        if port == 0:
            port = self._free_port()
        elif port in self.ports:
            raise ConfigurationError(f"port {port} of {self.ip} is taken")
        elif not 1 <= port <= 65_535:
            raise ConfigurationError(f"{port} is not a UDP port")
        self.ports[port] = opened = SimPort(self, port)
        return opened

    def _free_port(self) -> int:
        # From a random start to the first free one, as Linux searches.
        low, high = EPHEMERAL_PORTS
        count = high - low + 1
        start = self._rng.randrange(count)
        for step in range(count):
            port = low + (start + step) % count
            if port not in self.ports:
                return port
        raise ConfigurationError(f"all ephemeral ports of {self.ip} are taken")

    def _receive(self, packet: Packet, ttl: int) -> None:
        internet = self.internet
        port = self.ports.get(packet.destination.port)
        if port is None:
            internet.counters.dropped_closed += 1
        else:
            internet.counters.delivered_count += 1
        if internet.world.trace is not None:
            event = "closed" if port is None else "received"
            internet.world.trace(internet.world.now, event, self.name, packet)
        if port is not None and port.on_datagram is not None:
            port.on_datagram(packet.data, packet.source)


class SimPort:
    """One open UDP port of a virtual host.

    Attributes:
        endpoint: Its address in its own realm.
        on_datagram: Called with (data, source) for each datagram, inside an event: it may send and
            schedule, not run the world.
    """

    def __init__(self, host: Host, port: int) -> None:
        self.endpoint = Endpoint(host.ip, port)
        self.on_datagram: Callable[[bytes, Endpoint], None] | None = None
        self._host = host
        self._world = host.internet.world
        self._counters = host.internet.counters
        self._send_up = host.uplink.send_up

    def send(self, data: bytes, destination: Endpoint, ttl: int = DEFAULT_TTL) -> None:
        """Send a datagram at the world's present time; it passes `ttl` - 1 routers at most."""
        packet = Packet(self.endpoint, destination, data)
        self._counters.sent_count += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "sent", self._host.name, packet)
        self._send_up(packet, ttl)

    def close(self) -> None:
        """Stop receiving; idempotent. The number may be opened again at once."""
        if self._host.ports.get(self.endpoint.port) is self:
            del self._host.ports[self.endpoint.port]


def _preset(kind: str | Preset | NatBehaviour) -> Preset:
    if isinstance(kind, NatBehaviour):
        return Preset(kind, Site.HOME, IDEAL, 0, "given")
    if isinstance(kind, Preset):
        return kind
    if kind not in PRESETS:
        raise ConfigurationError(f"no preset {kind!r}; there are {', '.join(PRESETS)}")
    return PRESETS[kind]


def _addresses(*networks: str) -> Iterator[str]:
    for network in networks:
        for address in ipaddress.ip_network(network).hosts():
            yield str(address)


def _nobody_there(packet: Packet, ttl: int) -> None:
    raise AssertionError("a packet came before the device was connected")
