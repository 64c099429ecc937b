"""One script that finds out what a NAT does, with plain UDP sockets on both of its sides.

What it finds is the same question put to the kernel's NAT and to the emulated one: the twin tests
compare the answers (`tests/lab/test_twin.py`), and `natswarm lab verify` compares them with what
the presets promise. Unlike `natswarm inspect` it may look from both sides, so it needs no
statistics.

Whether something was let in is decided without waiting for what does not come: after what may be
refused comes a datagram that is not, on a way that keeps order. Sources: RFC 4787, RFC 5780 for the
idea. Blocks; knows neither presets nor how the namespaces were made.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from natswarm.lab.errors import LabError
from natswarm.lab.namespace import entered
from natswarm.nat.behaviour import Filtering, Mapping

__all__ = ["Address", "Place", "Probe"]

Address = tuple[str, int]

# Each datagram may be lost: with 5 % each way, six tries fail together once in a million.
TRIES = 6
DATAGRAM_BYTES = 100
# Remotes at one address: that many draws agree by chance once in 65,000 times in a block of 256.
SAME_ADDRESS_REMOTES = 3

_IP_RECVTTL = 12
_IP_RECVERR = 11
_ORIGIN_ICMP = 2  # SO_EE_ORIGIN_ICMP
_TIME_EXCEEDED = 11


@dataclass(frozen=True, slots=True)
class Place:
    """Where sockets can be opened.

    Attributes:
        namespace: Full name of the network namespace.
        ip: Its own address.
    """

    namespace: str
    ip: str


class Probe:
    """A device, and two public observers that look at it.

    Args:
        device: Whose NATs are looked at.
        first: An observer.
        second: Another, at another address.
        wait_s: Longer than any answer takes.

    Leaving it as a context manager closes all sockets.
    """

    def __init__(self, device: Place, first: Place, second: Place, *, wait_s: float = 1.0) -> None:
        self.device = device
        self.first = first
        self.second = second
        self._wait_s = wait_s
        self._stack = contextlib.ExitStack()
        self._serials = itertools.count()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(self, place: Place, port: int = 0) -> socket.socket:
        """Open a UDP socket at a place; it is closed with the probe."""
        with entered(place.namespace):
            udp = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            udp.bind((place.ip, port))
        udp.setblocking(False)
        return udp

    def reach(self, udp: socket.socket, remote: socket.socket) -> Address:
        """Send to a remote until it has arrived; return where from the remote sees us.

        Raises:
            LabError: Nothing arrived.
        """
        for _ in range(TRIES):
            token = self._token()
            udp.sendto(token, remote.getsockname())
            source = self._receive(remote, token)
            if source is not None:
                return source
        raise LabError(
            f"nothing from {self.device.ip} reached {':'.join(map(str, remote.getsockname()))} in "
            f"{TRIES} tries"
        )

    def answer(self, remote: socket.socket, mapped: Address, udp: socket.socket) -> bool:
        """Return whether what a remote sends to a mapping comes in. Waits where it does not."""
        for _ in range(TRIES):
            token = self._token()
            remote.sendto(token, mapped)
            if self._receive(udp, token) is not None:
                return True
        return False

    def lets_in(
        self,
        stranger: socket.socket,
        mapped: Address,
        udp: socket.socket,
        friend: socket.socket,
    ) -> bool:
        """Return whether a stranger gets in where a friend does. Does not wait where it does not.

        Raises:
            LabError: The friend does not get in either.
        """
        for _ in range(TRIES):
            strange, friendly = self._token(), self._token()
            stranger.sendto(strange, mapped)
            friend.sendto(friendly, mapped)
            seen = self._receive_until(udp, friendly)
            if strange in seen:
                return True
            if friendly in seen:
                # From another address it may be a little later.
                return self._receive(udp, strange, wait_s=self._wait_s / 20) is not None
        raise LabError(f"{mapped[0]}:{mapped[1]} does not let in whom {self.device.ip} has sent to")

    def mapping(self) -> Mapping:
        """Return on what the external endpoint depends."""
        udp = self.open(self.device)
        here = [self.reach(udp, self.open(self.first)) for _ in range(SAME_ADDRESS_REMOTES)]
        if len(set(here)) > 1:
            return Mapping.APDM
        there = self.reach(udp, self.open(self.second))
        return Mapping.EIM if there == here[0] else Mapping.ADM

    def filtering(self) -> Filtering:
        """Return whom the mapping lets in."""
        udp, friend = self.open(self.device), self.open(self.first)
        mapped = self.reach(udp, friend)
        if self.lets_in(self.open(self.second), mapped, udp, friend):
            return Filtering.EIF
        if self.lets_in(self.open(self.first), mapped, udp, friend):
            return Filtering.ADF
        return Filtering.APDF

    def external_endpoints(self, count: int) -> tuple[int, list[Address]]:
        """Send from one port to `count` remotes at one address; return our port, and what they see.

        Raises:
            LabError: Nothing arrived at one of them.
        """
        udp = self.open(self.device)
        remotes = [self.open(self.first) for _ in range(count)]
        tokens = [self._token() for _ in remotes]
        for remote, token in zip(remotes, tokens, strict=True):
            udp.sendto(token, remote.getsockname())
        deadline = time.monotonic() + self._wait_s
        seen = []
        for remote, token in zip(remotes, tokens, strict=True):
            left_s = max(0.0, deadline - time.monotonic())
            seen.append(self._receive(remote, token, wait_s=left_s) or self.reach(udp, remote))
        return udp.getsockname()[1], seen

    def settle(self) -> None:
        """Wait until all that was sent between the device and the first observer is there.

        By a round trip on ports of its own: links keep order.

        Raises:
            LabError: The round trip fails.
        """
        udp, remote = self.open(self.device), self.open(self.first)
        if not self.answer(remote, self.reach(udp, remote), udp):
            raise LabError(f"no answer from {self.first.ip} reached {self.device.ip}")

    def hops(self) -> int:
        """Return how many routers a datagram passes on its way to an observer."""
        udp, remote = self.open(self.device), self.open(self.first)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 64)
        remote.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
        for _ in range(TRIES):
            udp.sendto(self._token(), remote.getsockname())
            if select.select([remote], [], [], self._wait_s)[0]:
                _, ancillary, _, _ = remote.recvmsg(DATAGRAM_BYTES, 100)
                (left,) = (
                    int.from_bytes(data[:4], "little")
                    for level, kind, data in ancillary
                    if (level, kind) == (socket.IPPROTO_IP, socket.IP_TTL)
                )
                return 64 - left
        raise LabError(f"nothing from {self.device.ip} reached {self.first.ip}")

    def expires_at(self, udp: socket.socket, ttl: int, remote: Address) -> str | None:
        """Send with a low TTL; return the router that says the datagram died there, or None."""
        udp.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        udp.sendto(self._token(), remote)
        poll = select.poll()
        poll.register(udp, 0)  # errors alone
        if not poll.poll(1000 * self._wait_s):
            return None
        _, ancillary, _, _ = udp.recvmsg(DATAGRAM_BYTES, 512, socket.MSG_ERRQUEUE)
        udp.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 0)
        for level, kind, data in ancillary:
            # struct sock_extended_err (16 bytes: errno, origin, type, ...), then a sockaddr_in.
            is_error = (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR)
            if is_error and data[4] == _ORIGIN_ICMP and data[5] == _TIME_EXCEEDED:
                return socket.inet_ntoa(data[20:24])
        return None

    def comes_in(self, remote: socket.socket, mapped: Address, udp: socket.socket) -> bool:
        """Return whether one datagram of a remote comes in. Does not wait where it does not.

        Raises:
            LabError: The round trip that would have come after it fails.
        """
        token = self._token()
        remote.sendto(token, mapped)
        self.settle()
        return any(data == token for data, _ in self.drain(udp))

    def wait_readable(self, udp: socket.socket) -> None:
        """Wait until something is there to read.

        Raises:
            LabError: Nothing comes.
        """
        if not select.select([udp], [], [], self._wait_s)[0]:
            raise LabError(f"nothing came to {':'.join(map(str, udp.getsockname()))}")

    def is_silent(self, udp: socket.socket, wait_s: float) -> bool:
        """Return whether nothing comes within `wait_s`."""
        return not select.select([udp], [], [], wait_s)[0]

    def drain(self, udp: socket.socket) -> list[tuple[bytes, Address]]:
        """Return what has come so far."""
        return list(self._arrivals(udp))

    def _token(self) -> bytes:
        return b"natswarm lab probe %d" % next(self._serials)

    def _receive(
        self, udp: socket.socket, token: bytes, *, wait_s: float | None = None
    ) -> Address | None:
        """Wait for one datagram, forgetting all others; return where from."""
        deadline = time.monotonic() + (self._wait_s if wait_s is None else wait_s)
        while select.select([udp], [], [], max(0.0, deadline - time.monotonic()))[0]:
            for data, source in self._arrivals(udp):
                if data == token:
                    return source
        return None

    def _receive_until(self, udp: socket.socket, token: bytes) -> set[bytes]:
        """Wait for one datagram; return all that came till then, itself included if it did."""
        deadline = time.monotonic() + self._wait_s
        seen: set[bytes] = set()
        while (
            token not in seen
            and (select.select([udp], [], [], max(0.0, deadline - time.monotonic()))[0])
        ):
            seen.update(data for data, _ in self._arrivals(udp))
        return seen

    @staticmethod
    def _arrivals(udp: socket.socket) -> Iterator[tuple[bytes, Address]]:
        while True:
            try:
                yield udp.recvfrom(DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                continue  # an ICMP error about an earlier datagram, told once
