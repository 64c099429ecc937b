"""Make the namespaces of a device, and tie them to the emulated internet.

Where the innermost NAT is the kernel's, the device has two namespaces:

    device                     router                          emulated internet
    192.168.N.2 lan ─── veth ─── lan 192.168.N.1   wan ─── TUN ─── host

else one, whose `wan` is the TUN device itself. Commands run to their end here, some milliseconds
each; nothing else of the lab moves meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from natswarm.lab.emulation import LabInternet, TunPort, add_host
from natswarm.lab.namespace import Namespace
from natswarm.lab.nat import KernelNat
from natswarm.lab.registry import DeviceState
from natswarm.lab.settings import DevicePlan
from natswarm.lab.tun import open_tun
from natswarm.sim.router import NatRouter

__all__ = ["Device", "make_device"]

# Emulated homes count up from 192.168.1.0/24; with one of those above it, the kernel's home must
# have another network.
KERNEL_HOME_FIRST = 100


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is there.

    Attributes:
        plan: What it was to be.
        state: What others need to know of it.
        tun: Where it meets the emulated internet.
        routers: Its emulated NATs, from the internet inwards.
        kernel_router: The namespace of the kernel's NAT; None without.
    """

    plan: DevicePlan
    state: DeviceState
    tun: TunPort
    routers: list[NatRouter]
    kernel_router: Namespace | None


def make_device(
    prefix: str,
    internet: LabInternet,
    plan: DevicePlan,
    index: int,
    stack: contextlib.ExitStack,
) -> Device:
    """Make a device.

    Args:
        prefix: Of the lab's namespaces.
        internet: Where its host goes.
        plan: What it is to be.
        index: A number no other device of the lab has, from 0.
        stack: Takes everything apart again.

    Raises:
        LabError: The system does not let us.
    """
    host, routers = add_host(internet, plan)
    namespace = _namespace(prefix, plan.name, stack)
    router, interface, ip = None, "wan", host.ip
    if plan.kernel is not None:
        router = _namespace(prefix, f"{plan.name}.nat", stack)
    descriptor = open_tun(router or namespace, "wan")
    stack.callback(os.close, descriptor)
    (router or namespace).ip(
        f"address add {host.ip}/32 dev wan",
        "route add default dev wan",
    )
    if router is not None and plan.kernel is not None:
        network = f"192.168.{KERNEL_HOME_FIRST + index}"
        _add_home(router, namespace, network, plan.kernel)
        interface, ip = "lan", f"{network}.2"
    external = routers[0].nat.external_ips if routers else (host.ip,)
    state = DeviceState(
        name=plan.name,
        namespace=namespace.full_name,
        router=router.full_name if router is not None else "",
        interface=interface,
        ip=ip,
        presets=tuple(nat.preset for nat in plan.nats),
        external_ips=tuple(external),
    )
    return Device(plan, state, TunPort(descriptor, host), routers, router)


def _add_home(router: Namespace, device: Namespace, network: str, nat: KernelNat) -> None:
    """Put a device behind a router of the kernel."""
    router.ip(
        f"link add name lan type veth peer name lan netns {device.full_name}",
        f"address add {network}.1/24 dev lan",
        "link set dev lan up",
    )
    router.sysctl("net.ipv4.ip_forward", 1)
    router.nft(nat.ruleset)
    for key, value in nat.sysctls.items():
        router.sysctl(key, value)
    device.ip(
        f"address add {network}.2/24 dev lan",
        "link set dev lan up",
        f"route add default via {network}.1",
    )


def _namespace(prefix: str, name: str, stack: contextlib.ExitStack) -> Namespace:
    namespace = Namespace(prefix, name)
    remove: Callable[[], None] = namespace.remove
    stack.callback(remove)
    # A lab carries IPv4 alone: programs shall find no address of the other kind to try.
    namespace.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    return namespace
