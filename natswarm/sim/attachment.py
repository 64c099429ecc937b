"""Where a device hangs: its addresses in the realm above, and the link up to it.

Routers on the link count hops down here, links take their time and lose, and the realm above learns
which addresses are reached this way. A datagram costs one event for each link that takes time.

The routers on a link stand at its upper end, behind the radio or the line: what dies there on its
way up has been on the link, what dies there on its way down has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from natswarm.sim.icmp import ErrorSource
from natswarm.sim.link import IDEAL, Link, LinkConditions
from natswarm.sim.nat64 import CLAT_IP, Clat, is_embedded
from natswarm.sim.packet import DEFAULT_TTL, TIME_EXCEEDED, Packet

if TYPE_CHECKING:
    from natswarm.sim.router import NatRouter
    from natswarm.sim.topology import Internet

__all__ = ["Attachment", "ClatAttachment"]


class Attachment:
    """A device's place: its address in the realm above, and the link up to it.

    Attributes:
        ip: The device's address there: IPv4 where it has one, else IPv6.
        ip6: Its IPv6 address; None without.
        parent: The NAT above; None is the core.
        upload: The link's direction up.
        download: The link's direction down.
        hops: Routers on the link, both ends not counted.
        routers: What they say errors from, from below; none where they keep silent.
    """

    def __init__(
        self,
        internet: Internet,
        name: str,
        ip: str,
        parent: NatRouter | None,
        upload: LinkConditions,
        download: LinkConditions,
        hops: int,
        ip6: str | None = None,
        routers: Sequence[ErrorSource] = (),
    ) -> None:
        self.ip = ip
        self.ip6 = ip6
        self.parent = parent
        self.hops = hops
        self.routers = routers
        self.upload = Link(upload, internet.world.stream(f"upload/{name}"))
        self.download = Link(download, internet.world.stream(f"download/{name}"))
        self._internet = internet
        self._world = internet.world
        self._name = name
        self._receive: Callable[[Packet, int], None] = _nobody_there

    def connect(self, receive: Callable[[Packet, int], None]) -> None:
        """Put the device there, which takes packets from above by `receive(packet, ttl)`."""
        self._receive = receive
        self.announce(self.ip)
        if self.ip6 is not None:
            self.announce(self.ip6)

    def leave(self) -> None:
        """Take the device away: the realm above has nobody at its address, nor do links end there.

        Only for a device without IPv6.
        """
        realm = self._internet.realm if self.parent is None else self.parent.realm
        del realm[self.ip]
        self._receive = _lose

    def announce(self, ip: str) -> None:
        """Have the realm above send packets for `ip` this way, and all realms for IPv6."""
        realm = self._internet.realm if self.parent is None else self.parent.realm
        realm[ip] = self
        if ":" in ip and self.parent is not None:
            self.parent.uplink.announce(ip)

    def send_up(self, packet: Packet, ttl: int) -> None:
        """Send a packet of the device to the realm above."""
        ttl -= self.hops
        if ttl <= 0:
            self._expire_going_up(packet, ttl + self.hops)
            return
        now, link = self._world.now, self.upload
        arrival = link.arrival_time(now, packet.data)
        if arrival is None:
            self._internet.drop_lost(packet, self._name)
            return
        if link.may_duplicate and link.duplicates():
            self._internet.count_duplicate(packet, self._name)
            self._world.at(arrival, self._arrive_above, packet, ttl)
        if self.parent is None:
            self._internet.route(packet, ttl, arrival)
        elif arrival == now:
            self.parent.receive_from_inside(packet, ttl)
        else:
            self._world.at(arrival, self.parent.receive_from_inside, packet, ttl)

    def send_down(self, packet: Packet, ttl: int, departure: float) -> None:
        """Send a packet from the realm above to the device, leaving at `departure`.

        Always by an event, so that two hosts on ideal links do not answer each other for ever in
        one call.
        """
        link = self.download
        if departure > self._world.now and not link.is_constant:
            # The link keeps packets in order of departure, so it must see them in that order.
            self._world.at(departure, self.send_down, packet, ttl, departure)
            return
        ttl -= self.hops
        if ttl <= 0:
            self._expire_going_down(packet, ttl + self.hops, departure)
            return
        arrival = link.arrival_time(departure, packet.data)
        if arrival is None:
            self._internet.drop_lost(packet, self._name)
            return
        self._world.at(arrival, self._receive, packet, ttl)
        if link.may_duplicate and link.duplicates():
            self._internet.count_duplicate(packet, self._name)
            self._world.at(arrival, self._receive, packet, ttl)

    def hand_down(self, packet: Packet, ttl: int) -> None:
        """As `send_down` now, from inside an event: an ideal link then costs none of its own."""
        if self.download.conditions is IDEAL:
            self._receive(packet, ttl)
        else:
            self.send_down(packet, ttl, self._world.now)

    def _expire_going_up(self, packet: Packet, hop: int) -> None:
        """Drop a packet at the `hop`-th router from below, which tells the device."""
        internet, departure = self._internet, self._world.now
        if internet.has_error_listeners:
            arrival = self.upload.arrival_time(departure, packet.data)
            if arrival is None:
                internet.drop_lost(packet, self._name)
                return
            departure = arrival
        internet.drop_expired(packet, self._name)
        error = self._error(packet, hop)
        if error is not None:
            self.send_down(error, DEFAULT_TTL + self.hops - hop + 1, departure)

    def _expire_going_down(self, packet: Packet, hop: int, departure: float) -> None:
        """Drop a packet at the `hop`-th router from above, which tells its source."""
        self._internet.drop_expired(packet, self._name)
        error = self._error(packet, self.hops - hop + 1)
        if error is None:
            return
        if self.parent is None:
            self._internet.route(error, DEFAULT_TTL - hop + 1, departure)
        else:
            parent = self.parent
            self._world.at(departure, parent.receive_from_inside, error, DEFAULT_TTL - hop + 1)

    def _error(self, packet: Packet, hop: int) -> Packet | None:
        # A packet that was sent without any hop left dies at the first router.
        router = self.routers[max(hop, 1) - 1] if self.routers else None
        return self._internet.error(router, packet, TIME_EXCEEDED, self._name)

    def _arrive_above(self, packet: Packet, ttl: int) -> None:
        if self.parent is None:
            self._internet.route(packet, ttl, self._world.now)
        else:
            self.parent.receive_from_inside(packet, ttl)


class ClatAttachment(Attachment):
    """The place of a device that has IPv4 through a CLAT only, in a realm of IPv6."""

    def __init__(
        self,
        internet: Internet,
        name: str,
        parent: NatRouter,
        upload: LinkConditions,
        download: LinkConditions,
        hops: int,
        ip6: str | None,
        clat: Clat,
    ) -> None:
        super().__init__(internet, name, CLAT_IP, parent, upload, download, hops, ip6)
        self._clat = clat
        self._receive_inside: Callable[[Packet, int], None] = _nobody_there

    def connect(self, receive: Callable[[Packet, int], None]) -> None:
        """As of any place; the realm above knows nothing of the device's IPv4 address."""
        self._receive_inside = receive
        self._receive = self._translate_in
        for ip in (self.ip6, self._clat.ip6):
            if ip is not None:
                self.announce(ip)

    def send_up(self, packet: Packet, ttl: int) -> None:
        """Send a packet of the device, translated if it is IPv4."""
        if ":" not in packet.destination.ip:
            if ttl <= 1:
                self._internet.drop_expired(packet, self._name)
                return
            packet, ttl = self._clat.outbound(packet), ttl - 1
        super().send_up(packet, ttl)

    def _translate_in(self, packet: Packet, ttl: int) -> None:
        if packet.destination.ip == self._clat.ip6:
            if not is_embedded(packet.source.ip):
                self._internet.drop_unroutable(packet, self._name)
                return
            if ttl <= 1:
                self._internet.drop_expired(packet, self._name)
                return
            packet, ttl = self._clat.inbound(packet), ttl - 1
        self._receive_inside(packet, ttl)


def _lose(packet: Packet, ttl: int) -> None:
    """Take what was on its way to a device that has left."""


def _nobody_there(packet: Packet, ttl: int) -> None:
    raise AssertionError("a packet came before the device was connected")
