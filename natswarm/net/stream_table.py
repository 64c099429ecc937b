"""All streams of one QUIC connection, and the control stream that regulates them.

qh3 hands over stream data as it arrives and extends QUIC's own flow control in the same breath, so
a reader that stops would never stop the writer, and our memory would be the only bound. QUIC stream
0, the control stream, therefore carries credit of our own: nobody sends on a stream beyond the
offset that the other side's reader has allowed.

    control frame, 17 bytes, big-endian:  kind 1 | stream id 8 | value 8
        CREDIT 1   you may send on the stream up to absolute offset `value`
        STOP   2   what you send on the stream is no longer read; value is 0

QUIC's STOP_SENDING is not used, and quic.py does not accept it: qh3 answers it at once, by itself,
which would end streams that nobody accepted yet, and so lift the one bound on their number.

Source: RFC 9000 sections 2 to 4 (streams, flow control). Knows neither time, datagrams nor how the
peer was authenticated: quic.py feeds it.
"""

from __future__ import annotations

import contextlib
import enum
import struct
from collections import deque
from collections.abc import Callable

import trio
from qh3.quic.connection import QuicConnection, QuicConnectionError

from natswarm.identity import PeerId
from natswarm.net.stream import ProtocolViolation, Stream, encode_head

__all__ = ["CONTROL_STREAM_ID", "QUIC_REFUSALS", "StreamTable"]

# --- Specification: changing one of these changes the protocol ---

CONTROL_STREAM_ID = 0
CONTROL_FRAME = struct.Struct(">BQQ")

# --- Implementation ---

# qh3 lets a peer have 100 unfinished streams of its own; control frames can name more.
MAX_UNACCEPTED_STREAMS = 128
# Nobody reads it (RFC 9000 section 20.2: error codes are the application's).
RESET_CODE = 0
# How qh3 says that a connection or a stream has ended: the first for connections, plain ValueError
# for streams.
QUIC_REFUSALS = (QuicConnectionError, ValueError)


class ControlKind(enum.IntEnum):
    """What a control frame says."""

    CREDIT = 1
    STOP = 2


