"""The one receiver of a UDP port: sorts what comes in and hands it on.

A socket that several tasks receive from loses the order and the batch; so one task receives, and
what datagrams are for is told by their first byte in the spirit of RFC 9443:

    bit 0x40 set   QUIC (RFC 9000 section 17: the fixed bit), to whoever attached its source
    d and a digit  KRPC of mainline nodes, where nobody attached its source: "d" has bit 0x40, too
    4..15          natswarm's own, wire.py
    else           nobody's: counted and dropped

QUIC goes by source endpoint, not by connection id: a path here is one socket and one endpoint that
authenticated probes agreed on, with one connection on it. Whoever is not at the end of such a path
gets no answer at all, so an open port cannot be told from a closed one.

Knows neither QUIC nor natswarm's formats; nothing that comes in can raise in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from natswarm.address import Endpoint
from natswarm.net.port import DatagramPort

__all__ = ["PortPump", "PumpStatistics"]

QUIC_FIXED_BIT = 0x40
QUIC_FIRST_BYTES = bytes(byte for byte in range(256) if byte & QUIC_FIXED_BIT)
NATSWARM_FIRST_BYTES = range(4, 16)


@dataclass(slots=True)
class PumpStatistics:
    """Datagrams of one port by what became of them; the counters only grow."""

    quic_count: int = 0
    natswarm_count: int = 0
    krpc_count: int = 0
    stray_quic_count: int = 0
    """Looked like QUIC, but from an endpoint that nobody attached; dropped."""
    unknown_count: int = 0
    """Neither; dropped."""


class PortPump:
    """Receives everything that arrives at one port.

    Args:
        port: The port; nobody else may receive from it. Stays the caller's to close.
        on_datagram: Gets every natswarm datagram and where it came from, from within `run`; the
            first byte is all that is known of it.
    """

    def __init__(self, port: DatagramPort, on_datagram: Callable[[bytes, Endpoint], None]) -> None:
        self._port = port
        self._on_datagram = on_datagram
        self._receivers: dict[Endpoint, Callable[[list[bytes]], None]] = {}
        self._statistics = PumpStatistics()
        self.on_krpc: Callable[[bytes, Endpoint], None] | None = None
        """Gets what looks like KRPC; None: nobody speaks it here."""

    @property
    def port(self) -> DatagramPort:
        """The port it receives from."""
        return self._port

    def statistics(self) -> PumpStatistics:
        """Return the counters so far."""
        return self._statistics

    def attach(self, remote: Endpoint, receiver: Callable[[list[bytes]], None]) -> None:
        """Send the QUIC datagrams from `remote` to `receiver`, one call a batch, order kept.

        Raises:
            ValueError: Someone else receives from `remote`.
        """
        if remote in self._receivers:
            raise ValueError(f"datagrams from {remote} already have a receiver")
        self._receivers[remote] = receiver

    def detach(
        self, remote: Endpoint, receiver: Callable[[list[bytes]], None] | None = None
    ) -> None:
        """Drop what comes from `remote` from now on; idempotent.

        Args:
            remote: Whose datagrams.
            receiver: If given, nothing happens where somebody else has taken its place.
        """
        if receiver is None or self._receivers.get(remote) == receiver:
            self._receivers.pop(remote, None)

    async def run(self) -> None:
        """Receive until the port is closed, then return.

        Cancelled, it has handed on everything it took out of the port.
        """
        while True:
            try:
                arrivals = await self._port.receive_merged()
            except trio.ClosedResourceError:
                return
            quic: dict[Endpoint, list[bytes]] = {}
            run: list[bytes] = []
            run_source: Endpoint | None = None
            for data, source, segment_bytes in arrivals:
                # Datagrams come in runs from one source, and hashing an endpoint is slow.
                if source is not run_source:
                    run = quic.setdefault(source, [])
                    run_source = source
                if segment_bytes:
                    run += self._split(data, source, segment_bytes)
                elif data and data[0] & QUIC_FIXED_BIT:
                    run.append(data)
                else:
                    self._take_other(data, source)
            for source, datagrams in quic.items():
                if not datagrams:
                    continue
                # Looked up late: a natswarm datagram of the same batch may have made the path.
                receiver = self._receivers.get(source)
                if receiver is None:
                    self._sort_strays(datagrams, source)
                else:
                    self._statistics.quic_count += len(datagrams)
                    receiver(datagrams)

    def _split(self, data: bytes, source: Endpoint, segment_bytes: int) -> list[bytes]:
        """Return the QUIC datagrams among those that the system merged, and hand on the others."""
        # The hottest lines of the transport, 740,000 datagrams a gigabyte.
        datagrams = [
            data[start : start + segment_bytes] for start in range(0, len(data), segment_bytes)
        ]
        if not data[::segment_bytes].translate(None, QUIC_FIRST_BYTES):
            return datagrams
        for datagram in datagrams:
            if not datagram[0] & QUIC_FIXED_BIT:
                self._take_other(datagram, source)
        return [datagram for datagram in datagrams if datagram[0] & QUIC_FIXED_BIT]

    def _take_other(self, data: bytes, source: Endpoint) -> None:
        if data and data[0] in NATSWARM_FIRST_BYTES:
            self._statistics.natswarm_count += 1
            self._on_datagram(data, source)
        else:
            self._statistics.unknown_count += 1

    def _sort_strays(self, datagrams: list[bytes], source: Endpoint) -> None:
        for data in datagrams:
            if self.on_krpc is not None and data[:1] == b"d" and data[1:2].isdigit():
                self._statistics.krpc_count += 1
                self.on_krpc(data, source)
            else:
                self._statistics.stray_quic_count += 1
