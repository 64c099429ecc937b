"""Which addresses the virtual internet hands out, and to whom."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

__all__ = ["CARRIER_NETWORK", "GLOBAL_NETWORKS", "addresses"]

GLOBAL_NETWORKS = ("198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15")
CARRIER_NETWORK = "100.64.0.0/10"  # RFC 6598


def addresses(*networks: str) -> Iterator[str]:
    """Yield the addresses of hosts in `networks`, ascending."""
    for network in networks:
        for address in ipaddress.ip_network(network).hosts():
            yield str(address)
