"""Report the network interfaces: addresses, gateways, and what each interface probably is.

A field test has one device with several SIMs, a home network and a VPN at once, and must know which
is which before it binds a port. No operating system says so; names and addresses are the evidence,
and the report repeats it, so that a wrong guess can be seen to be one.

Source: netifaces for what is there; RFC 1918, 4193, 6598 for address space; the names that Linux,
Android, iOS and macOS drivers give to modems and tunnels. Only reads: sends nothing, binds nothing.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import netifaces

from natswarm.address import AddressKind, address_kind
from natswarm.errors import ConfigurationError

__all__ = [
    "AddressSpace",
    "Interface",
    "InterfaceAddress",
    "InterfaceKind",
    "InterfaceReport",
    "InterfaceSource",
    "SystemInterfaces",
    "find_interface",
    "inspect_interfaces",
]

# A phone has some thirty, a container host hundreds; beyond that the report is of no use.
MAX_INTERFACES = 1024


class InterfaceKind(enum.Enum):
    """What an interface leads to."""

    LOOPBACK = "loopback"
    LAN = "lan"
    """A home or an office: a router of somebody we know stands next to us."""
    MOBILE = "mobile"
    """A SIM, or a phone that shares its own."""
    CARRIER = "carrier"
    """Directly in a carrier's network, no router of ours between."""
    PUBLIC = "public"
    """A global IPv4 address of its own: a server, or a modem in bridge mode."""
    VPN = "vpn"
    VIRTUAL = "virtual"
    """Bridges of containers and virtual machines: leads to this machine only."""
    UNKNOWN = "unknown"


class AddressSpace(enum.Enum):
    """Who gave an address out, as far as it shows."""

    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    HOME = "home"
    """RFC 1918, on anything but a mobile link."""
    CARRIER = "carrier"
    """100.64.0.0/10 (RFC 6598), or RFC 1918 on a mobile link: a carrier-grade NAT follows."""
    TUNNEL = "tunnel"
    """RFC 1918, RFC 4193 or 100.64.0.0/10 inside a VPN."""
    UNIQUE_LOCAL_IPV6 = "unique-local IPv6"
    GLOBAL_IPV4 = "global IPv4"
    GLOBAL_IPV6 = "global IPv6"
    UNUSABLE = "unusable"


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One address of an interface.

    Attributes:
        ip: Without scope (`%eth0`).
        prefix_length: 0..32 or 0..128; None where the system does not say.
        space: Who gave it out.
    """

    ip: str
    prefix_length: int | None
    space: AddressSpace

    def __str__(self) -> str:
        return self.ip if self.prefix_length is None else f"{self.ip}/{self.prefix_length}"


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface.

    Attributes:
        name: As the system calls it.
        kind: What it probably leads to.
        evidence: Why we think so, strongest first; never empty.
        addresses: IPv4 first, then IPv6.
        gateway_ipv4: Next hop of its default route; None without one, or without a next hop.
        gateway_ipv6: The same; link-local ones without scope.
        is_default_ipv4: Whether the system's default route leads out here.
        is_default_ipv6: The same for IPv6.
    """

    name: str
    kind: InterfaceKind
    evidence: tuple[str, ...]
    addresses: tuple[InterfaceAddress, ...]
    gateway_ipv4: str | None = None
    gateway_ipv6: str | None = None
    is_default_ipv4: bool = False
    is_default_ipv6: bool = False

    @property
    def is_default(self) -> bool:
        """Whether the system's default route of either family leads out here."""
        return self.is_default_ipv4 or self.is_default_ipv6

    def source_address_for(self, ip: str) -> str | None:
        """Return our address in the same subnet as `ip`, such as the gateway's; None without one.

        On a point-to-point link (/32) no subnet holds the gateway: then the first usable address of
        the family.
        """
        target = ipaddress.ip_address(ip.partition("%")[0])
        same_family = [
            address
            for address in self.addresses
            if ipaddress.ip_address(address.ip).version == target.version
        ]
        for address in same_family:
            if address.prefix_length is not None and target in ipaddress.ip_network(
                str(address), strict=False
            ):
                return address.ip
        unusable = (AddressSpace.LINK_LOCAL, AddressSpace.UNUSABLE)
        return next((a.ip for a in same_family if a.space not in unusable), None)


