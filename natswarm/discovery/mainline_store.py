"""What we keep for other mainline nodes: peers of an info-hash, mutable items; and tokens.

A token proves that whoever announces or puts can receive at its address: it is a MAC over the
address under a secret that changes every five minutes, and is valid for five to ten (BEP 5).

Bounds: 256 info-hashes of 64 peers for half an hour, 256 items for two hours; the oldest goes.
Pure: the time is an argument, secrets come from the entropy given.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable

from natswarm.address import Endpoint
from natswarm.discovery.mainline_item import MutableItem

__all__ = ["MainlineStore", "Tokens"]

TOKEN_BYTES = 8
SECRET_BYTES = 32
SECRET_LIFETIME_S = 300.0

HASHES_MAX = 256
PEERS_PER_HASH_MAX = 64
PEER_LIFETIME_S = 30 * 60.0
PEERS_RETURNED_MAX = 32  # 6..18 bytes each: within one datagram, next to the nodes

ITEMS_MAX = 256
ITEM_LIFETIME_S = 2 * 3600.0  # BEP 44: republished each hour


class Tokens:
    """Hands out and checks tokens.

    Args:
        entropy: A number of bytes -> that many nobody can guess.
    """

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self._entropy = entropy
        self._secrets = (entropy(SECRET_BYTES), entropy(SECRET_BYTES))
        self._changed_at = float("-inf")

    def issue(self, ip: str, now: float) -> bytes:
        """Return the token of an address."""
        if now >= self._changed_at + SECRET_LIFETIME_S:
            self._secrets = (self._entropy(SECRET_BYTES), self._secrets[0])
            self._changed_at = now
        return _token(self._secrets[0], ip)

    def is_valid(self, token: bytes, ip: str) -> bool:
        """Return whether we gave a token to an address lately."""
        return any(hmac.compare_digest(_token(secret, ip), token) for secret in self._secrets)


def _token(secret: bytes, ip: str) -> bytes:
    return hashlib.blake2s(ip.encode(), key=secret, digest_size=TOKEN_BYTES).digest()


class MainlineStore:
    """What one node keeps."""

    def __init__(self) -> None:
        self._peers: OrderedDict[bytes, OrderedDict[Endpoint, float]] = OrderedDict()
        self._items: OrderedDict[bytes, tuple[MutableItem, float]] = OrderedDict()

    def announce(self, info_hash: bytes, endpoint: Endpoint, now: float) -> None:
        """Keep a peer of an info-hash."""
        peers = self._peers.setdefault(info_hash, OrderedDict())
        self._peers.move_to_end(info_hash)
        peers[endpoint] = now
        peers.move_to_end(endpoint)
        if len(peers) > PEERS_PER_HASH_MAX:
            peers.popitem(last=False)
        if len(self._peers) > HASHES_MAX:
            self._peers.popitem(last=False)

    def peers(self, info_hash: bytes, now: float) -> list[Endpoint]:
        """Return peers of an info-hash, the latest first, at most 32."""
        found = self._peers.get(info_hash) or OrderedDict[Endpoint, float]()
        alive = [each for each, at in found.items() if now < at + PEER_LIFETIME_S]
        return alive[::-1][:PEERS_RETURNED_MAX]

    def put(self, item: MutableItem, now: float) -> bool:
        """Keep an item whose signature was checked; False: we have a newer one."""
        known = self.item(item.target, now)
        if known is not None and known.sequence > item.sequence:
            return False
        self._items[item.target] = item, now
        self._items.move_to_end(item.target)
        if len(self._items) > ITEMS_MAX:
            self._items.popitem(last=False)
        return True

    def item(self, target: bytes, now: float) -> MutableItem | None:
        """Return the item of a target; None: there is none any more."""
        found = self._items.get(target)
        return found[0] if found is not None and now < found[1] + ITEM_LIFETIME_S else None
