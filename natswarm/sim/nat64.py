"""IPv4 addresses inside IPv6 ones, and the translators at both ends: NAT64 and CLAT.

Many mobile networks give phones IPv6 alone. A NAT64 in the network reaches IPv4 hosts for them: it
takes the packets to 64:ff9b::/96, finds the IPv4 address in the last 32 bits, and maps the rest as
any NAT does (`natswarm/sim/nat.py`, which minds only endpoints; RFC 6146). Programs that know an
IPv4 literal alone, as peers behind IPv4 NATs are known, need a second, stateless translator on the
host, the CLAT: together they are 464XLAT (RFC 6877).

Source: RFC 6052 (prefix), RFC 6146, RFC 6877, RFC 7335 (the host's IPv4 address), RFC 7915 (each
translator is a hop). Simplified: a host and its CLAT have an IPv6 address each, as Android's do,
and count as two subscribers of the NAT64.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from natswarm.address import Endpoint
from natswarm.sim.packet import Packet

__all__ = ["CLAT_IP", "Clat", "embed", "extract", "is_embedded"]

NAT64_PREFIX = int(ipaddress.IPv6Address("64:ff9b::"))
NAT64_TEXT = "64:ff9b::"  # what all its addresses start with, in their shortest text

# RFC 7335 sets 192.0.0.0/29 aside for this; .4 is what Android's clatd takes.
CLAT_IP = "192.0.0.4"


@lru_cache(maxsize=4096)
def embed(ip: str) -> str:
    """Return the IPv6 address that stands for an IPv4 address behind a NAT64."""
    return str(ipaddress.IPv6Address(NAT64_PREFIX + int(ipaddress.IPv4Address(ip))))


@lru_cache(maxsize=4096)
def extract(ip6: str) -> str:
    """Return the IPv4 address that `ip6` stands for.

    Raises:
        ValueError: It is not inside 64:ff9b::/96.
    """
    number = int(ipaddress.IPv6Address(ip6)) - NAT64_PREFIX
    if not 0 <= number < 2**32:
        raise ValueError(f"{ip6} is not an IPv4 address behind a NAT64")
    return str(ipaddress.IPv4Address(number))


@lru_cache(maxsize=4096)
def is_embedded(ip: str) -> bool:
    """Return whether an address, in its shortest text, is inside 64:ff9b::/96."""
    return ip.startswith(NAT64_TEXT) and 0 <= int(ipaddress.IPv6Address(ip)) - NAT64_PREFIX < 2**32


class Clat:
    """The host's side of 464XLAT: IPv4 packets become IPv6 ones and back; no state, ports stay.

    Attributes:
        ip6: The IPv6 address that stands for the host's IPv4 address.
    """

    def __init__(self, ip6: str) -> None:
        self.ip6 = ip6

    def outbound(self, packet: Packet) -> Packet:
        """Translate an IPv4 packet of the host."""
        source, destination, data, protocol, about = packet
        return Packet(
            Endpoint(self.ip6, source.port),
            Endpoint(embed(destination.ip), destination.port),
            data,
            protocol,
            about,
        )

    def inbound(self, packet: Packet) -> Packet:
        """Translate an IPv6 packet to `ip6`.

        Raises:
            ValueError: It does not come from behind a NAT64.
        """
        source, destination, data, protocol, about = packet
        return Packet(
            Endpoint(extract(source.ip), source.port),
            Endpoint(CLAT_IP, destination.port),
            data,
            protocol,
            about,
        )
