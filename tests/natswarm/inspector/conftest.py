"""What is around a host of the virtual internet: its one interface, a silent router, the path."""

from __future__ import annotations

import ipaddress
import random

import netifaces
import pytest

from natswarm import VirtualNetwork
from natswarm.inspector import Surroundings
from natswarm.net.gateway import Reach
from natswarm.sim.topology import Host


class VirtualInterfaces:
    """The interfaces of a virtual host, in netifaces' words.

    Attributes:
        names: Delete one and it is gone.
    """

    def __init__(self, host: Host, name: str = "eth0") -> None:
        self.names = [name]
        self._ip = host.ip
        self._gateway = None if host.nat is None else host.nat.inside_ip

    def interfaces(self) -> list[str]:
        return list(self.names)

    def ifaddresses(self, name: str):
        if name not in self.names:
            raise ValueError(name)
        is_private = ipaddress.ip_address(self._ip).is_private
        netmask = "255.255.255.0" if is_private else "255.255.255.252"
        return {netifaces.AF_INET: [{"addr": self._ip, "netmask": netmask}]}

    def gateways(self):
        if self._gateway is None or not self.names:
            return {}
        route = (self._gateway, self.names[0])
        return {"default": {netifaces.AF_INET: route}, netifaces.AF_INET: [(*route, True)]}

    def routed_without_gateway(self) -> list[str]:
        return self.names[:1]


async def no_tcp(local_ip, remote):
    raise OSError("nobody listens")


def surroundings_of(host: Host, name: str = "eth0", **options) -> Surroundings:
    network = VirtualNetwork(host)
    reach = Reach(network=network, connect=no_tcp, rng=random.Random(1), entropy=bytes)
    return Surroundings(
        **{"source": VirtualInterfaces(host, name), "reach": reach, "paths": network} | options
    )


@pytest.fixture
def surround():
    """`surround(host)` is what is around a virtual host."""
    return surroundings_of
