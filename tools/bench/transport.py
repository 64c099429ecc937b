"""What the QUIC transport carries and costs, beside Trio's TLS over TCP.

    python -m tools.bench.transport [--seed N] [--quick] [--json]

Two processes on 127.0.0.1, since the ends of a real connection share no core. Every round moves the
same data through one connection of each kind, one right after the other, so that both see the same
noise of the machine: the ratio is the figure to trust. Each figure is the median of the rounds.

The targets are what bare qh3 2.1 did once, on two cores of the kind this was written on: the
transport should not cost more than its engine. Loopback has no loss and no NAT; the tests and the
lab look at those.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConnectionLost
from natswarm.identity import Identity
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection
from natswarm.net.udp import UdpNetwork

HERE = "127.0.0.1"
WRITE_BYTES = 256 * 1024
MESSAGE_BYTES = 4096
# A task starts with one of these bytes; SINK is followed by the number of bytes to swallow.
SINK = b"s"
ECHO = b"e"
COUNT = struct.Struct(">Q")
SECONDS = struct.Struct(">d")

AT_LEAST = {"quic_to_tls_throughput": 0.5}
AT_MOST = {
    "quic_send_cpu_s_per_gb": 5.0,
    "quic_receive_cpu_s_per_gb": 2.2,
    "quic_round_trip_p50_ms": 1.9,
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much work one run is."""

    rounds: int
    bulk_bytes: int
    round_trips: int


FULL = Size(5, 400_000_000, 1000)
QUICK = Size(3, 60_000_000, 200)


@dataclass(frozen=True, slots=True)
class Figures:
    """One connection, measured."""

    connect_ms: float
    mb_per_s: float
    send_cpu_s_per_gb: float
    receive_cpu_s_per_gb: float
    round_trip_p50_ms: float
    round_trip_p99_ms: float


OpenStream = Callable[[], Awaitable[trio.abc.Stream]]
Connect = Callable[[], AbstractAsyncContextManager[OpenStream]]


def identities(seed: int) -> tuple[Identity, Identity]:
    """Return the client's and the server's identity."""
    rng = random.Random(seed)
    return Identity(rng.randbytes(32)), Identity(rng.randbytes(32))


# --- QUIC ---


@asynccontextmanager
async def quic_connection(
    seed: int, *, is_client: bool, local: Endpoint, remote: Endpoint
) -> AsyncIterator[Connection]:
    """Yield a running connection between two UDP ports of this machine."""
    client, server = identities(seed)
    own, peer = (client, server) if is_client else (server, client)
    port = UdpNetwork().bind(local)
    connection = Connection(
        own,
        peer.peer_id,
        is_client=is_client,
        send=lambda datagrams: port.send_run(datagrams, remote),
        handshake_timeout_s=10.0 if is_client else 600.0,  # the child waits for its turn
    )
    pump = PortPump(port, lambda *_: None)
    pump.attach(remote, connection.receive_datagrams)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            await nursery.start(connection.run)
            yield connection
            nursery.cancel_scope.cancel()
    finally:
        port.close()


@asynccontextmanager
async def connect_quic(seed: int, local: Endpoint, remote: Endpoint) -> AsyncIterator[OpenStream]:
    """Connect to the child; yield what opens a stream."""
    async with quic_connection(seed, is_client=True, local=local, remote=remote) as connection:

        async def open_stream() -> trio.abc.Stream:
            return await connection.open_stream("bench")

        yield open_stream
        await connection.aclose()


async def serve_quic(seed: int, local: Endpoint, remote: Endpoint) -> None:
    """Serve one connection after the other, for ever."""
    while True:
        async with (
            quic_connection(seed, is_client=False, local=local, remote=remote) as connection,
            trio.open_nursery() as nursery,
        ):
            with suppress(ConnectionLost):
                while True:
                    nursery.start_soon(do_task, await connection.accept_stream())


# --- TLS over TCP ---


