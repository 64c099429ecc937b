"""Mainline nodes from files that BitTorrent clients keep, so that no bootstrap host is needed.

Our own file, which names those that answered last time, is like Transmission's.

    Transmission     dht.dat            {id, nodes: 6 bytes each, nodes6: 18 bytes each}
    libtorrent       session state      {"dht state": {nodes: [6 bytes, ...], nodes6: [...]}}
    qBittorrent      BT_backup/session  the same; older versions: ses_state

Pure: bytes to endpoints. Source: what those programs write (Transmission 4, libtorrent 2).
"""

from __future__ import annotations

from collections.abc import Sequence

from natswarm.address import AddressKind, Endpoint
from natswarm.discovery.krpc import (
    ID_BYTES,
    Fields,
    decode_endpoint_untrusted,
    encode_endpoint,
)
from natswarm.discovery.krpc_bencode import Value, bdecode_untrusted, bencode
from natswarm.errors import DecodeError

__all__ = ["FILE_BYTES_MAX", "KnownNodes", "nodes_in_file_untrusted"]

FILE_BYTES_MAX = 4 * 1024 * 1024
NODES_MAX = 500
STATE_KEYS = (b"dht state", b"dht_state", b"dht")

# Of so many, some are there a month later.
KNOWN_MAX = 64


class KnownNodes:
    """The mainline nodes that answered last time.

    Attributes:
        endpoints: Where they are, at most 64.
        is_changed: Whether they are others than when this was last set to False.
    """

    def __init__(self, endpoints: Sequence[Endpoint] = ()) -> None:
        self.endpoints = tuple(endpoints)
        self.is_changed = False

    def note(self, endpoints: Sequence[Endpoint]) -> None:
        """Take the place of those before with nodes that answer now; with none, keep them."""
        newest = tuple(endpoints[:KNOWN_MAX])
        if newest and newest != self.endpoints:
            self.endpoints, self.is_changed = newest, True

    def encode(self) -> bytes:
        """Return the stored form."""
        both = {b"nodes": b"", b"nodes6": b""}
        for each in self.endpoints:
            both[b"nodes6" if ":" in each.ip else b"nodes"] += encode_endpoint(each)
        return bencode({key: text for key, text in both.items() if text})

    @classmethod
    def decode_untrusted(cls, data: bytes) -> KnownNodes:
        """Read the stored form.

        Raises:
            DecodeError: It is damaged, or names nobody.
        """
        return cls(nodes_in_file_untrusted(data)[:KNOWN_MAX])


def nodes_in_file_untrusted(data: bytes) -> list[Endpoint]:
    """Return the nodes that a client's file names, at most 500 of each address family.

    Raises:
        DecodeError: Not such a file, or it names nobody.
    """
    content = bdecode_untrusted(data, is_order_free=True)
    found: list[Endpoint] = []
    if isinstance(content, dict):
        for place in (content, *(content.get(key) for key in STATE_KEYS)):
            if isinstance(place, dict):
                found += _nodes_in(place)
    usable = [
        each for each in dict.fromkeys(found) if each.port and each.kind is not AddressKind.UNUSABLE
    ]
    if not usable:
        raise DecodeError("it names no mainline node; take dht.dat or the session file of a client")
    return usable


def _nodes_in(fields: Fields) -> list[Endpoint]:
    found: list[Endpoint] = []
    for key, size in ((b"nodes", 6), (b"nodes6", 18)):
        for text in _pieces(fields.get(key), size)[:NODES_MAX]:
            # Some versions write the id of the node before its endpoint.
            if len(text) in (size, size + ID_BYTES):
                found.append(decode_endpoint_untrusted(text[-size:]))
    return found


def _pieces(value: Value | None, size: int) -> list[bytes]:
    if isinstance(value, bytes):
        whole = len(value) - len(value) % size
        return [value[start : start + size] for start in range(0, whole, size)]
    if isinstance(value, list):
        return [each for each in value if isinstance(each, bytes)]
    return []
