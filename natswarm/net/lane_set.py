"""The lanes of one connection: the first, and those that bulk gets while packets are lost.

The QUIC client opens lanes. It tells on the first lane which connection id a handshake will be for,
and a handshake for any other is not answered, so nobody else can make a server work. Datagrams find
their lane by connection id. Lanes stay until the connection ends; without bulk, a PING now and then
is all they cost. One whose handshake fails is not used, and not tried again.

The first lane's handshake is the client's to begin, and to begin anew. Anybody who can send from
the peer's endpoint can begin one, too, but not end it. So a server answers several attempts side by
side, each by its own connection id, and the one that proves who it is becomes the first lane.

Source: RFC 9000 section 5.1 for connection ids; striping.py for how many. Knows no tasks.
"""

from __future__ import annotations

import os
from collections import deque

from natswarm.net.frames import FrameKind, ProtocolViolation
from natswarm.net.lane import (
    CONNECTION_ID_BYTES,
    Lane,
    LaneSettings,
    initial_connection_id_untrusted,
)
from natswarm.net.multiplexer import Multiplexer
from natswarm.net.striping import LANES_MAX, Progress, Striping

__all__ = ["LaneSet"]

# Attempts of the first handshake beside the latest. The oldest has to go: within a round trip of
# 300 ms nobody's is driven out by 50 forged ones a second.
RIVALS_MAX = 15
# Those that have gone, whose datagrams may still arrive, or again.
GONE_MAX = 64


