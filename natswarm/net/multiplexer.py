"""Many streams over the one byte stream that QUIC carries, with credit for each.

QUIC has streams of its own, but those of qh3 2.1 can't be handed out:
    * it extends flow control as soon as data arrive, so a reader that stops never stops the writer;
    * a lost FIN is forgotten when older data were lost with it, so readers wait for ever;
    * a stream that ends while one of its packets waits to be repeated breaks the connection
      ("reserved stream is missing"): with some jitter that was one connection in 40 after 100 kB;
    * where several streams send both ways over a lossy path, acknowledgements queue up behind data:
      at 5 % loss the estimates of a 0.3 s round trip grew to 1.1 s, and the odd one to 10 s.

So one QUIC stream, number 0, carries frames in both directions. A lost packet holds up all streams
for a round trip, as it does under HTTP/2; who can't bear that opens a second connection.

    frame: kind 1 | stream id 8 | value 4, big-endian; then the payload of OPEN and DATA
        OPEN   1   a new stream; payload of `value` bytes is the name of its protocol
        DATA   2   payload of `value` bytes, 1..65,536, for the stream
        CREDIT 3   I read: you may send `value` bytes more on the stream
        END    4   the stream's data in this direction are complete
        ABORT  5   they are not, and never will be; `value` 1: nobody here speaks the protocol
        STOP   6   I read no more of the stream

Ids are used once, in order; odd where the QUIC client opened the stream. A direction starts with
16 KiB of credit, and ends with END or ABORT. After both directions have ended the stream is over.
A side may have opened 2,048 streams that are not over.

Source: the design of yamux (HashiCorp) and RFC 9113 section 5. Knows neither time, datagrams nor
how the peer was authenticated: quic.py feeds it.
"""

from __future__ import annotations

import contextlib
import enum
import struct
from collections import deque
from collections.abc import Callable
from itertools import islice

import trio

from natswarm.identity import PeerId
from natswarm.net.quic_engine import ENGINE_REFUSALS, QuicEngine
from natswarm.net.stream import ProtocolViolation, Stream

__all__ = ["QUIC_STREAM_ID", "Multiplexer"]

# --- Specification: changing one of these changes the protocol ---

QUIC_STREAM_ID = 0
FRAME = struct.Struct(">BQI")
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_PROTOCOL_CHARACTERS = 64
# Thousands of calls at once, each a stream. What a peer may fill with garbage is 32 MB.
MAX_OPEN_STREAMS = 2048
UNKNOWN_PROTOCOL = 1


class FrameKind(enum.IntEnum):
    """What a frame says."""

    OPEN = 1
    DATA = 2
    CREDIT = 3
    END = 4
    ABORT = 5
    STOP = 6


# --- Implementation ---

# What may wait in QUIC for its first transmission is one congestion window: enough to fill the path
# while the application is woken, and no more, since whatever is sent next waits behind it.
MIN_SEND_BUFFER_BYTES = 64 * 1024
MAX_SEND_BUFFER_BYTES = 512 * 1024


