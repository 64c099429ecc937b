"""Real UDP ports under Trio: batches in, runs out, thousands of sockets behind one wait.

Trio's own UDP socket costs a trip through the scheduler for every datagram, 15-20 thousand a second
at most. Here one wait is followed by a drain of the non-blocking socket (70 thousand), and where
the kernel can, it carries many datagrams of one size through one system call: UDP_SEGMENT on the
way out, UDP_GRO on the way in (over 200 thousand).

Source: udp(7) and the kernel's Documentation/networking/segmentation-offloads.rst; RFC 8899 for
the don't-fragment bit. Implements natswarm/net/port.py; knows nothing of what datagrams mean.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import selectors
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import trio

from natswarm.address import AddressKind, Endpoint, address_kind
from natswarm.errors import ConfigurationError
from natswarm.net.device import address_on, tie_to_interface
from natswarm.net.interfaces import inspect_interfaces
from natswarm.net.port import Arrival, MergedArrival, PortStatistics

__all__ = ["UdpNetwork", "UdpPort", "UdpPortGroup", "endpoint_of"]

# Linux, include/uapi/linux/udp.h and in.h; Python's socket module does not name them.
UDP_SEGMENT = 103
UDP_GRO = 104
IP_MTU_DISCOVER = 10
IPV6_MTU_DISCOVER = 23
PMTUDISC_PROBE = 3
HAS_OFFLOADS = sys.platform == "linux"

# What one UDP_SEGMENT call may carry: UDP_MAX_SEGMENTS was 64 until Linux 6.9 doubled it, and all
# segments together must fit one IP packet of 65,535 bytes with its headers.
MAX_RUN_SEGMENTS = 64
MAX_RUN_BYTES = 65_000

MAX_DATAGRAM_BYTES = 65_535
# What others wait for: half a millisecond of QUIC. Each turn of Trio costs a tenth of that.
MAX_DRAIN_CALLS = 32
MAX_BATCH_DATAGRAMS = 256
# One socket of a group that is flooded must not starve the thousands that wait for one datagram.
MAX_GROUP_DRAIN_CALLS = 4

# Asked for, not insisted on: Linux silently halves it to net.core.rmem_max. The default of 208 KiB
# is 1.5 ms of a 1 Gbit/s burst, less than a garbage collection.
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024


@lru_cache(maxsize=4096)
def endpoint_of(ip: str, port: int, _flow: int = 0, scope: int = 0) -> Endpoint:
    """Return the endpoint of a socket address; link-local ones name their interface, `%eth0`."""
    # Cached because a frozen dataclass costs more to make than the system call costs per datagram.
    if scope:
        with contextlib.suppress(OSError):  # the interface is gone
            ip = f"{ip}%{socket.if_indextoname(scope)}"
    return Endpoint(ip, port)


def _socket_address(endpoint: Endpoint) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return what the system takes for an endpoint; Python ignores a scope within the text."""
    ip, _, scope = endpoint.ip.partition("%")
    if not scope:
        return ip, endpoint.port
    return ip, endpoint.port, 0, socket.if_nametoindex(scope)


