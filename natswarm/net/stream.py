"""A stream of a QUIC connection as Trio knows streams: half-closeable, cancellable, bounded.

The two directions are independent. Towards the peer, bytes go to QUIC as far as the peer's reader
has given credit and this machine keeps up; from the peer, they wait in a buffer that our own credit
bounds. Everything that is about more than one stream is stream_table.py's.

    head of a stream, from the side that opened it:
        length 1 | name of the protocol, 1..64 printable ASCII characters

Source: trio.abc for what a stream promises; RFC 9000 sections 2 and 3 for what QUIC does with it.
Knows neither time nor datagrams.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import trio

from natswarm.identity import PeerId

if TYPE_CHECKING:
    from natswarm.net.stream_table import StreamTable

__all__ = ["INITIAL_CREDIT_BYTES", "ProtocolViolation", "Stream", "encode_head"]

# --- Specification: changing one of these changes the protocol ---

# What may be sent on a stream before its reader says more. Small, because a peer can open 100
# streams that nobody accepts: 6.4 MB, of which all can be garbage.
INITIAL_CREDIT_BYTES = 64 * 1024
MAX_PROTOCOL_CHARACTERS = 64

# --- Implementation ---

# Bytes between `send_all` and their first transmission. QUIC sends what its congestion window
# allows in one go; half of this lets it go on while the application is being woken.
SEND_BUFFER_BYTES = 512 * 1024
DEFAULT_RECEIVE_BYTES = 64 * 1024


class ProtocolViolation(Exception):
    """The peer broke the rules; the connection must end. Never leaves natswarm.net."""


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
            total_bytes = len(view)
            while view:
                if (room := self._send_room()) > 0:
                    self._write(view[:room])
                    view = view[room:]
                    continue
                try:
                    await self._wait_sendable()
                except trio.Cancelled:
                    self._is_send_interrupted = len(view) < total_bytes
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

    def _on_flushed(self) -> None:
        """Wake a waiting sender if a fair amount of room has come about; the table calls it."""
        if self._send_limit > self._sent_offset and (
            self._table.unsent_bytes(self._id) <= SEND_BUFFER_BYTES // 2
        ):
            self._sendable.unpark_all()

    def _on_credit(self, limit: int) -> None:
        """Take credit from the peer; frames may come in late, so it only ever grows."""
        if limit > self._send_limit:
            self._send_limit = limit
            self._on_flushed()

    def _on_stop(self) -> None:
        """The peer reads no more: fail our sending, and drop what waits to be sent."""
        self._is_stopped = True
        self._sendable.unpark_all()
        if self._is_in_use:
            self._end_sending(is_clean=False)

    def _on_accepted(self) -> None:
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
            self._table.give_credit(self._id, limit)

    def _on_data(self, data: bytes, *, is_end: bool) -> None:
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

    def _on_reset(self) -> None:
        """The peer gave up: what it sent is part of something that will never be whole."""
        self._is_reset = True
        self._buffer.clear()
        self._readable.unpark_all()

    def _take_head(self) -> bool:
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
            self._protocol = _protocol_name(name)
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
        if not self._is_receive_over:
            self._table.stop(self._id)
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
    def _is_receive_over(self) -> bool:
        """Whether QUIC can deliver nothing more on this stream."""
        return self._is_end_received or self._is_reset

    @property
    def _is_over(self) -> bool:
        """Whether neither the application nor QUIC will speak of this stream again."""
        return self._is_closed and self._is_receive_over

    def _on_connection_ended(self) -> None:
        """Wake everybody; what they find is `StreamTable.raise_if_ended`."""
        self._sendable.unpark_all()
        self._readable.unpark_all()


def encode_head(protocol: str) -> bytes:
    """Return the head of a stream that speaks `protocol`.

    Raises:
        ValueError: Not 1..64 printable ASCII characters.
    """
    name = protocol.encode("utf-8")
    _protocol_name(name)
    return bytes([len(name)]) + name


def _protocol_name(name: bytes) -> str:
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
