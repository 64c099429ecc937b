"""What travels in the virtual internet: a UDP datagram with its two addresses.

The hop limit travels beside it, not in it: routers change it at every hop, and an integer argument
is cheaper than a new packet.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from natswarm.address import Endpoint

__all__ = ["Packet"]


class Packet(NamedTuple):
    """A UDP datagram on its way."""

    source: Endpoint
    destination: Endpoint
    data: bytes

    def __str__(self) -> str:
        digest = hashlib.blake2b(self.data, digest_size=3).hexdigest()
        return f"{self.source} > {self.destination} {len(self.data)} B #{digest}"
