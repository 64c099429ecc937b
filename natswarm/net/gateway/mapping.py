"""What a port mapping at the gateway is, and whom we ask for one.

Types only, and the one seam to the operating system (`Reach`) that the drivers next door share.
"""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import ConfigurationError, GatewayError
from natswarm.nat.portmap import GATEWAY_CONTROL_PORT
from natswarm.net.interfaces import AddressSpace, Interface
from natswarm.net.port import DatagramPort, Network
from natswarm.net.udp import UdpNetwork

__all__ = [
    "Gateway",
    "GatewayReport",
    "GatewayService",
    "MappingProtocol",
    "PortMapping",
    "Reach",
    "ServiceReport",
]

SSDP_PORT = 1900


class MappingProtocol(enum.Enum):
    """How a gateway is asked, the best first: PCP says the most and takes the fewest packets."""

    PCP = "PCP"
    NAT_PMP = "NAT-PMP"
    UPNP_IGD = "UPnP-IGD"


@dataclass(frozen=True, slots=True)
class Gateway:
    """The next hop of our default route, and our address as it sees it.

    Attributes:
        ip: Its address on our link; a link-local IPv6 address with its scope, `fe80::1%eth0`.
        local_ip: Our address on that link, of the same family.
        control_port: UDP port of PCP and NAT-PMP.
        ssdp_port: UDP port at which UPnP devices are searched.
    """

    ip: str
    local_ip: str
    control_port: int = GATEWAY_CONTROL_PORT
    ssdp_port: int = SSDP_PORT

    def __post_init__(self) -> None:
        for ip in (self.ip, self.local_ip):
            if address_kind(ip) is AddressKind.UNUSABLE:
                raise ConfigurationError(f"{ip} is no address of a gateway or a host behind it")
        if self.is_ipv6 != (":" in self.local_ip):
            raise ConfigurationError(
                f"{self.local_ip} and the gateway {self.ip} are of different address families"
            )

    @property
    def is_ipv6(self) -> bool:
        """Whether we speak IPv6 with it: then there is a firewall to open, not a NAT."""
        return ":" in self.ip

    @classmethod
    def of(cls, interface: Interface, *, is_ipv6: bool = False) -> Gateway:
        """Return the gateway of an interface.

        Raises:
            ConfigurationError: It has none, or no address of ours to ask from; says so.
        """
        ip = interface.gateway_ipv6 if is_ipv6 else interface.gateway_ipv4
        family = "IPv6" if is_ipv6 else "IPv4"
        if ip is None:
            raise ConfigurationError(
                f"interface {interface.name} has no {family} gateway: nobody to ask for a mapping"
            )
        local_ip = interface.source_address_for(ip)
        if is_ipv6:
            # The gateway opens the address it is asked from, so ask from the one peers know.
            spaces = {address.space: address.ip for address in reversed(interface.addresses)}
            local_ip = spaces.get(AddressSpace.GLOBAL_IPV6, local_ip)
            if address_kind(ip) is AddressKind.LINK_LOCAL:
                ip = f"{ip}%{interface.name}"
        if local_ip is None:
            raise ConfigurationError(f"interface {interface.name} has no {family} address")
        return cls(ip, local_ip)


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A mapping the gateway granted: what arrives at `external` it hands to `internal`.

    Attributes:
        protocol: In which it was asked.
        internal: Our own endpoint.
        external: The endpoint at the gateway; with IPv6, `internal` itself, now open.
        lease_s: How long it lasts without renewal; None means for ever, as only UPnP has it.
    """

    protocol: MappingProtocol
    internal: Endpoint
    external: Endpoint
    lease_s: int | None

    @property
    def is_public(self) -> bool:
        """Whether anybody can reach it; else there is another NAT beyond the gateway."""
        return self.external.kind is AddressKind.GLOBAL

    def __str__(self) -> str:
        lease = "no end" if self.lease_s is None else f"{self.lease_s} s"
        return f"{self.external} -> {self.internal} ({self.protocol.value}, lease {lease})"


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What one protocol came to, without making a mapping.

    Attributes:
        protocol: Which.
        is_available: Whether the gateway answered in it.
        detail: What it said, or why we think that it does not speak it.
        external_ip: What it calls its external address; None where it did not say.
    """

    protocol: MappingProtocol
    is_available: bool
    detail: str
    external_ip: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """Which mapping services a gateway has; one entry for each protocol asked, best first."""

    gateway: Gateway
    services: tuple[ServiceReport, ...]


class GatewayService(Protocol):
    """One protocol towards one gateway. Every wait ends by itself, in a `GatewayError` at worst."""

    @property
    def protocol(self) -> MappingProtocol:
        """Which protocol."""
        ...

    async def probe(self) -> ServiceReport:
        """Find out whether the gateway speaks it, changing nothing there.

        Raises:
            GatewayError: It does not; says how that shows.
        """
        ...

    async def map(self, external_port: int, lease_s: int) -> PortMapping:
        """Make the mapping of our internal port, or renew it. After `probe`.

        Args:
            external_port: Wanted; the gateway may give another. 0 leaves it to the gateway.
            lease_s: Wanted, at least 1; the gateway may give more or less.

        Raises:
            GatewayError: Refused, or no answer.
        """
        ...

    async def unmap(self, mapping: PortMapping | None) -> None:
        """Delete the mapping; None where one was asked for and the answer did not come.

        Raises:
            GatewayError: Not confirmed; it ends with its lease.
        """
        ...

    async def still_holds(self, mapping: PortMapping) -> bool:
        """Whether the mapping is as far as the gateway tells still there, unchanged.

        Raises:
            GatewayError: No answer.
        """
        ...


Connect = Callable[[str, Endpoint], Awaitable[trio.abc.Stream]]


async def connect_tcp(local_ip: str, remote: Endpoint) -> trio.SocketStream:
    """Connect to a literal address from one of ours.

    Raises:
        OSError: Refused, unreachable, or `local_ip` is not ours.
    """
    family = trio.socket.AF_INET6 if ":" in remote.ip else trio.socket.AF_INET
    sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        await sock.bind((local_ip, 0))
        await sock.connect((remote.ip, remote.port))
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


@dataclass(frozen=True)
class Reach:
    """How the drivers reach the gateway, and chance: other ones in tests.

    Attributes:
        network: Where UDP ports come from.
        connect: Opens a TCP connection from one of our addresses.
        rng: Jitter and random external ports.
        entropy: Bytes nobody can guess, for nonces.
    """

    network: Network = field(default_factory=UdpNetwork)
    connect: Connect = connect_tcp
    rng: random.Random = field(default_factory=random.Random)
    entropy: Callable[[int], bytes] = os.urandom

    def bind(self, gateway: Gateway) -> DatagramPort:
        """Bind a UDP port on our address towards the gateway.

        Raises:
            GatewayError: The address is no longer ours; says so.
        """
        try:
            return self.network.bind(Endpoint(gateway.local_ip, 0))
        except ConfigurationError as error:
            raise GatewayError(str(error)) from error


def check_external_ip(ip: str) -> str:
    """Return what a gateway calls its external address, if it can be one.

    Raises:
        GatewayError: It cannot: the gateway has no connection, or tells tales.
    """
    if address_kind(ip) in (AddressKind.UNUSABLE, AddressKind.LOOPBACK, AddressKind.LINK_LOCAL):
        raise GatewayError(f"it calls {ip} its external address: it seems to have no connection")
    return ip
