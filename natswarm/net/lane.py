"""One QUIC connection of the few that may lead to a peer: handshake, proof, and what it carries.

A `Connection` (quic.py) has one lane, or more while packets are lost. A lane is a synchronous
object: datagrams and the time are pushed in, datagrams and bytes of its one QUIC stream come out.

Identity. Both ends prove the Ed25519 key that is their PeerId, and nothing is taken before:
    1. The server's TLS certificate holds its key; the client compares it with the PeerId it wants.
    2. The client proves itself in the first bytes of stream 0 (proof.py).
    3. The server answers one byte, ACCEPTED, on stream 0. What follows are frames (frames.py).

Source: RFC 9000 and 9001 (QUIC); qh3 2.1 is the engine. Knows neither paths, streams nor tasks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import (
    ConnectionTerminated,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId
from natswarm.net.delay_bound import DelayBound
from natswarm.net.frames import QUIC_STREAM_ID, ProtocolViolation
from natswarm.net.proof import (
    ACCEPTED,
    PROOF_BYTES,
    is_key_of,
    make_proof,
    proved_client_untrusted,
)
from natswarm.net.quic_engine import ENGINE_REFUSALS, PEER_ADDRESS, QuicEngine
from natswarm.net.reassembly import MIN_PIECE_BYTES

__all__ = [
    "CONNECTION_ID_BYTES",
    "Lane",
    "LaneSettings",
    "ProofRefused",
    "initial_connection_id_untrusted",
]

# --- Specification: changing one of these changes the protocol ---

ALPN = "natswarm/2"
CONNECTION_ID_BYTES = 8

# --- Implementation ---

MIN_INITIAL_BYTES = 1200
INITIAL_RTT_S = 0.333  # RFC 9002 section 6.2.2
# RFC 9002 section 6.1.2; also how soon a timer may fire again that did not move when it fired.
TIMER_GRANULARITY_S = 0.001

# Datagrams of the handshake and of the close go out twice. QUIC repeats lost ones, but only after 3
# round trips, then 6, then 12. Of 1,000 handshakes over 300 ms and 10 % loss, half took 0.6 s and
# 99 % at most 1.5 s; sent once, as QUIC does it, 1.0 and 5.5 s. It costs 8 kB a connection.
FRAGILE_COPIES = 2
# A fresh attempt ends that back-off: at 30 % loss, sent once, 24 of 1,000 took over 60 s without it
# and 1 with it; sent twice, 1 and none.
MIN_ATTEMPT_S = 3.0
ATTEMPT_ROUND_TRIPS = 10
# A side's part of the handshake is 4 datagrams at the most, sent twice.
MAX_EARLY_DATAGRAMS = 16

# QUIC's own flow control: what may lie here waiting for a lost packet, so 50 MB/s over 300 ms.
QUIC_WINDOW_BYTES = 16 * 1024 * 1024
# Datagrams under one key. AES-GCM may have 2^23 (RFC 9001 section 6.6), 10 GB; qh3 does not count.
KEY_DATAGRAMS = 1 << 22

# After a change of paths. The peer changes within a round trip; at 10 % loss each way eight
# questions all fail once in 600,000.
NUDGES = 8
NUDGE_MIN_S, NUDGE_ROUND_TRIPS = 0.1, 1.5
# Each question doubles the time-out after which QUIC itself asks; beyond this it is left alone.
NUDGED_MAX_S = 60.0

# What may wait in QUIC for its first transmission: enough to fill the path while the application is
# woken, and no more, since whatever is sent next waits behind it. Bulk may have less than messages.
MIN_SEND_BUFFER_BYTES = 64 * 1024
MAX_SEND_BUFFER_BYTES = 512 * 1024
MIN_BULK_BUFFER_BYTES = 16 * 1024
# Bulk's while there are messages. On loopback 512 KiB made messages take 6 times as long as without
# bulk, 256 KiB 3.7 times, 128 KiB 2.4 times at three quarters of the throughput.
MAX_HELD_BUFFER_BYTES = 256 * 1024
# Where nobody sends messages there is nobody to be held back for.
MIN_HELD_S = 1.0
HELD_ROUND_TRIPS = 10


class ProofRefused(Exception):
    """Somebody else is at the other end; never leaves natswarm.net."""


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """What all lanes of a connection have in common."""

    identity: Identity
    peer_id: PeerId
    is_client: bool
    rtt_s: float | None
    max_datagram_bytes: int
    idle_timeout_s: float
    key_log: TextIO | None = None

    @property
    def initial_rtt_s(self) -> float:
        """Round trip to begin with."""
        return INITIAL_RTT_S if self.rtt_s is None else max(self.rtt_s, TIMER_GRANULARITY_S)


class Lane:
    """One QUIC connection and the proof of who is at its other end.

    Args:
        settings: Shared by all lanes.
        attempt: The connection id of the only attempt of the handshake there may be; None on a
            client's first lane, which begins anew when nothing comes back, and on the lane of a
            server that has heard of no attempt.

    Attributes:
        engine: QUIC; None on a server that heard of no client yet.
        connection_id: What the peer's datagrams are addressed to, once it knows.
        is_proved: Whether both ends have proved who they are.
        is_terminated: Whether QUIC is done; nothing comes out any more.
        last_sent_at: When the last datagram left.
        rejected_batch_count: Batches of datagrams that QUIC choked on.
        bound: How much bulk may be under way beside messages.
        has_messages: Set where a message goes out on any lane: for a while, bulk keeps to `bound`.
        is_restless: Whether something has happened since `settle`.
        timer_at: When `handle_timer` has something to do, as of `settle`; infinity for never.
    """

    def __init__(self, settings: LaneSettings, *, attempt: bytes | None = None) -> None:
        self.engine: QuicEngine | None = None
        self.connection_id = os.urandom(CONNECTION_ID_BYTES)
        self.is_proved = False
        self.is_terminated = False
        self.last_sent_at = 0.0
        self.rejected_batch_count = 0
        self.bound = DelayBound()
        self.has_messages = False
        self.timer_at = math.inf
        self.is_restless = False
        self._settings = settings
        self._only_attempt = attempt
        self._early: deque[bytes] = deque(maxlen=MAX_EARLY_DATAGRAMS)
        self._attempt_until = math.inf
        self._handled_at = 0.0
        self._is_encrypted = False
        self._is_settled = False
        self._proof = bytearray()
        self._in_flight_bytes = 0
        self._held_until = -math.inf
        self._is_held = False
        self._key_datagram_count = 0
        self._received_at = 0.0
        self._is_suspended = False
        self._nudges_left = 0
        self._nudge_at = math.inf

    # --- the handshake ---

    def start(self, now: float) -> None:
        """Begin an attempt of the handshake, as the client."""
        settings = self._settings
        if self._only_attempt is None:
            attempt_s = max(MIN_ATTEMPT_S, ATTEMPT_ROUND_TRIPS * settings.initial_rtt_s)
            self._attempt_until = now + attempt_s
        self.engine = QuicEngine.client(self._configuration(), self._only_attempt)
        self.engine.host_cid = self.connection_id
        self.engine.connect(PEER_ADDRESS, now)
        self.is_restless = True

    def _configuration(self) -> QuicConfiguration:
        settings = self._settings
        configuration = QuicConfiguration(
            alpn_protocols=[ALPN],
            idle_timeout=settings.idle_timeout_s,
            initial_rtt=settings.initial_rtt_s,
            max_datagram_size=settings.max_datagram_bytes,
            probe_datagram_size=False,
            max_stream_data=QUIC_WINDOW_BYTES,
            max_data=QUIC_WINDOW_BYTES,
        )
        if settings.key_log is not None:
            configuration.secrets_log_file = settings.key_log
        return configuration

    def receive(self, datagrams: list[bytes], now: float) -> None:
        """Take QUIC datagrams. No bytes can make this raise; `received` tells what they held."""
        self.is_restless = True
        self._received_at = now
        if self._is_encrypted:
            self._feed(datagrams, now)
        else:
            self._feed_early(datagrams, now)

    def _feed(self, datagrams: list[bytes], now: float) -> None:
        if self.engine is None:
            return
        try:
            self.engine.feed(datagrams, now)
        except Exception:
            # Malformed datagrams are as good as lost. If they were the peer's own, so is the
            # connection, and the time-outs will say so.
            self.rejected_batch_count += 1
        in_flight_bytes = self.engine.bytes_in_flight
        delivered_bytes = self._in_flight_bytes - in_flight_bytes
        self._in_flight_bytes = in_flight_bytes
        rtt_s = self.engine.latest_rtt_s
        if self.has_messages:
            self.has_messages = False
            self._held_until = now + max(MIN_HELD_S, HELD_ROUND_TRIPS * (rtt_s or 0.0))
        self._is_held = now < self._held_until
        self.bound.on_delivered(delivered_bytes, rtt_s, now, is_held=self._is_held)

    def _feed_early(self, datagrams: list[bytes], now: float) -> None:
        """Feed datagrams of the handshake, again with each that follows.

        Every flight has the keys to the next, and where they swap places qh3 drops what it has no
        keys for yet; RFC 9001 section 5.7 would let it wait. QUIC knows packets it has seen, so
        offering all of them anew costs microseconds, where the sender's time-out costs a second.
        """
        self._early.extend(datagrams)
        if not self._settings.is_client and self.engine is None:
            self._answer_attempt(datagrams, now)
        for _ in range(2):  # once for the keys, once for what waited for them
            for data in self._early:
                self._feed([data], now)
        if self.engine is not None and self.engine.is_encrypted:
            self._early.clear()

    def _answer_attempt(self, datagrams: list[bytes], now: float) -> None:
        """Make an engine once an Initial of the client's attempt is there.

        An attempt is known by the connection id that the client made up (RFC 9000 section 7.2).
        """
        for data in datagrams:
            attempt = initial_connection_id_untrusted(data)
            if attempt is None or attempt != self._only_attempt:
                continue
            engine = QuicEngine.server(self._configuration(), self._settings.identity, attempt)
            engine.host_cid = self.connection_id
            with contextlib.suppress(Exception):  # as in _feed
                engine.feed([data], now)
            if engine.has_authentic_packet:  # else garbage with the right first byte
                self.engine = engine
                return

    # --- what comes in ---

    def received(self) -> Iterator[bytes]:
        """Yield what came in on the QUIC stream since the last time, after the proof.

        Raises:
            ProtocolViolation: The peer broke a rule.
            ProofRefused: Somebody else is there.
        """
        engine = self.engine
        if engine is None:
            return
        while (event := engine.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                if event.stream_id != QUIC_STREAM_ID or event.end_stream:
                    raise ProtocolViolation("there is one QUIC stream, without end")
                if self.is_proved:
                    yield event.data
                elif rest := self._authenticate(engine, event.data):
                    yield rest
            elif isinstance(event, StreamReset | StopSendingReceived):
                raise ProtocolViolation("there is one QUIC stream, without end")
            elif isinstance(event, HandshakeCompleted):
                self._is_encrypted = True
                if self._settings.is_client:
                    self._check_server_and_prove(engine)
            elif isinstance(event, ConnectionTerminated):
                self.is_terminated = True

    def _check_server_and_prove(self, engine: QuicEngine) -> None:
        settings = self._settings
        if not is_key_of(engine.peer_key_info, settings.peer_id):
            raise ProofRefused("it proved to be someone else")
        proof = make_proof(settings.identity, settings.peer_id, engine.channel_binding())
        engine.send_stream_data(QUIC_STREAM_ID, proof)

    def _authenticate(self, engine: QuicEngine, data: bytes) -> bytes:
        """Take the first bytes of the QUIC stream, proof or yes; return what follows them."""
        self._proof += data
        expected_bytes = len(ACCEPTED) if self._settings.is_client else PROOF_BYTES
        if len(self._proof) < expected_bytes:
            return b""
        proof = bytes(self._proof[:expected_bytes])
        rest = bytes(self._proof[expected_bytes:])
        self._proof.clear()
        if self._settings.is_client:
            if proof != ACCEPTED:
                raise ProtocolViolation("the server's answer to the proof")
        else:
            self._check_client(engine, proof)
            engine.send_stream_data(QUIC_STREAM_ID, ACCEPTED)
        self.is_proved = True
        return rest

    def _check_client(self, engine: QuicEngine, proof: bytes) -> None:
        settings = self._settings
        try:
            client = proved_client_untrusted(
                proof, settings.identity.peer_id, engine.channel_binding()
            )
        except DecodeError as error:
            raise ProofRefused("its proof is not its own") from error
        if client != settings.peer_id:
            raise ProofRefused(f"it proved to be {client}")

    # --- time ---

    def settle(self) -> None:
        """Look when to wake up next, after all that there was to do was done."""
        timer = self._nudge_at if self._is_encrypted else self._attempt_until
        due = None if self.engine is None or self._is_suspended else self.engine.get_timer()
        if due is not None:
            # A timer that has just fired and did not move must not make us spin.
            is_stuck = due <= self._handled_at
            timer = min(timer, self._handled_at + TIMER_GRANULARITY_S if is_stuck else due)
        self.timer_at = timer
        self.is_restless = False

    def handle_timer(self, now: float) -> None:
        """Do what is due.

        Raises:
            RuntimeError: The engine failed inside.
            ValueError: The same.
        """
        self._handled_at = now
        self.is_restless = True
        engine = self.engine
        if engine is not None and not self._is_suspended:
            due = engine.get_timer()
            if due is not None and due <= now:
                engine.handle_timer(now)
        if now >= self._nudge_at:
            self._nudge_at = math.inf
            if engine is not None and engine.is_unsure:
                self._nudge(now)
        if not self._is_encrypted and now >= self._attempt_until:
            self.start(now)

    def ping(self, now: float) -> None:
        """Have the peer acknowledge something."""
        self.last_sent_at = now  # also where congestion control holds the PING back
        self.is_restless = True
        if self.engine is not None:
            with contextlib.suppress(*ENGINE_REFUSALS):
                self.engine.send_ping(0)

    def suspend(self) -> None:
        """Let QUIC's time-outs wait: no path leads to the peer, and they would double in vain."""
        self._is_suspended = True
        self.is_restless = True

    def resume(self, now: float) -> None:
        """Send at once what QUIC holds back after losses, and learn the path anew."""
        self._is_suspended = False
        self.bound.forget()
        self._nudges_left = NUDGES
        self._nudge(now)

    def _nudge(self, now: float) -> None:
        """Have QUIC ask what has arrived, and ask again soon, until it knows.

        Its own next question would come after twice the time-out that it has doubled all along; and
        an answer may well be lost: the peer may be about to change to the new path only now.
        """
        engine = self.engine
        if engine is None:
            return
        self.is_restless = True
        until = min(now + NUDGED_MAX_S, self._received_at + self._settings.idle_timeout_s)
        with contextlib.suppress(*ENGINE_REFUSALS):
            engine.expire_probe_timer(now, until)
        self._nudges_left -= 1
        pause_s = max(NUDGE_MIN_S, NUDGE_ROUND_TRIPS * (engine.rtt_s or 0.0))
        self._nudge_at = now + pause_s if self._nudges_left > 0 else math.inf

    # --- what goes out ---

    def write(self, *parts: bytes | memoryview) -> None:
        """Queue bytes of the QUIC stream.

        Raises:
            RuntimeError: QUIC has ended.
            ValueError: The same.
        """
        assert self.engine is not None, "nothing is written before the handshake is done"
        self.is_restless = True
        for part in parts:
            if part:
                self.engine.send_stream_data(QUIC_STREAM_ID, part)

    def close(self, code: int, told: str) -> None:
        """Have QUIC tell the peer that it is over."""
        self._is_suspended = False  # its time-outs lead to the end
        self.is_restless = True
        if self.engine is not None:
            self.engine.close(code, reason_phrase=told)

    def drain(self, now: float, count: int, *, is_closing: bool) -> list[bytes]:
        """Return the next `count` datagrams to send, fewer where there are no more.

        Raises:
            RuntimeError: The engine failed inside.
            ValueError: The same.
        """
        engine = self.engine
        if engine is None or not (datagrams := engine.drain(now, count)):
            return []
        self.last_sent_at = now
        self._in_flight_bytes = engine.bytes_in_flight
        self._key_datagram_count += len(datagrams)
        if self._key_datagram_count >= KEY_DATAGRAMS and engine.try_update_keys():
            self._key_datagram_count = 0
        if not self._is_settled or is_closing:
            datagrams = [data for data in datagrams for _ in range(FRAGILE_COPIES)]
        # The server's yes goes out after the server itself is content, and counts as well.
        self._is_settled = self.is_proved
        return datagrams

    @property
    def message_room(self) -> int:
        """How many bytes of messages QUIC should be given now; 0 or less for none."""
        assert self.engine is not None
        limit = min(
            max(self.engine.congestion_window_bytes, MIN_SEND_BUFFER_BYTES), MAX_SEND_BUFFER_BYTES
        )
        return limit - self.engine.queued_bytes

    @property
    def bulk_room(self) -> int:
        """How many bytes of bulk QUIC should be given now; 0 where it is not worth it."""
        engine = self.engine
        assert engine is not None
        half_window = engine.congestion_window_bytes // 2
        limit = min(max(half_window, MIN_BULK_BUFFER_BYTES), MAX_SEND_BUFFER_BYTES)
        room = limit
        if self._is_held or self.has_messages:
            bound = int(self.bound.limit_bytes)
            limit = min(limit, bound, MAX_HELD_BUFFER_BYTES)
            room = min(limit, bound - engine.bytes_in_flight)
        room -= engine.queued_bytes
        # In large portions, since each costs both sides a turn; half the bound keeps the path full.
        return room if room >= max(MIN_PIECE_BYTES, limit // 2) else 0

    @property
    def is_drained(self) -> bool:
        """Whether the peer has acknowledged all that was sent."""
        return self.engine is None or self.engine.is_drained


def initial_connection_id_untrusted(data: bytes) -> bytes | None:
    """Return the connection id that a client's Initial packet is for; None for other datagrams.

    RFC 9000 section 17.2.2: flags 1 | version 4 | length 1 | destination connection id 8..20 | ...
    """
    if len(data) < MIN_INITIAL_BYTES or data[0] & 0xF0 != 0xC0 or data[1:5] != b"\0\0\0\x01":
        return None
    length = data[5]
    return bytes(data[6 : 6 + length]) if 8 <= length <= 20 else None
