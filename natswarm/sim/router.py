"""A NAT at its place: between the realm above it and the one inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from natswarm.sim.addresses import addresses
from natswarm.sim.attachment import Attachment
from natswarm.sim.nat import Nat
from natswarm.sim.packet import Packet
from natswarm.sim.presets import Preset

if TYPE_CHECKING:
    from natswarm.sim.topology import Internet

__all__ = ["NatRouter"]


class NatRouter:
    """A NAT at its place: a router between the realm above and the one inside.

    Attributes:
        name: Unique among the NATs.
        preset: What kind it is.
        nat: Its table and counters.
        uplink: Its place in the realm above.
        realm: What is inside, by address.
    """

    def __init__(
        self, internet: Internet, name: str, preset: Preset, inside: str, uplink: Attachment
    ) -> None:
        assert preset.behaviour is not None
        self.name = name
        self.preset = preset
        more = preset.behaviour.address_count - 1
        ips = (uplink.ip, *(internet.next_address(uplink.parent) for _ in range(more)))
        self.nat = Nat(preset.behaviour, ips, internet.world.stream(f"nat/{name}"))
        self.uplink = uplink
        self.realm: dict[str, Attachment] = {}
        self._internet = internet
        self._world = internet.world
        self._inside_addresses = addresses(inside)
        next(self._inside_addresses)  # the router's own
        uplink.connect(self.receive_from_outside)
        for ip in ips[1:]:
            uplink.announce(ip)

    @property
    def external_ip(self) -> str:
        """The address the outside sees; of several, the first."""
        return self.uplink.ip

    def next_address(self) -> str:
        """Hand out the next inner address."""
        return next(self._inside_addresses)

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
        translated = self.nat.inbound(packet, self._world.now)
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
        target.send_down(turned, ttl - 1, now)

    def _drop(self, packet: Packet) -> None:
        self._internet.counters.dropped_nat += 1
        if self._world.trace is not None:
            self._world.trace(self._world.now, "refused", self.name, packet)
