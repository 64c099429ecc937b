"""Endpoints: an IP address and a UDP port, and what kind of address it is.

Source: RFC 1918 and RFC 4193 (private), RFC 6598 (100.64.0.0/10, shared by carriers), RFC 3986 for
the bracketed text form. Knows no names: this system has no DNS, so text that is not a literal
address is an error.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from natswarm.errors import AddressError, DecodeError

__all__ = ["ENDPOINT_BYTES", "AddressKind", "Endpoint", "address_kind"]

SHARED_NETWORK = ipaddress.ip_network("100.64.0.0/10")
# The blocks for documentation (RFC 5737) and benchmarking (RFC 2544) count as global: the virtual
# internet and the namespace lab live in them, and the real internet never routes them.
STAND_IN_NETWORKS = tuple(
    ipaddress.ip_network(text) for text in ("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24")
)

# On the wire every endpoint is an IPv6 address (IPv4 mapped into ::ffff:0:0/96) and a port, so that
# datagrams of one kind have one size whatever the address family.
ENDPOINT_BYTES = 16 + 2


class AddressKind(enum.Enum):
    """Where an address means something."""

    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    PRIVATE = "private"
    """RFC 1918 or RFC 4193: a home, an office, or a carrier that ran out of 100.64/10."""
    SHARED = "shared"
    """RFC 6598, 100.64.0.0/10: between a subscriber and a carrier-grade NAT."""
    GLOBAL = "global"
    UNUSABLE = "unusable"
    """Unspecified, multicast, broadcast, reserved: never a peer."""


@lru_cache(maxsize=4096)
def _parsed(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(ip)


@lru_cache(maxsize=4096)
def address_kind(ip: str) -> AddressKind:
    """Return the kind of a literal IPv4 or IPv6 address.

    Raises:
        AddressError: `ip` is not a literal address.
    """
    try:
        address = _parsed(ip)
    except ValueError as error:
        raise AddressError(f"{ip!r} is not an IP address (names are not looked up)") from error
    if address.is_loopback:
        return AddressKind.LOOPBACK
    if address.is_link_local:
        return AddressKind.LINK_LOCAL
    if address.is_multicast or address.is_unspecified:
        return AddressKind.UNUSABLE
    if address.version == 4 and address in SHARED_NETWORK:
        return AddressKind.SHARED
    if any(address in network for network in STAND_IN_NETWORKS):
        return AddressKind.GLOBAL
    if address.is_reserved:
        return AddressKind.UNUSABLE
    if address.is_private:
        return AddressKind.PRIVATE
    return AddressKind.GLOBAL


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One end of a UDP path.

    Attributes:
        ip: Literal IPv4 or IPv6 address, in the shortest text form.
        port: UDP port, 0..65535; 0 only where "any port" is meant (binding).
    """

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"

    @property
    def kind(self) -> AddressKind:
        """Where the address means something."""
        return address_kind(self.ip)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read `192.0.2.1:4000` or `[2001:db8::1]:4000`.

        Raises:
            AddressError: Not a literal address and a port in 1..65535.
        """
        ip, separator, port_text = text.strip().rpartition(":")
        if ip.startswith("[") and ip.endswith("]"):
            ip = ip[1:-1]
        elif ":" in ip:
            raise AddressError(
                f"{text!r}: write an IPv6 endpoint with brackets, [2001:db8::1]:4000"
            )
        if not separator or not port_text.isascii() or not port_text.isdigit():
            raise AddressError(f"{text!r} is not an endpoint; write ADDRESS:PORT, 192.0.2.1:4000")
        port = int(port_text)
        if not 1 <= port <= 65_535:
            raise AddressError(f"{text!r}: a UDP port is a number from 1 to 65535")
        try:
            return cls(str(_parsed(ip)), port)
        except ValueError as error:
            raise AddressError(
                f"{ip!r} is not an IP address; names are not looked up, since natswarm uses no DNS"
            ) from error

    def to_bytes(self) -> bytes:
        """Return the 18 bytes of the wire form: IPv6 or IPv4-mapped address, port big-endian."""
        address = _parsed(self.ip)
        packed = (
            address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
        )
        return packed + self.port.to_bytes(2, "big")

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Endpoint:
        """Read the 18 bytes of the wire form.

        Raises:
            DecodeError: Not exactly 18 bytes.
        """
        if len(data) != ENDPOINT_BYTES:
            raise DecodeError(f"an endpoint has {ENDPOINT_BYTES} bytes, not {len(data)}")
        address = ipaddress.IPv6Address(data[:16])
        mapped = address.ipv4_mapped
        return cls(str(mapped if mapped is not None else address), int.from_bytes(data[16:], "big"))
