"""A router at its place: the NAT between the realm above and the one inside, and IPv6 past it.

IPv4 goes through the NAT. IPv6 is forwarded as it is, past a firewall if there is one, except for
the addresses that stand for IPv4 behind a NAT64: those go through the NAT, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.sim.addresses import address6, addresses
from natswarm.sim.attachment import Attachment
from natswarm.sim.firewall6 import Firewall
from natswarm.sim.nat import Nat
from natswarm.sim.nat64 import embed, extract, is_embedded
from natswarm.sim.packet import Packet
from natswarm.sim.presets import Preset, Site, Transition

if TYPE_CHECKING:
    from natswarm.sim.topology import Internet

__all__ = ["NatRouter"]


class NatRouter:
    """A NAT at its place: a router between the realm above and the one inside.

    Attributes:
        name: Unique among the NATs.
        preset: What kind it is.
        nat: Its table and counters.
        has_ipv6: Whether hosts inside have IPv6.
        transition: What they have of IPv4.
        firewall: What their IPv6 goes past; None where nothing stands in the way.
        uplink: Its place in the realm above.
        realm: What is inside, by address.
    """

    def __init__(
        self, internet: Internet, name: str, preset: Preset, inside: str, uplink: Attachment
    ) -> None:
        assert preset.behaviour is not None
        self.name = name
        self.preset = preset
        self.uplink = uplink
        self.realm: dict[str, Attachment] = {}
        self.has_ipv6 = preset.ipv6 is not None
        self.transition = Transition.DUAL_STACK if preset.ipv6 is None else preset.ipv6.transition
        self._is_nat64 = self.transition is not Transition.DUAL_STACK
        firewall = None if preset.ipv6 is None else preset.ipv6.firewall
        self.firewall = None if firewall is None else Firewall(firewall)
        self._internet = internet
        self._world = internet.world
        more = preset.behaviour.address_count - 1
        ips = (uplink.ip, *(internet.next_address(uplink.parent) for _ in range(more)))
        self.nat = Nat(preset.behaviour, ips, internet.world.stream(f"nat/{name}"))
        self._inside_addresses = addresses(inside)
        next(self._inside_addresses)  # the router's own
        self._prefix_index = 0
        self._host_index6 = 1  # the router's own
        uplink.connect(self.receive_from_outside)
        for ip in ips[1:]:
            uplink.announce(ip)

    @property
    def external_ip(self) -> str:
        """The address the outside sees; of several, the first."""
        return self.uplink.ip

    def next_address(self) -> str:
        """Hand out the next inner IPv4 address.

        Raises:
            ConfigurationError: There is none inside.
        """
        if self._is_nat64:
            raise ConfigurationError(f"there are no IPv4 addresses to have inside {self.name}")
        return next(self._inside_addresses)

    def next_address6(self) -> str:
        """Hand out the next inner IPv6 address: of one /64 at home, of one each at a carrier."""
        if self._prefix_index == 0 or self.preset.site is Site.CARRIER:
            self._prefix_index = self._internet.next_prefix_index()
            self._host_index6 = 1
        self._host_index6 += 1
        return address6(self._prefix_index, self._host_index6)

    def receive_from_inside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet of the realm inside: within it, round, or translated and up."""
        local = self.realm.get(packet.destination.ip)
        if local is not None:
            local.send_down(packet, ttl, self._world.now)  # switched, not routed
            return
        if ttl <= 1:
            # Before the table: Linux makes no mapping for a packet it will not forward.
            self._internet.drop_expired(packet, self.name)
            return
        if self.has_ipv6 and ":" in packet.destination.ip:
            if not (self._is_nat64 and is_embedded(packet.destination.ip)):
                self._forward_ipv6(packet, ttl)
                return
            ip = extract(packet.destination.ip)
            packet = packet._replace(destination=Endpoint(ip, packet.destination.port))
        nat = self.nat
        if packet.destination.ip in nat.external_ips:
            self._turn_round(packet, ttl)
            return
        translated = nat.outbound(packet, self._world.now)
        if translated is None:
            self._drop(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "out", self.name, translated)
        self.uplink.send_up(translated, ttl - 1)

    def receive_from_outside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet from above, if the table has someone for it. Only inside events."""
        if ttl <= 1:
            self._internet.drop_expired(packet, self.name)
            return
        if self.has_ipv6 and ":" in packet.destination.ip:
            if self.firewall is not None and not self.firewall.inbound(packet, self._world.now):
                self._refuse(packet)
                return
            translated: Packet | None = packet
        else:
            translated = self.nat.inbound(packet, self._world.now)
            if translated is not None and self._is_nat64:
                translated = _from_nat64(translated)
        if translated is None:
            self._drop(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "in", self.name, translated)
        target = self.realm.get(translated.destination.ip)
        if target is None:
            self._internet.drop_unroutable(translated, self.name)
            return
        target.hand_down(translated, ttl - 1)

    def _turn_round(self, packet: Packet, ttl: int) -> None:
        """Hairpinning with external source address and port (RFC 4787 REQ-9)."""
        nat, now = self.nat, self._world.now
        if not nat.behaviour.hairpinning:
            nat.counters.dropped_hairpin += 1
            self._drop(packet)
            return
        translated = nat.outbound(packet, now)
        turned = None if translated is None else nat.inbound(translated, now)
        target = None if turned is None else self.realm.get(turned.destination.ip)
        if turned is None or target is None:
            self._drop(packet)
            return
        target.send_down(_from_nat64(turned) if self._is_nat64 else turned, ttl - 1, now)

    def _forward_ipv6(self, packet: Packet, ttl: int) -> None:
        if self.firewall is not None and not self.firewall.outbound(packet, self._world.now):
            self._refuse(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "out", self.name, packet)
        self.uplink.send_up(packet, ttl - 1)

    def _drop(self, packet: Packet) -> None:
        self._internet.counters.dropped_nat += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "refused", self.name, packet)

    def _refuse(self, packet: Packet) -> None:
        self._internet.counters.dropped_firewall += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "refused", self.name, packet)


def _from_nat64(packet: Packet) -> Packet:
    """Write the IPv4 source of a packet to the inside as the inside knows it."""
    return packet._replace(source=Endpoint(embed(packet.source.ip), packet.source.port))
