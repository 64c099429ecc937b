"""What qh3's engine and system calls alone cost: below that no driver of them can get.

Two engines in one process, joined in memory: no socket, no task, no frames, none of our code but
the way `net/quic_engine.py` calls them. Then two UDP ports on loopback and runs of datagrams of the
same size through them. Two processes on two cores can't be faster than the dearer end.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import trio
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import StreamDataReceived

from natswarm.address import Endpoint
from natswarm.identity import Identity
from natswarm.net.frames import QUIC_STREAM_ID
from natswarm.net.lane import ALPN, MAX_SEND_BUFFER_BYTES, QUIC_WINDOW_BYTES
from natswarm.net.quic_engine import PEER_ADDRESS, QuicEngine
from natswarm.net.udp import UdpNetwork
from tools.bench.transport_kinds import HERE

__all__ = ["Floor", "measure_floor"]

MAX_DATAGRAM_BYTES = 1350
BATCH_DATAGRAMS = 192
PORTION = bytes(64 * 1024)
ROUND_TRIP_S = 0.0005
HANDSHAKE_ROUNDS_MAX = 100


@dataclass(frozen=True, slots=True)
class Floor:
    """CPU seconds for a gigabyte; of the engine's, acknowledgements are a part."""

    engine_send_cpu_s_per_gb: float
    engine_receive_cpu_s_per_gb: float
    socket_send_cpu_s_per_gb: float
    socket_receive_cpu_s_per_gb: float

    @property
    def mb_per_s(self) -> float:
        """What two cores could move at the most."""
        send_s = self.engine_send_cpu_s_per_gb + self.socket_send_cpu_s_per_gb
        receive_s = self.engine_receive_cpu_s_per_gb + self.socket_receive_cpu_s_per_gb
        return 1e3 / max(send_s, receive_s)


def measure_floor(bulk_bytes: int, seed: int) -> Floor:
    """Move `bulk_bytes` through engines, and through sockets."""
    engine_s = _measure_engine(bulk_bytes, seed)
    socket_s = trio.run(_measure_sockets, bulk_bytes)
    return Floor(*(cpu_s / (bulk_bytes / 1e9) for cpu_s in (*engine_s, *socket_s)))


async def _measure_sockets(bulk_bytes: int) -> tuple[float, float]:
    """Return CPU seconds of sending and of receiving."""
    network = UdpNetwork()
    ours, theirs = (network.bind(Endpoint(HERE, 0)) for _ in range(2))
    run = [bytes(MAX_DATAGRAM_BYTES)] * BATCH_DATAGRAMS
    send_s = receive_s = 0.0
    for _ in range(bulk_bytes // (BATCH_DATAGRAMS * MAX_DATAGRAM_BYTES)):
        started = time.process_time()
        ours.send_run(run, theirs.local_endpoint)
        sent = time.process_time()
        await theirs.receive_merged()
        send_s += sent - started
        receive_s += time.process_time() - sent
    ours.close()
    theirs.close()
    return send_s, receive_s


class _End:
    """One engine, and the CPU seconds that it took since they were last set to 0."""

    def __init__(self, engine: QuicEngine) -> None:
        self.engine = engine
        self.cpu_s = 0.0
        self.received_bytes = 0

    def turn(self, arrived: list[bytes], now: float) -> list[bytes]:
        """Take datagrams in, look at what they held, and return those to send."""
        started = time.process_time()
        if arrived:
            self.engine.feed(arrived, now)
        while (event := self.engine.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                self.received_bytes += len(event.data)
        datagrams = self.engine.drain(now, BATCH_DATAGRAMS)
        self.cpu_s += time.process_time() - started
        return datagrams

    def fill(self) -> None:
        """Give the engine as much to send as our transport would."""
        started = time.process_time()
        while self.engine.queued_bytes < MAX_SEND_BUFFER_BYTES:
            self.engine.send_stream_data(QUIC_STREAM_ID, PORTION)
        self.cpu_s += time.process_time() - started


def _measure_engine(bulk_bytes: int, seed: int) -> tuple[float, float]:
    """Return CPU seconds of both ends, after as many bytes to warm up congestion control."""
    client, server = _connect(Identity(random.Random(seed).randbytes(32)))
    now = HANDSHAKE_ROUNDS_MAX * ROUND_TRIP_S
    for _ in range(2):
        client.cpu_s = server.cpu_s = 0.0
        goal_bytes = server.received_bytes + bulk_bytes
        acknowledgements: list[bytes] = []
        while server.received_bytes < goal_bytes:
            now += ROUND_TRIP_S
            client.fill()
            acknowledgements = server.turn(client.turn(acknowledgements, now), now)
    return client.cpu_s, server.cpu_s


def _connect(identity: Identity) -> tuple[_End, _End]:
    """Return client and server after the handshake."""
    attempt = bytes(8)
    client = _End(QuicEngine.client(_configuration(), attempt))
    server = _End(QuicEngine.server(_configuration(), identity, attempt))
    client.engine.connect(PEER_ADDRESS, 0.0)
    datagrams: list[bytes] = []
    for number in range(HANDSHAKE_ROUNDS_MAX):
        now = number * ROUND_TRIP_S
        datagrams = server.turn(client.turn(datagrams, now), now)
        if client.engine.is_encrypted and server.engine.is_encrypted and not datagrams:
            return client, server
    raise RuntimeError("the two engines did not finish their handshake")


def _configuration() -> QuicConfiguration:
    return QuicConfiguration(
        alpn_protocols=[ALPN],
        initial_rtt=ROUND_TRIP_S,
        max_datagram_size=MAX_DATAGRAM_BYTES,
        probe_datagram_size=False,
        max_stream_data=QUIC_WINDOW_BYTES,
        max_data=QUIC_WINDOW_BYTES,
    )
