"""Which addresses the virtual internet hands out, and to whom."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

__all__ = [
    "CARRIER_NETWORK",
    "GLOBAL_NETWORKS",
    "address6",
    "addresses",
    "core_router_address",
    "inner_router_addresses",
    "link_router_address",
]

GLOBAL_NETWORKS = ("198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15")
CARRIER_NETWORK = "100.64.0.0/10"  # RFC 6598

# Routers have the top of the last global network, which hosts fill from its bottom: the last 256
# addresses are of the core, those below of links up to it. They meet after 130,000 hosts.
_CORE_ROUTERS_TOP = int(ipaddress.IPv4Address("198.19.255.255"))
_LINK_ROUTERS_TOP = _CORE_ROUTERS_TOP - 256

# The block for documentation that is large enough for topologies (RFC 9637); a /64 of it for every
# home, and for every device on a mobile network (3GPP TS 23.401, section 5.3.1).
GLOBAL_PREFIX6 = int(ipaddress.IPv6Address("3fff::"))


def addresses(*networks: str) -> Iterator[str]:
    """Yield the addresses of hosts in `networks`, ascending."""
    for network in networks:
        for address in ipaddress.ip_network(network).hosts():
            yield str(address)


def address6(prefix_index: int, host_index: int) -> str:
    """Return the global IPv6 address of a host in the /64 with an index, both from 1 up."""
    return str(ipaddress.IPv6Address(GLOBAL_PREFIX6 + (prefix_index << 64) + host_index))


def core_router_address(hop: int) -> str:
    """Return the address of the `hop`-th router of the core on every way, from 1 up to 255."""
    return str(ipaddress.IPv4Address(_CORE_ROUTERS_TOP - hop))


def link_router_address(index: int) -> str:
    """Return the address of a router on a link up to the core, by its index from 1 up."""
    return str(ipaddress.IPv4Address(_LINK_ROUTERS_TOP - index))


def inner_router_addresses(network: str, count: int) -> tuple[str, ...]:
    """Return the last `count` addresses of hosts in `network`, the nearest to subscribers first."""
    top = ipaddress.IPv4Network(network).broadcast_address
    return tuple(str(top - count + index) for index in range(count))