@dataclass(frozen=True, slots=True)
class InterfaceReport:
    """All interfaces as they were at one moment, in the system's order."""

    interfaces: tuple[Interface, ...]

    @property
    def default_ipv4(self) -> Interface | None:
        """Where IPv4 leaves this machine; None if it does not."""
        return next((each for each in self.interfaces if each.is_default_ipv4), None)

    @property
    def default_ipv6(self) -> Interface | None:
        """Where IPv6 leaves this machine; None if it does not."""
        return next((each for each in self.interfaces if each.is_default_ipv6), None)

    def find(self, name: str) -> Interface:
        """Return the interface `name`.

        Raises:
            ConfigurationError: There is none; says which there are.
        """
        for interface in self.interfaces:
            if interface.name == name:
                return interface
        there = ", ".join(f"{each.name} ({each.kind.value})" for each in self.interfaces)
        raise ConfigurationError(
            f"this machine has no interface {name!r}; it has {there or 'none at all'}"
        )


class InterfaceSource(Protocol):
    """What is asked for interfaces; netifaces' words. Any call may find the interface gone."""

    def interfaces(self) -> list[str]:
        """Names."""
        ...

    def ifaddresses(self, name: str) -> Mapping[int, Sequence[Mapping[str, str]]]:
        """Addresses by family: `addr`, `netmask`; ValueError or OSError if it is gone."""
        ...

    def gateways(self) -> Mapping[Any, Any]:
        """By family, `(next hop, interface, is default)`; under "default" the one in use."""
        ...

    def routed_without_gateway(self) -> list[str]:
        """Names of interfaces with an IPv4 default route that names no next hop."""
        ...


class SystemInterfaces:
    """The interfaces of this machine, by netifaces. Stateless."""

    def interfaces(self) -> list[str]:
        """See `InterfaceSource.interfaces`."""
        return list(netifaces.interfaces())

    def ifaddresses(self, name: str) -> Mapping[int, Sequence[Mapping[str, str]]]:
        """See `InterfaceSource.ifaddresses`."""
        return netifaces.ifaddresses(name)

    def gateways(self) -> Mapping[Any, Any]:
        """See `InterfaceSource.gateways`."""
        return netifaces.gateways()

    def routed_without_gateway(self) -> list[str]:
        """See `InterfaceSource.routed_without_gateway`; known on Linux alone.

        netifaces leaves out routes like `default dev wwan0`, which are the usual ones on modems.
        """
        if sys.platform != "linux":
            return []
        try:
            lines = Path("/proc/net/route").read_text().splitlines()[1:]
        except OSError:  # Android hides it from applications
            return []
        return _default_routes_without_gateway(lines)


def _default_routes_without_gateway(lines: Sequence[str]) -> list[str]:
    """Read lines of /proc/net/route; in hexadecimal: destination, gateway, ..., mask."""
    found: dict[str, int] = {}
    for line in lines:
        fields = line.split()
        if len(fields) < 8 or {fields[1], fields[2], fields[7]} != {"00000000"}:
            continue
        metric = int(fields[6]) if fields[6].isdigit() else 0
        found[fields[0]] = min(metric, found.get(fields[0], metric))
    return sorted(found, key=lambda name: found[name])


def inspect_interfaces(source: InterfaceSource | None = None) -> InterfaceReport:
    """Look at all interfaces, once.

    An interface that vanishes while we look is left out. One read of a few system calls per
    interface: does not block for longer than those.

    Args:
        source: Whom to ask; None means this machine.
    """
    source = SystemInterfaces() if source is None else source
    routes = _Routes(source)
    interfaces = []
    for name in source.interfaces()[:MAX_INTERFACES]:
        try:
            families = source.ifaddresses(name)
        except (ValueError, OSError):  # netifaces: ValueError for a name that is no more
            continue
        interfaces.append(_describe(name, _addresses(families), routes))
    return InterfaceReport(tuple(interfaces))


def find_interface(name: str, source: InterfaceSource | None = None) -> Interface:
    """Return the interface `name`, as it is now.

    Raises:
        ConfigurationError: There is none; says which there are.
    """
    return inspect_interfaces(source).find(name)


