"""Many streams over the lanes that lead to one peer, with credit for each.

QUIC has streams of its own, but those of qh3 2.1 can't be handed out:
    * it extends flow control as soon as data arrive, so a reader that stops never stops the writer;
    * a lost FIN is forgotten when older data were lost with it, so readers wait for ever;
    * a stream that ends while one of its packets waits to be repeated breaks the connection
      ("reserved stream is missing"): with some jitter that was one connection in 40 after 100 kB;
    * where several streams send both ways over a lossy path, acknowledgements queue up behind data:
      at 5 % loss the estimates of a 0.3 s round trip grew to 1.1 s, and the odd one to 10 s.

So one QUIC stream of each lane, number 0, carries frames (frames.py) in both directions. On one
lane a lost packet holds up all streams for a round trip, as it does under HTTP/2. While there are
more lanes, they take the bulk, and the first has only messages.

Ids are used once, in order; odd where the QUIC client opened the stream. A direction starts with
16 KiB of credit, and ends with END or ABORT. After both directions have ended the stream is over.
A side may have opened 2,048 streams that are not over.

Source: the design of yamux (HashiCorp) and RFC 9113 section 5. Knows neither time, datagrams nor
how the peer was authenticated: quic.py feeds it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from itertools import islice

import trio

from natswarm.identity import PeerId
from natswarm.net.frames import (
    FRAME,
    MAX_PAYLOAD_BYTES,
    MAX_PROTOCOL_CHARACTERS,
    UNKNOWN_PROTOCOL,
    FrameKind,
    FrameReader,
    ProtocolViolation,
)
from natswarm.net.lane import Lane
from natswarm.net.quic_engine import ENGINE_REFUSALS
from natswarm.net.stream import Stream

__all__ = ["MAX_OPEN_STREAMS", "Multiplexer"]

# Thousands of calls at once, each a stream; part of the protocol. What a peer may fill with garbage
# is 32 MB.
MAX_OPEN_STREAMS = 2048

# Less room is not worth waking anybody for.
MIN_MESSAGE_ROOM_BYTES = 32 * 1024


class Multiplexer:
    """All streams of one connection.

    Args:
        peer_id: Whom the streams are with.
        is_client: Whether this side is the QUIC client; decides which ids are ours.
        window_bytes: How far a stream's sender may be ahead of its reader here.
        wake: Called when there is something for QUIC to send.
        on_lane_note: Takes LANE and WANTED: the kind, the connection id, the value.
    """

    def __init__(
        self,
        peer_id: PeerId,
        *,
        is_client: bool,
        window_bytes: int,
        wake: Callable[[], None],
        on_lane_note: Callable[[FrameKind, int, int], None],
    ) -> None:
        self.peer_id = peer_id
        self.window_bytes = window_bytes
        self.stripe_count = 1
        """Over how many lanes bulk goes, where there are as many; 1: it goes with the messages."""
        self._wake = wake
        self._on_lane_note = on_lane_note
        self._lanes: list[Lane] = []  # proved ones; none until `add_lane`
        self._readers: dict[Lane, FrameReader] = {}
        self._end_error: Callable[[], Exception] | None = None

        self._streams: dict[int, Stream] = {}
        self._next_own_id = 1 if is_client else 2
        self._next_peer_id = 2 if is_client else 1
        self._own_count = 0
        self._peer_count = 0
        self._slot_freed = trio.lowlevel.ParkingLot()
        self._waiting_messages: dict[int, Stream] = {}
        self._waiting_bulk: dict[int, Stream] = {}

        self._arrived: deque[Stream] = deque()
        self._arrival = trio.lowlevel.ParkingLot()

    @property
    def stream_count(self) -> int:
        """Streams that are not over yet."""
        return len(self._streams)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that arrived and were not read, over all streams."""
        return sum(stream._buffered_bytes for stream in self._streams.values())

    def add_lane(self, lane: Lane) -> None:
        """Use a lane, both of whose ends have proved who they are; streams need the first."""
        self._readers[lane] = FrameReader(self, is_first=not self._lanes)
        self._lanes.append(lane)
        self._slot_freed.unpark_all()

    def has_lane(self, lane: Lane) -> bool:
        """Return whether the lane is in use."""
        return lane in self._readers

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
            if self._lanes and self._own_count < MAX_OPEN_STREAMS:
                break
            await self._slot_freed.park()
        stream = Stream(self, self._next_own_id, protocol, is_in_use=True)
        self._next_own_id += 2
        self._own_count += 1
        self._streams[stream.id] = stream
        self._send(FrameKind.OPEN, stream.id, 0, len(name), name)
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

    def receive(self, lane: Lane, data: bytes) -> None:
        """Take bytes of a lane, in any portions.

        Raises:
            ProtocolViolation: The peer broke a rule.
        """
        self._readers[lane].receive(data)

    def on_open(self, stream_id: int, name: bytes) -> None:
        """See `FrameSink`."""
        if stream_id != self._next_peer_id:
            raise ProtocolViolation(f"stream {stream_id} is not next")
        if self._peer_count >= MAX_OPEN_STREAMS:
            raise ProtocolViolation("too many streams at once")
        try:
            _check_name(name)
        except ValueError as error:
            raise ProtocolViolation(str(error)) from error
        self._next_peer_id += 2
        self._peer_count += 1
        stream = Stream(self, stream_id, name.decode("ascii"), is_in_use=False)
        self._streams[stream.id] = stream
        self._arrived.append(stream)
        self._arrival.unpark()

    def on_data_announced(self, stream_id: int, position: int, count: int) -> None:
        """See `FrameSink`."""
        if (stream := self._find(stream_id)) is not None:
            stream._on_data_announced(position, count)

    def on_data(self, stream_id: int, position: int, data: memoryview) -> None:
        """See `FrameSink`."""
        # Of a stream that was given up, data may be late on another lane.
        if (stream := self._find(stream_id)) is not None:
            stream._on_data(position, data)
            self.forget_if_over(stream)

    def on_note(self, kind: FrameKind, stream_id: int, position: int, value: int) -> None:
        """See `FrameSink`."""
        if kind in (FrameKind.LANE, FrameKind.WANTED):
            self._on_lane_note(kind, stream_id, value)
            return
        # Notes may come in late, when the stream is over on this side.
        if (stream := self._find(stream_id)) is None:
            return
        if kind == FrameKind.CREDIT:
            stream._on_credit(position)
        elif kind == FrameKind.STOP:
            stream._on_stop()
        else:
            is_unknown = kind == FrameKind.ABORT and value == UNKNOWN_PROTOCOL
            stream._on_end(position if kind == FrameKind.END else None, is_unknown=is_unknown)
            self._note_end(stream)
            self.forget_if_over(stream)

    def _find(self, stream_id: int) -> Stream | None:
        """Return a stream, None if it is over."""
        next_id = self._next_own_id if self._is_own(stream_id) else self._next_peer_id
        if not 0 < stream_id < next_id:
            raise ProtocolViolation(f"stream {stream_id} was never opened")
        return self._streams.get(stream_id)

    def _is_own(self, stream_id: int) -> bool:
        return (stream_id - self._next_own_id) % 2 == 0

    # --- what streams do ---

    def choose_lane(self, stream: Stream, *, is_bulk: bool) -> tuple[Lane, int]:
        """Return a lane for the stream, and how many bytes it may take now; 0 or less is none."""
        if not is_bulk:
            return self._lanes[0], self.message_room
        lanes = self._bulk_lanes if stream._is_known_to_peer else self._lanes[:1]
        rooms = [lane.bulk_room for lane in lanes]
        room = max(rooms)
        return lanes[rooms.index(room)], room

    @property
    def message_room(self) -> int:
        """How many bytes of messages may be sent now; 0 or less for none."""
        return self._lanes[0].message_room

    @property
    def _bulk_lanes(self) -> list[Lane]:
        """The lanes for bulk: not the first, which has the messages, where there are others."""
        others = self._lanes[1 : 1 + self.stripe_count] if self.stripe_count > 1 else []
        return others or self._lanes[:1]

    def note_message(self) -> None:
        """Hold bulk back for a while: somebody sends messages."""
        for lane in self._lanes:
            lane.has_messages = True

    def send_data(self, lane: Lane, stream_id: int, position: int, data: memoryview) -> None:
        """Queue one frame of at most 64 KiB for QUIC, at once.

        Raises:
            trio.BrokenResourceError: QUIC has ended, which will be known here in a moment.
        """
        self._send(FrameKind.DATA, stream_id, position, len(data), data, lane=lane)

    def send_credit(self, stream_id: int, limit: int) -> None:
        """Let the peer send up to position `limit` of a stream."""
        self.send_note(FrameKind.CREDIT, stream_id, limit)

    def send_stop(self, stream_id: int) -> None:
        """Tell the peer that nobody reads a stream any more."""
        self.send_note(FrameKind.STOP, stream_id)

    def send_end(self, stream: Stream, position: int | None, *, is_unknown: bool) -> None:
        """Tell the peer where a stream ends, or with None that it was given up."""
        if position is None:
            value = UNKNOWN_PROTOCOL if is_unknown else 0
            self.send_note(FrameKind.ABORT, stream.id, value=value)
        else:
            self.send_note(FrameKind.END, stream.id, position)
        self._note_end(stream)

    def send_note(self, kind: FrameKind, stream_id: int, position: int = 0, value: int = 0) -> None:
        """Queue a frame without payload; nothing happens where QUIC has ended."""
        # Notes wait for no room. What can queue up is bounded: a stream says STOP and END once, and
        # each credit needs a quarter of a window to have arrived.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._send(kind, stream_id, position, value)

    def _send(
        self,
        kind: FrameKind,
        stream_id: int,
        position: int,
        value: int,
        payload: bytes | memoryview = b"",
        *,
        lane: Lane | None = None,
    ) -> None:
        header = FRAME.pack(kind, stream_id, position, value)
        try:
            (lane or self._lanes[0]).write(header, payload)
        except ENGINE_REFUSALS as error:
            self.raise_if_ended()
            raise trio.BrokenResourceError(f"QUIC has ended: {error}") from error
        self._wake()

    async def wait_room(self, stream: Stream, *, is_bulk: bool) -> None:
        """Wait in line until the stream may send, or something has happened to it."""
        line = self._waiting_bulk if is_bulk else self._waiting_messages
        if stream._has_credit:  # else its peer's reader wakes it, and it would only hold up others
            line[stream.id] = stream
        try:
            await stream._sendable.park()
        finally:
            line.pop(stream.id, None)

    def should_yield(self, *, is_bulk: bool) -> bool:
        """Return whether others could send, so that who has just sent should let them go first."""
        return bool(self._waiting_messages) or (is_bulk and bool(self._waiting_bulk))

    @property
    def is_bulk_waiting(self) -> bool:
        """Whether there is bulk that the lanes, and not its reader, hold up."""
        return bool(self._waiting_bulk)

    def on_flushed(self) -> None:
        """Wake as many waiting senders as there is room for, first come first served."""
        if self._waiting_messages:
            room = self.message_room
            if room >= MIN_MESSAGE_ROOM_BYTES:
                self._wake_senders(self._waiting_messages, room)
        if self._waiting_bulk:
            rooms = [room for lane in self._bulk_lanes if (room := lane.bulk_room) > 0]
            self._wake_senders(self._waiting_bulk, sum(rooms))

    @staticmethod
    def _wake_senders(line: dict[int, Stream], room: int) -> None:
        count = -(-room // MAX_PAYLOAD_BYTES)
        for stream in list(islice(line.values(), count)):
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
