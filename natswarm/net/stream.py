"""The streams of one QUIC connection: Trio's stream interface, and the credit that keeps it honest.

qh3 hands over stream data as it arrives and extends QUIC's own flow control in the same breath, so
a reader that stops would never stop the writer, and our memory would be the only bound. QUIC stream
0, the control stream, therefore carries credit of our own: nobody sends on a stream beyond the
offset that the other side's reader has allowed.

    control frame, 17 bytes, big-endian:  kind 1 | stream id 8 | value 8
        CREDIT 1   you may send on the stream up to absolute offset `value`
        STOP   2   what you send on the stream is no longer read; value is 0
    head of every other stream, from the side that opened it:
        length 1 | name of the protocol, 1..64 ASCII characters

QUIC's STOP_SENDING is not used and not accepted: qh3 answers it at once, by itself, which would end
streams that nobody accepted yet and so lift the one bound on their number.

Source: RFC 9000 sections 2 to 4 (streams, flow control); trio.abc for what a stream promises.
Knows neither time, datagrams nor how the peer was authenticated: quic.py feeds it.
"""

from __future__ import annotations

import contextlib
import enum
import operator
import struct
from collections import deque
from collections.abc import Callable

import trio
from qh3.quic.connection import QuicConnection, QuicConnectionError

from natswarm.identity import PeerId

__all__ = ["CONTROL_STREAM_ID", "QUIC_REFUSALS", "ProtocolViolation", "Stream", "StreamTable"]

# --- Specification: changing one of these changes the protocol ("natswarm/1") ---

CONTROL_STREAM_ID = 0
CONTROL_FRAME = struct.Struct(">BQQ")

# What may be sent on a stream before its reader says more. Small, because a peer can open 100
# streams that nobody accepts: 6.4 MB, of which all can be garbage.
INITIAL_CREDIT_BYTES = 64 * 1024
MAX_PROTOCOL_CHARACTERS = 64

# --- Implementation ---

# Bytes on their way from `send_all` into QUIC's first transmission, per stream: two flushes at the
# speed this machine reaches (256 KiB each), so that the encryption never waits for the application.
SEND_BUFFER_BYTES = 512 * 1024
# qh3 lets a peer have 100 unfinished streams of its own; control frames can name more.
MAX_UNACCEPTED_STREAMS = 128
DEFAULT_RECEIVE_BYTES = 64 * 1024
# The value of error codes is ours and nobody reads it (RFC 9000 section 20.2).
RESET_CODE = 0
# How qh3 says that a connection or stream has ended: the first for connections, plain ValueError
# for streams.
QUIC_REFUSALS = (QuicConnectionError, ValueError)


class ControlKind(enum.IntEnum):
    """What a control frame says."""

    CREDIT = 1
    STOP = 2


class ProtocolViolation(Exception):
    """The peer broke the rules of this module; the connection must end. Never leaves quic.py."""


