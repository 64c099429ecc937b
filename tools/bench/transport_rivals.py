"""Plain drivers of aioquic and qh3, as their examples do it: what the transport is compared with.

One datagram a system call, Trio's own UDP socket, QUIC's own streams. aioquic and qh3 have the same
face, so one driver serves both; aioquic is an optional package (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from natswarm.address import Endpoint
from natswarm.identity import Identity

__all__ = ["LIBRARIES", "PlainStream", "is_installed", "plain_client", "serve_plain"]

LIBRARIES = ("qh3", "aioquic")
ALPN = "bench"
MAX_DATAGRAM_BYTES = 1350
MAX_QUEUED_BYTES = 512 * 1024


def is_installed(library: str) -> bool:
    """Return whether a library is there."""
    return importlib.util.find_spec(library) is not None


class PlainStream(trio.abc.Stream):
    """Stream 0 of a QUIC connection, without back-pressure: neither library has any."""

    def __init__(self, library: str, udp: trio.socket.SocketType) -> None:
        self._events = importlib.import_module(f"{library}.quic.events")
        self._udp = udp
        self.quic: Any = None
        self.remote: tuple[str, int] | None = None
        self._buffer = bytearray()
        self._changed = trio.Event()
        self._is_over = False
        self._queued = 0

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def flush(self) -> None:
        """Send what QUIC has to send."""
        for data, _ in self.quic.datagrams_to_send(now=trio.current_time()):
            assert self.remote is not None
            await self._udp.sendto(data, self.remote)

    async def receive_datagrams(self) -> None:
        """Receive for ever, one by one."""
        while True:
            data, source = await self._udp.recvfrom(65_535)
            self.remote = source
            self.quic.receive_datagram(data, source, now=trio.current_time())
            self._take_events()
            await self.flush()

    async def run_timer(self) -> None:
        """Serve QUIC's timer for ever, a millisecond late at most."""
        while True:
            await trio.sleep(0.001)
            due = None if self.quic is None else self.quic.get_timer()
            if due is not None and due <= trio.current_time():
                self.quic.handle_timer(now=trio.current_time())
                self._take_events()
                await self.flush()

    def _take_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, self._events.StreamDataReceived):
                self._buffer += event.data
            elif isinstance(event, self._events.ConnectionTerminated):
                self._is_over = True
        self._notify()

    def _backlog(self) -> int:
        if hasattr(self.quic, "get_send_buffer_size"):
            return int(self.quic.get_send_buffer_size(0))
        stream = self.quic._streams.get(0)  # aioquic tells nobody
        return 0 if stream is None else len(stream.sender._buffer)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, and wait while QUIC has more than half a megabyte."""
        self.quic.send_stream_data(0, bytes(data))
        await self.flush()
        while self._backlog() > MAX_QUEUED_BYTES:
            await self._changed.wait()

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        while not self._buffer:
            if self._is_over:
                return b""
            await self._changed.wait()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        return data

    async def aclose(self) -> None:
        """Say that it is over."""
        self.quic.close()
        await self.flush()


def _configuration(library: str, identity: Identity, *, is_client: bool) -> Any:
    module = importlib.import_module(f"{library}.quic.configuration")
    configuration = module.QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        max_datagram_size=MAX_DATAGRAM_BYTES,
        max_data=16 * 1024 * 1024,
        max_stream_data=16 * 1024 * 1024,
        verify_mode=0 if is_client else None,
    )
    if not is_client:
        _load_certificate(configuration, identity, library)
    elif library == "qh3":
        from qh3.tls import SignatureAlgorithm

        configuration.signature_algorithms = [SignatureAlgorithm.ED25519]
    return configuration


def _load_certificate(configuration: Any, identity: Identity, library: str) -> None:
    if library == "qh3":
        configuration.load_cert_chain(identity.certificate_pem, identity.private_key_pem)
        return
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificate

    configuration.certificate = load_pem_x509_certificate(identity.certificate_pem)
    configuration.private_key = load_pem_private_key(identity.private_key_pem, None)


async def _bind(local: Endpoint) -> trio.socket.SocketType:
    udp = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    udp.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4 * 1024 * 1024)
    await udp.bind((local.ip, local.port))
    return udp


def _new_connection(library: str, configuration: Any, attempt: bytes | None = None) -> Any:
    module = importlib.import_module(f"{library}.quic.connection")
    if attempt is None:
        return module.QuicConnection(configuration=configuration)
    return module.QuicConnection(
        configuration=configuration, original_destination_connection_id=attempt
    )


@asynccontextmanager
async def plain_client(
    library: str, identity: Identity, local: Endpoint, remote: Endpoint
) -> AsyncIterator[PlainStream]:
    """Yield a connection to the server at `remote`; its handshake goes on by itself."""
    with await _bind(local) as udp:
        stream = PlainStream(library, udp)
        stream.remote = (remote.ip, remote.port)
        configuration = _configuration(library, identity, is_client=True)
        stream.quic = _new_connection(library, configuration)
        stream.quic.connect(stream.remote, now=trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_datagrams)
            nursery.start_soon(stream.run_timer)
            await stream.flush()
            yield stream
            await stream.aclose()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serve_plain(
    library: str, identity: Identity, local: Endpoint
) -> AsyncIterator[PlainStream]:
    """Yield the connection of the next client, once its first datagram is there."""
    with await _bind(local) as udp:
        data, source = await udp.recvfrom(65_535)
        # RFC 9000 section 17.2.2: flags 1 | version 4 | length 1 | destination connection id
        while len(data) < 1200 or data[0] & 0xF0 != 0xC0:
            data, source = await udp.recvfrom(65_535)  # of the last connection
        stream = PlainStream(library, udp)
        stream.remote = source
        configuration = _configuration(library, identity, is_client=False)
        stream.quic = _new_connection(library, configuration, data[6 : 6 + data[5]])
        stream.quic.receive_datagram(data, source, now=trio.current_time())
        await stream.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_datagrams)
            nursery.start_soon(stream.run_timer)
            yield stream
            nursery.cancel_scope.cancel()
