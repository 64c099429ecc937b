"""One encrypted connection to one peer: QUIC over a path that the puncture has proved.

A path is a socket and an endpoint on which authenticated probes went both ways. This module does
not know it: datagrams are pushed in with `receive_datagrams`, and go out through `send`, behind
which `path_set.py` keeps the paths. QUIC itself always sees one constant address, so that its own
migration never competes with the node's.

Identity. Both ends prove the Ed25519 key that is their PeerId, and no stream exists before:
    1. The server's TLS certificate holds its key; the client compares it with the PeerId it wants.
    2. qh3 servers cannot ask for a certificate, so the client proves itself in the first bytes of
       stream 0: its key, and a signature over a tag, the server's key and a secret that both ends
       derive from the whole TLS transcript. Whoever sits in the middle has two transcripts.
    3. The server answers one byte, ACCEPTED, on stream 0.

In a private swarm what precedes all that is sealed under the swarm's key (`swarm_key.py`).

    proof, client to server, 96 bytes:  key 32 | signature 64
    then on stream 0, both ways:        frames of multiplexer.py

Source: RFC 9000 and 9001 (QUIC), RFC 8446 section 7.5 (exporter secret); qh3 2.1 is the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import trio
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import (
    ConnectionTerminated,
    HandshakeCompleted,
    QuicEvent,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

from natswarm.errors import ConnectionLost, DecodeError, HandshakeFailed
from natswarm.identity import SIGNATURE_BYTES, Identity, PeerId
from natswarm.net.multiplexer import QUIC_STREAM_ID, Multiplexer
from natswarm.net.quic_engine import ENGINE_REFUSALS, PEER_ADDRESS, QuicEngine
from natswarm.net.stream import ProtocolViolation, Stream
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["Connection", "ConnectionStatistics", "Stream"]

# --- Specification: changing one of these changes the protocol ---

ALPN = "natswarm/1"
PROOF_TAG = b"natswarm quic client\0"
PROOF_BYTES = 32 + SIGNATURE_BYTES
ACCEPTED = b"\x01"
NAME_BYTES = 8
NAME_PURPOSE = b"name"
# SubjectPublicKeyInfo of an Ed25519 key (RFC 8410): these 12 bytes, then the key.
ED25519_KEY_INFO = bytes.fromhex("302a300506032b6570032100")

CLOSE_DONE = 0
CLOSE_REFUSED = 1
CLOSE_VIOLATION = 2

# --- Implementation ---

MIN_INITIAL_BYTES = 1200
INITIAL_RTT_S = 0.333  # RFC 9002 section 6.2.2

# Datagrams of the handshake and of the close go out twice. QUIC repeats lost ones, but only after 3
# round trips, then 6, then 12. Of 1,000 handshakes over 300 ms and 10 % loss, half took 0.6 s and
# 99 % at most 1.5 s; sent once, as QUIC does it, 1.0 and 5.5 s. It costs 8 kB a connection.
FRAGILE_COPIES = 2
# A fresh attempt ends that back-off: at 30 % loss, sent once, 24 of 1,000 took over 60 s without it
# and 1 with it; sent twice, 1 and none.
MIN_ATTEMPT_S = 3.0
ATTEMPT_ROUND_TRIPS = 10
MAX_ATTEMPTS_SEEN = 16
# A side's part of the handshake is 4 datagrams at the most, sent twice.
MAX_EARLY_DATAGRAMS = 16

# QUIC's own flow control: what may lie here waiting for a lost packet, so 50 MB/s over 300 ms.
QUIC_WINDOW_BYTES = 16 * 1024 * 1024
# Datagrams under one key. AES-GCM may have 2^23 (RFC 9001 section 6.6), 10 GB; qh3 does not count.
KEY_DATAGRAMS = 1 << 22
# How long `aclose` waits for the peer to acknowledge what streams have sent.
DRAIN_S = 5.0
# RFC 9002 section 6.1.2; also how soon a timer may fire again that did not move when it fired.
TIMER_GRANULARITY_S = 0.001
MAX_REASON_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """A connection in numbers. Counters run from its start and only grow."""

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
        swarm: SwarmKey = OPEN_SWARM,
    ) -> None:
        self.send = send
        self._swarm = swarm
        self._identity = identity
        self._peer_id = peer_id
        self._is_client = is_client
        self._initial_rtt_s = INITIAL_RTT_S if rtt_s is None else max(rtt_s, TIMER_GRANULARITY_S)
        self._attempt_s = max(MIN_ATTEMPT_S, ATTEMPT_ROUND_TRIPS * self._initial_rtt_s)
        self._max_datagram_bytes = max_datagram_bytes
        self._keepalive_s = keepalive_s
        self._idle_timeout_s = idle_timeout_s
        self._handshake_timeout_s = handshake_timeout_s
        self._window_bytes = stream_window_bytes
        self._key_log = key_log

        self._wake = trio.Event()
        self._is_started = False
        self._engine: QuicEngine | None = None
        self._seen_attempts: deque[bytes] = deque(maxlen=MAX_ATTEMPTS_SEEN)
        self._early: deque[bytes] = deque(maxlen=MAX_EARLY_DATAGRAMS)
        self._attempt_at = 0.0
        self._give_up_at = 0.0
        self._handled_at = 0.0
        self._is_encrypted = False
        self._is_authenticated = False
        self._is_settled = False
        self._proof = bytearray()

        self._streams = Multiplexer(
            peer_id, is_client=is_client, window_bytes=stream_window_bytes, wake=self._wake_up
        )
        self._drained = trio.Event()
        self._is_draining = False
        self._proved = trio.Event()
        self._closed = trio.Event()
        self._close_reason = ""
        self._is_terminated = False
        self._last_sent_at = 0.0
        self._key_datagram_count = 0
        self._sent_datagram_count = 0
        self._sent_bytes = 0
        self._received_datagram_count = 0
        self._received_bytes = 0
        self._rejected_batch_count = 0

    def __repr__(self) -> str:
        role = "client" if self._is_client else "server"
        if self._closed.is_set():
            state = f"ended: {self._close_reason}"
        else:
            state = "connected" if self._is_authenticated else "connecting"
        return f"<Connection with {self._peer_id.short} ({role}, {state})>"

    @property
    def peer_id(self) -> PeerId:
        """Who is, or must prove to be, at the other end."""
        return self._peer_id

    @property
    def close_reason(self) -> str | None:
        """Why the connection ended, for people to read; None while it has not."""
        return self._close_reason if self._closed.is_set() else None

    def statistics(self) -> ConnectionStatistics:
        """Return the numbers so far."""
        engine = self._engine
        return ConnectionStatistics(
            rtt_s=None if engine is None else engine.rtt_s,
            congestion_window_bytes=0 if engine is None else engine.congestion_window_bytes,
            sent_datagram_count=self._sent_datagram_count,
            sent_bytes=self._sent_bytes,
            received_datagram_count=self._received_datagram_count,
            received_bytes=self._received_bytes,
            rejected_batch_count=self._rejected_batch_count,
            lost_packet_count=0 if engine is None else engine.lost_packet_count,
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
        assert self._engine is not None
        binding = self._engine.channel_binding()
        return hashlib.blake2s(binding, digest_size=NAME_BYTES, person=NAME_PURPOSE).digest()

    def resume(self) -> None:
        """Send at once what QUIC holds back after losses: there is a new path, or the old again.

        QUIC itself would wait for its time-out, which has doubled with every try in vain.
        """
        if self._is_authenticated and not self._closed.is_set() and self._engine is not None:
            with contextlib.suppress(*ENGINE_REFUSALS):
                self._engine.expire_probe_timer(trio.current_time())
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
            if self._is_authenticated and not self._closed.is_set():
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
        if self._is_encrypted:
            self._feed(datagrams, now)
        else:
            self._feed_early(datagrams, now)
        self._handle_events()
        self._wake_up()

    def _feed(self, datagrams: list[bytes], now: float) -> None:
        if self._engine is None:
            return
        try:
            self._engine.feed(datagrams, now)
        except Exception:
            # Malformed datagrams are as good as lost. If they were the peer's own, so is the
            # connection, and the time-outs will say so.
            self._rejected_batch_count += 1

    def _feed_early(self, datagrams: list[bytes], now: float) -> None:
        """Feed datagrams of the handshake, again with each that follows.

        Every flight has the keys to the next, and where they swap places qh3 drops what it has no
        keys for yet; RFC 9001 section 5.7 would let it wait. QUIC knows packets it has seen, so
        offering all of them anew costs microseconds, where the sender's time-out costs a second.
        """
        self._early.extend(datagrams)
        if not self._is_client:
            self._watch_for_attempts(datagrams, now)
        for _ in range(2):  # once for the keys, once for what waited for them
            for data in self._early:
                self._feed([data], now)
        if self._engine is not None and self._engine.is_encrypted:
            self._early.clear()

    def _watch_for_attempts(self, datagrams: list[bytes], now: float) -> None:
        """Make an engine for each new attempt of the client: the latest counts until TLS is done.

        An attempt is known by the connection id that the client made up (RFC 9000 section 7.2).
        One that was replaced must not come back when its datagrams arrive late, or twice.
        """
        for data in datagrams:
            attempt = _initial_connection_id_untrusted(data)
            if attempt is None or attempt in self._seen_attempts:
                continue
            if self._engine is not None and attempt == self._engine.host_cid:
                continue  # an Initial that answers ours
            engine = self._new_engine(attempt)
            with contextlib.suppress(Exception):  # as in _feed
                engine.feed([data], now)
            if engine.has_authentic_packet:  # else garbage with the right first byte
                self._seen_attempts.append(attempt)
                self._engine = engine

    def _new_engine(self, attempt: bytes | None = None) -> QuicEngine:
        configuration = QuicConfiguration(
            alpn_protocols=[ALPN],
            idle_timeout=self._idle_timeout_s,
            initial_rtt=self._initial_rtt_s,
            max_datagram_size=self._max_datagram_bytes,
            probe_datagram_size=False,
            max_stream_data=QUIC_WINDOW_BYTES,
            max_data=QUIC_WINDOW_BYTES,
        )
        if self._key_log is not None:
            configuration.secrets_log_file = self._key_log
        if self._is_client:
            return QuicEngine.client(configuration)
        assert attempt is not None
        return QuicEngine.server(configuration, self._identity, attempt)

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
        if self._is_client:
            self._start_attempt(now)
        is_announced = False
        try:
            while True:
                self._flush()
                if self._is_authenticated and not is_announced:
                    is_announced = True
                    task_status.started()
                # A connection we closed stays until QUIC says so, to repeat the close to a peer
                # that missed it; a handshake that failed does not keep its caller waiting.
                if self._is_terminated or (self._closed.is_set() and not self._is_authenticated):
                    break
                with trio.move_on_at(self._next_wake_at()):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._handle_time(trio.current_time())
            if not self._is_authenticated:
                raise HandshakeFailed(f"no connection with {self._peer_id}: {self._close_reason}")
        finally:
            self._close(CLOSE_DONE, "going away", "this side stopped")

    def _wake_up(self) -> None:
        self._wake.set()

    def _start_attempt(self, now: float) -> None:
        self._attempt_at = now
        self._engine = self._new_engine()
        self._engine.connect(PEER_ADDRESS, now)

    def _next_wake_at(self) -> float:
        times = [math.inf]
        if self._engine is not None and (timer := self._engine.get_timer()) is not None:
            # A timer that has just fired and did not move must not make us spin.
            is_stuck = timer <= self._handled_at
            times.append(self._handled_at + TIMER_GRANULARITY_S if is_stuck else timer)
        if not self._is_authenticated:
            times.append(self._give_up_at)
            if self._is_client and not self._is_encrypted:
                times.append(self._attempt_at + self._attempt_s)
        elif not self._closed.is_set():
            times.append(self._last_sent_at + self._keepalive_s)
        return min(times)

    def _handle_time(self, now: float) -> None:
        self._handled_at = now
        engine = self._engine
        if engine is not None and (timer := engine.get_timer()) is not None and timer <= now:
            try:
                engine.handle_timer(now)
            except ENGINE_REFUSALS as error:
                self._lose(f"QUIC failed: {error}")
            self._handle_events()
        if self._closed.is_set():
            return
        if not self._is_authenticated:
            if now >= self._give_up_at:
                self._close(
                    CLOSE_DONE,
                    "timed out",
                    f"no proof of who it is within {self._handshake_timeout_s:g} s; the path may "
                    "have closed again: puncture anew",
                )
            elif (
                self._is_client
                and not self._is_encrypted
                and now >= self._attempt_at + self._attempt_s
            ):
                self._start_attempt(now)
        elif now >= self._last_sent_at + self._keepalive_s and engine is not None:
            self._last_sent_at = now  # also where congestion control holds the PING back
            with contextlib.suppress(*ENGINE_REFUSALS):
                engine.send_ping(0)

    def _flush(self) -> None:
        """Send what QUIC has to send, once for everything that happened since the last time."""
        engine = self._engine
        if engine is None:
            return
        now = trio.current_time()
        try:
            datagrams = engine.drain(now)
        except ENGINE_REFUSALS as error:
            self._lose(f"QUIC failed: {error}")
            return
        if datagrams:
            self._key_datagram_count += len(datagrams)
            if self._key_datagram_count >= KEY_DATAGRAMS and engine.try_update_keys():
                self._key_datagram_count = 0
            if not self._is_settled or self._closed.is_set():
                datagrams = [data for data in datagrams for _ in range(FRAGILE_COPIES)]
            # The server's yes goes out after the server itself is content, and counts as well.
            self._is_settled = self._is_authenticated
            self._last_sent_at = now
            self._sent_datagram_count += len(datagrams)
            self._sent_bytes += sum(map(len, datagrams))
            try:
                self.send(self._swarm.seal_quic(datagrams))
            except trio.ClosedResourceError:
                self._lose("the port under it was closed")
        self._streams.on_flushed()
        if self._is_draining and not self._closed.is_set() and engine.is_drained:
            self._drained.set()

    def _handle_events(self) -> None:
        engine = self._engine
        if engine is None:
            return
        try:
            while (event := engine.next_event()) is not None:
                if isinstance(event, ConnectionTerminated):
                    self._is_terminated = True
                elif not self._closed.is_set():
                    self._handle_event(engine, event)
        except ProtocolViolation as violation:
            self._close(
                CLOSE_VIOLATION, str(violation), f"the peer broke the protocol: {violation}"
            )
        if engine.closing is not None and not self._closed.is_set():
            self._lose(_describe(engine, self._idle_timeout_s))
        self._streams.on_flushed()

    def _handle_event(self, engine: QuicEngine, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            if event.stream_id != QUIC_STREAM_ID or event.end_stream:
                raise ProtocolViolation("there is one QUIC stream, without end")
            if self._is_authenticated:
                self._streams.receive(event.data)
            else:
                self._authenticate(engine, event.data)
        elif isinstance(event, StreamReset | StopSendingReceived):
            raise ProtocolViolation("there is one QUIC stream, without end")
        elif isinstance(event, HandshakeCompleted):
            self._is_encrypted = True
            if self._is_client:
                self._check_server_and_prove(engine)

    # --- who is there ---

    def _check_server_and_prove(self, engine: QuicEngine) -> None:
        key_info = engine.peer_key_info
        if key_info != ED25519_KEY_INFO + self._peer_id.key:
            self._refuse("it proved to be someone else")
            return
        signature = self._identity.sign(self._proof_message(engine, self._peer_id))
        engine.send_stream_data(QUIC_STREAM_ID, self._identity.peer_id.key + signature)

    def _proof_message(self, engine: QuicEngine, server: PeerId) -> bytes:
        return PROOF_TAG + server.key + engine.channel_binding()

    def _authenticate(self, engine: QuicEngine, data: bytes) -> None:
        """Take the first bytes of the QUIC stream: the client's proof, or the server's yes."""
        self._proof += data
        expected_bytes = len(ACCEPTED) if self._is_client else PROOF_BYTES
        if len(self._proof) < expected_bytes:
            return
        proof = bytes(self._proof[:expected_bytes])
        rest = bytes(self._proof[expected_bytes:])
        self._proof.clear()
        if self._is_client:
            if proof != ACCEPTED:
                raise ProtocolViolation("the server's answer to the proof")
        else:
            try:
                client = PeerId.decode_untrusted(proof[:-SIGNATURE_BYTES])
                client.verify_untrusted(
                    proof[-SIGNATURE_BYTES:],
                    self._proof_message(engine, self._identity.peer_id),
                )
            except DecodeError:
                self._refuse("its proof is not its own")
                return
            if client != self._peer_id:
                self._refuse(f"it proved to be {client}")
                return
            engine.send_stream_data(QUIC_STREAM_ID, ACCEPTED)
        self._is_authenticated = True
        self._proved.set()
        self._streams.start(engine)
        self._streams.receive(rest)

    # --- the end ---

    def _refuse(self, reason: str) -> None:
        self._close(CLOSE_REFUSED, "not the peer that was asked for", reason)

    def _close(self, code: int, told: str, reason: str, *, is_ours: bool = False) -> None:
        """End the connection and tell the peer `told`; does nothing where it has ended."""
        if self._closed.is_set():
            return
        if (engine := self._engine) is None:
            self._is_terminated = True
        else:
            # QUIC repeats a close to a peer that goes on sending, for 3 time-outs, which qh3 counts
            # from the last activity: a PING makes that now, and has the peer send something. It
            # also flushes the end of a TLS handshake, without which the close can't be read.
            with contextlib.suppress(*ENGINE_REFUSALS):
                engine.send_ping(0)
            self._flush()
            engine.close(code, reason_phrase=told)
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

        def error() -> Exception:
            if is_ours:
                return trio.ClosedResourceError(
                    f"the connection with {self._peer_id.short}: {reason}"
                )
            return ConnectionLost(f"the connection with {self._peer_id.short} ended: {reason}")

        self._streams.end(error)
        self._wake_up()


def _initial_connection_id_untrusted(data: bytes) -> bytes | None:
    """Return the connection id that a client's Initial packet is for; None for other datagrams.

    RFC 9000 section 17.2.2: flags 1 | version 4 | length 1 | destination connection id 8..20 | ...
    """
    if len(data) < MIN_INITIAL_BYTES or data[0] & 0xF0 != 0xC0 or data[1:5] != b"\0\0\0\x01":
        return None
    length = data[5]
    return bytes(data[6 : 6 + length]) if 8 <= length <= 20 else None


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