class _ConflictDetector:
    """Raise `trio.BusyResourceError` in the second of two tasks that do the same thing at once."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._is_held = False

    def __enter__(self) -> None:
        if self._is_held:
            raise trio.BusyResourceError(self._message)
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False


class Stream(trio.abc.HalfCloseableStream):
    """One stream of a connection: a `trio.abc.HalfCloseableStream` with a protocol and a peer.

    Sending waits while more than 512 KiB have not left this machine, or while the peer's reader is
    a whole window behind. What `send_all` took is delivered as long as the connection lives, also
    after `aclose`. When the connection has ended, methods raise `natswarm.ConnectionLost`, which is
    a `trio.BrokenResourceError`; what had arrived before can still be read.

    Cancelling `receive_some` loses nothing. Cancelling `send_all` leaves unknown how much was sent,
    as with any Trio stream; such a stream cannot end well any more, so `aclose` resets it and the
    peer gets `trio.BrokenResourceError` instead of a clean end. So does cancelling `aclose`.
    """

    def __init__(self, table: StreamTable, stream_id: int, protocol: str | None) -> None:
        self._table = table
        self._id = stream_id
        # None until the head of a stream that the peer opened has come in.
        self._protocol = protocol
        # Whether the application has it; what it has not seen must not go away behind its back.
        self._is_in_use = protocol is not None
        self._is_closed = False

        self._send_conflict = _ConflictDetector("another task is sending on this stream")
        self._sendable = trio.lowlevel.ParkingLot()
        self._sent_offset = 0
        self._send_limit = INITIAL_CREDIT_BYTES
        self._is_end_sent = False
        self._is_stopped = False
        self._is_send_interrupted = False

        self._receive_conflict = _ConflictDetector("another task is receiving from this stream")
        self._readable = trio.lowlevel.ParkingLot()
        self._buffer = bytearray()
        self._received_offset = 0
        self._receive_limit = INITIAL_CREDIT_BYTES
        self._is_end_received = False
        self._is_reset = False

    def __repr__(self) -> str:
        state = " (closed)" if self._is_closed else ""
        return f"<Stream {self._id} {self._protocol!r} with {self.peer_id.short}{state}>"

    @property
    def protocol(self) -> str:
        """What is spoken on the stream, as its opener named it."""
        return self._protocol or ""

    @property
    def peer_id(self) -> PeerId:
        """Who is at the other end; proved by the connection's handshake."""
        return self._table.peer_id

    # --- sending ---

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; see the class for when it waits and what cancelling does.

        Raises:
            trio.BrokenResourceError: The peer closed the stream, or the connection is lost.
            trio.ClosedResourceError: This side closed the stream or sent its end.
            trio.BusyResourceError: Another task is sending.
        """
        with self._send_conflict:
            await trio.lowlevel.checkpoint()
            self._raise_if_unsendable()
            view = memoryview(data).cast("B")
            try:
                while True:
                    if (room := self._send_room()) > 0 and view:
                        self._write(view[:room])
                        view = view[room:]
                    if not view:
                        return
                    await self._wait_sendable()
            except trio.Cancelled:
                self._is_send_interrupted = True
                raise

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` would take at least one byte; raises what it raises."""
        with self._send_conflict:
            await trio.lowlevel.checkpoint()
            self._raise_if_unsendable()
            while self._send_room() <= 0:
                await self._wait_sendable()

    async def send_eof(self) -> None:
        """Tell the peer that nothing follows; receiving goes on. Idempotent.

        Raises:
            trio.BrokenResourceError: The peer closed the stream, or the connection is lost.
            trio.ClosedResourceError: This side closed the stream.
            trio.BusyResourceError: Another task is sending.
        """
        with self._send_conflict:
            await trio.lowlevel.checkpoint()
            if self._is_end_sent and not self._is_closed:
                return
            self._raise_if_unsendable()
            self._write(b"", is_end=True)

    def _write(self, data: bytes | memoryview, *, is_end: bool = False) -> None:
        self._table.write(self._id, data, is_end=is_end)
        self._sent_offset += len(data)
        self._is_end_sent = is_end

    def _send_room(self) -> int:
        """Return how many bytes may go to QUIC now; 0 or less means wait."""
        credit = self._send_limit - self._sent_offset
        return min(credit, SEND_BUFFER_BYTES - self._table.unsent_bytes(self._id))

    async def _wait_sendable(self) -> None:
        self._table.waiting_senders[self._id] = self
        try:
            await self._sendable.park()
        finally:
            self._table.waiting_senders.pop(self._id, None)
        self._raise_if_unsendable()

    def _raise_if_unsendable(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this side closed the stream")
        self._table.raise_if_ended()
        if self._is_stopped:
            raise trio.BrokenResourceError("the peer closed the stream")
        if self._is_end_sent:
            raise trio.ClosedResourceError("the end of the stream was sent before")

    def on_flushed(self) -> None:
        """Wake a waiting sender if a fair amount of room has come about; the table calls it."""
        if self._send_limit > self._sent_offset and (
            self._table.unsent_bytes(self._id) <= SEND_BUFFER_BYTES // 2
        ):
            self._sendable.unpark_all()

    def on_credit(self, limit: int) -> None:
        """Take credit from the peer; frames may come in late, so it only ever grows."""
        if limit > self._send_limit:
            self._send_limit = limit
            self.on_flushed()

    def on_stop(self) -> None:
        """The peer reads no more: fail our sending, and drop what waits to be sent."""
        self._is_stopped = True
        self._sendable.unpark_all()
        if self._is_in_use:
            self._end_sending(is_clean=False)

    def on_accepted(self) -> None:
        """The application takes the stream over."""
        self._is_in_use = True
        if self._is_stopped:
            self._end_sending(is_clean=False)

    # --- receiving ---

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data and return 1 to `max_bytes` bytes of it (None: 64 KiB), or b"" at the end.

        Raises:
            trio.BrokenResourceError: The peer reset the stream, or the connection is lost.
            trio.ClosedResourceError: This side closed the stream.
            trio.BusyResourceError: Another task is receiving.
        """
        limit = DEFAULT_RECEIVE_BYTES if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receive_conflict:
            await trio.lowlevel.checkpoint()
            self._extend_credit()
            while not self._buffer:
                if self._is_closed:
                    raise trio.ClosedResourceError("this side closed the stream")
                if self._is_reset:
                    raise trio.BrokenResourceError("the peer gave the stream up")
                if self._is_end_received:
                    return b""
                self._table.raise_if_ended()
                await self._readable.park()
            data = bytes(memoryview(self._buffer)[:limit])
            del self._buffer[:limit]  # moves no bytes: a bytearray can start late
            self._extend_credit()
            return data

    def _extend_credit(self) -> None:
        """Let the peer send up to one window beyond what was read, in steps of a quarter window.

        Only a reader gives credit, so what an application does not read stays at the initial 64 KiB
        a stream, whatever the window.
        """
        if self._is_closed or self._is_end_received or self._is_reset:
            return
        limit = self._received_offset - len(self._buffer) + self._table.window_bytes
        if limit - self._receive_limit >= self._table.window_bytes // 4:
            self._receive_limit = limit
            self._table.send_control(ControlKind.CREDIT, self._id, limit)

    def on_data(self, data: bytes, *, is_end: bool) -> None:
        """Take data in order.

        Raises:
            ProtocolViolation: The peer sent more than we allowed.
        """
        self._received_offset += len(data)
        if self._received_offset > self._receive_limit:
            raise ProtocolViolation(f"stream {self._id} overran its credit")
        self._is_end_received = self._is_end_received or is_end
        if not self._is_closed:
            self._buffer += data
            self._readable.unpark_all()

    def on_reset(self) -> None:
        """The peer gave up: what it sent is part of something that will never be whole."""
        self._is_reset = True
        self._buffer.clear()
        self._readable.unpark_all()

    def take_head(self) -> bool:
        """Read the protocol's name off the front, once it is there; True when it is.

        Raises:
            ProtocolViolation: There is none or it is not 1..64 printable ASCII characters.
        """
        buffer = self._buffer
        if not buffer or len(buffer) < 1 + buffer[0]:
            if self._is_end_received:
                raise ProtocolViolation(f"stream {self._id} ended before it named a protocol")
            return False
        name = bytes(buffer[1 : 1 + buffer[0]])
        del buffer[: 1 + buffer[0]]
        try:
            self._protocol = decode_protocol(name)
        except ValueError as error:
            raise ProtocolViolation(f"stream {self._id}: {error}") from error
        return True

    # --- closing ---

    async def aclose(self) -> None:
        """Close both directions: the peer reads what was sent and then the end. Idempotent.

        Returns without waiting for the peer. Data in flight towards us is dropped and the peer's
        further sending fails. Cancelled, it resets the stream instead: sent data may be lost.
        """
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        self._is_closed = True
        self._buffer.clear()
        self._sendable.unpark_all()
        self._readable.unpark_all()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self._finish(is_clean=False)
            raise
        self._finish(is_clean=True)

    def _finish(self, *, is_clean: bool) -> None:
        self._end_sending(is_clean=is_clean and not self._is_send_interrupted)
        if not self.is_receive_over:
            self._table.send_control(ControlKind.STOP, self._id, 0)
        self._table.forget_if_over(self)

    def _end_sending(self, *, is_clean: bool) -> None:
        if self._is_end_sent and is_clean:
            return
        self._is_end_sent = True
        self._table.end_sending(self._id, is_clean=is_clean)

    @property
    def id(self) -> int:
        """QUIC's stream id."""
        return self._id

    @property
    def is_receive_over(self) -> bool:
        """Whether QUIC can deliver nothing more on this stream."""
        return self._is_end_received or self._is_reset

    @property
    def is_over(self) -> bool:
        """Whether neither the application nor QUIC will speak of this stream again."""
        return self._is_closed and self.is_receive_over

    def on_connection_ended(self) -> None:
        """Wake everybody; what they find is `StreamTable.raise_if_ended`."""
        self._sendable.unpark_all()
        self._readable.unpark_all()


def encode_protocol(protocol: str) -> bytes:
    """Return the head of a stream that speaks `protocol`.

    Raises:
        ValueError: Not 1..64 printable ASCII characters.
    """
    name = protocol.encode("utf-8")
    decode_protocol(name)
    return bytes([len(name)]) + name


def decode_protocol(name: bytes) -> str:
    """Return the name of a protocol.

    Raises:
        ValueError: Not 1..64 printable ASCII characters.
    """
    protocol = name.decode("ascii", "replace")
    if not 1 <= len(name) <= MAX_PROTOCOL_CHARACTERS or not (
        protocol.isascii() and protocol.isprintable()
    ):
        raise ValueError(f"a protocol is named by 1 to 64 printable ASCII characters, not {name!r}")
    return protocol


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
        head = encode_protocol(protocol)
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
        stream.on_accepted()
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
        stream.on_data(data, is_end=is_end)
        if not has_head and stream.take_head():
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
        stream.on_reset()
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
                    stream.on_credit(value)
            elif kind == ControlKind.STOP:
                if stream is not None:
                    stream.on_stop()
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
            stream.on_flushed()
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

    def send_control(self, kind: ControlKind, stream_id: int, value: int) -> None:
        """Queue a control frame.

        What queues up is bounded: a stream is stopped once, and each credit needs the data of the
        one before to arrive.
        """
        frame = CONTROL_FRAME.pack(kind, stream_id, value)
        with contextlib.suppress(*QUIC_REFUSALS):  # the connection is over
            self._engine().send_stream_data(CONTROL_STREAM_ID, frame)
        self._wake()

    def unsent_bytes(self, stream_id: int) -> int:
        """Return how many bytes of a stream QUIC has not sent for the first time."""
        return self._engine().get_send_buffer_size(stream_id)

    def forget_if_over(self, stream: Stream) -> None:
        """Drop a stream that neither side will speak of again."""
        if stream.is_over:
            self._streams.pop(stream.id, None)

    # --- the end ---

    def end(self, error: Callable[[], Exception]) -> None:
        """End all streams: they raise what `error` makes. Only the first call counts."""
        if self._end_error is not None:
            return
        self._end_error = error
        for stream in self._streams.values():
            stream.on_connection_ended()
        self._arrival.unpark_all()
        self._free_slot.unpark_all()

    def raise_if_ended(self) -> None:
        """Raise a new exception that tells how the connection ended, if it did."""
        if self._end_error is not None:
            raise self._end_error()