class Multiplexer:
    """All streams of one connection.

    Args:
        peer_id: Whom the streams are with.
        is_client: Whether this side is the QUIC client; decides which ids are ours.
        window_bytes: How far a stream's sender may be ahead of its reader here.
        wake: Called when there is something for QUIC to send.
    """

    def __init__(
        self, peer_id: PeerId, *, is_client: bool, window_bytes: int, wake: Callable[[], None]
    ) -> None:
        self.peer_id = peer_id
        self.window_bytes = window_bytes
        self._wake = wake
        self._engine: QuicEngine | None = None  # until `start`
        self._end_error: Callable[[], Exception] | None = None

        self._streams: dict[int, Stream] = {}
        self._next_own_id = 1 if is_client else 2
        self._next_peer_id = 2 if is_client else 1
        self._own_count = 0
        self._peer_count = 0
        self._slot_freed = trio.lowlevel.ParkingLot()
        self._waiting_senders: dict[int, Stream] = {}

        self._arrived: deque[Stream] = deque()
        self._arrival = trio.lowlevel.ParkingLot()

        # The frame that is coming in.
        self._header = bytearray()
        self._name = bytearray()
        self._payload_left = 0
        self._payload_stream: Stream | None = None  # None also where it is the name of a protocol
        self._opening_id = 0

    @property
    def stream_count(self) -> int:
        """Streams that are not over yet."""
        return len(self._streams)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that arrived and were not read, over all streams."""
        return sum(len(stream._buffer) for stream in self._streams.values())

    def start(self, engine: QuicEngine) -> None:
        """Let streams be opened and accepted: both ends have proved who they are."""
        self._engine = engine
        self._slot_freed.unpark_all()

    # --- opening and accepting ---

    async def open(self, protocol: str) -> Stream:
        """Open a stream as soon as the peer has room for one more; cancelled, none was opened.

        Raises:
            ValueError: Not 1..64 printable ASCII characters.
        """
        name = protocol.encode("utf-8")
        _check_name(name)
        await trio.lowlevel.checkpoint()
        while True:
            self.raise_if_ended()
            if self._engine is not None and self._own_count < MAX_OPEN_STREAMS:
                break
            await self._slot_freed.park()
        stream = Stream(self, self._next_own_id, protocol, is_in_use=True)
        self._next_own_id += 2
        self._own_count += 1
        self._streams[stream.id] = stream
        self._send(FrameKind.OPEN, stream.id, len(name), name)
        return stream

    async def accept(self) -> Stream:
        """Wait for a stream that the peer opened; cancelled, none is lost."""
        await trio.lowlevel.checkpoint()
        while True:
            while not self._arrived:
                self.raise_if_ended()
                await self._arrival.park()
            stream = self._arrived.popleft()
            stream._on_accepted()
            if not stream._is_aborted:
                return stream
            stream._give_up()  # as its opener did, before anybody here saw it

    # --- what comes in ---

    def receive(self, data: bytes) -> None:
        """Take bytes of the QUIC stream, in any portions.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        view = memoryview(data)
        while view:
            if self._payload_left:
                part = view[: self._payload_left]
                self._payload_left -= len(part)
                self._receive_payload(part)
            else:
                part = view[: FRAME.size - len(self._header)]
                self._header += part
                if len(self._header) == FRAME.size:
                    kind, stream_id, value = FRAME.unpack(self._header)
                    self._header.clear()
                    self._receive_frame(kind, stream_id, value)
            view = view[len(part) :]

    def _receive_frame(self, kind: int, stream_id: int, value: int) -> None:
        if kind == FrameKind.OPEN:
            self._receive_open(stream_id, value)
            return
        stream = self._find(stream_id)
        match kind:
            case FrameKind.DATA:
                if stream is None or not 1 <= value <= MAX_PAYLOAD_BYTES:
                    raise ProtocolViolation(f"{value} bytes of data on stream {stream_id}")
                stream._on_data_announced(value)
                self._payload_left = value
                self._payload_stream = stream
            # Notes may come in late, when the stream is over on this side.
            case FrameKind.CREDIT:
                if stream is not None:
                    stream._on_credit(value)
            case FrameKind.STOP:
                if stream is not None:
                    stream._on_stop()
            case FrameKind.END | FrameKind.ABORT:
                if stream is not None:
                    is_unknown = value == UNKNOWN_PROTOCOL
                    stream._on_end(is_clean=kind == FrameKind.END, is_unknown=is_unknown)
                    self._note_end(stream)
                    self.forget_if_over(stream)
            case _:
                raise ProtocolViolation(f"unknown kind of frame {kind}")

    def _receive_open(self, stream_id: int, name_bytes: int) -> None:
        if stream_id != self._next_peer_id:
            raise ProtocolViolation(f"stream {stream_id} is not next")
        if not 1 <= name_bytes <= MAX_PROTOCOL_CHARACTERS:
            raise ProtocolViolation(f"a protocol with a name of {name_bytes} bytes")
        if self._peer_count >= MAX_OPEN_STREAMS:
            raise ProtocolViolation("too many streams at once")
        self._next_peer_id += 2
        self._peer_count += 1
        self._opening_id = stream_id
        self._payload_left = name_bytes
        self._payload_stream = None

    def _receive_payload(self, part: memoryview) -> None:
        if self._payload_stream is not None:
            self._payload_stream._on_data(part)
            return
        self._name += part
        if self._payload_left:
            return
        name = bytes(self._name)
        self._name.clear()
        try:
            _check_name(name)
        except ValueError as error:
            raise ProtocolViolation(str(error)) from error
        stream = Stream(self, self._opening_id, name.decode("ascii"), is_in_use=False)
        self._streams[stream.id] = stream
        self._arrived.append(stream)
        self._arrival.unpark()

    def _find(self, stream_id: int) -> Stream | None:
        """Return a stream, None if it is over."""
        next_id = self._next_own_id if self._is_own(stream_id) else self._next_peer_id
        if not 0 < stream_id < next_id:
            raise ProtocolViolation(f"stream {stream_id} was never opened")
        return self._streams.get(stream_id)

    def _is_own(self, stream_id: int) -> bool:
        return (stream_id - self._next_own_id) % 2 == 0

    # --- what streams do ---

    def send_room(self) -> int:
        """Return how many bytes may go to QUIC now; 0 or less means `wait_room`."""
        engine = self._started_engine()
        limit = engine.congestion_window_bytes
        limit = min(max(limit, MIN_SEND_BUFFER_BYTES), MAX_SEND_BUFFER_BYTES)
        return limit - engine.get_send_buffer_size(QUIC_STREAM_ID)

    def send_data(self, stream_id: int, data: memoryview) -> None:
        """Queue one frame of at most 64 KiB for QUIC, at once.

        Raises:
            trio.BrokenResourceError: QUIC has ended, which will be known here in a moment.
        """
        self._send(FrameKind.DATA, stream_id, len(data), data)

    def send_credit(self, stream_id: int, count: int) -> None:
        """Let the peer send `count` bytes more."""
        self._send_note(FrameKind.CREDIT, stream_id, count)

    def send_stop(self, stream_id: int) -> None:
        """Tell the peer that nobody reads a stream any more."""
        self._send_note(FrameKind.STOP, stream_id, 0)

    def send_end(self, stream: Stream, *, is_clean: bool, is_unknown: bool) -> None:
        """Tell the peer that what was sent on a stream is complete, or that it was given up."""
        kind = FrameKind.END if is_clean else FrameKind.ABORT
        self._send_note(kind, stream.id, UNKNOWN_PROTOCOL if is_unknown else 0)
        self._note_end(stream)

    def _send(
        self, kind: FrameKind, stream_id: int, value: int, payload: bytes | memoryview = b""
    ) -> None:
        engine = self._started_engine()
        try:
            engine.send_stream_data(QUIC_STREAM_ID, FRAME.pack(kind, stream_id, value))
            if payload:
                engine.send_stream_data(QUIC_STREAM_ID, payload)
        except ENGINE_REFUSALS as error:
            self.raise_if_ended()
            raise trio.BrokenResourceError(f"QUIC has ended: {error}") from error
        self._wake()

    def _send_note(self, kind: FrameKind, stream_id: int, value: int) -> None:
        # Notes wait for no room. What can queue up is bounded: a stream says STOP and END once, and
        # each credit needs a quarter of a window to have arrived.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._send(kind, stream_id, value)

    def _started_engine(self) -> QuicEngine:
        assert self._engine is not None, "there are no streams before the handshake is done"
        return self._engine

    async def wait_room(self, stream: Stream) -> None:
        """Wait in line until the stream may send, or something has happened to it."""
        if stream._has_credit:  # else its peer's reader wakes it, and it would only hold up others
            self._waiting_senders[stream.id] = stream
        try:
            await stream._sendable.park()
        finally:
            self._waiting_senders.pop(stream.id, None)

    @property
    def has_waiting_senders(self) -> bool:
        """Whether others could send, so that who has just sent should let them go first."""
        return bool(self._waiting_senders)

    def on_flushed(self) -> None:
        """Wake as many waiting senders as there is room for, first come first served."""
        if not self._waiting_senders or (room := self.send_room()) < MIN_SEND_BUFFER_BYTES // 2:
            return
        count = -(-room // MAX_PAYLOAD_BYTES)
        for stream in list(islice(self._waiting_senders.values(), count)):
            stream._sendable.unpark_all()

    def _note_end(self, stream: Stream) -> None:
        # The peer counts as we do: it had our end before it opened the next one.
        if stream._is_ended and not self._is_own(stream.id):
            self._peer_count -= 1

    def forget_if_over(self, stream: Stream) -> None:
        """Drop a stream of which neither side will speak again; its place is free."""
        if stream._is_over and stream.id in self._streams:
            del self._streams[stream.id]
            if self._is_own(stream.id):
                self._own_count -= 1
                self._slot_freed.unpark()

    # --- the end ---

    def end(self, error: Callable[[], Exception]) -> None:
        """End all streams: they raise what `error` makes. Only the first call counts."""
        if self._end_error is not None:
            return
        self._end_error = error
        for stream in self._streams.values():
            stream._wake_all()
            stream._tell_reader_gone()
        self._arrival.unpark_all()
        self._slot_freed.unpark_all()

    @property
    def has_ended(self) -> bool:
        """Whether the connection has."""
        return self._end_error is not None

    def raise_if_ended(self) -> None:
        """Raise a new exception that tells how the connection ended, if it did."""
        if self._end_error is not None:
            raise self._end_error()


def _check_name(name: bytes) -> None:
    is_printable = all(0x20 <= byte < 0x7F for byte in name)
    if not 1 <= len(name) <= MAX_PROTOCOL_CHARACTERS or not is_printable:
        raise ValueError(f"a protocol is named by 1 to 64 printable ASCII characters, not {name!r}")
