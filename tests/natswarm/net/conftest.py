"""Two connections with a link in memory between them that loses, delays, swaps and doubles."""

from __future__ import annotations

import heapq
import itertools
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.identity import Identity
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection
from natswarm.net.stream import Stream
from natswarm.net.udp import UdpNetwork


@pytest.fixture
def lab() -> ModuleType:
    """This module: pytest's importlib mode lets no test import its neighbour."""
    return sys.modules[__name__]


CLIENT = Identity(b"c" * 32)
SERVER = Identity(b"s" * 32)
STRANGER = Identity(b"x" * 32)


@dataclass
class Weather:
    """How bad the link is. Times in seconds, one way."""

    delay_s: float = 0.01
    jitter_s: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0


class Link:
    """Carries datagrams to receivers after a delay, as a seed decides."""

    def __init__(self, *, seed: int, weather: Weather | None = None) -> None:
        print(f"link seed {seed}")  # pytest shows it with a failure
        self.weather = weather or Weather()
        self.is_cut = False
        self.delivered_count = 0
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[list[bytes]], None], bytes]] = []
        self._order = itertools.count()
        self._changed = trio.Event()

    def sender(self, receive: Callable[[list[bytes]], None]) -> Callable[[Sequence[bytes]], None]:
        """Return what a connection takes as `send`; what it sends reaches `receive`."""

        def send(datagrams: Sequence[bytes]) -> None:
            weather = self.weather
            for data in datagrams:
                copies = 2 if self._rng.random() < weather.duplication else 1
                for _ in range(copies):
                    if self.is_cut or self._rng.random() < weather.loss:
                        continue
                    due = trio.current_time() + weather.delay_s
                    due += self._rng.random() * weather.jitter_s
                    heapq.heappush(self._heap, (due, next(self._order), receive, data))
            self._changed.set()

        return send

    async def run(self) -> None:
        while True:
            deadline = self._heap[0][0] if self._heap else float("inf")
            with trio.move_on_at(deadline):
                await self._changed.wait()
            self._changed = trio.Event()
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                receive = self._heap[0][2]
                batch: list[bytes] = []
                while self._heap and self._heap[0][0] <= now and self._heap[0][2] == receive:
                    batch.append(heapq.heappop(self._heap)[3])
                self.delivered_count += len(batch)
                receive(batch)


def make_pair(
    link: Link,
    *,
    client_expects: Identity = SERVER,
    server_expects: Identity = CLIENT,
    rtt_s: float | None = None,
    **options: float,
) -> tuple[Connection, Connection]:
    """Return a client and a server joined by a link, neither running."""
    client = Connection(
        CLIENT, client_expects.peer_id, is_client=True, send=nowhere, rtt_s=rtt_s, **options
    )
    server = Connection(
        SERVER, server_expects.peer_id, is_client=False, send=nowhere, rtt_s=rtt_s, **options
    )
    client.send = link.sender(server.receive_datagrams)
    server.send = link.sender(client.receive_datagrams)
    return client, server


def nowhere(datagrams: Sequence[bytes]) -> None:
    """Lose everything."""


@asynccontextmanager
async def connected_pair(
    *, seed: int = 0, weather: Weather | None = None, **options: float
) -> AsyncIterator[tuple[Connection, Connection, Link]]:
    """Yield a client and a server that run and have authenticated each other, and their link."""
    link = Link(seed=seed, weather=weather)
    client, server = make_pair(link, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, server.run)
            starting.start_soon(nursery.start, client.run)
        yield client, server, link
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def loopback_pair(**options: float) -> AsyncIterator[tuple[Connection, Connection]]:
    """Yield a client and a server that run over real sockets on 127.0.0.1."""
    network = UdpNetwork()
    client_port, server_port = (network.bind(Endpoint("127.0.0.1", 0)) for _ in range(2))
    to_server, to_client = server_port.local_endpoint, client_port.local_endpoint
    client = Connection(
        CLIENT,
        SERVER.peer_id,
        is_client=True,
        send=lambda datagrams: client_port.send_run(datagrams, to_server),
        **options,
    )
    server = Connection(
        SERVER,
        CLIENT.peer_id,
        is_client=False,
        send=lambda datagrams: server_port.send_run(datagrams, to_client),
        **options,
    )
    pumps = [PortPump(port, lambda *_: None) for port in (client_port, server_port)]
    pumps[0].attach(to_server, client.receive_datagrams)
    pumps[1].attach(to_client, server.receive_datagrams)
    async with trio.open_nursery() as nursery:
        for pump in pumps:
            nursery.start_soon(pump.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, server.run)
            starting.start_soon(nursery.start, client.run)
        yield client, server
        nursery.cancel_scope.cancel()
    client_port.close()
    server_port.close()


async def open_pair(opener: Connection, accepter: Connection) -> tuple[Stream, Stream]:
    """Return both ends of a new stream."""
    stream = await opener.open_stream("test")
    return stream, await accepter.accept_stream()


async def receive_exactly(stream: Stream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        assert chunk, f"the end after {len(data)} of {count} bytes"
        data += chunk
    return bytes(data)


async def receive_all(stream: Stream) -> bytes:
    data = bytearray()
    while chunk := await stream.receive_some():
        data += chunk
    return bytes(data)
