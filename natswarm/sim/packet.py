"""What travels in the virtual internet: the packets of three protocols, with their two addresses.

UDP, and besides it what programs and path tracers need: TCP, ICMP queries and ICMP errors. Only
what NATs look at stands apart; the rest is bytes:

    UDP         data is the payload
    TCP         data is the segment after its two ports: sequence number, and so on. Checksums are
                not kept: whoever writes a packet to a device works them out
    ICMP query  the identifier is the port of whoever asks, the port of the other is 0 (RFC 5508);
                data is type, code, then sequence number and payload
    ICMP error  `about` is the packet it is about, as it looks in the realm where the error is now;
                data is type and code; the source, with port 0, is the router that says so, the
                destination the source of the packet it is about

The hop limit travels beside it, not in it: routers change it at every hop, and an integer argument
is cheaper than a new packet.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from natswarm.address import Endpoint

__all__ = [
    "DEFAULT_TTL",
    "HOST_UNREACHABLE",
    "ICMP",
    "PORT_UNREACHABLE",
    "TCP",
    "TIME_EXCEEDED",
    "UDP",
    "Packet",
    "make_packet",
]

# IANA protocol numbers.
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17

# Type and code of the errors that routers and hosts here make (RFC 792).
HOST_UNREACHABLE: Final = b"\x03\x01"
PORT_UNREACHABLE: Final = b"\x03\x03"
TIME_EXCEEDED: Final = b"\x0b\x00"

DEFAULT_TTL: Final = 64  # Linux; RFC 1700


class Packet(NamedTuple):
    """A packet on its way.

    Attributes:
        source: Who sent it; see the module for what a port is in ICMP.
        destination: Who shall get it.
        data: What it carries.
        protocol: IANA number: 17 UDP, 6 TCP, 1 ICMP.
        about: Of an ICMP error, and only of one, the packet it is about.
    """

    source: Endpoint
    destination: Endpoint
    data: bytes
    protocol: int = UDP
    about: Packet | None = None

    def __str__(self) -> str:
        way = f"{self.source} > {self.destination}"
        if self.about is not None:
            return f"{way} ICMP {'/'.join(map(str, self.data))} about ({self.about})"
        digest = hashlib.blake2b(self.data, digest_size=3).hexdigest()
        return f"{way}{_PREFIXES.get(self.protocol, '')} {len(self.data)} B #{digest}"


_PREFIXES = {TCP: " TCP", ICMP: " ICMP"}

# make_packet(Packet, (source, destination, data, protocol, about)): as `Packet(...)`, which is a
# function in Python around this; what every datagram passes takes this, and is 3 % faster for it.
make_packet: Final = tuple.__new__