class _Routes:
    """Default routes, by family and interface name."""

    def __init__(self, source: InterfaceSource) -> None:
        self._next_hops: dict[tuple[int, str], str] = {}
        self._default: dict[int, str] = {}
        gateways: Mapping[Any, Any] = {}
        with contextlib.suppress(ValueError, OSError):
            gateways = source.gateways()
        for family in (netifaces.AF_INET, netifaces.AF_INET6):
            for next_hop, name, *_ in gateways.get(family, ()):
                self._next_hops.setdefault((family, name), next_hop.partition("%")[0])
            if (default := gateways.get("default", {}).get(family)) is not None:
                self._default[family] = default[1]
        if netifaces.AF_INET not in self._default:
            for name in source.routed_without_gateway()[:1]:
                self._default[netifaces.AF_INET] = name

    def next_hop(self, family: int, name: str) -> str | None:
        return self._next_hops.get((family, name))

    def is_default(self, family: int, name: str) -> bool:
        return self._default.get(family) == name


def _addresses(
    families: Mapping[int, Sequence[Mapping[str, str]]],
) -> list[tuple[str, int | None]]:
    found: list[tuple[str, int | None]] = []
    for family in (netifaces.AF_INET, netifaces.AF_INET6):
        for entry in families.get(family, ()):
            try:
                address = ipaddress.ip_address(entry.get("addr", "").partition("%")[0])
            except ValueError:
                continue  # an entry without an address: a modem that is dialling
            length = _prefix_length(entry.get("netmask", ""))
            if length is not None and length > address.max_prefixlen:
                length = None
            found.append((str(address), length))
    return found


def _prefix_length(netmask: str) -> int | None:
    """Read `255.255.255.0`, `ffff:ffff::` or `ffff:ffff::/32`."""
    mask, _, length = netmask.partition("/")
    if length.isascii() and length.isdigit() and len(length) <= 3:
        return int(length)
    try:
        bits = f"{int(ipaddress.ip_address(mask)):0{32 if '.' in mask else 128}b}"
    except ValueError:
        return None
    ones = bits.rstrip("0")
    return None if "0" in ones else len(ones)


def _describe(name: str, addresses: list[tuple[str, int | None]], routes: _Routes) -> Interface:
    kind, evidence = _judge(name, [ip for ip, _ in addresses])
    return Interface(
        name=name,
        kind=kind,
        evidence=tuple(evidence),
        addresses=tuple(
            InterfaceAddress(ip, prefix_length, _space(ip, kind)) for ip, prefix_length in addresses
        ),
        gateway_ipv4=routes.next_hop(netifaces.AF_INET, name),
        gateway_ipv6=routes.next_hop(netifaces.AF_INET6, name),
        is_default_ipv4=routes.is_default(netifaces.AF_INET, name),
        is_default_ipv6=routes.is_default(netifaces.AF_INET6, name),
    )


# The first that matches decides, so special names stand before general ones. Only names that tell
# something: `ppp0` may be a modem, PPPoE or a VPN, and Windows gives every interface a GUID; there
# the addresses decide.
_NAMES: tuple[tuple[InterfaceKind, str, str], ...] = (
    (InterfaceKind.LOOPBACK, r"lo\d*", "name of the loopback"),
    (
        InterfaceKind.MOBILE,
        r"(r_)?rmnet(_\w+)?\d*|rev_rmnet\d+|v4-rmnet\w*|ccmni\d+|wwan\d+|wwp\w+|mhi_\w+|pdp_ip\d+|seth_\w+",
        "name of a cellular modem",
    ),
    (
        InterfaceKind.MOBILE,
        r"usb\d+|rndis\d+",
        "name of a modem or tethered phone on USB",
    ),
    (
        InterfaceKind.VPN,
        r"(tun|tap|utun|wg|ipsec|ovpn|zt|tailscale|nordlynx|proton|mullvad|wt|gpd)[\w-]*|cscotun\d+",
        "name of a tunnel",
    ),
    (
        InterfaceKind.VIRTUAL,
        r"(docker|br-|virbr|veth|vmnet|vboxnet|vnet|cni|flannel|lxc|lxd|podman|cali|ifb|dummy|bridge)[\w-]*",
        "name of a bridge for containers or virtual machines",
    ),
    (
        InterfaceKind.LAN,
        r"(eth|en|wlan|wl|br|bond|lan|ap|swlan)[\w.-]*",
        "name of an Ethernet or Wi-Fi interface",
    ),
)
# Fixed by the operating systems of phones that share their SIM.
_TETHERS = (
    ("172.20.10.0/28", "the network an iPhone gives to tethered devices"),
    ("192.168.42.0/24", "the network Android gives to devices tethered over USB"),
    ("192.168.43.0/24", "the network Android gives to devices on its hotspot"),
    ("192.168.44.0/24", "the network Android gives to devices tethered over Bluetooth"),
)
_TETHER_NETWORKS = tuple((ipaddress.ip_network(network), why) for network, why in _TETHERS)


