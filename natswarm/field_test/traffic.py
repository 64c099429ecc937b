"""A network that counts: what all ports of one node handed to the system, and what it refused."""

from __future__ import annotations

from natswarm.address import Endpoint
from natswarm.net.port import DatagramPort, Network, PortGroup, PortStatistics

__all__ = ["CountingNetwork"]


class CountingNetwork:
    """A `Network` that remembers the counters of the ports it made, closed ones included.

    Args:
        network: Where the ports come from. It must be made anew for each attempt, since what it
            remembers only grows.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._counters: list[PortStatistics] = []

    def bind(self, local: Endpoint) -> DatagramPort:
        """See `Network.bind`."""
        port = self._network.bind(local)
        self._counters.append(port.statistics)
        return port

    def bind_group(self, ip: str, count: int) -> PortGroup:
        """See `Network.bind_group`."""
        group = self._network.bind_group(ip, count)
        self._counters += [group.statistics(index) for index in range(group.count)]
        return group

    def local_addresses(self) -> list[str]:
        """See `Network.local_addresses`."""
        return self._network.local_addresses()

    @property
    def handed_count(self) -> int:
        """Datagrams that the system took."""
        return sum(each.sent_count for each in self._counters)

    @property
    def refused_count(self) -> int:
        """Datagrams that it did not take."""
        return sum(each.send_failed_count for each in self._counters)

    @property
    def refusal(self) -> str:
        """What it said last, of any port; empty: nothing was refused."""
        return next((each.last_refusal for each in self._counters if each.last_refusal), "")
