"""Two connections over an emulated path, in virtual time: the same figures on any machine.

A path is a link each way (natswarm/sim/link.py): rate, delay, loss, and a queue that drops at its
tail. Datagrams are handed over in steps of a fraction of a millisecond, as a network card does.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from natswarm.identity import Identity
from natswarm.net.quic import Connection
from natswarm.net.stream import Stream
from natswarm.sim.link import Link, LinkConditions

__all__ = ["Emulated", "Path", "measure_path"]

STEP_S = 0.0005
MAX_DATAGRAM_BYTES = 1350


MESSAGE_BYTES = 4096
MESSAGE_INTERVAL_S = 0.02
WRITE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Path:
    """What lies between the two ends, both ways the same."""

    mbit_per_s: float
    rtt_s: float
    loss: float
    queue_s: float = 0.1
    """How long the queue in front of the slowest link is, in time at its rate."""

    @property
    def conditions(self) -> LinkConditions:
        """One direction of it."""
        rate = self.mbit_per_s * 1e6 / 8
        return LinkConditions(
            delay_s=self.rtt_s / 2,
            loss=self.loss,
            rate_bytes_per_s=rate,
            queue_bytes=max(20_000, round(rate * self.queue_s)),
        )


class _Carrier:
    """Hands datagrams over when they are due."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[list[bytes]], None], bytes]] = []
        self._count = 0
        self._wake = trio.Event()

    def sender(
        self, link: Link, receive: Callable[[list[bytes]], None]
    ) -> Callable[[Sequence[bytes]], None]:
        """Return what sends over `link` to `receive`."""

        def send(datagrams: Sequence[bytes]) -> None:
            now = trio.current_time()
            for data in datagrams:
                if (arrival := link.arrival_time(now, data)) is not None:
                    step = (int(arrival / STEP_S) + 1) * STEP_S
                    self._count += 1
                    heapq.heappush(self._due, (step, self._count, receive, data))
            self._wake.set()

        return send

    async def run(self) -> None:
        due = self._due
        while True:
            with trio.move_on_at(due[0][0] if due else float("inf")):
                await self._wake.wait()
            self._wake = trio.Event()
            now = trio.current_time()
            batches: dict[Callable[[list[bytes]], None], list[bytes]] = {}
            while due and due[0][0] <= now:
                _, _, receive, data = heapq.heappop(due)
                batches.setdefault(receive, []).append(data)
            for receive, batch in batches.items():
                receive(batch)


@asynccontextmanager
async def connect_over(
    path: Path, *, seed: int, may_stripe: bool = True
) -> AsyncIterator[tuple[Connection, Connection]]:
    """Yield a client and a server that run, with the path between them."""
    rng = random.Random(seed)
    links = [Link(path.conditions, rng) for _ in range(2)]
    identities = [Identity(rng.randbytes(32)) for _ in range(2)]
    carrier = _Carrier()
    client, server = (
        Connection(
            identities[index],
            identities[1 - index].peer_id,
            is_client=index == 0,
            send=lambda _: None,
            rtt_s=path.rtt_s,
            max_datagram_bytes=MAX_DATAGRAM_BYTES,
            idle_timeout_s=60.0,
            may_stripe=may_stripe,
        )
        for index in range(2)
    )
    client.send = carrier.sender(links[0], server.receive_datagrams)
    server.send = carrier.sender(links[1], client.receive_datagrams)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carrier.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, server.run)
            starting.start_soon(nursery.start, client.run)
        yield client, server
        nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class Emulated:
    """What one connection did on a path: 4 KiB messages without bulk, then beside it."""

    mb_per_s: float
    idle_p50_ms: float
    under_bulk_p50_ms: float
    under_bulk_p99_ms: float
    lane_count: int


def measure_path(path: Path, *, seconds: float, seed: int, may_stripe: bool = True) -> Emulated:
    """Send bulk for some virtual seconds after an idle second or two, and messages all the time."""

    async def run() -> Emulated:
        async with connect_over(path, seed=seed, may_stripe=may_stripe) as (client, server):
            bulk, bulk_end = await client.open_stream("bulk"), await server.accept_stream()
            talk, talk_end = await client.open_stream("talk"), await server.accept_stream()
            received_bytes = 0
            idle: list[float] = []
            under_bulk: list[float] = []

            async def send() -> None:
                while True:
                    await bulk.send_all(bytes(WRITE_BYTES))

            async def receive() -> None:
                nonlocal received_bytes
                while True:
                    received_bytes += len(await bulk_end.receive_some(WRITE_BYTES))

            async def echo() -> None:
                while True:
                    await talk_end.send_all(await _receive_message(talk_end))

            async def ask(round_trips: list[float]) -> None:
                while True:
                    started = trio.current_time()
                    await talk.send_all(bytes(MESSAGE_BYTES))
                    await _receive_message(talk)
                    round_trips.append(trio.current_time() - started)
                    if is_bulk_on and round_trips is idle:
                        return
                    await trio.sleep(MESSAGE_INTERVAL_S)

            is_bulk_on = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo)
                nursery.start_soon(receive)
                async with trio.open_nursery() as asking:
                    asking.start_soon(ask, idle)
                    await trio.sleep(1 + 10 * path.rtt_s)
                    is_bulk_on = True
                nursery.start_soon(send)
                nursery.start_soon(ask, under_bulk)
                await trio.sleep(seconds)
                nursery.cancel_scope.cancel()
            percentiles = statistics.quantiles(under_bulk, n=100)
            return Emulated(
                mb_per_s=round(received_bytes / seconds / 1e6, 2),
                idle_p50_ms=round(statistics.median(idle) * 1e3, 1),
                under_bulk_p50_ms=round(percentiles[49] * 1e3, 1),
                under_bulk_p99_ms=round(percentiles[98] * 1e3, 1),
                lane_count=client.statistics().lane_count,
            )

    return trio.run(run, clock=MockClock(autojump_threshold=0))


async def _receive_message(stream: Stream) -> bytes:
    data = bytearray()
    while len(data) < MESSAGE_BYTES:
        data += await stream.receive_some(MESSAGE_BYTES - len(data))
    return bytes(data)
