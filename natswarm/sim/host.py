"""A virtual host and its UDP ports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.sim.attachment import Attachment
from natswarm.sim.packet import Packet

if TYPE_CHECKING:
    from natswarm.sim.router import NatRouter
    from natswarm.sim.topology import Internet

__all__ = ["DEFAULT_TTL", "EPHEMERAL_PORTS", "Host", "SimPort"]

DEFAULT_TTL = 64  # Linux; RFC 1700

EPHEMERAL_PORTS = (32_768, 60_999)  # Linux `ip_local_port_range`


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
