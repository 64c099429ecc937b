"""One encrypted connection to one peer: QUIC over a path that the puncture has proved.

A path is a socket and an endpoint on which authenticated probes went both ways. This module does
not know it: datagrams are pushed in with `receive_datagrams`, and go out through `send`, behind
which `path_set.py` keeps the paths. QUIC itself always sees one constant address, so that its own
migration never competes with the node's.

    Stream ── Multiplexer ── Lane, Lane, ... ── Connection ── send
    (stream.py)  frames      QUIC, identity     tasks, time

In a private swarm the handshake is sealed under the swarm's key (`swarm_key.py`).

The first lane is there from the handshake to the end, and is the connection as far as anybody else
can tell. While packets are lost, bulk gets lanes of its own (lane_set.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import trio

from natswarm.errors import ConnectionLost, HandshakeFailed
from natswarm.identity import Identity, PeerId
from natswarm.net.frames import FrameKind, ProtocolViolation
from natswarm.net.lane import Lane, LaneSettings, ProofRefused
from natswarm.net.lane_set import LaneSet
from natswarm.net.multiplexer import Multiplexer
from natswarm.net.quic_engine import ENGINE_REFUSALS, QuicEngine
from natswarm.net.stream import Stream
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["Connection", "ConnectionStatistics", "Stream"]

# --- Specification: changing one of these changes the protocol ---

NAME_BYTES = 8
NAME_PURPOSE = b"name"

CLOSE_DONE = 0
CLOSE_REFUSED = 1
CLOSE_VIOLATION = 2

# --- Implementation ---

# How long `aclose` waits for the peer to acknowledge what streams have sent.
DRAIN_S = 5.0
MAX_REASON_CHARACTERS = 120

# What one turn may send on one lane before others get theirs, about half a millisecond of QUIC, and
# how much of it at once: each run wakes the receiver.
RUN_DATAGRAMS = 192
RUNS_A_TURN = 2


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """A connection in numbers. Counters run from its start and only grow."""

    lane_count: int
    """QUIC connections that lead to the peer: 1, or more since packets were lost."""
    rtt_s: float | None
    """Smoothed round trip; None before the first was measured."""
    congestion_window_bytes: int
    sent_datagram_count: int
    sent_bytes: int
    received_datagram_count: int
    received_bytes: int
    rejected_batch_count: int
    """Batches of datagrams that QUIC choked on: broken or forged."""
    lost_packet_count: int
    """Packets sent and then declared lost."""
    stream_count: int
    """Streams that are not over yet."""
    buffered_bytes: int
    """Received on streams and not read yet."""


class Connection:
    """A QUIC connection with one peer, both of whose ends have proved who they are.

    Nothing happens before `run`, except that a server keeps the first datagrams.

    Args:
        identity: Who we are.
        peer_id: Who must be at the other end.
        is_client: Whether this side opens; the two sides agree that the lower PeerId does.
        send: Takes datagrams for the path, in order, at once, without waiting. Also an attribute.
        rtt_s: Round trip of the path if the probes measured one; sets the first time-outs.
        max_datagram_bytes: What every path it will use carries, 1200..1452. QUIC does not look for
            more: qh3 would not notice that a later path carries less.
        keepalive_s: A connection that sent nothing for so long sends a PING, so that NATs on the
            way keep the mapping. Some forget after 15 s.
        idle_timeout_s: A peer silent for so long, although asked, is gone: a dead one is noticed
            within `keepalive_s + idle_timeout_s`. The smaller one of both sides counts.
        handshake_timeout_s: How long `run` waits for a proved peer.
        key_log: Where TLS secrets are written, for Wireshark; None: nowhere.
        stream_window_bytes: How far a stream's sender may be ahead of its reader here. Bounds
            throughput to one window a round trip, and memory to one window a stream that is read.
        may_stripe: Whether to ask for more lanes while packets are lost. The peer may all the same.
        swarm: Whose key it takes to shake hands.
    """

    def __init__(
        self,
        identity: Identity,
        peer_id: PeerId,
        *,
        is_client: bool,
        send: Callable[[Sequence[bytes]], None],
        rtt_s: float | None = None,
        max_datagram_bytes: int = 1200,
        keepalive_s: float = 10.0,
        idle_timeout_s: float = 20.0,
        handshake_timeout_s: float = 10.0,
        stream_window_bytes: int = 4 * 1024 * 1024,
        key_log: TextIO | None = None,
        may_stripe: bool = True,
        swarm: SwarmKey = OPEN_SWARM,
    ) -> None:
        self.send = send
        self._swarm = swarm
        self._settings = LaneSettings(
            identity, peer_id, is_client, rtt_s, max_datagram_bytes, idle_timeout_s, key_log
        )
        self._keepalive_s = keepalive_s
        self._handshake_timeout_s = handshake_timeout_s

        self._streams = Multiplexer(
            peer_id,
            is_client=is_client,
            window_bytes=stream_window_bytes,
            wake=self._wake_up,
            on_lane_note=self._on_lane_note,
        )
        self._lanes = LaneSet(self._settings, self._streams, may_stripe=may_stripe)

        self._wake = trio.Event()
        self._is_started = False
        self._give_up_at = 0.0
        self._drained = trio.Event()
        self._is_draining = False
        self._proved = trio.Event()
        self._closed = trio.Event()
        self._close_reason = ""
        self._is_terminated = False
        self._sent_datagram_count = 0
        self._sent_bytes = 0
        self._received_datagram_count = 0
        self._received_bytes = 0

    def __repr__(self) -> str:
        role = "client" if self._settings.is_client else "server"
        if self._closed.is_set():
            state = f"ended: {self._close_reason}"
        else:
            state = "connected" if self._first.is_proved else "connecting"
        return f"<Connection with {self.peer_id.short} ({role}, {state})>"

    @property
    def peer_id(self) -> PeerId:
        """Who is, or must prove to be, at the other end."""
        return self._settings.peer_id

    @property
    def _first(self) -> Lane:
        return self._lanes.first

    @property
    def close_reason(self) -> str | None:
        """Why the connection ended, for people to read; None while it has not."""
        return self._close_reason if self._closed.is_set() else None

    def statistics(self) -> ConnectionStatistics:
        """Return the numbers so far."""
        lanes = self._lanes.lanes
        engines = [lane.engine for lane in lanes if lane.engine is not None]
        return ConnectionStatistics(
            lane_count=len(lanes),
            rtt_s=engines[0].rtt_s if engines else None,
            congestion_window_bytes=sum(engine.congestion_window_bytes for engine in engines),
            sent_datagram_count=self._sent_datagram_count,
            sent_bytes=self._sent_bytes,
            received_datagram_count=self._received_datagram_count,
            received_bytes=self._received_bytes,
            rejected_batch_count=sum(lane.rejected_batch_count for lane in lanes),
            lost_packet_count=self._lanes.lost_packet_count,
            stream_count=self._streams.stream_count,
            buffered_bytes=self._streams.buffered_bytes,
        )

    # --- streams ---

    async def open_stream(self, protocol: str) -> Stream:
        """Open a stream; the peer's `accept_stream` returns its other end.

        Waits for the handshake, and while 2,048 streams that this side opened are not closed on
        both sides. Cancelled, no stream was opened.

        Args:
            protocol: What will be spoken on it: 1..64 printable ASCII characters.

        Raises:
            ConnectionLost: The connection has ended.
            trio.ClosedResourceError: This side closed it.
            ValueError: Not a name for a protocol.
        """
        return await self._streams.open(protocol)

    async def accept_stream(self) -> Stream:
        """Wait for a stream that the peer opened. Cancelled, none is lost.

        Any number of tasks may wait. Streams that arrived whole before the connection ended are
        still returned.

        Raises:
            ConnectionLost: The connection has ended.
            trio.ClosedResourceError: This side closed it.
        """
        return await self._streams.accept()

    async def wait_proved(self) -> bytes:
        """Wait until both ends have proved who they are; return a name for the connection.

        8 bytes that both ends derive from the handshake, and that no other connection has.
        """
        await self._proved.wait()
        assert self._first.engine is not None
        binding = self._first.engine.channel_binding()
        return hashlib.blake2s(binding, digest_size=NAME_BYTES, person=NAME_PURPOSE).digest()

    def suspend(self) -> None:
        """Let time-outs wait until `resume`: no path leads to the peer."""
        if self._first.is_proved and not self._closed.is_set():
            self._lanes.suspend()
            self._wake_up()

    def resume(self) -> None:
        """Send at once what QUIC holds back after losses: there is a new path, or the old again.

        QUIC itself would wait for its time-out, which has doubled with every try in vain.
        """
        if self._first.is_proved and not self._closed.is_set():
            self._lanes.resume(trio.current_time())
            self._wake_up()

    def abandon(self, reason: str) -> None:
        """End the connection without a word to the peer, who can't be reached. Idempotent."""
        self._lose(reason)
        self._wake_up()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, for whatever reason: see `close_reason`."""
        await self._closed.wait()

    async def aclose(self) -> None:
        """Wait until the peer has what streams have sent, at most 5 s, then close. Idempotent.

        Cancelled, it closes at once. `run` may go on for some round trips, to tell a peer that did
        not hear of the close.
        """
        try:
            if self._first.is_proved and not self._closed.is_set():
                self._is_draining = True
                self._wake_up()
                with trio.move_on_after(DRAIN_S):
                    await self._drained.wait()
            await trio.lowlevel.checkpoint()
        finally:
            self._close(CLOSE_DONE, "closed", "this side closed it", is_ours=True)

    # --- the driver ---

    def receive_datagrams(self, datagrams: list[bytes]) -> None:
        """Take QUIC datagrams that came in on the path. No bytes can make this raise."""
        now = trio.current_time()
        self._received_datagram_count += len(datagrams)
        self._received_bytes += sum(map(len, datagrams))
        datagrams = self._swarm.open_quic_untrusted(datagrams)
        for lane, batch in self._lanes.sort_untrusted(datagrams, now).items():
            lane.receive(batch, now)
            self._handle_lane(lane)
        self._wake_up()

    def _handle_lane(self, lane: Lane) -> None:
        """Take what a lane has brought, and what has become of it."""
        if self._closed.is_set() and lane is not self._first:
            return
        try:
            for data in lane.received():
                if not self._closed.is_set():
                    self._note_proved(lane)
                    self._streams.receive(lane, data)
            self._note_proved(lane)
        except ProofRefused as refusal:
            if not self._lanes.give_up(lane) and lane is self._first:
                self._close(CLOSE_REFUSED, "not the peer that was asked for", str(refusal))
        except ProtocolViolation as violation:
            if lane.is_proved or not self._lanes.give_up(lane):
                reason = f"the peer broke the protocol: {violation}"
                self._close(CLOSE_VIOLATION, str(violation), reason)
        is_needed = lane is self._first or lane.is_proved
        engine = lane.engine
        is_ending = engine is not None and engine.closing is not None
        is_the_end = is_needed and is_ending and not self._closed.is_set()
        if is_ending and not lane.is_proved and self._lanes.give_up(lane):
            is_the_end = False
        if is_the_end:
            assert engine is not None
            self._lose(_describe(engine, self._settings.idle_timeout_s))
        self._is_terminated |= self._first.is_terminated

    def _note_proved(self, lane: Lane) -> None:
        if lane.is_proved and not self._streams.has_lane(lane) and not self._closed.is_set():
            self._lanes.settle_on(lane)
            self._streams.add_lane(lane)
            self._proved.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the connection until it has ended; started once both ends are authenticated.

        Returns when the connection was closed or lost, which streams and `close_reason` tell.
        Cancelled, it sends the peer a close and ends the streams at once.

        Raises:
            HandshakeFailed: There was no connection: the wrong peer, silence, or TLS failed.
        """
        if self._is_started:
            raise RuntimeError("a connection runs once")
        self._is_started = True
        now = trio.current_time()
        self._give_up_at = now + self._handshake_timeout_s
        if self._settings.is_client:
            self._first.start(now)
        is_announced = False
        try:
            while True:
                has_more = self._flush()
                if self._first.is_proved and not is_announced:
                    is_announced = True
                    task_status.started()
                # A connection we closed stays until QUIC says so, to repeat the close to a peer
                # that missed it; a handshake that failed does not keep its caller waiting.
                if self._is_terminated or (self._closed.is_set() and not self._first.is_proved):
                    break
                if has_more:
                    await trio.lowlevel.checkpoint()
                else:
                    with trio.move_on_at(self._next_wake_at()):
                        await self._wake.wait()
                    self._wake = trio.Event()
                self._handle_time(trio.current_time())
            if not self._first.is_proved:
                raise HandshakeFailed(f"no connection with {self.peer_id}: {self._close_reason}")
        finally:
            self._close(CLOSE_DONE, "going away", "this side stopped")

    def _wake_up(self) -> None:
        self._wake.set()

    def _next_wake_at(self) -> float:
        wake_at = min(lane.timer_at for lane in self._driven_lanes)
        if not self._first.is_proved:
            wake_at = min(wake_at, self._give_up_at)
        elif not self._closed.is_set():
            sent_at = min(lane.last_sent_at for lane in self._lanes.lanes if lane.is_proved)
            wake_at = min(wake_at, sent_at + self._keepalive_s)
        return wake_at

    def _handle_time(self, now: float) -> None:
        for lane in self._driven_lanes:
            if now < lane.timer_at:
                continue
            try:
                lane.handle_timer(now)
            except ENGINE_REFUSALS as error:
                self._lose(f"QUIC failed: {error}")
            self._handle_lane(lane)
        if self._closed.is_set():
            return
        if not self._first.is_proved:
            if now >= self._give_up_at:
                self._close(
                    CLOSE_DONE,
                    "timed out",
                    f"no proof of who it is within {self._handshake_timeout_s:g} s; the path may "
                    "have closed again: puncture anew",
                )
            return
        for lane in self._lanes.lanes:
            if lane.is_proved and now >= lane.last_sent_at + self._keepalive_s:
                lane.ping(now)

    @property
    def _driven_lanes(self) -> list[Lane]:
        """Those that have something to do: after the close, the first, which tells of it."""
        if self._closed.is_set():
            return [self._first]
        return [*self._lanes.lanes, *self._lanes.rivals]

    def _flush(self) -> bool:
        """Send what QUIC has to send, once for everything that happened since the last time.

        Returns:
            Whether it is worth calling again: there was more than one turn may send.
        """
        now = trio.current_time()
        has_more = False
        for lane in self._driven_lanes:
            if lane.is_restless:
                has_more |= self._flush_lane(lane, now)
        if self._first.is_proved and not self._closed.is_set():
            self._lanes.stripe(now, self._sent_datagram_count)
            self._streams.on_flushed()
            if self._is_draining and all(lane.is_drained for lane in self._lanes.lanes):
                self._drained.set()
        return has_more

    def _flush_lane(self, lane: Lane, now: float) -> bool:
        for _ in range(RUNS_A_TURN):
            try:
                datagrams = lane.drain(now, RUN_DATAGRAMS, is_closing=self._closed.is_set())
            except ENGINE_REFUSALS as error:
                self._lose(f"QUIC failed: {error}")
                return False
            if not datagrams:
                lane.settle()
                return False
            self._sent_datagram_count += len(datagrams)
            self._sent_bytes += sum(map(len, datagrams))
            try:
                self.send(self._swarm.seal_quic(datagrams))
            except trio.ClosedResourceError:
                self._lose("the port under it was closed")
                return False
        return True

    def _on_lane_note(self, kind: FrameKind, connection_id: int, value: int) -> None:
        self._lanes.take_note(kind, connection_id, value, trio.current_time())

    # --- the end ---

    def _refuse(self, reason: str) -> None:
        self._close(CLOSE_REFUSED, "not the peer that was asked for", reason)

    def _close(self, code: int, told: str, reason: str, *, is_ours: bool = False) -> None:
        """End the connection and tell the peer `told`; does nothing where it has ended."""
        if self._closed.is_set():
            return
        if self._first.engine is None:
            self._is_terminated = True
        else:
            # QUIC repeats a close to a peer that goes on sending, for 3 time-outs, which qh3 counts
            # from the last activity: a PING makes that now, and has the peer send something. It
            # also flushes the end of a TLS handshake, without which the close can't be read.
            self._first.ping(trio.current_time())
            self._flush()
            self._first.close(code, told)
        self._end(reason, is_ours=is_ours)
        self._flush()

    def _lose(self, reason: str) -> None:
        """End the connection without a word: the peer knows, or can't be told."""
        self._is_terminated = True
        self._end(reason, is_ours=False)

    def _end(self, reason: str, *, is_ours: bool) -> None:
        if self._closed.is_set():
            return
        self._close_reason = reason
        self._closed.set()
        self._drained.set()
        name = self.peer_id.short

        def error() -> Exception:
            if is_ours:
                return trio.ClosedResourceError(f"the connection with {name}: {reason}")
            return ConnectionLost(f"the connection with {name} ended: {reason}")

        self._streams.end(error)
        self._wake_up()


def _describe(engine: QuicEngine, idle_timeout_s: float) -> str:
    """Return why QUIC ended the connection, for people to read."""
    closing = engine.closing
    assert closing is not None
    # What a peer says goes to terminals and logs: no control characters, no novels.
    reason = "".join(c for c in closing.reason_phrase[:MAX_REASON_CHARACTERS] if c.isprintable())
    if engine.is_closed_by_peer:
        return f"the peer closed it: {reason or closing.error_code}"
    if reason == "Idle timeout":
        return f"nothing came from the peer for {idle_timeout_s:g} s"
    return f"QUIC failed: {reason or closing.error_code}"