def tls_context(identity: Identity, *, is_client: bool) -> ssl.SSLContext:
    """Return a TLS 1.3 context with the same kind of certificate that QUIC uses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if not is_client:
        with tempfile.NamedTemporaryFile() as file:
            file.write(identity.private_key_pem + identity.certificate_pem)
            file.flush()
            context.load_cert_chain(file.name)
    return context


@asynccontextmanager
async def connect_tls(seed: int, remote: Endpoint) -> AsyncIterator[OpenStream]:
    """Connect to the child once; the connection serves one task after the other."""
    tcp = await trio.open_tcp_stream(remote.ip, remote.port)
    context = tls_context(identities(seed)[0], is_client=True)
    stream = trio.SSLStream(tcp, context, https_compatible=True)
    await stream.do_handshake()

    async def open_stream() -> trio.abc.Stream:
        return stream

    yield open_stream
    await trio.aclose_forcefully(stream)


async def serve_tls(seed: int, listener: trio.SocketListener) -> None:
    """Serve connections, for ever."""
    context = tls_context(identities(seed)[1], is_client=False)

    async def serve(tcp: trio.SocketStream) -> None:
        stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        with suppress(trio.BrokenResourceError):  # the parent is done with it
            while await do_task(stream, keep_open=True):
                pass

    await trio.serve_listeners(serve, [listener])


# --- the work, the same for both ---


async def receive_exactly(stream: trio.abc.Stream, count: int) -> bytes:
    """Return `count` bytes, or b"" if the stream ends before."""
    data = bytearray()
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


async def do_task(stream: trio.abc.Stream, *, keep_open: bool = False) -> bool:
    """Do what the other side asks for, once; False if it asks for nothing any more."""
    try:
        task = await receive_exactly(stream, 1)
        if task == SINK:
            (left,) = COUNT.unpack(await receive_exactly(stream, COUNT.size))
            cpu_started = time.process_time()
            while left:
                left -= len(await stream.receive_some(WRITE_BYTES))
            await stream.send_all(SECONDS.pack(time.process_time() - cpu_started))
        elif task == ECHO:
            (left,) = COUNT.unpack(await receive_exactly(stream, COUNT.size))
            for _ in range(left):
                await stream.send_all(await receive_exactly(stream, MESSAGE_BYTES))
    finally:
        if not keep_open:
            await stream.aclose()
    return bool(task)


async def measure(connect: Connect, size: Size) -> Figures:
    """Measure one connection: connecting, bulk to the child, then messages there and back."""
    started = time.perf_counter()
    async with connect() as open_stream:
        stream = await open_stream()
        connect_s = time.perf_counter() - started

        data = bytes(WRITE_BYTES)
        writes = size.bulk_bytes // WRITE_BYTES
        bulk_gb = writes * WRITE_BYTES / 1e9
        started, cpu_started = time.perf_counter(), time.process_time()
        await stream.send_all(SINK + COUNT.pack(writes * WRITE_BYTES))
        for _ in range(writes):
            await stream.send_all(data)
        (receive_cpu_s,) = SECONDS.unpack(await receive_exactly(stream, SECONDS.size))
        bulk_s, send_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started

        stream = await open_stream()
        message = bytes(MESSAGE_BYTES)
        round_trips = []
        await stream.send_all(ECHO + COUNT.pack(size.round_trips))
        for _ in range(size.round_trips):
            started = time.perf_counter()
            await stream.send_all(message)
            await receive_exactly(stream, MESSAGE_BYTES)
            round_trips.append(time.perf_counter() - started)
        percentiles = statistics.quantiles(round_trips, n=100)
    return Figures(
        connect_ms=connect_s * 1e3,
        mb_per_s=bulk_gb * 1e3 / bulk_s,
        send_cpu_s_per_gb=send_cpu_s / bulk_gb,
        receive_cpu_s_per_gb=receive_cpu_s / bulk_gb,
        round_trip_p50_ms=percentiles[49] * 1e3,
        round_trip_p99_ms=percentiles[98] * 1e3,
    )


async def run_child(seed: int, parent_port: int) -> None:
    """Serve both kinds; print the ports once both listen."""
    udp = free_udp_endpoint()
    listeners = await trio.open_tcp_listeners(0, host=HERE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_quic, seed, udp, Endpoint(HERE, parent_port))
        nursery.start_soon(serve_tls, seed, listeners[0])
        print(json.dumps([udp.port, listeners[0].socket.getsockname()[1]]), flush=True)


async def run_parent(
    seed: int, size: Size, udp: Endpoint, ports: tuple[int, int]
) -> dict[str, list[Figures]]:
    """Measure every round and return its figures by kind of connection."""
    quic_remote, tls_remote = (Endpoint(HERE, port) for port in ports)
    connects: dict[str, Connect] = {
        "quic": lambda: connect_quic(seed, udp, quic_remote),
        "tls": lambda: connect_tls(seed, tls_remote),
    }
    # The first connections of a process load and compile what the others find ready.
    for connect in connects.values():
        await measure(connect, Size(1, 10_000_000, 100))
    rounds: dict[str, list[Figures]] = {kind: [] for kind in connects}
    for _ in range(size.rounds):
        for kind, connect in connects.items():
            rounds[kind].append(await measure(connect, size))
    return rounds


def free_udp_endpoint() -> Endpoint:
    """Return an endpoint that nobody holds at the moment."""
    port = UdpNetwork().bind(Endpoint(HERE, 0))
    endpoint = port.local_endpoint
    port.close()
    return endpoint


async def main_parent(seed: int, size: Size) -> dict[str, list[Figures]]:
    """Start the child and measure."""
    udp = free_udp_endpoint()
    command = [sys.executable, "-m", "tools.bench.transport"]
    command += ["--seed", str(seed), "--child", str(udp.port)]
    start_child = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        child: trio.Process = await nursery.start(start_child)
        assert child.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            line += await child.stdout.receive_some()
        rounds = await run_parent(seed, size, udp, tuple(json.loads(line)))
        nursery.cancel_scope.cancel()
    return rounds


def summarize(rounds: dict[str, list[Figures]]) -> dict[str, float]:
    """Return the median of every figure, and the ratio of round to round."""
    figures = {
        f"{kind}_{name}": round(statistics.median(getattr(one, name) for one in ones), 3)
        for kind, ones in rounds.items()
        for name in Figures.__slots__
    }
    figures["quic_to_tls_throughput"] = round(
        statistics.median(
            quic.mb_per_s / tls.mb_per_s
            for quic, tls in zip(rounds["quic"], rounds["tls"], strict=True)
        ),
        3,
    )
    return figures


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the identities")
    parser.add_argument("--quick", action="store_true", help="a rough figure in seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        trio.run(run_child, arguments.seed, arguments.child)
        return
    size = QUICK if arguments.quick else FULL
    rounds = trio.run(main_parent, arguments.seed, size)
    figures = summarize(rounds)
    targets = {
        name: {"value": figures[name], "target": target, "ok": figures[name] >= target}
        for name, target in AT_LEAST.items()
    } | {
        name: {"value": figures[name], "target": target, "ok": figures[name] <= target}
        for name, target in AT_MOST.items()
    }
    if arguments.json:
        setting = {
            "seed": arguments.seed,
            "quick": arguments.quick,
            "python": platform.python_version(),
        }
        every = {kind: [asdict(one) for one in ones] for kind, ones in rounds.items()}
        print(
            json.dumps(
                {
                    "benchmark": "transport",
                    **setting,
                    **figures,
                    "rounds": every,
                    "targets": targets,
                }
            )
        )
        return
    for name, value in figures.items():
        verdict = ""
        if name in targets:
            word = "met" if targets[name]["ok"] else "MISSED"
            verdict = f"   target {targets[name]['target']:g}: {word}"
        print(f"{name:32} {value:10,.2f}{verdict}")


if __name__ == "__main__":
    main()
