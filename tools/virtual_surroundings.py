"""What is around a host of the virtual internet, for `natswarm.inspect`: interface, router, path.

Its one interface is described in netifaces' words; its router answers no port mapping protocol.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import netifaces
import trio

from natswarm import Endpoint, Surroundings, VirtualNetwork
from natswarm.net.gateway import Reach
from natswarm.sim.topology import Host

__all__ = ["VirtualInterfaces", "surroundings_of"]


class VirtualInterfaces:
    """An `InterfaceSource`.

    Attributes:
        names: Take one out and it is gone.
    """

    def __init__(self, host: Host, name: str) -> None:
        self.names = [name]
        self._ip = host.ip
        self._gateway = None if host.nat is None else host.nat.inside_ip

    def interfaces(self) -> list[str]:
        """See `InterfaceSource`."""
        return list(self.names)

    def ifaddresses(self, name: str) -> Mapping[int, Sequence[Mapping[str, str]]]:
        """See `InterfaceSource`."""
        if name not in self.names:
            raise ValueError(f"no interface {name}")
        return {netifaces.AF_INET: [{"addr": self._ip, "netmask": "255.255.255.0"}]}

    def gateways(self) -> Mapping[Any, Any]:
        """See `InterfaceSource`."""
        if self._gateway is None or not self.names:
            return {}
        route = (self._gateway, self.names[0])
        return {"default": {netifaces.AF_INET: route}, netifaces.AF_INET: [(*route, True)]}

    def routed_without_gateway(self) -> list[str]:
        """See `InterfaceSource`."""
        return self.names[:1]


async def _connect(local_ip: str, remote: Endpoint) -> trio.SocketStream:
    raise OSError(f"{remote} takes no connections from {local_ip}")


def surroundings_of(host: Host, interface: str = "eth0") -> Surroundings:
    """Return what is around a virtual host whose interface has the name `interface`."""
    network = VirtualNetwork(host)
    reach = Reach(network=network, connect=_connect, rng=random.Random(1), entropy=bytes)
    return Surroundings(source=VirtualInterfaces(host, interface), reach=reach, paths=network)
