"""Trace the path outward: all hop limits at once, in under two seconds.

`trace_path` drives a `PathTrace` (`natswarm/nat/path.py`). Probes are UDP datagrams from fresh
ports, one for each hop limit, towards the port of an ordinary peer; nothing else is sent, to nobody
else. What nobody answers is sent again, up to three times half a second apart: routers that run
Linux say 6 errors at once and one a second to each address (`icmp_ratelimit`), so all get through.
The probes differ in their source port only, and routers that share load by it may send them by
different ways: near us, where it matters, there is one way.

On real systems the answers come in two ways:

    error queue   Linux hands ICMP errors about a socket's datagrams to whoever owns it (IP_RECVERR,
                  MSG_ERRQUEUE): no privileges, no parsing, nobody else's errors. So it comes first
    raw socket    elsewhere, and only for root: all ICMP that comes to this machine, in which scapy
                  finds what is about our datagrams. It takes most of a second to import, which
                  happens here alone, in a thread, when it is needed. Tested on Linux only

Source: ip(7), recvmsg(2); RFC 792. Knows nothing of nodes; IPv6, which nobody translates, is not
traced.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import selectors
import socket
import struct
import sys
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import trio

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.nat.path import PathAnswer, PathReport, PathTrace
from natswarm.net.device import address_on, tie_to_interface

__all__ = ["PATH_PAYLOAD", "PathNetwork", "PathProber", "SystemPaths", "trace_path"]

# Nodes count and drop what starts with a zero byte; see `natswarm/wire.py`.
PATH_PAYLOAD = b"\0natswarm: where do our NATs end?"

# Carriers seen have 2 to 6 hops inside; the way to a peer in the same country has 10 to 15.
TTL_MAX = 16
ATTEMPTS = 3
ATTEMPT_S = 0.55
"""Time between two attempts and after the last: the slowest hops of a mobile network answer in
less, and three fit into two seconds."""


class PathProber(Protocol):
    """The ports of one trace. Closed by whoever opened it."""

    @property
    def local_ip(self) -> str:
        """Our own address on the way to the destination."""
        ...

    def send(self, ttl: int, data: bytes) -> None:
        """Send one probe to the destination, at once; what the system refuses is lost."""
        ...

    async def receive(self) -> list[PathAnswer]:
        """Wait for answers and return the at least one that is there."""
        ...

    def close(self) -> None:
        """Close; idempotent."""
        ...


class PathNetwork(Protocol):
    """Where probers come from: `SystemPaths`, or a `VirtualNetwork`."""

    async def open_prober(self, destination: Endpoint, ttl_max: int) -> PathProber:
        """Open ports for a trace towards an IPv4 destination with hop limits 1 to `ttl_max`.

        Raises:
            ConfigurationError: There is no way to hear routers here; says why and what to do.
        """
        ...


async def trace_path(
    network: PathNetwork,
    destination: Endpoint | None,
    *,
    payload: bytes = PATH_PAYLOAD,
    ttl_max: int = TTL_MAX,
) -> PathReport:
    """Find out which routers are on the way to a peer; takes 1.65 s at most.

    Cancelled, it leaves nothing behind.

    Args:
        network: Where to send from.
        destination: A port of a peer that can be reached; None where there is no peer, for then
            nobody is contacted.
        payload: What the probes carry. Peers drop the default; with an encoded `EchoRequest` they
            answer, and the report tells how far away they are.
        ttl_max: The highest hop limit, 1..255.

    Returns:
        What was found; where that is nothing, the report says why.
    """
    if destination is None:
        return _nothing(None, "no peer to trace towards: connect to one first")
    if ":" in destination.ip:
        return _nothing(destination, "IPv6 is not translated: trace towards an IPv4 address")
    try:
        prober = await network.open_prober(destination, ttl_max)
    except ConfigurationError as error:
        return _nothing(destination, str(error))
    trace = PathTrace(destination, prober.local_ip, ttl_max)
    with contextlib.closing(prober):
        for _ in range(ATTEMPTS):
            for ttl in trace.ttls_to_send(trio.current_time()):
                prober.send(ttl, payload)
            with trio.move_on_after(ATTEMPT_S):
                while not trace.is_complete:
                    for answer in await prober.receive():
                        trace.hear(answer, trio.current_time())
            if trace.is_complete:
                break
    return trace.report()


def _nothing(destination: Endpoint | None, trouble: str) -> PathReport:
    return PathReport(destination, None, (), reached=False, trouble=trouble)


class SystemPaths:
    """The paths out of this machine: a `PathNetwork`. Stateless.

    Args:
        ip: The address to send from; `0.0.0.0` leaves it to the system's routes.
        interface: Send through this one alone, such as `wwan0`; None follows the routes.
        has_error_queue: Whether to hear routers by the error queue; False takes a raw socket.
    """

    def __init__(
        self,
        *,
        ip: str = "0.0.0.0",
        interface: str | None = None,
        has_error_queue: bool = hasattr(socket, "MSG_ERRQUEUE"),
    ) -> None:
        self._ip = ip
        self._interface = interface
        self._has_error_queue = has_error_queue

    async def open_prober(self, destination: Endpoint, ttl_max: int) -> PathProber:
        """See `PathNetwork.open_prober`."""
        if sys.platform == "win32":
            raise ConfigurationError(
                "Windows keeps from sockets what routers say: trace from Linux"
            )
        if not self._has_error_queue:
            await trio.to_thread.run_sync(_load_scapy)
        try:
            return self._open_sockets(destination, ttl_max)
        except OSError as error:
            raise ConfigurationError(
                f"cannot send to {destination}: {error.strerror}; check the address to send from "
                "and that the network is up"
            ) from error

    def _open_sockets(self, destination: Endpoint, ttl_max: int) -> PathProber:
        with contextlib.ExitStack() as stack:
            raw = None if self._has_error_queue else stack.enter_context(self._open_raw_socket())
            sockets = {
                ttl: stack.enter_context(self._open_socket(destination, ttl))
                for ttl in range(1, ttl_max + 1)
            }
            prober = _ErrorQueueProber(sockets) if raw is None else _RawProber(sockets, raw)
            stack.pop_all()
        return prober

    def _open_socket(self, destination: Endpoint, ttl: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._tie(sock)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            if self._has_error_queue:
                _ask_for_errors(sock)
            # Sends nothing: chooses our address, and keeps away what others send to the port.
            sock.connect((destination.ip, destination.port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _open_raw_socket(self) -> socket.socket:
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        except OSError as error:
            needs_root = error.errno in (errno.EPERM, errno.EACCES)
            raise ConfigurationError(
                "this system tells what routers say only to programs with a raw socket: "
                f"{error.strerror}; {'run as root (sudo)' if needs_root else 'trace from Linux'}"
            ) from error
        try:
            self._tie(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _tie(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        ip = self._ip
        if self._interface is not None:
            tie_to_interface(sock, self._interface)
            ip = address_on(self._interface, ip)
        sock.bind((ip, 0))


def _ask_for_errors(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    except OSError as error:
        raise ConfigurationError(
            f"this system keeps from programs what routers say: {error.strerror}; some sandboxes "
            "do, trace outside of it"
        ) from error


class _SystemProber:
    """A connected UDP socket for each hop limit; whoever answers by UDP is the destination."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._sockets = sockets
        self._selector = selectors.DefaultSelector()
        for ttl, sock in sockets.items():
            self._selector.register(sock, selectors.EVENT_READ, ttl)

    @property
    def local_ip(self) -> str:
        """See `PathProber.local_ip`."""
        ip: str = self._sockets[1].getsockname()[0]
        return ip

    def send(self, ttl: int, data: bytes) -> None:
        """See `PathProber.send`."""
        sock = self._sockets[ttl]
        # An error about the last probe would be raised here, in place of sending this one.
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        with contextlib.suppress(OSError):
            sock.send(data)

    async def receive(self) -> list[PathAnswer]:
        """See `PathProber.receive`."""
        descriptor: int = getattr(self._selector, "fileno")()  # noqa: B009 - epoll and kqueue have
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            ready = [key.data for key, _ in self._selector.select(0)]
            if answers := [answer for ttl in ready for answer in self._read(ttl)]:
                return answers

    def _read(self, ttl: int) -> list[PathAnswer]:
        sock = self._sockets[ttl]
        try:
            sock.recv(1)
        except OSError:  # nothing there, or a pending error that comes in full elsewhere
            return []
        return [PathAnswer(ttl, sock.getpeername()[0], is_end=True)]

    def close(self) -> None:
        """See `PathProber.close`."""
        self._selector.close()
        for sock in self._sockets.values():
            sock.close()


