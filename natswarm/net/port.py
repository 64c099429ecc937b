"""The seam between natswarm and a network: UDP ports, real or virtual.

Everything above speaks to a network only through these protocols, so the same node runs on real
sockets (`udp.py`) and on the virtual internet (`virtual.py`), QUIC included. UDP's promises are
kept, not improved: a datagram may be lost, duplicated or reordered, and `send` never blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from natswarm.address import Endpoint

__all__ = [
    "ANY_ADDRESS",
    "ANY_ADDRESS_6",
    "Arrival",
    "DatagramPort",
    "MergedArrival",
    "Network",
    "PortGroup",
    "PortStatistics",
]

ANY_ADDRESS, ANY_ADDRESS_6 = "0.0.0.0", "::"


class Arrival(NamedTuple):
    """A datagram as it came in."""

    data: bytes
    source: Endpoint


class MergedArrival(NamedTuple):
    """A datagram, or several from one source that the system has merged."""

    data: bytes
    source: Endpoint
    segment_bytes: int
    """0: one datagram; else of so many bytes each, of which the last may be shorter."""


@dataclass(slots=True)
class PortStatistics:
    """Counters of one port; they only grow."""

    sent_count: int = 0
    received_count: int = 0
    send_failed_count: int = 0
    """The operating system took no datagram: buffer full, no route, not permitted."""
    last_refusal: str = ""
    """What it said to the last one it did not take; empty as long as it took all."""


class DatagramPort(Protocol):
    """One bound UDP port. One task receives; anyone may send."""

    @property
    def local_endpoint(self) -> Endpoint:
        """The bound address (`0.0.0.0` where bound to any) and port, never 0."""
        ...

    @property
    def statistics(self) -> PortStatistics:
        """Counters so far."""
        ...

    def send(self, data: bytes, destination: Endpoint, *, ttl: int | None = None) -> None:
        """Hand one datagram to the network, at once, without waiting.

        Args:
            data: At most 65,507 bytes.
            destination: Of the address family the port is bound to.
            ttl: IP hop limit of this datagram alone, 1..255; None means the system's default.

        A datagram the system refuses counts as `send_failed_count`, as one lost on the way.

        Raises:
            trio.ClosedResourceError: The port was closed.
        """
        ...

    def send_run(self, datagrams: Sequence[bytes], destination: Endpoint) -> None:
        """Hand several datagrams for one destination to the network, in order, as `send` does."""
        ...

    async def receive_batch(self) -> list[Arrival]:
        """Wait for datagrams and return the at least one, at most some dozens, that are there.

        Raises:
            trio.ClosedResourceError: The port was closed, before or while waiting.
        """
        ...

    async def receive_merged(self) -> list[MergedArrival]:
        """As `receive_batch`, with what the system has merged left as it is: for bulk."""
        ...

    def close(self) -> None:
        """Close; idempotent."""
        ...


class PortGroup(Protocol):
    """Many UDP ports behind one wait: what a birthday puncture opens. Indices are 0..count-1."""

    @property
    def count(self) -> int:
        """How many ports the group was opened with."""
        ...

    def local_endpoint(self, index: int) -> Endpoint:
        """The address and port that port `index` is bound to."""
        ...

    def send(
        self, index: int, data: bytes, destination: Endpoint, *, ttl: int | None = None
    ) -> None:
        """As `DatagramPort.send`, from port `index`."""
        ...

    def statistics(self, index: int) -> PortStatistics:
        """Counters of port `index` so far."""
        ...

    async def receive_batch(self) -> list[tuple[int, Arrival]]:
        """Wait for datagrams on any of the ports: (index, arrival), at least one.

        Raises:
            trio.ClosedResourceError: The group was closed.
        """
        ...

    def take(self, index: int) -> DatagramPort:
        """Take one port out of the group; it lives on after the group is closed."""
        ...

    def close(self) -> None:
        """Close every port that was not taken; idempotent."""
        ...


class Network(Protocol):
    """Where ports come from."""

    def bind(self, local: Endpoint) -> DatagramPort:
        """Bind one UDP port.

        Args:
            local: The address and port to bind; port 0 lets the system choose, `0.0.0.0` is any
                interface.

        Raises:
            ConfigurationError: The address is not ours or the port is taken; says which.
        """
        ...

    def bind_group(self, ip: str, count: int) -> PortGroup:
        """Bind `count` ports that the system chooses on address `ip`.

        Raises:
            ConfigurationError: The system gave fewer; says how many and which limit to raise.
        """
        ...

    def local_addresses(self) -> list[str]:
        """Our own addresses, usable as host candidates: no loopback, no link-local."""
        ...