class UdpPort:
    """One UDP socket, as `natswarm.net.port.DatagramPort`.

    Owns the socket. Not made directly: `UdpNetwork.bind` and `UdpPortGroup.take` return it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._statistics = PortStatistics()
        ip, port = sock.getsockname()[:2]
        self._local_endpoint = Endpoint(ip, port)
        self._ttl_option = (
            (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
            if sock.family == socket.AF_INET6
            else (socket.IPPROTO_IP, socket.IP_TTL)
        )
        self._default_ttl = sock.getsockopt(*self._ttl_option)
        self._ttl = self._default_ttl
        self._can_segment = HAS_OFFLOADS
        self._buffer: bytearray | None = None

    def __repr__(self) -> str:
        return f"<UdpPort {self._local_endpoint}{' (closed)' if self._is_closed else ''}>"

    @property
    def local_endpoint(self) -> Endpoint:
        """The bound address and port."""
        return self._local_endpoint

    @property
    def statistics(self) -> PortStatistics:
        """Counters so far."""
        return self._statistics

    @property
    def _is_closed(self) -> bool:
        return self._socket.fileno() < 0

    def send(self, data: bytes, destination: Endpoint, *, ttl: int | None = None) -> None:
        """See `DatagramPort.send`."""
        if self._is_closed:
            raise trio.ClosedResourceError(f"{self!r} cannot send")
        wanted_ttl = self._default_ttl if ttl is None else ttl
        try:
            # The option stays set until a datagram wants another value, so a round of probes with
            # one TTL costs one more system call, not one each; a control message would do the same
            # on Linux alone.
            if wanted_ttl != self._ttl:
                self._socket.setsockopt(*self._ttl_option, wanted_ttl)
                self._ttl = wanted_ttl
            self._socket.sendto(data, _socket_address(destination))
        except OSError as error:
            # EAGAIN, ENOBUFS: full; ENETUNREACH, EHOSTUNREACH: no route; EPERM: a firewall here;
            # EMSGSIZE: longer than the interface takes; ENETDOWN, ENODEV, EADDRNOTAVAIL: the
            # interface is gone. Lost on the way, as far as the peer can tell.
            self._statistics.send_failed_count += 1
            self._statistics.last_refusal = error.strerror or str(error)
        else:
            self._statistics.sent_count += 1

    def send_run(self, datagrams: Sequence[bytes], destination: Endpoint) -> None:
        """See `DatagramPort.send_run`."""
        for start, end in _equal_runs(datagrams):
            if end - start == 1 or not self._can_segment:
                for data in datagrams[start:end]:
                    self.send(data, destination)
            else:
                self._send_segments(datagrams[start:end], destination)

    def _send_segments(self, datagrams: Sequence[bytes], destination: Endpoint) -> None:
        """Send datagrams of one size (the last may be shorter) in one system call."""
        if self._is_closed:
            raise trio.ClosedResourceError(f"{self!r} cannot send")
        if self._ttl != self._default_ttl:
            self._socket.setsockopt(*self._ttl_option, self._default_ttl)
            self._ttl = self._default_ttl
        size = struct.pack("=H", len(datagrams[0]))
        try:
            self._socket.sendmsg(
                datagrams,
                [(socket.IPPROTO_UDP, UDP_SEGMENT, size)],
                0,
                _socket_address(destination),
            )
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EINVAL, errno.ENOPROTOOPT):
                self._statistics.send_failed_count += len(datagrams)
                return
            # EIO: a device on the way computes no checksums, as tunnels and some virtual ones;
            # EINVAL: the kernel is older than 4.18, or a segment is longer than the interface
            # takes. None of them changes while the port lives, so it is not tried again.
            self._can_segment = False
            for data in datagrams:
                self.send(data, destination)
        else:
            self._statistics.sent_count += len(datagrams)

    async def receive_batch(self) -> list[Arrival]:
        """See `DatagramPort.receive_batch`; cancelled, it takes nothing out of the socket."""
        return _split(await self.receive_merged())

    async def receive_merged(self) -> list[MergedArrival]:
        """See `DatagramPort.receive_merged`; cancelled, it takes nothing out of the socket."""
        while True:
            if self._is_closed:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise trio.ClosedResourceError(f"{self!r} cannot receive")
            await trio.lowlevel.wait_readable(self._socket)
            arrivals = self._drain(MAX_DRAIN_CALLS)
            if arrivals:  # else a datagram with a bad checksum woke us, or an ICMP error
                return arrivals

    def _drain(self, max_calls: int) -> list[MergedArrival]:
        if self._buffer is None:
            self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        view = memoryview(self._buffer)
        arrivals: list[MergedArrival] = []
        count = 0
        for _ in range(max_calls):
            try:
                received, segment, address = self._receive_into(view)
            except BlockingIOError:
                break
            except OSError:
                # An ICMP error that an earlier datagram of ours caused (ECONNREFUSED here,
                # ECONNRESET on Windows). It is not authenticated and names no datagram: ignore.
                continue
            source = endpoint_of(*address)
            if received <= segment:
                segment = 0
            arrivals.append(MergedArrival(bytes(view[:received]), source, segment))
            count += -(-received // segment) if segment else 1
            if count >= MAX_BATCH_DATAGRAMS:
                break
        self._statistics.received_count += count
        return arrivals

    def _receive_into(self, view: memoryview) -> tuple[int, int, tuple[Any, ...]]:
        """Return the bytes received, the size of a segment of them, and the source."""
        if not HAS_OFFLOADS:
            received, address = self._socket.recvfrom_into(view)
            return received, MAX_DATAGRAM_BYTES, address
        received, ancillary, _, address = self._socket.recvmsg_into([view], _GRO_SPACE)
        for level, kind, value in ancillary:
            if level == socket.IPPROTO_UDP and kind == UDP_GRO:
                return received, struct.unpack_from("=i", value)[0], address
        return received, MAX_DATAGRAM_BYTES, address

    def tune(self) -> None:
        """Prepare for bulk: large socket buffers, and merged datagrams where the kernel can."""
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if HAS_OFFLOADS:
            with contextlib.suppress(OSError):  # before Linux 5.0
                self._socket.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)

    def close(self) -> None:
        """Close; idempotent. A task inside `receive_batch` gets `trio.ClosedResourceError`."""
        if not self._is_closed:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def fileno(self) -> int:
        """Return the file descriptor, -1 once closed."""
        return self._socket.fileno()


_GRO_SPACE = socket.CMSG_SPACE(4) if HAS_OFFLOADS else 0


def _split(arrivals: list[MergedArrival]) -> list[Arrival]:
    """Return each datagram by itself."""
    return [
        Arrival(data[start : start + (size or len(data))], source)
        for data, source, size in arrivals
        for start in range(0, len(data) or 1, size or len(data) or 1)
    ]


def _equal_runs(datagrams: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the stretches that one UDP_SEGMENT call can carry, in order.

    All of a stretch have the size of its first; a shorter one may end it.
    """
    sizes = [len(data) for data in datagrams]
    start = 0
    while start < len(sizes):
        size = sizes[start]
        count = min(MAX_RUN_SEGMENTS, MAX_RUN_BYTES // size) if size else 1
        limit = min(start + max(count, 1), len(sizes))
        end = start + 1
        while end < limit and sizes[end] == size:
            end += 1
        if end < limit and 0 < sizes[end] < size:
            end += 1
        yield start, end
        start = end


class UdpPortGroup:
    """Many UDP sockets behind one wait, as `natswarm.net.port.PortGroup`.

    One epoll (Linux) or kqueue (BSD, macOS) descriptor holds them all and is itself what Trio waits
    for: 4,096 sockets are armed in 12 ms and 1.5 MB, where a task each takes 180 ms and 12.7 MB.
    """

    def __init__(self, ports: list[UdpPort]) -> None:
        self._ports: list[UdpPort | None] = list(ports)
        self._is_closed = False
        self._selector = selectors.DefaultSelector()
        fileno = getattr(self._selector, "fileno", None)
        self._descriptor: int | None = None if fileno is None else fileno()
        for index, port in enumerate(ports):
            self._selector.register(port, selectors.EVENT_READ, index)

    @property
    def count(self) -> int:
        """How many ports the group was opened with."""
        return len(self._ports)

    def local_endpoint(self, index: int) -> Endpoint:
        """Return the address and port that port `index` is bound to."""
        return self._port(index).local_endpoint

    def send(
        self, index: int, data: bytes, destination: Endpoint, *, ttl: int | None = None
    ) -> None:
        """See `PortGroup.send`.

        Raises:
            trio.ClosedResourceError: The group was closed, or the port taken out of it.
        """
        self._port(index).send(data, destination, ttl=ttl)

    def statistics(self, index: int) -> PortStatistics:
        """Return the counters of port `index` so far."""
        return self._port(index).statistics

    def _port(self, index: int) -> UdpPort:
        port = self._ports[index]
        if port is None or self._is_closed:
            raise trio.ClosedResourceError(f"port {index} is no longer in the group")
        return port

    async def receive_batch(self) -> list[tuple[int, Arrival]]:
        """See `PortGroup.receive_batch`; cancelled, it takes nothing out of the sockets."""
        while True:
            if self._is_closed:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise trio.ClosedResourceError("the port group was closed")
            await self._wait_any_readable()
            if batch := self._drain():
                return batch

    def _drain(self) -> list[tuple[int, Arrival]]:
        if self._is_closed:  # since we were woken
            return []
        return [
            (key.data, arrival)
            for key, _ in self._selector.select(0)
            for arrival in _split(self._port(key.data)._drain(MAX_GROUP_DRAIN_CALLS))
        ]

    async def _wait_any_readable(self) -> None:
        if (descriptor := self._descriptor) is not None:
            await trio.lowlevel.wait_readable(descriptor)
            return
        # Windows has select() only, which is no file; a task each is slow but works.
        async with trio.open_nursery() as nursery:
            for port in self._ports:
                if port is not None:
                    nursery.start_soon(self._wait_one_readable, port, nursery.cancel_scope)

    @staticmethod
    async def _wait_one_readable(port: UdpPort, done: trio.CancelScope) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(port.fileno())
        done.cancel()

    def take(self, index: int) -> UdpPort:
        """Take one port out of the group; it lives on after the group is closed.

        Raises:
            trio.ClosedResourceError: The group was closed, or the port taken before.
        """
        port = self._port(index)
        self._selector.unregister(port)
        self._ports[index] = None
        port.tune()
        return port

    def close(self) -> None:
        """Close every port that was not taken; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._descriptor is not None:
            trio.lowlevel.notify_closing(self._descriptor)
        self._selector.close()
        for port in self._ports:
            if port is not None:
                port.close()


class UdpNetwork:
    """The network of this machine, as `natswarm.net.port.Network`. Stateless.

    Args:
        interface: Send and receive through this one alone, such as `wwan0`; None follows the
            system's routes.
    """

    def __init__(self, *, interface: str | None = None) -> None:
        self._interface = interface

    def bind(self, local: Endpoint) -> UdpPort:
        """See `Network.bind`."""
        try:
            sock = self._open_socket(self._address(local.ip), local.port)
        except OSError as error:
            raise ConfigurationError(
                f"cannot bind UDP {local}: {error.strerror}; {_bind_advice(error)}"
            ) from error
        port = UdpPort(sock)
        port.tune()
        return port

    def bind_group(self, ip: str, count: int) -> UdpPortGroup:
        """See `Network.bind_group`.

        Args:
            ip: Local address; `0.0.0.0` is any interface.
            count: 1 to about 60,000; every port is one file descriptor.
        """
        ports: list[UdpPort] = []
        try:
            address = self._address(ip)
            for _ in range(count):
                ports.append(UdpPort(self._open_socket(address, 0)))
            return UdpPortGroup(ports)
        except (OSError, ConfigurationError) as error:
            for port in ports:
                port.close()
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"opened {len(ports)} of {count} UDP ports on {ip}: {error.strerror}; "
                f"{_group_advice(error, count)}"
            ) from error

    def local_addresses(self) -> list[str]:
        """See `Network.local_addresses`; sorted, IPv4 before IPv6, so that the order is stable."""
        unusable = {AddressKind.LOOPBACK, AddressKind.LINK_LOCAL, AddressKind.UNUSABLE}
        found = {
            ipaddress.ip_address(address.ip)
            for interface in inspect_interfaces().interfaces
            for address in interface.addresses
            if self._interface in (None, interface.name)
        }
        usable = [address for address in found if address_kind(str(address)) not in unusable]
        return [str(address) for address in sorted(usable, key=lambda ip: (ip.version, int(ip)))]

    def _address(self, ip: str) -> str:
        return ip if self._interface is None else address_on(self._interface, ip)

    def _open_socket(self, ip: str, port: int) -> socket.socket:
        sock = _make_socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        try:
            if self._interface is not None:
                tie_to_interface(sock, self._interface)
            sock.bind((ip, port))
        except BaseException:
            sock.close()
            raise
        return sock


def _make_socket(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            # So that `::` and `0.0.0.0` can have the same port, and no peer has two addresses.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if HAS_OFFLOADS:
            # Set the don't-fragment bit and ignore what ICMP claims about the path: carriers drop
            # fragments, anyone can forge ICMP, and QUIC probes for the real size by itself.
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
                if family == socket.AF_INET6
                else (socket.IPPROTO_IP, IP_MTU_DISCOVER)
            )
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, PMTUDISC_PROBE)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_advice(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another program holds the port: stop it or choose another port (0: any)"
        case errno.EADDRNOTAVAIL:
            return "no interface of this machine has that address"
        case errno.EACCES | errno.EPERM:
            return "ports below 1024 need privileges: choose a higher one"
        case _:
            return "check the address and that the network is up"


def _group_advice(error: OSError, count: int) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE) and sys.platform != "win32":
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"the limit of open files (RLIMIT_NOFILE) is {soft}, at most {hard}: run "
            f"`ulimit -n {count + 256}` first, or ask for fewer ports"
        )
    return "ask for fewer ports or another address"