# Linux, include/uapi/linux/in.h and errqueue.h: struct sock_extended_err, and behind it the address
# of whoever says it, a struct sockaddr_in.
IP_RECVERR = 11
SO_EE_ORIGIN_ICMP = 2
_EXTENDED_ERROR = struct.Struct("=IBBBBII2x2x4s")
_TIME_EXCEEDED = 11


class _ErrorQueueProber(_SystemProber):
    def _read(self, ttl: int) -> list[PathAnswer]:
        answers = super()._read(ttl)
        sock = self._sockets[ttl]
        while True:
            try:
                _, ancillary, _, _ = sock.recvmsg(
                    1, socket.CMSG_SPACE(_EXTENDED_ERROR.size + 8), socket.MSG_ERRQUEUE
                )
            except OSError:  # no more
                return answers
            for level, kind, value in ancillary:
                if (level, kind) == (socket.IPPROTO_IP, IP_RECVERR):
                    _, origin, icmp_type, _, _, _, _, ip = _EXTENDED_ERROR.unpack_from(value)
                    if origin == SO_EE_ORIGIN_ICMP:
                        is_end = icmp_type != _TIME_EXCEEDED
                        answers.append(PathAnswer(ttl, socket.inet_ntoa(ip), is_end))


class _RawProber(_SystemProber):
    def __init__(self, sockets: Mapping[int, socket.socket], raw: socket.socket) -> None:
        super().__init__(sockets)
        self._raw = raw
        self._ttl_of_port = {sock.getsockname()[1]: ttl for ttl, sock in sockets.items()}
        self._destination = Endpoint(*sockets[1].getpeername())
        self._selector.register(raw, selectors.EVENT_READ, 0)

    def _read(self, ttl: int) -> list[PathAnswer]:
        if ttl != 0:
            return super()._read(ttl)
        answers: list[PathAnswer] = []
        while True:
            try:
                packet = self._raw.recv(2048)
            except OSError:  # no more
                return answers
            with contextlib.suppress(DecodeError):
                error = _decode_error_untrusted(packet)
                if error.destination == self._destination and error.port in self._ttl_of_port:
                    is_end = error.icmp_type != _TIME_EXCEEDED
                    answers.append(PathAnswer(self._ttl_of_port[error.port], error.ip, is_end))

    def close(self) -> None:
        super().close()
        self._raw.close()


class _IcmpError(NamedTuple):
    ip: str
    icmp_type: int
    destination: Endpoint
    """Of the datagram it is about."""
    port: int
    """The same one's source port."""


def _load_scapy() -> None:
    # It warns of interfaces without an address, among others: not the user's business here.
    logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
    importlib.import_module("scapy.layers.inet")


def _decode_error_untrusted(packet: bytes) -> _IcmpError:
    """Read an IPv4 packet that is an ICMP error about a UDP datagram.

    Raises:
        DecodeError: It is something else.
    """
    from scapy.layers.inet import ICMP, IPerror, UDPerror

    # macOS changes the length in the header, by which scapy would cut: read past it.
    header_bytes = 4 * (packet[0] & 0x0F) if packet else 0
    try:
        message = ICMP(packet[header_bytes:])
        about, udp = message[IPerror], message[UDPerror]
        source = socket.inet_ntoa(packet[12:16])
        return _IcmpError(source, message.type, Endpoint(about.dst, udp.dport), udp.sport)
    except (IndexError, struct.error, OSError) as error:
        raise DecodeError(f"not an ICMP error about a UDP datagram: {error}") from error
