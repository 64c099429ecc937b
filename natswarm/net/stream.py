"""A stream as Trio knows streams: half-closeable, cancellable, and bounded in memory.

The two directions are independent. Towards the peer, bytes go out as far as the peer's reader has
given credit and this machine keeps up; from the peer, they wait in a buffer that our own credit
bounds. How streams share a connection is multiplexer.py's affair.

Source: trio.abc for what a stream promises. Knows neither time, datagrams nor QUIC.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from natswarm.errors import ProtocolUnknown
from natswarm.identity import PeerId
from natswarm.net.frames import MAX_PAYLOAD_BYTES, ProtocolViolation
from natswarm.net.reassembly import Reassembly

if TYPE_CHECKING:
    from natswarm.net.multiplexer import Multiplexer

__all__ = ["INITIAL_CREDIT_BYTES", "Stream"]

# What may be sent on a stream before its reader says more; part of the protocol. Small, because a
# peer can open thousands of streams that nobody reads, and fill them with garbage.
INITIAL_CREDIT_BYTES = 16 * 1024

DEFAULT_RECEIVE_BYTES = 64 * 1024
# Of what waits to be read, small pieces are joined up to this.
CHUNK_BYTES = DEFAULT_RECEIVE_BYTES


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

    What is sent in one go and fits a frame, 64 KiB, is a message; what is longer is bulk, and lets
    the messages of other streams go first. So send bulk in large pieces.

    Sending waits while the connection has more to send than its path takes at once, or while the
    peer's reader is a whole window behind. What `send_all` took is delivered as long as the
    connection lives, also after `aclose`. When the connection has ended, methods raise
    `natswarm.ConnectionLost`, which is a `trio.BrokenResourceError`; what had arrived before can
    still be read.

    Cancelling `receive_some` loses nothing. Cancelling `send_all` leaves unknown how much was sent,
    as with any Trio stream. If it was cut in the middle, nothing can be sent any more, and `aclose`
    gives the stream up: the peer gets `trio.BrokenResourceError`, not what looks like an end. So
    does cancelling `aclose`, unless the end was sent before.
    """

    def __init__(
        self, multiplexer: Multiplexer, stream_id: int, protocol: str, *, is_in_use: bool
    ) -> None:
        # The multiplexer, the other half of this class, uses what starts with one underscore.
        self._multiplexer = multiplexer
        self._id = stream_id
        self._protocol = protocol
        # Whether the application has it; what it has not seen must not go away behind its back.
        self._is_in_use = is_in_use
        self._is_closed = False

        self._send_conflict = _ConflictDetector("another task is sending on this stream")
        self._sendable = trio.lowlevel.ParkingLot()
        self._send_position = 0
        self._send_limit = INITIAL_CREDIT_BYTES  # the position that the peer's credit reaches to
        self._has_bulk = False  # whether any was sent
        self._is_end_sent = False
        self._is_stopped = False
        self._on_reader_gone: Callable[[], None] | None = None
        self._is_send_interrupted = False

        self._receive_conflict = _ConflictDetector("another task is receiving from this stream")
        self._readable = trio.lowlevel.ParkingLot()
        # In chunks: one long buffer would be copied whole each time that it has grown by an eighth.
        self._chunks: deque[bytearray] = deque()
        self._unread_bytes = 0
        self._pieces = Reassembly()
        self._received_position = 0
        self._announced_bytes = 0
        self._receive_limit = INITIAL_CREDIT_BYTES  # the position that our credit reaches to
        self._final_position: int | None = None
        self._is_end_received = False
        self._is_aborted = False
        self._is_unknown = False  # to the peer, who said so

    def __repr__(self) -> str:
        state = " (closed)" if self._is_closed else ""
        return f"<Stream {self._id} {self._protocol!r} with {self.peer_id.short}{state}>"

    @property
    def protocol(self) -> str:
        """What is spoken on the stream, as its opener named it."""
        return self._protocol

    @property
    def peer_id(self) -> PeerId:
        """Who is at the other end; proved by the connection's handshake."""
        return self._multiplexer.peer_id

    @property
    def id(self) -> int:
        """A number that both ends use for this stream of this connection, and never again."""
        return self._id

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
            total_bytes = len(view)
            is_bulk = total_bytes > MAX_PAYLOAD_BYTES
            self._has_bulk |= is_bulk
            if not self._has_bulk:  # else it is the head of what follows
                self._multiplexer.note_message()
            while view:
                if (sent := self._send_part(view, is_bulk=is_bulk)) > 0:
                    view = view[sent:]
                    if not view or not self._multiplexer.should_yield(is_bulk=is_bulk):
                        continue
                try:
                    await self._wait_sendable(is_bulk=is_bulk)
                except trio.Cancelled:
                    self._is_send_interrupted = len(view) < total_bytes
                    raise

    def _send_part(self, view: memoryview, *, is_bulk: bool) -> int:
        """Send what may be sent of `view` now, in one frame; return how much that was."""
        lane, room = self._multiplexer.choose_lane(self, is_bulk=is_bulk)
        count = min(len(view), room, self._send_limit - self._send_position, MAX_PAYLOAD_BYTES)
        if count > 0:
            self._multiplexer.send_data(lane, self._id, self._send_position, view[:count])
            self._send_position += count
        return count

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` would take at least one byte; raises what it raises."""
        with self._send_conflict:
            await trio.lowlevel.checkpoint()
            self._raise_if_unsendable()
            while not (self._has_credit and self._multiplexer.message_room > 0):
                await self._wait_sendable(is_bulk=False)

    async def send_eof(self) -> None:
        """Tell the peer that nothing follows; receiving goes on. Idempotent.

        Raises:
            trio.BrokenResourceError: The peer closed the stream, or the connection is lost.
            trio.ClosedResourceError: This side closed the stream.
            trio.BusyResourceError: Another task is sending.
        """
        with self._send_conflict:
            await trio.lowlevel.checkpoint()
            if self._is_end_sent and not self._is_closed and not self._is_stopped:
                return
            self._raise_if_unsendable()
            self._end_sending(is_clean=True)

    @property
    def _has_credit(self) -> bool:
        return self._send_limit > self._send_position

    @property
    def _is_known_to_peer(self) -> bool:
        """Whether the peer has shown that it knows the stream, by giving credit."""
        return self._send_limit > INITIAL_CREDIT_BYTES

    async def _wait_sendable(self, *, is_bulk: bool) -> None:
        await self._multiplexer.wait_room(self, is_bulk=is_bulk)
        self._raise_if_unsendable()

    def _raise_if_unsendable(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this side closed the stream")
        self._multiplexer.raise_if_ended()
        if self._is_stopped:
            raise self._protocol_unknown() or trio.BrokenResourceError("the peer closed the stream")
        if self._is_end_sent:
            raise trio.ClosedResourceError("the end of the stream was sent before")
        if self._is_send_interrupted:
            raise trio.BrokenResourceError("a send_all was cancelled in the middle")

    def _end_sending(self, *, is_clean: bool, is_unknown: bool = False) -> None:
        if not self._is_end_sent:
            self._is_end_sent = True
            position = self._send_position if is_clean else None
            self._multiplexer.send_end(self, position, is_unknown=is_unknown)

    def _on_credit(self, limit: int) -> None:
        self._send_limit = max(self._send_limit, limit)
        self._sendable.unpark_all()

    def _on_stop(self) -> None:
        """The peer reads no more: fail our sending."""
        self._is_stopped = True
        self._sendable.unpark_all()
        self._tell_reader_gone()
        if self._is_in_use:
            self._end_sending(is_clean=False)

    def when_reader_gone(self, callback: Callable[[], None]) -> None:
        """Call back, at once and once, when the peer reads no more or the connection has ended.

        For whoever works on an answer: reading would only tell whether the peer goes on sending.
        """
        self._on_reader_gone = callback
        if self._is_stopped or self._multiplexer.has_ended:
            self._tell_reader_gone()

    def _tell_reader_gone(self) -> None:
        callback, self._on_reader_gone = self._on_reader_gone, None
        if callback is not None:
            callback()

    def _on_accepted(self) -> None:
        """The application takes the stream over."""
        self._is_in_use = True
        if self._is_stopped:
            self._end_sending(is_clean=False)

    # --- receiving ---

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data and return 1 to `max_bytes` bytes of it (None: 64 KiB), or b"" at the end.

        Raises:
            trio.BrokenResourceError: The peer gave the stream up, or the connection is lost.
            trio.ClosedResourceError: This side closed the stream.
            trio.BusyResourceError: Another task is receiving.
        """
        limit = DEFAULT_RECEIVE_BYTES if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receive_conflict:
            await trio.lowlevel.checkpoint()
            self._extend_credit()
            while not self._chunks:
                if self._is_closed:
                    raise trio.ClosedResourceError("this side closed the stream")
                if self._is_aborted:
                    raise self._protocol_unknown() or trio.BrokenResourceError(
                        "the peer gave the stream up"
                    )
                if self._is_end_received:
                    return b""
                self._multiplexer.raise_if_ended()
                await self._readable.park()
            chunk = self._chunks[0]
            if len(chunk) <= limit:
                data = bytes(self._chunks.popleft())
            else:
                data = bytes(memoryview(chunk)[:limit])
                del chunk[:limit]  # moves no bytes: a bytearray can start late
            self._unread_bytes -= len(data)
            self._extend_credit()
            return data

    def _extend_credit(self) -> None:
        """Let the peer send up to one window beyond what was read, in steps of a quarter window.

        Only a reader gives credit, so what an application does not read stays at the initial 16 KiB
        a stream, whatever the window.
        """
        if self._is_closed or self._is_end_received:
            return
        window_bytes = self._multiplexer.window_bytes
        limit = self._received_position - self._unread_bytes + window_bytes
        if limit - self._receive_limit >= window_bytes // 4:
            self._receive_limit = limit
            self._multiplexer.send_credit(self._id, limit)

    @property
    def _buffered_bytes(self) -> int:
        return self._unread_bytes + len(self._pieces)

    def _on_data_announced(self, position: int, count: int) -> None:
        # Counted as well, so that what comes twice can't fill the memory.
        self._announced_bytes += count
        if max(position + count, self._announced_bytes) > self._receive_limit:
            raise ProtocolViolation(f"stream {self._id} overran its credit")
        if self._final_position is not None and position + count > self._final_position:
            raise ProtocolViolation(f"stream {self._id} went on after its end")

    def _on_data(self, position: int, data: memoryview) -> None:
        if position < self._received_position:
            raise ProtocolViolation(f"stream {self._id} began anew at {position}")
        if position > self._received_position:
            self._pieces.add(position, data)
            return
        self._take(data)
        while (piece := self._pieces.take(self._received_position)) is not None:
            self._take(piece)
        self._check_end()

    def _take(self, data: memoryview | bytearray) -> None:
        """Take the next data of the stream."""
        self._received_position += len(data)
        if not self._is_closed and len(data):
            if self._chunks and len(self._chunks[-1]) + len(data) <= CHUNK_BYTES:
                self._chunks[-1] += data
            else:
                self._chunks.append(bytearray(data))
            self._unread_bytes += len(data)
            self._readable.unpark_all()

    def _drop_unread(self) -> None:
        self._chunks.clear()
        self._unread_bytes = 0

    def _protocol_unknown(self) -> ProtocolUnknown | None:
        if not self._is_unknown:
            return None
        return ProtocolUnknown(f"{self.peer_id.short} does not speak {self._protocol}")

    def _on_end(self, final_position: int | None, *, is_unknown: bool) -> None:
        """Take the end; None if the peer gave up."""
        if self._is_end_received or self._final_position is not None:
            raise ProtocolViolation(f"stream {self._id} ended twice")
        if final_position is None:
            # What came in is part of something that will never be whole.
            self._is_aborted = self._is_end_received = True
            self._is_unknown = is_unknown
            self._drop_unread()
            self._pieces.clear()
            self._readable.unpark_all()
            return
        if not self._received_position <= final_position <= self._receive_limit:
            raise ProtocolViolation(f"stream {self._id} ended at {final_position}")
        self._final_position = final_position
        self._check_end()

    def _check_end(self) -> None:
        if self._received_position == self._final_position:
            self._is_end_received = True
            self._readable.unpark_all()

    # --- closing ---

    async def aclose(self) -> None:
        """Close both directions: the peer reads what was sent and then the end. Idempotent.

        Returns without waiting for the peer. What is on its way to us is dropped, and the peer's
        further sending fails. Cancelled, it gives the stream up instead.
        """
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        self._mark_closed()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self._finish(is_clean=False)
            raise
        self._finish(is_clean=not self._is_send_interrupted)

    def refuse(self) -> None:
        """Close at once and tell the peer that nobody here speaks the stream's protocol."""
        self._mark_closed()
        self._finish(is_clean=False, is_unknown=True)

    def _give_up(self) -> None:
        """Close at once."""
        self._mark_closed()
        self._finish(is_clean=False)

    def _mark_closed(self) -> None:
        self._is_closed = True
        self._drop_unread()
        self._wake_all()

    def _finish(self, *, is_clean: bool, is_unknown: bool = False) -> None:
        self._end_sending(is_clean=is_clean, is_unknown=is_unknown)
        if not self._is_end_received:
            self._multiplexer.send_stop(self._id)
        self._multiplexer.forget_if_over(self)

    @property
    def _is_ended(self) -> bool:
        """Whether both sides have said that they are done; data may still be under way."""
        is_end_announced = self._is_end_received or self._final_position is not None
        return self._is_end_sent and is_end_announced

    @property
    def _is_over(self) -> bool:
        """Whether both directions have ended and the application has let go of it."""
        return self._is_closed and self._is_end_sent and self._is_end_received

    def _wake_all(self) -> None:
        """Let everybody who waits look again at what has become of the stream."""
        self._sendable.unpark_all()
        self._readable.unpark_all()
