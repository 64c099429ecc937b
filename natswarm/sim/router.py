"""A router at its place: the NAT between the realm above and the one inside, and IPv6 past it.

IPv4 goes through the NAT. IPv6 is forwarded as it is, past a firewall if there is one, except for
the addresses that stand for IPv4 behind a NAT64: those go through the NAT, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natswarm.address import Endpoint
from natswarm.errors import ConfigurationError
from natswarm.sim.addresses import address6, addresses, inner_router_addresses
from natswarm.sim.attachment import Attachment
from natswarm.sim.firewall6 import Firewall
from natswarm.sim.icmp import ErrorSource
from natswarm.sim.nat import Nat
from natswarm.sim.nat64 import embed, extract, is_embedded
from natswarm.sim.nat_protocols import make_table
from natswarm.sim.packet import DEFAULT_TTL, TIME_EXCEEDED, UDP, Packet
from natswarm.sim.presets import Preset, Site, Transition

if TYPE_CHECKING:
    from natswarm.sim.topology import Internet

__all__ = ["NatRouter"]


class NatRouter:
    """A NAT at its place: a router between the realm above and the one inside.

    Attributes:
        name: Unique among the NATs.
        preset: What kind it is.
        nat: Its table and counters for UDP.
        inside_ip: Its own IPv4 address inside.
        access_routers: What the routers on the links inside say errors from, from below; none
            where they keep silent.
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
        self._tables: dict[int, Nat | None] = {UDP: self.nat}
        self._inside_addresses = addresses(inside)
        self.inside_ip = next(self._inside_addresses)
        access_hops = preset.access_hops if preset.site is Site.CARRIER else 0
        self._router_ips = inner_router_addresses(inside, access_hops)
        answers = preset.answers_ttl
        self.access_routers = [ErrorSource(ip) for ip in self._router_ips] if answers else []
        self._inner_source = ErrorSource(self.inside_ip) if answers else None
        self._outer_source = ErrorSource(uplink.ip) if answers else None
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
        ip = next(self._inside_addresses, None)
        if ip is None or ip in self._router_ips:
            raise ConfigurationError(f"no address is left inside {self.name}: give it more")
        return ip

    def next_address6(self) -> str:
        """Hand out the next inner IPv6 address: of one /64 at home, of one each at a carrier."""
        if self._prefix_index == 0 or self.preset.site is Site.CARRIER:
            self._prefix_index = self._internet.next_prefix_index()
            self._host_index6 = 1
        self._host_index6 += 1
        return address6(self._prefix_index, self._host_index6)

    def reboot(self) -> None:
        """Forget every mapping, as a router that was switched off and on."""
        nat = self.nat
        rng = self._world.stream(f"nat/{self.name}/{self._world.now}")
        self.nat = Nat(nat.behaviour, nat.external_ips, rng)
        self._tables = {UDP: self.nat}

    def table(self, protocol: int) -> Nat | None:
        """Return the table of a protocol, made when first asked for; None where there is none."""
        if protocol not in self._tables:
            rng = self._world.stream(f"nat/{self.name}/{protocol}")
            nat = self.nat
            self._tables[protocol] = make_table(protocol, nat.behaviour, nat.external_ips, rng)
        return self._tables[protocol]

    def receive_from_inside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet of the realm inside: within it, round, or translated and up."""
        local = self.realm.get(packet.destination.ip)
        if local is not None:
            local.send_down(packet, ttl, self._world.now)  # switched, not routed
            return
        if ttl <= 1:
            # Before the table: Linux makes no mapping for a packet it will not forward.
            self._expire_going_up(packet)
            return
        if self.has_ipv6 and ":" in packet.destination.ip:
            if not (self._is_nat64 and is_embedded(packet.destination.ip)):
                self._forward_ipv6(packet, ttl)
                return
            ip = extract(packet.destination.ip)
            packet = packet._replace(destination=Endpoint(ip, packet.destination.port))
        if packet.destination.ip in self.nat.external_ips:
            self._turn_round(packet, ttl)
            return
        if packet.protocol == UDP:
            translated = self.nat.outbound(packet, self._world.now)
        else:
            translated = self._translate_other(packet, is_inbound=False)
        if translated is None:
            self._drop(packet)
            return
        if self._world.trace is not None:
            self._world.trace(self._world.now, "out", self.name, translated)
        self.uplink.send_up(translated, ttl - 1)

    def receive_from_outside(self, packet: Packet, ttl: int) -> None:
        """Forward a packet from above, if the table has someone for it. Only inside events."""
        if ttl <= 1:
            self._expire_going_down(packet)
            return
        if self.has_ipv6 and ":" in packet.destination.ip:
            if self.firewall is not None and not self.firewall.inbound(packet, self._world.now):
                self._refuse(packet)
                return
            translated: Packet | None = packet
        else:
            if packet.protocol == UDP:
                translated = self.nat.inbound(packet, self._world.now)
            else:
                translated = self._translate_other(packet, is_inbound=True)
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
        if not self.nat.behaviour.hairpinning:
            self.nat.counters.dropped_hairpin += 1
            self._drop(packet)
            return
        now = self._world.now
        if packet.protocol == UDP:
            translated = self.nat.outbound(packet, now)
            turned = None if translated is None else self.nat.inbound(translated, now)
        else:
            translated = self._translate_other(packet, is_inbound=False)
            turned = translated and self._translate_other(translated, is_inbound=True)
        target = None if turned is None else self.realm.get(turned.destination.ip)
        if turned is None or target is None:
            self._drop(packet)
            return
        target.send_down(_from_nat64(turned) if self._is_nat64 else turned, ttl - 1, now)

    def _translate_other(self, packet: Packet, *, is_inbound: bool) -> Packet | None:
        """Translate what is not UDP; an ICMP error by the session that it is about."""
        now, about = self._world.now, packet.about
        if about is None:
            nat = self.table(packet.protocol)
            if nat is None:
                return None
            return nat.inbound(packet, now) if is_inbound else nat.outbound(packet, now)
        nat = self._tables.get(about.protocol)
        if nat is None or self._is_nat64:
            return None
        if is_inbound:
            return nat.error_inbound(packet, now)
        return nat.error_outbound(packet, now)

    def _expire_going_up(self, packet: Packet) -> None:
        self._internet.drop_expired(packet, self.name)
        device = self.realm.get(packet.source.ip)
        if device is None:
            return
        error = self._internet.error(self._inner_source, packet, TIME_EXCEEDED, self.name)
        if error is not None:
            device.send_down(error, DEFAULT_TTL, self._world.now)

    def _expire_going_down(self, packet: Packet) -> None:
        """Drop a packet from above; only about one it would forward does the NAT say so."""
        self._internet.drop_expired(packet, self.name)
        nat = self._tables.get(packet.protocol)
        if nat is None or ":" in packet.destination.ip:
            return
        if not nat.is_expected(packet, self._world.now):
            return
        error = self._internet.error(self._outer_source, packet, TIME_EXCEEDED, self.name)
        if error is not None:
            self.uplink.send_up(error, DEFAULT_TTL)

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
