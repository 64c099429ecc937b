"""The kinds of connection that transport.py compares: ours, TLS over TCP, plain drivers.

Each has a `connect_...`, which yields what opens a stream, and a `serve_...` for the other process,
which does one task after the other.
"""

from __future__ import annotations

import random
import resource
import ssl
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConnectionLost
from natswarm.identity import Identity
from natswarm.net.pump import PortPump
from natswarm.net.quic import Connection
from natswarm.net.udp import UdpNetwork
from tools.bench.transport_rivals import plain_client, serve_plain

__all__ = [
    "COUNT",
    "ECHO",
    "HERE",
    "MESSAGE_BYTES",
    "QUIT",
    "SECONDS",
    "SINK",
    "SLOW",
    "SLOW_BYTES_PER_S",
    "WRITE_BYTES",
    "OpenStream",
    "connect_plain",
    "connect_quic",
    "connect_tls",
    "receive_exactly",
    "resident_bytes",
    "serve_plain_kind",
    "serve_quic",
    "serve_tls",
]

HERE = "127.0.0.1"
WRITE_BYTES = 256 * 1024
MESSAGE_BYTES = 4096
# A task starts with one of these bytes; all but QUIT are followed by a number.
SINK = b"s"  # swallow so many bytes
ECHO = b"e"  # echo so many messages
SLOW = b"w"  # read for so many seconds, slowly; tell how much memory that took
SLOW_BYTES_PER_S = 1_000_000
QUIT = b"q"  # end the connection
# 1,350 B in each datagram of ours; qh3 takes some for what it might have to add.
MAX_DATAGRAM_BYTES = 1379

COUNT = struct.Struct(">Q")
SECONDS = struct.Struct(">d")

OpenStream = Callable[[], Awaitable[trio.abc.Stream]]


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
        max_datagram_bytes=MAX_DATAGRAM_BYTES,
        handshake_timeout_s=10.0 if is_client else 3600.0,  # the child waits for its turn
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
    await stream.send_all(QUIT)
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


# --- plain drivers ---


@asynccontextmanager
async def connect_plain(
    library: str, seed: int, local: Endpoint, remote: Endpoint
) -> AsyncIterator[OpenStream]:
    """Connect to the child once; the connection serves one task after the other."""
    async with plain_client(library, identities(seed)[0], local, remote) as stream:

        async def open_stream() -> trio.abc.Stream:
            return stream

        yield open_stream
        await stream.send_all(QUIT)
        await trio.sleep(0.1)  # so that the child has it before the close


async def serve_plain_kind(library: str, seed: int, local: Endpoint) -> None:
    """Serve one connection after the other, for ever."""
    while True:
        async with serve_plain(library, identities(seed)[1], local) as stream:
            while await do_task(stream, keep_open=True):
                pass


# --- the work, the same for all ---


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
            while left and (data := await stream.receive_some(WRITE_BYTES)):
                left -= len(data)
            await stream.send_all(SECONDS.pack(time.process_time() - cpu_started))
        elif task == SLOW:
            (seconds,) = COUNT.unpack(await receive_exactly(stream, COUNT.size))
            await receive_exactly(stream, SLOW_BYTES_PER_S)
            await trio.sleep(1)  # the window fills
            before_bytes = resident_bytes()
            for _ in range(seconds * 10):
                await receive_exactly(stream, SLOW_BYTES_PER_S // 10)
                await trio.sleep(0.1)
            await stream.send_all(COUNT.pack(max(0, resident_bytes() - before_bytes)))
        elif task == ECHO:
            (left,) = COUNT.unpack(await receive_exactly(stream, COUNT.size))
            for _ in range(left):
                await stream.send_all(await receive_exactly(stream, MESSAGE_BYTES))
    except trio.BrokenResourceError:
        return False  # the parent gave its bulk up
    finally:
        if not keep_open:
            await stream.aclose()
    return task not in (b"", QUIT)


def resident_bytes() -> int:
    """Return what this process has in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * resource.getpagesize()
