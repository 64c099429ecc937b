"""ICMP errors: who speaks, and how often.

A router that cannot carry a packet tells its source so; path tracers live by it. Like Linux (6 at
once and one a second to each destination, `icmp_ratelimit` and `XRLIM_BURST_FACTOR`; 50 at once and
1,000 a second to all together, `icmp_msgs_burst` and `icmp_msgs_per_sec`), a router says so only so
often, and what it does not say is not said later.

Pure; knows neither links nor NATs: `attachment.py` and `router.py` carry errors, `nat.py`
translates them.
"""

from __future__ import annotations

from natswarm.address import Endpoint
from natswarm.sim.packet import ICMP, Packet
from natswarm.sim.rate import RateLimit, TokenBuckets

__all__ = ["ErrorSource"]

DESTINATION_RATE = RateLimit(1.0, 6)
ROUTER_RATE = RateLimit(1000.0, 50)


class ErrorSource:
    """One address that a router or host says errors from.

    Attributes:
        ip: The address.
    """

    def __init__(self, ip: str) -> None:
        self.ip = ip
        self._buckets = TokenBuckets(DESTINATION_RATE, ROUTER_RATE)

    def error(self, packet: Packet, data: bytes, now: float) -> Packet | None:
        """Make the error about a packet; None about another error, or when it comes too fast.

        Args:
            packet: As it looks where the error is made.
            data: Type and code.
            now: Times never go back.
        """
        ip = packet.source.ip
        if packet.about is not None or not self._buckets.allow(ip, now):
            return None
        self._buckets.take(ip, now)
        return Packet(Endpoint(self.ip, 0), packet.source, data, ICMP, packet)