class StreamTable:
    """All streams of one connection, and the control stream that regulates them.

    Args:
        peer_id: Whom the streams are with.
        is_client: Whether this side is the QUIC client; decides which stream ids are ours.
        window_bytes: How far a stream's sender may be ahead of its reader here.
        wake: Called when there is something for QUIC to send.
    """

    def __init__(
        self, peer_id: PeerId, *, is_client: bool, window_bytes: int, wake: Callable[[], None]
    ) -> None:
        self.peer_id = peer_id
        self.window_bytes = window_bytes
        # Set once TLS is done: then the engine lasts, and QUIC can deliver stream data.
        self.engine: QuicConnection | None = None
        self.waiting_senders: dict[int, Stream] = {}
        self._wake = wake
        self._is_open = False
        self._streams: dict[int, Stream] = {}
        self._peer_initiator_bit = 1 if is_client else 0
        self._next_peer_id = 1 if is_client else CONTROL_STREAM_ID + 4
        self._arrived: deque[Stream] = deque()
        self._arrival = trio.lowlevel.ParkingLot()
        self._unaccepted_count = 0
        self._free_slot = trio.lowlevel.ParkingLot()
        self._control = bytearray()
        self._end_error: Callable[[], Exception] | None = None

    @property
    def count(self) -> int:
        """Streams that are not over yet."""
        return len(self._streams)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that arrived and were not read, over all streams."""
        return sum(len(stream._buffer) for stream in self._streams.values())

    def _engine(self) -> QuicConnection:
        assert self.engine is not None, "no stream exists before the handshake has an engine"
        return self.engine

    # --- opening and accepting ---

    def start(self) -> None:
        """Let streams be opened and accepted: both ends have proved who they are."""
        self._is_open = True
        self._arrival.unpark_all()

    async def open(self, protocol: str) -> Stream:
        """Open a stream as soon as the peer allows one more; cancelled, none was opened."""
        head = encode_head(protocol)
        await trio.lowlevel.checkpoint()
        while True:
            self.raise_if_ended()
            if self._free_slot_count() > 0:
                break
            await self._free_slot.park()
        stream_id = self._engine().get_next_available_stream_id()
        stream = Stream(self, stream_id, protocol)
        self._streams[stream_id] = stream
        stream._write(head)
        return stream

    def _free_slot_count(self) -> int:
        if not self._is_open:
            return 0
        engine = self._engine()
        return engine.max_concurrent_bidi_streams - engine.get_next_available_stream_id() // 4

    async def accept(self) -> Stream:
        """Wait for a stream that the peer opened; cancelled, none is lost."""
        await trio.lowlevel.checkpoint()
        while not (self._arrived and self._is_open):
            self.raise_if_ended()
            await self._arrival.park()
        stream = self._arrived.popleft()
        self._unaccepted_count -= 1
        stream._on_accepted()
        return stream

    # --- what QUIC delivers ---

    def on_stream_data(self, stream_id: int, data: bytes, *, is_end: bool) -> None:
        """Take stream data that QUIC delivered; anything but the control stream.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        stream = self._find(stream_id)
        if stream is None:
            return
        has_head = stream._protocol is not None
        stream._on_data(data, is_end=is_end)
        if not has_head and stream._take_head():
            self._arrived.append(stream)
            self._arrival.unpark()
        self.forget_if_over(stream)

    def on_stream_reset(self, stream_id: int) -> None:
        """Take note that the peer gave a stream up.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        if stream_id == CONTROL_STREAM_ID:
            raise ProtocolViolation("the control stream was reset")
        stream = self._find(stream_id)
        if stream is None:
            return
        stream._on_reset()
        if stream._protocol is None:
            # Opened and given up before its head was sent: nobody here will ever hear of it.
            self._unaccepted_count -= 1
            self.end_sending(stream_id, is_clean=False)
            del self._streams[stream_id]
        self.forget_if_over(stream)

    def on_control_data(self, data: bytes) -> None:
        """Take bytes of the control stream, beginning with the first frame's.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        self._control += data
        whole = len(self._control) // CONTROL_FRAME.size * CONTROL_FRAME.size
        for kind, stream_id, value in CONTROL_FRAME.iter_unpack(bytes(self._control[:whole])):
            stream = self._find(stream_id)
            if kind == ControlKind.CREDIT:
                if stream is not None:
                    stream._on_credit(value)
            elif kind == ControlKind.STOP:
                if stream is not None:
                    stream._on_stop()
            else:
                raise ProtocolViolation(f"unknown control frame {kind}")
        del self._control[:whole]

    def _find(self, stream_id: int) -> Stream | None:
        """Return a stream, None if it is over; the peer's come into being when first named.

        Frames overtake each other when packets are lost: credit for a stream may be here before the
        stream. As in RFC 9000 section 2.1, naming a stream opens all lower ones of its kind.
        """
        if stream_id & 0b10 or stream_id == CONTROL_STREAM_ID:
            raise ProtocolViolation(f"there can be no stream {stream_id}")
        if stream_id & 1 != self._peer_initiator_bit:
            if stream_id >= self._engine().get_next_available_stream_id():
                raise ProtocolViolation(f"stream {stream_id} was never opened")
            return self._streams.get(stream_id)
        while self._next_peer_id <= stream_id:
            if self._unaccepted_count >= MAX_UNACCEPTED_STREAMS:
                raise ProtocolViolation("too many streams at once")
            self._streams[self._next_peer_id] = Stream(self, self._next_peer_id, None)
            self._unaccepted_count += 1
            self._next_peer_id += 4
        return self._streams.get(stream_id)

    def on_progress(self) -> None:
        """Wake who waits for room to send or for a stream to open, after QUIC sent or received."""
        for stream in list(self.waiting_senders.values()):
            stream._on_flushed()
        if self._free_slot and (free_count := self._free_slot_count()) > 0:
            self._free_slot.unpark(count=free_count)

    # --- what streams do to QUIC ---

    def write(self, stream_id: int, data: bytes | memoryview, *, is_end: bool) -> None:
        """Queue stream data; never waits.

        Raises:
            trio.BrokenResourceError: QUIC takes no more data on the stream.
        """
        try:
            self._engine().send_stream_data(stream_id, data, end_stream=is_end)
        except QUIC_REFUSALS as error:
            self.raise_if_ended()
            raise trio.BrokenResourceError(str(error)) from error
        self._wake()

    def end_sending(self, stream_id: int, *, is_clean: bool) -> None:
        """Send the end of a stream after its data, or else reset it; once is enough."""
        # QUIC refuses where the stream or the connection is over, which was the aim.
        with contextlib.suppress(*QUIC_REFUSALS):
            if is_clean:
                self._engine().send_stream_data(stream_id, b"", end_stream=True)
            else:
                self._engine().reset_stream(stream_id, RESET_CODE)
        self._wake()

    def give_credit(self, stream_id: int, limit: int) -> None:
        """Let the peer send on a stream up to absolute offset `limit`."""
        self._send_control(ControlKind.CREDIT, stream_id, limit)

    def stop(self, stream_id: int) -> None:
        """Tell the peer that nobody reads a stream any more."""
        self._send_control(ControlKind.STOP, stream_id, 0)

    def _send_control(self, kind: ControlKind, stream_id: int, value: int) -> None:
        # What queues up is bounded: a stream is stopped once, and each credit needs most of what
        # the one before allowed to have arrived.
        frame = CONTROL_FRAME.pack(kind, stream_id, value)
        with contextlib.suppress(*QUIC_REFUSALS):  # the connection is over
            self._engine().send_stream_data(CONTROL_STREAM_ID, frame)
        self._wake()

    def unsent_bytes(self, stream_id: int) -> int:
        """Return how many bytes of a stream QUIC has not sent for the first time."""
        return self._engine().get_send_buffer_size(stream_id)

    def forget_if_over(self, stream: Stream) -> None:
        """Drop a stream that neither side will speak of again."""
        if stream._is_over:
            self._streams.pop(stream.id, None)

    # --- the end ---

    def end(self, error: Callable[[], Exception]) -> None:
        """End all streams: they raise what `error` makes. Only the first call counts."""
        if self._end_error is not None:
            return
        self._end_error = error
        for stream in self._streams.values():
            stream._on_connection_ended()
        self._arrival.unpark_all()
        self._free_slot.unpark_all()

    def raise_if_ended(self) -> None:
        """Raise a new exception that tells how the connection ended, if it did."""
        if self._end_error is not None:
            raise self._end_error()
