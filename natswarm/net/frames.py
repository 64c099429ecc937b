"""The frames that carry many streams over the QUIC streams of a few lanes.

    frame: kind 1 | stream id 8 | position 8 | value 4, big-endian; then the payload of OPEN, DATA
        OPEN    1  a new stream; payload of `value` bytes is the name of its protocol
        DATA    2  payload of `value` bytes, 1..65,536, which belongs at `position` of the stream
        CREDIT  3  I read: you may send up to `position` of the stream
        END     4  the stream's data in this direction are complete, and end at `position`
        ABORT   5  they are not, and never will be; `value` 1: nobody here speaks the protocol
        STOP    6  I read no more of the stream
        LANE    7  from the QUIC client: a lane begins, whose first packets are for the connection
                   id that stands where other frames have the stream id
        WANTED  8  from the QUIC server: please open `value` lanes in all

Lanes other than the first carry only DATA, and only of streams that have had credit: so the stream
is known there, whichever lane is faster. Data of a stream may arrive in any order.

Source: the design of yamux (HashiCorp), RFC 9113 section 5 (HTTP/2), RFC 9000 section 2.2 for
positions. Knows no streams: a `FrameSink` does.
"""

from __future__ import annotations

import enum
import struct
from typing import Protocol

__all__ = [
    "FRAME",
    "MAX_PAYLOAD_BYTES",
    "MAX_PROTOCOL_CHARACTERS",
    "QUIC_STREAM_ID",
    "UNKNOWN_PROTOCOL",
    "FrameKind",
    "FrameReader",
    "FrameSink",
    "ProtocolViolation",
]

QUIC_STREAM_ID = 0
FRAME = struct.Struct(">BQQI")
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_PROTOCOL_CHARACTERS = 64
UNKNOWN_PROTOCOL = 1


class ProtocolViolation(Exception):
    """The peer broke the rules; the connection must end. Never leaves natswarm.net."""


class FrameKind(enum.IntEnum):
    """What a frame says."""

    OPEN = 1
    DATA = 2
    CREDIT = 3
    END = 4
    ABORT = 5
    STOP = 6
    LANE = 7
    WANTED = 8


class FrameSink(Protocol):
    """Who takes frames; each method may raise `ProtocolViolation`."""

    def on_open(self, stream_id: int, name: bytes) -> None:
        """Take OPEN."""
        ...

    def on_data_announced(self, stream_id: int, position: int, count: int) -> None:
        """Take the head of DATA: before its payload comes, in portions."""
        ...

    def on_data(self, stream_id: int, position: int, data: memoryview) -> None:
        """Take a portion of the payload."""
        ...

    def on_note(self, kind: FrameKind, stream_id: int, position: int, value: int) -> None:
        """Take any other frame."""
        ...


class FrameReader:
    """Cuts the bytes of one lane into frames.

    Args:
        sink: Who takes them.
        is_first: Whether it is the first lane, on which all kinds may come.
    """

    def __init__(self, sink: FrameSink, *, is_first: bool) -> None:
        self._sink = sink
        self._is_first = is_first
        self._header = bytearray()
        self._name = bytearray()
        self._is_opening = False
        self._stream_id = 0
        self._position = 0
        self._payload_left = 0

    def receive(self, data: bytes) -> None:
        """Take bytes of the lane, in any portions.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        view = memoryview(data)
        while view:
            if self._payload_left:
                part = view[: self._payload_left]
                self._payload_left -= len(part)
                self._receive_payload(part)
            elif not self._header and len(view) >= FRAME.size:
                part = view[: FRAME.size]
                self._receive_header(part)
            else:
                part = view[: FRAME.size - len(self._header)]
                self._header += part
                if len(self._header) == FRAME.size:
                    header = bytes(self._header)
                    self._header.clear()
                    self._receive_header(header)
            view = view[len(part) :]

    def _receive_header(self, header: bytes | memoryview) -> None:
        kind, stream_id, position, value = FRAME.unpack(header)
        if kind == FrameKind.DATA:
            if not 1 <= value <= MAX_PAYLOAD_BYTES:
                raise ProtocolViolation(f"{value} bytes of data on stream {stream_id}")
            self._sink.on_data_announced(stream_id, position, value)
        elif not self._is_first:
            raise ProtocolViolation(f"a frame of kind {kind} on a lane for data")
        elif kind == FrameKind.OPEN:
            if not 1 <= value <= MAX_PROTOCOL_CHARACTERS:
                raise ProtocolViolation(f"a protocol with a name of {value} bytes")
        else:
            try:
                note = FrameKind(kind)
            except ValueError:
                raise ProtocolViolation(f"unknown kind of frame {kind}") from None
            self._sink.on_note(note, stream_id, position, value)
            return
        self._is_opening = kind == FrameKind.OPEN
        self._stream_id = stream_id
        self._position = position
        self._payload_left = value

    def _receive_payload(self, part: memoryview) -> None:
        if not self._is_opening:
            self._sink.on_data(self._stream_id, self._position, part)
            self._position += len(part)
            return
        self._name += part
        if not self._payload_left:
            name = bytes(self._name)
            self._name.clear()
            self._sink.on_open(self._stream_id, name)
