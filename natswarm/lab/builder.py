"""Make the namespaces of a device, and tie them to the emulated internet.

Where the innermost NAT is the kernel's, the device has two namespaces:

    device                       router                            emulated internet
    192.168.N.2 lan ─── port2 ── lan 192.168.N.1   wan ─── TUN ─── host

else one, whose `wan` is the TUN device itself. A device beside another shares its NATs: it is one
more on the kernel's `lan`, which is a bridge, or one more host behind the emulated NAT. Commands
run to their end here, some milliseconds each; nothing else of the lab moves meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from natswarm.lab.emulation import LabInternet, TunPort, add_host
from natswarm.lab.errors import LabError
from natswarm.lab.namespace import Namespace
from natswarm.lab.nat import KernelNat
from natswarm.lab.registry import DeviceState
from natswarm.lab.settings import DevicePlan
from natswarm.lab.tun import open_tun
from natswarm.sim.host import Host
from natswarm.sim.router import NatRouter

__all__ = ["Builder", "Device", "Home"]

# Emulated homes count up from 192.168.1.0/24; with one of those above it, the kernel's home must
# have another network.
KERNEL_HOME_FIRST = 100


@dataclass(frozen=True, slots=True)
class Home:
    """The kernel's NAT before a device, or before several.

    Attributes:
        namespace: Where it is; its interfaces are `lan` and `wan`.
        ip: Its address outside.
        network: The first three bytes of those inside, as text.
        device_ips: What the devices have.
    """

    namespace: Namespace
    ip: str
    network: str
    device_ips: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is there.

    Attributes:
        plan: What it was to be.
        state: What others need to know of it.
        tun: Where it, or the kernel's NAT before it, meets the emulated internet; None for a device
            beside another behind the kernel's NAT.
        routers: Its emulated NATs, from the internet inwards.
        home: The kernel's NAT before it; None without.
    """

    plan: DevicePlan
    state: DeviceState
    tun: TunPort | None
    routers: list[NatRouter]
    home: Home | None


class Builder:
    """Makes the devices of one lab.

    Args:
        prefix: Of the lab's namespaces.
        internet: Where the hosts go.
        stack: Takes everything apart again.

    Attributes:
        devices: By name, in order of making.
    """

    def __init__(self, prefix: str, internet: LabInternet, stack: contextlib.ExitStack) -> None:
        self.devices: dict[str, Device] = {}
        self._prefix = prefix
        self._internet = internet
        self._stack = stack

    def add(self, plan: DevicePlan) -> Device:
        """Make a device; the one it stands beside must be there.

        Raises:
            LabError: The system does not let us.
        """
        beside = self.devices.get(plan.beside)
        tun, routers, home = None, [], None
        namespace = self._namespace(plan.name)
        if beside is not None and beside.home is not None:
            routers, home = beside.routers, beside.home
        else:
            host, routers = add_host(self._internet, plan)
            outer = namespace
            if plan.kernel is not None:
                outer = self._namespace(f"{plan.name}.nat")
            tun = self._open_tun(outer, host)
            if plan.kernel is not None:
                home = self._make_home(outer, host.ip, plan.kernel)
        interface, ip = "wan", "" if tun is None else tun.ip
        if home is not None:
            interface, ip = "lan", _add_to_home(home, namespace)
        external_ips = routers[0].nat.external_ips if routers else (home.ip if home else ip,)
        state = DeviceState(
            name=plan.name,
            namespace=namespace.full_name,
            router=home.namespace.full_name if home is not None else "",
            interface=interface,
            ip=ip,
            presets=tuple(nat.preset for nat in plan.nats),
            external_ips=tuple(external_ips),
        )
        device = self.devices[plan.name] = Device(plan, state, tun, routers, home)
        return device

    def _open_tun(self, namespace: Namespace, host: Host) -> TunPort:
        descriptor = open_tun(namespace, "wan")
        self._stack.callback(os.close, descriptor)
        namespace.ip(f"address add {host.ip}/32 dev wan", "route add default dev wan")
        return TunPort(descriptor, host)

    def _make_home(self, router: Namespace, ip: str, nat: KernelNat) -> Home:
        network = f"192.168.{KERNEL_HOME_FIRST + len(self.devices)}"
        router.ip(
            "link add name lan type bridge",
            f"address add {network}.1/24 dev lan",
            "link set dev lan up",
        )
        router.sysctl("net.ipv4.ip_forward", 1)
        # Devices beside each other are switched, not routed.
        with contextlib.suppress(LabError):
            router.sysctl("net.bridge.bridge-nf-call-iptables", 0)
        router.nft(nat.ruleset)
        for key, value in nat.sysctls.items():
            router.sysctl(key, value)
        return Home(router, ip, network)

    def _namespace(self, name: str) -> Namespace:
        namespace = Namespace(self._prefix, name)
        self._stack.callback(namespace.remove)
        # A lab carries IPv4 alone: programs shall find no address of the other kind to try.
        namespace.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        return namespace


def _add_to_home(home: Home, device: Namespace) -> str:
    """Put a device on the network inside a home; return its address there."""
    number = len(home.device_ips) + 2
    ip = f"{home.network}.{number}"
    home.namespace.ip(
        f"link add name port{number} type veth peer name lan netns {device.full_name}",
        f"link set dev port{number} master lan",
        f"link set dev port{number} up",
    )
    device.ip(
        f"address add {ip}/24 dev lan",
        "link set dev lan up",
        f"route add default via {home.network}.1",
    )
    home.device_ips.append(ip)
    return ip
