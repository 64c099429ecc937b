"""Put IPv4 fragments together again, and take what is too long apart.

The virtual internet carries whole datagrams, as if every NAT in it reassembled before it translated
(RFC 4787 REQ-14). Lost with one fragment is the whole datagram.

Source: RFC 791 section 3.2, RFC 815 in spirit. Pure; time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from natswarm.errors import DecodeError
from natswarm.lab.ipv4 import HEADER_BYTES, MAX_PACKET_BYTES, checksum

__all__ = ["Reassembly", "is_fragment", "split_packet"]

# Linux: `ipfrag_time` 30 s. What is incomplete takes memory, so only so many at a time; the oldest
# goes first.
TIMEOUT_S = 30.0
INCOMPLETE_MAX = 64

_MORE = 0x2000
_OFFSET = 0x1FFF


def is_fragment(datagram: bytes) -> bool:
    """Return whether an IPv4 packet of at least 8 bytes is a part of another."""
    return bool((datagram[6] << 8 | datagram[7]) & (_MORE | _OFFSET))


@dataclass(slots=True)
class _Incomplete:
    started: float
    parts: dict[int, bytes] = field(default_factory=dict)  # offset in bytes -> data
    header: bytes = b""  # of the first fragment
    size: int | None = None  # known from the last fragment


class Reassembly:
    """What one device has sent of datagrams that are not complete yet."""

    def __init__(self) -> None:
        self._incomplete: dict[bytes, _Incomplete] = {}

    def add_untrusted(self, fragment: bytes, now: float) -> bytes | None:
        """Take in a fragment; return the whole datagram if it was the last one missing.

        Raises:
            DecodeError: It contradicts itself or others of its datagram, which is forgotten then.
        """
        header_bytes = 4 * (fragment[0] & 0x0F)
        total = int.from_bytes(fragment[2:4], "big")
        if not HEADER_BYTES <= header_bytes < total <= len(fragment):
            raise DecodeError("a fragment whose lengths contradict each other")
        flags = int.from_bytes(fragment[6:8], "big")
        offset, data = 8 * (flags & _OFFSET), fragment[header_bytes:total]
        # RFC 791: source, destination, protocol and identification tell a datagram from another.
        key = fragment[12:20] + fragment[9:10] + fragment[4:6]
        known = self._entry(key, now)
        end = offset + len(data)
        if flags & _MORE and len(data) % 8:
            raise DecodeError("a fragment that does not end on a multiple of 8 bytes")
        if header_bytes + end > MAX_PACKET_BYTES or (known.size is not None and end > known.size):
            del self._incomplete[key]
            raise DecodeError("fragments that are longer than their datagram")
        known.parts[offset] = data
        if offset == 0:
            known.header = fragment[:header_bytes]
        if not flags & _MORE:
            known.size = end
        if sum(map(len, known.parts.values())) != known.size or not known.header:
            return None
        del self._incomplete[key]
        return _joined(known)

    def _entry(self, key: bytes, now: float) -> _Incomplete:
        known = self._incomplete.get(key)
        if known is None or known.started + TIMEOUT_S <= now:
            self._incomplete.pop(key, None)
            if len(self._incomplete) >= INCOMPLETE_MAX:
                del self._incomplete[next(iter(self._incomplete))]
            known = self._incomplete[key] = _Incomplete(now)
        return known


def split_packet(packet: bytes, mtu: int, identification: int) -> list[bytes]:
    """Return a packet with a header of 20 bytes as fragments of at most `mtu` bytes each."""
    step = (mtu - HEADER_BYTES) // 8 * 8
    data = packet[HEADER_BYTES:]
    fragments = []
    for offset in range(0, len(data), step):
        part = data[offset : offset + step]
        more = _MORE if offset + step < len(data) else 0
        fragments.append(
            _with_header(packet[:HEADER_BYTES], part, identification, more | offset // 8)
        )
    return fragments


def _joined(known: _Incomplete) -> bytes:
    data = bytearray()
    for offset in sorted(known.parts):
        if offset != len(data):
            raise DecodeError("fragments that overlap")
        data += known.parts[offset]
    return _with_header(known.header, bytes(data), int.from_bytes(known.header[4:6], "big"), 0)


def _with_header(header: bytes, data: bytes, identification: int, flags: int) -> bytes:
    total = len(header) + len(data)
    head = b"".join(
        (
            header[:2],
            total.to_bytes(2, "big"),
            identification.to_bytes(2, "big"),
            flags.to_bytes(2, "big"),
            header[8:10],
            b"\0\0",
            header[12:],
        )
    )
    return b"".join((head[:10], checksum(head).to_bytes(2, "big"), head[12:], data))
