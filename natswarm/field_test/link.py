"""One interface of a field test: is it usable, does it still stand, what has it sent?

Linux says so in files: /sys/class/net (counters, carrier), /proc/net/route, and the reverse path
filter under /proc/sys, which silently drops what comes in on a second default route where it is
strict. Elsewhere only the addresses are known, and no counters.

Source: Linux, Documentation/ABI/testing/sysfs-class-net and ip-sysctl.rst (`rp_filter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from natswarm.address import AddressKind, address_kind
from natswarm.errors import ConfigurationError
from natswarm.net.interfaces import Interface, find_interface

__all__ = ["Link", "LinkCounters"]

ROOT = Path("/")
STRICT = 1
ALL_ZERO = "00000000"
USABLE = (AddressKind.PRIVATE, AddressKind.SHARED, AddressKind.GLOBAL)


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """What an interface has carried since it was made, everybody's packets counted."""

    sent_packets: int
    sent_bytes: int
    received_packets: int


class Link:
    """One interface.

    Args:
        name: As the system calls it.
        root: Where the system's files are.
    """

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self.name = name
        self._root = root
        self._folder = root / "sys/class/net" / name

    def check(self) -> Interface:
        """Return the interface, if datagrams can leave and come back by it.

        Raises:
            ConfigurationError: They cannot; says why and what to do.
        """
        if (outage := self.outage()) and self._folder.is_dir():
            raise ConfigurationError(f"{outage}: connect it first")
        interface = find_interface(self.name)
        routes = self._default_routes()
        if routes is not None:
            if self.name not in routes:
                raise ConfigurationError(
                    f"{self.name} has no default route, so nothing gets out by it: switch it on "
                    f"in the network manager, or `ip route add default dev {self.name} metric 900` "
                    "(via GATEWAY, if it has one)"
                )
            if self._filters_strictly() and min(routes, key=lambda name: routes[name]) != self.name:
                raise ConfigurationError(
                    f"the reverse path filter of this system drops what comes in on {self.name}, "
                    "since another interface has the better default route: run "
                    f"`sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{self.name}"
                    ".rp_filter=2` for the time of the test"
                )
        return interface

    def outage(self) -> str:
        """Return what is wrong with the interface now; empty: nothing."""
        is_there = self._folder.is_dir()
        if is_there and self._read("carrier") != "1":
            return f"the interface {self.name} is down or has no carrier"
        try:
            addresses = find_interface(self.name).addresses
        except ConfigurationError:
            if not is_there:
                return f"the interface {self.name} is gone"
            addresses = ()  # netifaces knows none without an address
        if not any(address_kind(each.ip) in USABLE for each in addresses):
            return f"the interface {self.name} has no address"
        return ""

    def counters(self) -> LinkCounters | None:
        """Return what it has carried; None where the system does not say."""
        try:
            return LinkCounters(
                int(self._read("statistics/tx_packets")),
                int(self._read("statistics/tx_bytes")),
                int(self._read("statistics/rx_packets")),
            )
        except ValueError:
            return None

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text().strip()
        except OSError:  # gone, or administratively down: the carrier is not known then
            return ""

    def _default_routes(self) -> dict[str, int] | None:
        """Return the metric of each interface's IPv4 default route; None: not known here."""
        try:
            lines = (self._root / "proc/net/route").read_text().splitlines()[1:]
        except OSError:
            return None
        routes: dict[str, int] = {}
        for line in lines:
            fields = line.split()
            if len(fields) >= 8 and fields[1] == fields[7] == ALL_ZERO:
                metric = int(fields[6])
                routes[fields[0]] = min(metric, routes.get(fields[0], metric))
        return routes

    def _filters_strictly(self) -> bool:
        # The kernel takes the greater of the two values, by number.
        values = []
        for name in ("all", self.name):
            path = self._root / "proc/sys/net/ipv4/conf" / name / "rp_filter"
            try:
                values.append(int(path.read_text()))
            except (OSError, ValueError):
                continue
        return bool(values) and max(values) == STRICT
