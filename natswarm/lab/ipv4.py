"""IPv4 as bytes, and back: what a TUN device carries and what the virtual internet's packets are.

The emulator's packet has endpoints and data, nothing of headers; here they are taken off and put
on again, with fresh checksums, as a NAT that rewrites endpoints must.

What the emulator's packet keeps of each protocol says `natswarm/sim/packet.py`; besides, the data
of an ICMP error that a device sent goes on with the 4 bytes behind its checksum, where an MTU may
be.

What is lost on the way: the identification, DSCP and ECN, and options. A packet from a device whose
checksum is wrong is refused, as every host would. Fragments: `natswarm/lab/fragments.py`.

Source: RFC 791, 768, 9293, 792, 1071. Pure: knows neither devices nor the world.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from struct import Struct

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.sim.packet import ICMP, TCP, UDP, Packet

__all__ = [
    "HEADER_BYTES",
    "MAX_PACKET_BYTES",
    "checksum",
    "decode_packet_untrusted",
    "encode_packet",
]

HEADER_BYTES = 20
MAX_PACKET_BYTES = 65_535
UDP_HEADER_BYTES = 8
TCP_HEADER_BYTES = 20
ICMP_HEADER_BYTES = 8

# ICMP types: pairs of a query and its reply (echo, timestamp), and errors that quote a packet.
QUERIES = frozenset({8, 13})
REPLIES = frozenset({0, 14})
ERRORS = frozenset({3, 11, 12})
# What an error quotes of the data of a packet. RFC 1812 section 4.3.2.3: at most 576 bytes in all.
QUOTED_BYTES = 128

DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS_AND_OFFSET = 0x3FFF

# version and header length, DSCP and ECN, total length, identification, flags and offset, TTL,
# protocol, checksum, source, destination
_HEADER = Struct("!BBHHHBBH4s4s")
_PORTS = Struct("!HH")
_UDP = Struct("!HHHH")

# One's complement arithmetic is arithmetic modulo this number (RFC 1071), and Python takes the
# remainder of bytes of any length in one step of C.
_MODULUS = 0xFFFF


def checksum(data: bytes, extra: int = 0) -> int:
    """Return the internet checksum of `data`, as it is put into a header; never 0.

    Args:
        data: With zeros where the checksum goes.
        extra: What else is summed up, such as a pseudo header.
    """
    return _MODULUS - (_sum(data) + extra) % _MODULUS


def decode_packet_untrusted(datagram: bytes) -> tuple[Packet, int]:
    """Read one whole IPv4 packet; return it and its hop limit.

    Raises:
        DecodeError: Not a whole and sound IPv4 packet of UDP, TCP or ICMP; says what it is.
    """
    if len(datagram) < HEADER_BYTES:
        raise DecodeError("too short for IPv4")
    version, _, total, _, offset, ttl, protocol, _, source_ip, destination_ip = _HEADER.unpack_from(
        datagram
    )
    header_bytes = 4 * (version & 0x0F)
    if version >> 4 != 4:
        raise DecodeError("not IPv4")
    if not HEADER_BYTES <= header_bytes <= total <= len(datagram):
        raise DecodeError("its lengths contradict each other")
    if offset & MORE_FRAGMENTS_AND_OFFSET:
        raise DecodeError("a fragment")
    if int.from_bytes(datagram[:header_bytes], "big") % _MODULUS:
        raise DecodeError("wrong checksum of the header")
    body = datagram[header_bytes:total]
    if protocol == UDP:
        return _decode_udp(source_ip, destination_ip, body), ttl
    if protocol == TCP:
        return _decode_tcp(source_ip, destination_ip, body), ttl
    if protocol == ICMP:
        return _decode_icmp(source_ip, destination_ip, body), ttl
    raise DecodeError("neither UDP, TCP nor ICMP")


def encode_packet(packet: Packet, ttl: int) -> bytes:
    """Return an IPv4 packet as a device gets it.

    Raises:
        ValueError: Longer than IPv4 allows, or not IPv4.
    """
    if packet.protocol == ICMP:
        return _encode_icmp(packet, ttl)
    source, destination, data = packet.source, packet.destination, packet.data
    source_ip, source_sum = _packed(source.ip)
    destination_ip, destination_sum = _packed(destination.ip)
    ports_sum = source.port + destination.port
    if packet.protocol == UDP:
        size = UDP_HEADER_BYTES + len(data)
        pseudo = source_sum + destination_sum + UDP + size + ports_sum + size
        head = _UDP.pack(source.port, destination.port, size, checksum(data, pseudo))
        return _header(size, ttl, UDP, source_ip, destination_ip) + head + data
    size = _PORTS.size + len(data)
    data = b"".join((data[:12], b"\0\0", data[14:]))
    pseudo = source_sum + destination_sum + TCP + size + ports_sum
    return b"".join(
        (
            _header(size, ttl, TCP, source_ip, destination_ip),
            _PORTS.pack(source.port, destination.port),
            data[:12],
            checksum(data, pseudo).to_bytes(2, "big"),
            data[14:],
        )
    )


def _header(size: int, ttl: int, protocol: int, source_ip: bytes, destination_ip: bytes) -> bytes:
    total = HEADER_BYTES + size
    if total > MAX_PACKET_BYTES:
        raise ValueError(f"an IPv4 packet has at most {MAX_PACKET_BYTES} bytes, not {total}")
    # Whoever hands out packets that were put together from fragments lets them be taken apart.
    flags = DONT_FRAGMENT if total <= 1500 else 0
    head = _HEADER.pack(0x45, 0, total, 0, flags, ttl, protocol, 0, source_ip, destination_ip)
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:]


def _decode_udp(source_ip: bytes, destination_ip: bytes, body: bytes) -> Packet:
    if len(body) < UDP_HEADER_BYTES:
        raise DecodeError("too short for UDP")
    source_port, destination_port, size, sent_checksum = _UDP.unpack_from(body)
    if not UDP_HEADER_BYTES <= size <= len(body):
        raise DecodeError("its lengths contradict each other")
    body = body[:size]
    pseudo = _pseudo_sum(source_ip, destination_ip, UDP, size)
    if sent_checksum and (pseudo + _sum(body)) % _MODULUS:
        raise DecodeError("wrong checksum of UDP")
    return Packet(
        _endpoint(source_ip, source_port),
        _endpoint(destination_ip, destination_port),
        body[UDP_HEADER_BYTES:],
    )


def _decode_tcp(source_ip: bytes, destination_ip: bytes, body: bytes) -> Packet:
    if len(body) < TCP_HEADER_BYTES:
        raise DecodeError("too short for TCP")
    pseudo = _pseudo_sum(source_ip, destination_ip, TCP, len(body))
    if (pseudo + _sum(body)) % _MODULUS:
        raise DecodeError("wrong checksum of TCP")
    source_port, destination_port = _PORTS.unpack_from(body)
    return Packet(
        _endpoint(source_ip, source_port),
        _endpoint(destination_ip, destination_port),
        body[_PORTS.size :],
        TCP,
    )


def _decode_icmp(source_ip: bytes, destination_ip: bytes, body: bytes) -> Packet:
    if len(body) < ICMP_HEADER_BYTES:
        raise DecodeError("too short for ICMP")
    if _sum(body) % _MODULUS:
        raise DecodeError("wrong checksum of ICMP")
    kind = body[0]
    if kind in QUERIES or kind in REPLIES:
        identifier = int.from_bytes(body[4:6], "big")
        return Packet(
            _endpoint(source_ip, identifier if kind in QUERIES else 0),
            _endpoint(destination_ip, identifier if kind in REPLIES else 0),
            body[:2] + body[6:],
            ICMP,
        )
    if kind in ERRORS:
        about = _decode_quoted(body[8:])
        destination = _endpoint(destination_ip, about.source.port)
        data = body[:2] + body[4:8]
        return Packet(_endpoint(source_ip, 0), destination, data, ICMP, about)
    raise DecodeError("ICMP that is neither a query, a reply nor an error")


def _decode_quoted(quoted: bytes) -> Packet:
    """Read what an error quotes: a header and at least 8 bytes after it (RFC 792)."""
    header_bytes = 4 * (quoted[0] & 0x0F) if quoted else 0
    if header_bytes < HEADER_BYTES or quoted[0] >> 4 != 4 or len(quoted) < header_bytes + 8:
        raise DecodeError("an ICMP error that quotes no packet")
    protocol, source_ip, destination_ip = quoted[9], quoted[12:16], quoted[16:20]
    body = quoted[header_bytes:]
    if protocol == ICMP:
        is_query = body[0] in QUERIES
        if not is_query and body[0] not in REPLIES:
            raise DecodeError("an ICMP error about ICMP that is no query")
        identifier = int.from_bytes(body[4:6], "big")
        source_port, destination_port = (identifier, 0) if is_query else (0, identifier)
        data = body[:2] + body[6:]
    elif protocol in (UDP, TCP):
        source_port, destination_port = _PORTS.unpack_from(body)
        data = body[UDP_HEADER_BYTES if protocol == UDP else _PORTS.size :]
    else:
        raise DecodeError("an ICMP error about neither UDP, TCP nor ICMP")
    return Packet(
        _endpoint(source_ip, source_port),
        _endpoint(destination_ip, destination_port),
        data,
        protocol,
    )


def _encode_icmp(packet: Packet, ttl: int) -> bytes:
    source_ip, _ = _packed(packet.source.ip)
    destination_ip, _ = _packed(packet.destination.ip)
    data = packet.data
    if packet.about is None:
        identifier = packet.source.port or packet.destination.port
        rest = identifier.to_bytes(2, "big") + data[2:]
    else:
        rest = data[2:6].ljust(4, b"\0") + _encode_quoted(packet.about)
    body = data[:2] + checksum(data[:2] + rest).to_bytes(2, "big") + rest
    return _header(len(body), ttl, ICMP, source_ip, destination_ip) + body


def _encode_quoted(about: Packet) -> bytes:
    """Return what an error quotes of a packet: its hop limit is 1, its data cut short."""
    short = about._replace(data=about.data[:QUOTED_BYTES])
    if about.protocol == TCP and len(about.data) < TCP_HEADER_BYTES - _PORTS.size:
        # Known from another error only, that quoted no more: nothing to put a checksum in.
        source_ip, destination_ip = _packed(short.source.ip)[0], _packed(short.destination.ip)[0]
        body = _PORTS.pack(short.source.port, short.destination.port) + short.data
        return _header(len(body), 1, TCP, source_ip, destination_ip) + body
    return encode_packet(short, 1)


def _sum(data: bytes) -> int:
    total = int.from_bytes(data, "big")
    return total << 8 if len(data) % 2 else total


def _pseudo_sum(source_ip: bytes, destination_ip: bytes, protocol: int, size: int) -> int:
    """Return the share of the pseudo header (RFC 768) in a checksum."""
    source, destination = int.from_bytes(source_ip, "big"), int.from_bytes(destination_ip, "big")
    return source + destination + protocol + size


@lru_cache(maxsize=65_536)
def _endpoint(ip: bytes, port: int) -> Endpoint:
    # Making one costs more than the rest of a packet; a puncture uses some thousands.
    return Endpoint(socket.inet_ntoa(ip), port)


@lru_cache(maxsize=4096)
def _packed(ip: str) -> tuple[bytes, int]:
    """Return an address as bytes and as its share of a checksum."""
    try:
        packed = socket.inet_aton(ip)
    except OSError as error:
        raise ValueError(f"{ip} is not an IPv4 address") from error
    return packed, int.from_bytes(packed, "big") % _MODULUS
