"""A virtual internet: a core, NATs behind it or behind each other, and hosts with UDP ports.

It is a tree. The core forwards by global address; every NAT is a router with one realm inside; a
host or NAT hangs on the realm above it by a link with an upload and a download direction. Routers
count hops down, so that an opener with a low TTL dies between two NATs as it does in life. Private
addresses mean something only in their realm, and two homes may use the same ones.

    internet = Internet(World(seed=7))
    phone = internet.add_host("phone", "kpn-nl")                # its own carrier NAT
    cgn = internet.add_nat("cgn", "vodafone-nl")
    home = internet.add_nat("home", "linux-home", behind=cgn)   # double NAT
    laptop = internet.add_host("laptop", behind=home)
    dual = internet.add_host("dual", "linux-home-dual")         # with IPv6 past a firewall

A datagram costs one event for each link that takes time. Routers say what they cannot carry, by
ICMP errors, as soon as anybody listens for them; until then none is made, and what worlds without
listeners draw and cost does not depend on them. Knows no Trio: `natswarm/net/virtual.py` puts real
nodes on a host; here a port is a callback. No fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from natswarm.errors import ConfigurationError
from natswarm.sim.addresses import (
    CARRIER_NETWORK,
    GLOBAL_NETWORKS,
    address6,
    addresses,
    core_router_address,
    link_router_address,
)
from natswarm.sim.attachment import Attachment, ClatAttachment
from natswarm.sim.host import Host, SimPort
from natswarm.sim.icmp import ErrorSource
from natswarm.sim.link import IDEAL
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.nat64 import Clat
from natswarm.sim.packet import DEFAULT_TTL, HOST_UNREACHABLE, TIME_EXCEEDED, Packet
from natswarm.sim.presets import PRESETS, Preset, Site, Transition
from natswarm.sim.presets6 import PRESETS6
from natswarm.sim.router import NatRouter
from natswarm.sim.world import World

__all__ = [
    "DEFAULT_TTL",
    "Attachment",
    "Host",
    "Internet",
    "InternetCounters",
    "NatRouter",
    "SimPort",
]

# Between the borders of two access networks, inside one continent: assumed. What matters is that a
# TTL of 5 (hyperdht's opener) leaves home and dies on the way.
DEFAULT_CORE_HOPS = 8
DEFAULT_CORE_DELAY_S = 0.010


@dataclass(slots=True)
class InternetCounters:
    """What became of datagrams, apart from what the NATs and links count themselves."""

    sent_count: int = 0
    error_count: int = 0
    """ICMP errors that routers and hosts made; not in `sent_count`."""
    delivered_count: int = 0
    """To an open port, or to whoever takes packets and errors."""
    duplicated_count: int = 0
    """Copies that links made."""
    lost_count: int = 0
    """On a link, or in front of one with a full queue."""
    dropped_ttl: int = 0
    """The hop limit ran out."""
    dropped_nat: int = 0
    """By a NAT, which counts why."""
    dropped_firewall: int = 0
    """By an IPv6 firewall, which counts why."""
    dropped_no_route: int = 0
    """Nobody has the address."""
    dropped_closed: int = 0
    """The host has no such port, or nobody there for packets of this kind."""


class Internet:
    """The core, and the maker of everything that hangs on it.

    Attributes:
        world: Time and randomness.
        counters: What became of datagrams.
        core_hops: Routers in the core, on every way.
        core_delay_s: One-way delay of the core.
        has_error_listeners: Whether anybody ever set a host's `on_packet` or a port's `on_error`.
            ICMP errors are made from then on.
        hosts: By name, in order of making.
        nats: By name, in order of making.
    """

    def __init__(
        self,
        world: World,
        *,
        core_hops: int = DEFAULT_CORE_HOPS,
        core_delay_s: float = DEFAULT_CORE_DELAY_S,
        core_answers: bool = True,
    ) -> None:
        self.world = world
        self.counters = InternetCounters()
        self.core_hops = core_hops
        self.core_delay_s = core_delay_s
        self.hosts: dict[str, Host] = {}
        self.nats: dict[str, NatRouter] = {}
        self.realm: dict[str, Attachment] = {}
        self.has_error_listeners = False
        self._core_answers = core_answers
        self._core_routers: dict[int, ErrorSource] = {}
        self._link_router_count = 0
        self._addresses = addresses(*GLOBAL_NETWORKS)
        self._home_count = 0
        self._prefix_count = 0

    def add_nat(
        self,
        name: str,
        kind: str | Preset | NatBehaviour,
        *,
        behind: NatRouter | None = None,
        inside: str | None = None,
    ) -> NatRouter:
        """Add a NAT, for several hosts or for another NAT.

        Args:
            name: Not in use yet.
            kind: The name of a preset, a preset, or a behaviour (at home, with ideal links).
            behind: The NAT it is behind; None for the core.
            inside: Its inner network. By default 100.64.0.0/10 for every carrier, and for homes
                192.168.1.0/24, 192.168.2.0/24, ... in order of making.
        """
        preset = _preset(kind)
        if preset.behaviour is None:
            raise ValueError(f"{kind} has no NAT: add a host")
        if name in self.nats:
            raise ValueError(f"there is a NAT {name!r} already")
        if behind is not None:
            self._check_below(name, preset, behind)
        if inside is None and preset.site is Site.CARRIER:
            inside = CARRIER_NETWORK
        elif inside is None:
            self._home_count += 1
            inside = f"192.168.{self._home_count % 256}.0/24"
        uplink = self._place(name, preset, behind, has_ipv6=False)
        router = NatRouter(self, name, preset, inside, uplink)
        self.nats[name] = router
        return router

    def add_host(
        self,
        name: str,
        kind: str | Preset | NatBehaviour = "public",
        *,
        behind: NatRouter | None = None,
    ) -> Host:
        """Add a host, and where `kind` has a NAT one of its own, named `<name>-nat`.

        Args:
            name: Not in use yet.
            kind: The name of a preset, a preset, or a behaviour (at home, with ideal links).
            behind: The NAT the host is behind, or the host's own NAT is; None for the core.
        """
        if name in self.hosts:
            raise ValueError(f"there is a host {name!r} already")
        preset = _preset(kind)
        if preset.behaviour is not None:
            behind = self.add_nat(f"{name}-nat", preset, behind=behind)
        has_ipv6 = preset.ipv6 is not None if behind is None else behind.has_ipv6
        host = Host(self, name, behind, self._place(name, preset, behind, has_ipv6=has_ipv6))
        self.hosts[name] = host
        return host

    def place(self, name: str, behind: NatRouter | None) -> Attachment:
        """Make a way up for a host that moves: behind a NAT, or in the core as public hosts are."""
        return self._place(name, PRESETS["public"], behind, has_ipv6=False)

    def route(self, packet: Packet, ttl: int, departure: float) -> None:
        """Carry a packet through the core, which it enters at `departure`."""
        ttl -= self.core_hops
        if ttl <= 0:
            self.drop_expired(packet, "core")
            self._answer(packet, TIME_EXCEEDED, ttl + self.core_hops, departure)
            return
        target = self.realm.get(packet.destination.ip)
        if target is None:
            self.drop_unroutable(packet, "core")
            self._answer(packet, HOST_UNREACHABLE, self.core_hops, departure)
            return
        target.send_down(packet, ttl, departure + self.core_delay_s)

    def error(
        self, source: ErrorSource | None, packet: Packet, data: bytes, where: str
    ) -> Packet | None:
        """Make an ICMP error about a packet that went no further; None where there shall be none.

        Args:
            source: Who says it; None for one who keeps silent.
            packet: As it looks where it ended. IPv6 has no errors here.
            data: Type and code.
            where: For the trace.
        """
        if source is None or not self.has_error_listeners or ":" in packet.source.ip:
            return None
        error = source.error(packet, data, self.world.now)
        if error is not None:
            self.counters.error_count += 1
            if self.world.trace is not None:
                self.world.trace(self.world.now, "error", where, error)
        return error

    def _answer(self, packet: Packet, data: bytes, hop: int, departure: float) -> None:
        """Say an error from the `hop`-th router of the core, as far in as that stands."""
        device = self.realm.get(packet.source.ip)
        if device is None or not self._core_answers:
            return
        hop = max(hop, 1)
        router = self._core_routers.get(hop)
        if router is None:
            router = self._core_routers[hop] = ErrorSource(core_router_address(hop))
        error = self.error(router, packet, data, "core")
        if error is not None:
            delay_s = 2 * self.core_delay_s * hop / (self.core_hops + 1)
            device.send_down(error, DEFAULT_TTL - hop + 1, departure + delay_s)

    def drop_expired(self, packet: Packet, where: str) -> None:
        """Count a packet whose hop limit ran out."""
        self.counters.dropped_ttl += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "expired", where, packet)

    def drop_unroutable(self, packet: Packet, where: str) -> None:
        """Count a packet to an address that nobody has."""
        self.counters.dropped_no_route += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "unroutable", where, packet)

    def drop_lost(self, packet: Packet, where: str) -> None:
        """Count a packet that a link lost."""
        self.counters.lost_count += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "lost", where, packet)

    def count_duplicate(self, packet: Packet, where: str) -> None:
        """Count a packet that a link doubled."""
        self.counters.duplicated_count += 1
        if self.world.trace is not None:
            self.world.trace(self.world.now, "doubled", where, packet)

    def next_address(self, behind: NatRouter | None) -> str:
        """Hand out the next IPv4 address in the core, or inside a NAT."""
        return next(self._addresses) if behind is None else behind.next_address()

    def next_prefix_index(self) -> int:
        """Hand out the next /64."""
        self._prefix_count += 1
        return self._prefix_count

    def _check_below(self, name: str, preset: Preset, behind: NatRouter) -> None:
        assert preset.behaviour is not None
        if preset.ipv6 is not None and not behind.has_ipv6:
            raise ConfigurationError(
                f"{name} has IPv6, but {behind.name} above it has none: give that a preset with "
                "IPv6, or take one without here"
            )
        if behind.transition is Transition.NAT64:
            raise ConfigurationError(
                f"{name} translates IPv4, but inside {behind.name} there is none: give that 464XLAT"
            )
        if behind.transition is Transition.XLAT464 and preset.behaviour.address_count > 1:
            raise ConfigurationError(
                f"{name} wants {preset.behaviour.address_count} addresses, but 464XLAT gives one"
            )

    def _place(
        self, name: str, preset: Preset, behind: NatRouter | None, *, has_ipv6: bool
    ) -> Attachment:
        """Make the way up of a new device: addresses, link, router above."""
        if behind is None:
            # What is behind a carrier's NAT has the slow link, not the NAT itself.
            has_access = preset.site is Site.HOME
        else:
            preset = behind.preset
            has_access = preset.site is Site.CARRIER
        upload, download, hops = IDEAL, IDEAL, 0
        if has_access:
            upload, download, hops = preset.upload, preset.access, preset.access_hops
        routers = behind.access_routers if behind is not None else []
        if behind is None and preset.answers_ttl:
            routers = [self._next_link_router() for _ in range(hops)]
        ip6 = self._next_address6(behind) if has_ipv6 else None
        transition = Transition.DUAL_STACK if behind is None else behind.transition
        if behind is not None and transition is Transition.XLAT464:
            clat = Clat(self._next_address6(behind))
            return ClatAttachment(self, name, behind, upload, download, hops, ip6, clat)
        if ip6 is not None and transition is Transition.NAT64:
            ip = ip6
        else:
            ip = self.next_address(behind)
        return Attachment(self, name, ip, behind, upload, download, hops, ip6, routers)

    def _next_link_router(self) -> ErrorSource:
        self._link_router_count += 1
        return ErrorSource(link_router_address(self._link_router_count))

    def _next_address6(self, behind: NatRouter | None) -> str:
        if behind is None:
            return address6(self.next_prefix_index(), 1)
        return behind.next_address6()


def _preset(kind: str | Preset | NatBehaviour) -> Preset:
    if isinstance(kind, NatBehaviour):
        return Preset(kind, Site.HOME, IDEAL, 0, "given")
    if isinstance(kind, Preset):
        return kind
    preset = PRESETS.get(kind) or PRESETS6.get(kind)
    if preset is None:
        names = ", ".join([*PRESETS, *PRESETS6])
        raise ConfigurationError(f"no preset {kind!r}; there are {names}")
    return preset
