"""A virtual host: its UDP ports, or whoever takes all its packets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.sim.attachment import Attachment
from natswarm.sim.icmp import ErrorSource
from natswarm.sim.packet import DEFAULT_TTL, ICMP, PORT_UNREACHABLE, UDP, Packet, make_packet

if TYPE_CHECKING:
    from natswarm.sim.router import NatRouter
    from natswarm.sim.topology import Internet

__all__ = ["DEFAULT_TTL", "EPHEMERAL_PORTS", "Host", "SimPort"]

EPHEMERAL_PORTS = (32_768, 60_999)  # Linux `ip_local_port_range`


class Host:
    """A host with UDP ports.

    Attributes:
        name: Unique among the hosts.
        internet: Where it is.
        nat: The NAT it is behind; None on the core.
        uplink: Its place: address and link.
        ports: Open ports of its IPv4 address by number.
        ports6: The same of its IPv6 address: one number may be open on both.
    """

    def __init__(
        self, internet: Internet, name: str, nat: NatRouter | None, uplink: Attachment
    ) -> None:
        self.name = name
        self.internet = internet
        self.nat = nat
        self.uplink = uplink
        self.ports: dict[int, SimPort] = {}
        self.ports6: dict[int, SimPort] = {}
        self._on_packet: Callable[[Packet, int], None] | None = None
        self._error_source = ErrorSource(uplink.ip)
        self._has_ipv6 = uplink.ip6 is not None
        self._rng = internet.world.stream(f"host/{name}")
        uplink.connect(self._receive)

    @property
    def ip(self) -> str:
        """Its own address; private behind a NAT. IPv6 where it has no other."""
        return self.uplink.ip

    @property
    def ip6(self) -> str | None:
        """Its IPv6 address; None without."""
        return self.uplink.ip6

    @property
    def addresses(self) -> list[str]:
        """Its addresses, IPv4 first."""
        ip, ip6 = self.uplink.ip, self.uplink.ip6
        return [ip] if ip6 is None or ip6 == ip else [ip, ip6]

    @property
    def on_packet(self) -> Callable[[Packet, int], None] | None:
        """Called with (packet, hops left) for each packet that comes, in place of the open ports.

        Inside an event: it may send and schedule, not run the world.
        """
        return self._on_packet

    @on_packet.setter
    def on_packet(self, take: Callable[[Packet, int], None] | None) -> None:
        self._on_packet = take
        self.internet.has_error_listeners = True

    def move(self, behind: NatRouter | None) -> None:
        """Leave the network for another: a new link and address; what is on its way here is lost.

        Open IPv4 ports stay open and have the new address, as sockets bound to any address do.

        Args:
            behind: The NAT of the other network; None for the core.

        Raises:
            ConfigurationError: A host with IPv6 cannot move.
        """
        if self._has_ipv6:
            raise ConfigurationError(f"{self.name} has IPv6; only hosts without can move")
        self.uplink.leave()
        self.nat = behind
        self.uplink = self.internet.place(self.name, behind)
        self._error_source = ErrorSource(self.uplink.ip)
        self.uplink.connect(self._receive)
        for port in self.ports.values():
            port.move()

    def send_packet(self, packet: Packet, ttl: int = DEFAULT_TTL) -> None:
        """Send a packet of any protocol as it is; it passes `ttl` - 1 routers at most.

        Raises:
            ConfigurationError: Its source is not an address of the host.
        """
        if packet.source.ip not in self.addresses:
            raise ConfigurationError(
                f"{self.name} cannot send from {packet.source.ip}; it has "
                f"{' and '.join(self.addresses)}"
            )
        self.internet.counters.sent_count += 1
        if (":" in packet.source.ip) != (":" in packet.destination.ip):
            self.internet.drop_unroutable(packet, self.name)
            return
        if self.internet.world.trace is not None:
            self.internet.world.trace(self.internet.world.now, "sent", self.name, packet)
        self.uplink.send_up(packet, ttl)

    def open_port(self, port: int = 0, ip: str | None = None) -> SimPort:
        """Open a UDP port.

        Args:
            port: 0 draws a free ephemeral one.
            ip: Which of its addresses; by default `self.ip`.

        Raises:
            ConfigurationError: The port is taken, or all ephemeral ones are; or the address is not
                the host's.
        """
        if ip is None:
            ip = self.ip
        elif ip not in self.addresses:
            raise ConfigurationError(f"{ip} is not an address of {self.name}")
        ports = self.ports6 if ":" in ip else self.ports
        if port == 0:
            port = self._free_port(ports)
        elif port in ports:
            raise ConfigurationError(f"port {port} of {ip} is taken")
        elif not 1 <= port <= 65_535:
            raise ConfigurationError(f"{port} is not a UDP port")
        ports[port] = opened = (SimPort6 if ":" in ip else SimPort)(self, Endpoint(ip, port), ports)
        return opened

    def _free_port(self, ports: dict[int, SimPort]) -> int:
        # From a random start to the first free one, as Linux searches.
        low, high = EPHEMERAL_PORTS
        count = high - low + 1
        start = self._rng.randrange(count)
        for step in range(count):
            port = low + (start + step) % count
            if port not in ports:
                return port
        raise ConfigurationError(f"all ephemeral ports of {self.ip} are taken")

    def _receive(self, packet: Packet, ttl: int) -> None:
        internet = self.internet
        if self._on_packet is not None:
            self._count(packet, is_taken=True)
            self._on_packet(packet, ttl)
            return
        if packet.protocol != UDP:
            self._receive_other(packet)
            return
        port = self.ports.get(packet.destination.port)
        if self._has_ipv6 and ":" in packet.destination.ip:
            if ":" not in packet.source.ip:
                internet.drop_unroutable(packet, self.name)
                return
            port = self.ports6.get(packet.destination.port)
        if port is None:
            self._refuse(packet)
            return
        internet.counters.delivered_count += 1
        if internet.world.trace is not None:
            internet.world.trace(internet.world.now, "received", self.name, packet)
        if port.on_datagram is not None:
            port.on_datagram(packet.data, packet.source)

    def _receive_other(self, packet: Packet) -> None:
        """Take an ICMP error to the port it concerns; a host has nothing but UDP ports."""
        about = packet.about
        if about is None:
            self._refuse(packet)
            return
        port = self.ports.get(about.source.port) if about.protocol == UDP else None
        listener = None if port is None else port.on_error
        self._count(packet, is_taken=listener is not None)
        if listener is not None:
            listener(packet)

    def _refuse(self, packet: Packet) -> None:
        self._count(packet, is_taken=False)
        if packet.protocol != ICMP:
            error = self.internet.error(self._error_source, packet, PORT_UNREACHABLE, self.name)
            if error is not None:
                self.uplink.send_up(error, DEFAULT_TTL)

    def _count(self, packet: Packet, *, is_taken: bool) -> None:
        internet = self.internet
        if is_taken:
            internet.counters.delivered_count += 1
        else:
            internet.counters.dropped_closed += 1
        if internet.world.trace is not None:
            event = "received" if is_taken else "closed"
            internet.world.trace(internet.world.now, event, self.name, packet)


class SimPort:
    """One open UDP port of a virtual host.

    Attributes:
        endpoint: Its address in its own realm.
        on_datagram: Called with (data, source) for each datagram, inside an event: it may send and
            schedule, not run the world.
    """

    def __init__(self, host: Host, endpoint: Endpoint, ports: dict[int, SimPort]) -> None:
        self.endpoint = endpoint
        self.on_datagram: Callable[[bytes, Endpoint], None] | None = None
        self._on_error: Callable[[Packet], None] | None = None
        self._host = host
        self._ports = ports
        self._world = host.internet.world
        self._counters = host.internet.counters
        self._send_up = host.uplink.send_up

    @property
    def on_error(self) -> Callable[[Packet], None] | None:
        """Called with each ICMP error about a datagram of this port, inside an event."""
        return self._on_error

    @on_error.setter
    def on_error(self, take: Callable[[Packet], None] | None) -> None:
        self._on_error = take
        self._host.internet.has_error_listeners = True

    def send(self, data: bytes, destination: Endpoint, ttl: int = DEFAULT_TTL) -> None:
        """Send a datagram at the world's present time; it passes `ttl` - 1 routers at most."""
        packet = make_packet(Packet, (self.endpoint, destination, data, UDP, None))
        self._counters.sent_count += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "sent", self._host.name, packet)
        self._send_up(packet, ttl)

    def move(self) -> None:
        """Take the host's present address and link."""
        self.endpoint = Endpoint(self._host.ip, self.endpoint.port)
        self._send_up = self._host.uplink.send_up

    def close(self) -> None:
        """Stop receiving; idempotent. The number may be opened again at once."""
        if self._ports.get(self.endpoint.port) is self:
            del self._ports[self.endpoint.port]


class SimPort6(SimPort):
    """One open UDP port of a host's IPv6 address."""

    def send(self, data: bytes, destination: Endpoint, ttl: int = DEFAULT_TTL) -> None:
        """As `SimPort.send`; an IPv4 destination has no route from here."""
        if ":" in destination.ip:
            super().send(data, destination, ttl)
            return
        self._counters.sent_count += 1
        packet = Packet(self.endpoint, destination, data)
        self._host.internet.drop_unroutable(packet, self._host.name)