class LaneSet:
    """All lanes of one connection.

    Args:
        settings: Shared by all.
        streams: What the lanes carry.
        may_stripe: Whether bulk may have more than one.

    Attributes:
        first: The lane that is there from the handshake to the end; of a server the latest
            attempt, until one has proved who it is.
        rivals: Of a server's first lane, the earlier attempts, oldest first.
        lanes: All, the first among them.
    """

    def __init__(self, settings: LaneSettings, streams: Multiplexer, *, may_stripe: bool) -> None:
        self.first = Lane(settings)
        self.rivals: list[Lane] = []
        self.lanes = [self.first]
        self._gone: deque[bytes] = deque(maxlen=GONE_MAX)
        self._settings = settings
        self._streams = streams
        self._striping = Striping()
        self._may_stripe = may_stripe
        self._by_connection_id: dict[bytes, Lane] = {}

    @property
    def lost_packet_count(self) -> int:
        """Packets sent and then declared lost, on all lanes."""
        return sum(lane.engine.lost_packet_count for lane in self.lanes if lane.engine is not None)

    def sort_untrusted(self, datagrams: list[bytes], now: float) -> dict[Lane, list[bytes]]:
        """Return the datagrams by lane; the first gets what is for no other."""
        may_begin = not (self._settings.is_client or self.first.is_proved)
        if len(self.lanes) == 1 and not may_begin:
            return {self.first: datagrams}
        batches: dict[Lane, list[bytes]] = {}
        for data in datagrams:
            connection_id = _connection_id_untrusted(data)
            lane = self._by_connection_id.get(connection_id)
            if lane is None and may_begin and connection_id not in self._gone:
                self._begin_untrusted(data, now)
            batches.setdefault(lane or self.first, []).append(data)
        return batches

    # --- the first handshake ---

    def _begin_untrusted(self, data: bytes, now: float) -> None:
        """Answer one more attempt of the client, if that is what a datagram is."""
        attempt = initial_connection_id_untrusted(data)
        if attempt is None:
            return
        lane = Lane(self._settings, attempt=attempt)
        lane.receive([data], now)
        if lane.engine is None:
            return  # garbage
        if self.first.engine is not None:
            self.rivals.append(self.first)
        if len(self.rivals) > RIVALS_MAX:
            self._drop(self.rivals[0])
        self._lead(lane)
        self._by_connection_id[attempt] = self._by_connection_id[lane.connection_id] = lane

    def settle_on(self, lane: Lane) -> None:
        """Take note that an attempt has proved who it is: the others are of no use any more."""
        if lane in self.rivals:
            self.rivals.append(self.first)
            self.rivals.remove(lane)
            self._lead(lane)
        while self.rivals and lane is self.first:
            self._drop(self.rivals[0])

    def give_up(self, lane: Lane) -> bool:
        """Go on without an attempt that has failed; False if it was the only one."""
        if lane is self.first and self.rivals:
            self._lead(self.rivals.pop())
            self.rivals.append(lane)
        if lane in self.rivals:
            self._drop(lane)
            return True
        return False

    def _lead(self, lane: Lane) -> None:
        self.first = self.lanes[0] = lane

    def _drop(self, rival: Lane) -> None:
        self.rivals.remove(rival)
        for connection_id, lane in list(self._by_connection_id.items()):
            if lane is rival:
                del self._by_connection_id[connection_id]
                self._gone.append(connection_id)

    # --- all lanes ---

    def suspend(self) -> None:
        """Wait for a path."""
        for lane in self.lanes:
            lane.suspend()

    def resume(self, now: float) -> None:
        """Go on at once on another path, or on the old one again."""
        self._striping.forget()
        for lane in self.lanes:
            lane.resume(now)

    def stripe(self, now: float, sent_count: int) -> None:
        """Give bulk as many lanes as help, and have them opened.

        Args:
            now: Seconds.
            sent_count: Datagrams sent so far, on all lanes.
        """
        if not self._may_stripe:
            return
        streams, striping = self._streams, self._striping
        engine = self.first.engine
        assert engine is not None

        def progress() -> Progress:
            delivered_bytes = sum(lane.bound.delivered_bytes for lane in self.lanes)
            return Progress(delivered_bytes, sent_count, self.lost_packet_count)

        striping.observe(progress, engine.rtt_s or 0.0, now, is_bulk=streams.is_bulk_waiting)
        wanted = striping.lane_count
        if wanted == streams.stripe_count:
            return
        streams.stripe_count = wanted
        if self._settings.is_client:
            self._open(wanted, now)
        elif wanted > 1:
            streams.send_note(FrameKind.WANTED, 0, value=wanted)

    def take_note(self, kind: FrameKind, connection_id: int, value: int, now: float) -> None:
        """Take LANE or WANTED, what the peer says of lanes.

        Raises:
            ProtocolViolation: It is not for it to say, or too many.
        """
        is_client = self._settings.is_client
        if is_client != (kind == FrameKind.WANTED):
            raise ProtocolViolation("the QUIC client opens lanes, at the wish of the server")
        if value >= LANES_MAX or (not is_client and len(self.lanes) >= LANES_MAX):
            raise ProtocolViolation("too many lanes")
        if is_client:
            self._open(value, now)
        else:
            self._add(connection_id.to_bytes(CONNECTION_ID_BYTES, "big"))

    def _open(self, count: int, now: float) -> None:
        """Have `count` lanes beside the first, if more than one is asked for."""
        while 1 < count >= len(self.lanes):
            connection_id = os.urandom(CONNECTION_ID_BYTES)
            self._streams.send_note(FrameKind.LANE, int.from_bytes(connection_id, "big"))
            self._add(connection_id).start(now)

    def _add(self, attempt: bytes) -> Lane:
        lane = Lane(self._settings, attempt=attempt)
        self.lanes.append(lane)
        # The handshake begins with a connection id that the client drew, which only the server has
        # to know; then each side is addressed by its own, which the lane draws at once.
        self._by_connection_id[attempt] = self._by_connection_id[lane.connection_id] = lane
        return lane


def _connection_id_untrusted(data: bytes) -> bytes:
    """Return what stands where a packet has its destination connection id (RFC 9000 section 17)."""
    start = 6 if data[:1] >= b"\x80" else 1
    return data[start : start + CONNECTION_ID_BYTES]
