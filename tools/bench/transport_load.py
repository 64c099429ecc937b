"""Many connections in one process: how long handshakes take, and what memory the idle ones hold.

Both ends of each connection are in this process, joined in memory: no socket, no network.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from natswarm.identity import Identity
from natswarm.net.quic import Connection
from tools.bench.transport_kinds import resident_bytes

__all__ = ["Load", "measure_load"]

# Handshakes at once: a node that is found by many does not have them one after the other.
AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class Load:
    """Both ends of each connection together, but for the memory."""

    handshakes_per_s: float
    handshake_cpu_ms: float
    kb_per_idle_end: float


class _Wire:
    """Joins two connections: what one sends is received in the next turn."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Callable[[list[bytes]], None], list[bytes]]] = deque()
        self._wake = trio.Event()

    def sender(self, receive: Callable[[list[bytes]], None]) -> Callable[[Sequence[bytes]], None]:
        def send(datagrams: Sequence[bytes]) -> None:
            self._queue.append((receive, list(datagrams)))
            self._wake.set()

        return send

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._queue:
                receive, datagrams = self._queue.popleft()
                receive(datagrams)


def measure_load(count: int, seed: int) -> Load:
    """Make `count` connections and keep them."""
    rng = random.Random(seed)
    pairs = [(Identity(rng.randbytes(32)), Identity(rng.randbytes(32))) for _ in range(count)]

    async def connect(wire: _Wire, nursery: trio.Nursery, pair: tuple[Identity, Identity]) -> None:
        ends = [
            Connection(
                pair[index],
                pair[1 - index].peer_id,
                is_client=index == 0,
                send=lambda _: None,
                handshake_timeout_s=120.0,
            )
            for index in range(2)
        ]
        for end, other in zip(ends, reversed(ends), strict=True):
            end.send = wire.sender(other.receive_datagrams)
        async with trio.open_nursery() as starting:
            for end in ends:
                starting.start_soon(nursery.start, end.run)

    async def run() -> Load:
        async with trio.open_nursery() as nursery:
            wire = _Wire()
            nursery.start_soon(wire.run)
            await connect(wire, nursery, pairs[0])  # loads what the others find ready
            before_bytes = resident_bytes()
            started, cpu_started = time.perf_counter(), time.process_time()
            for start in range(1, count, AT_ONCE):
                async with trio.open_nursery() as batch:
                    for pair in pairs[start : start + AT_ONCE]:
                        batch.start_soon(connect, wire, nursery, pair)
            taken_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            await trio.sleep(0.5)
            grown_bytes = resident_bytes() - before_bytes
            nursery.cancel_scope.cancel()
        made = count - 1
        return Load(
            handshakes_per_s=round(made / taken_s, 1),
            handshake_cpu_ms=round(cpu_s / made * 1e3, 2),
            kb_per_idle_end=round(grown_bytes / made / 2 / 1e3, 1),
        )

    return trio.run(run)
