"""Captures in the classic pcap format: raw IP packets with times, for tcpdump and Wireshark.

Source: draft-ietf-opsawg-pcap (LINKTYPE_RAW, nanoseconds). Pure.
"""

from __future__ import annotations

import struct

__all__ = ["PCAP_RECORD_BYTES", "pcap_header", "pcap_record"]

_MAGIC_NANOSECONDS = 0xA1B2_3C4D
_VERSION = (2, 4)
_LINKTYPE_RAW = 101  # the packet begins with its IP header
_SNAP_BYTES = 65_535

_HEADER = struct.Struct("!IHHiIII")
_RECORD = struct.Struct("!IIII")  # the third: how many bytes of the packet follow
PCAP_RECORD_BYTES = _RECORD.size


def pcap_header() -> bytes:
    """Return what a capture begins with."""
    return _HEADER.pack(_MAGIC_NANOSECONDS, *_VERSION, 0, 0, _SNAP_BYTES, _LINKTYPE_RAW)


def pcap_record(packet: bytes, time_ns: int) -> bytes:
    """Return one IP packet as the next record, captured `time_ns` after 1970."""
    seconds, nanoseconds = divmod(time_ns, 10**9)
    size = min(len(packet), _SNAP_BYTES)
    return _RECORD.pack(seconds, nanoseconds, size, len(packet)) + packet[:size]