def _judge(name: str, ips: Sequence[str]) -> tuple[InterfaceKind, list[str]]:
    """Return what an interface probably is, and why."""
    kinds = {ip: address_kind(ip) for ip in ips}
    if ips and all(kind is AddressKind.LOOPBACK for kind in kinds.values()):
        return InterfaceKind.LOOPBACK, ["all its addresses are loopback addresses"]
    by_name, why = next(
        (
            (kind, f"{name} is the {text}")
            for kind, pattern, text in _NAMES
            if re.fullmatch(pattern, name)
        ),
        (InterfaceKind.UNKNOWN, f"the name {name} tells nothing"),
    )
    tethers = [
        f"{ip} is in {reason}"
        for ip in ips
        for network, reason in _TETHER_NETWORKS
        if ipaddress.ip_address(ip) in network
    ]
    if by_name in (InterfaceKind.MOBILE, InterfaceKind.VPN, InterfaceKind.VIRTUAL):
        return by_name, [why, *(tethers if by_name is InterfaceKind.MOBILE else ())]
    if tethers:
        return InterfaceKind.MOBILE, [*tethers, why]
    if by_name is InterfaceKind.LOOPBACK:
        return by_name, [why]
    by_address = _judge_by_address(kinds, is_lan=by_name is InterfaceKind.LAN)
    if by_address is not None:
        kind, reason = by_address
        # Where the name says nothing, it is not evidence.
        return kind, [reason, why] if by_name is not InterfaceKind.UNKNOWN else [reason]
    return by_name, [why]


def _judge_by_address(
    kinds: Mapping[str, AddressKind], *, is_lan: bool
) -> tuple[InterfaceKind, str] | None:
    for ip, kind in kinds.items():
        if kind is AddressKind.SHARED:
            return InterfaceKind.CARRIER, f"{ip} is in 100.64.0.0/10, which carriers use"
    for ip, kind in kinds.items():
        if kind is AddressKind.PRIVATE and ":" not in ip:
            return InterfaceKind.LAN, f"{ip} is a private address"
    for ip, kind in kinds.items():
        if kind is AddressKind.GLOBAL and ":" not in ip:
            return InterfaceKind.PUBLIC, f"{ip} is a global IPv4 address"
    for ip, kind in kinds.items():
        # A global IPv6 address alone is what every home and every SIM gets.
        if kind is AddressKind.GLOBAL and is_lan:
            return InterfaceKind.LAN, f"{ip} is a global IPv6 address"
    return None


def _space(ip: str, kind: InterfaceKind) -> AddressSpace:
    """Return who gave out an address on an interface of a kind."""
    is_ipv6 = ":" in ip
    match address_kind(ip):
        case AddressKind.LOOPBACK:
            return AddressSpace.LOOPBACK
        case AddressKind.LINK_LOCAL:
            return AddressSpace.LINK_LOCAL
        case AddressKind.GLOBAL:
            return AddressSpace.GLOBAL_IPV6 if is_ipv6 else AddressSpace.GLOBAL_IPV4
        case AddressKind.UNUSABLE:
            return AddressSpace.UNUSABLE
        case _ if kind is InterfaceKind.VPN:
            return AddressSpace.TUNNEL
        case AddressKind.SHARED:
            return AddressSpace.CARRIER
        case _ if is_ipv6:
            return AddressSpace.UNIQUE_LOCAL_IPV6
    # A tethered device gets its address from the phone, not from the carrier.
    is_tethered = any(ipaddress.ip_address(ip) in network for network, _ in _TETHER_NETWORKS)
    if kind is InterfaceKind.MOBILE and not is_tethered:
        return AddressSpace.CARRIER
    return AddressSpace.HOME
