"""Ids, and how far apart they are: 256 bits, XOR.

A node's id is its public key (32 bytes, `PeerId.key`); a record's key is a hash of the same length.
Inside this package ids are plain `bytes`, since a dataclass as a dictionary key costs more than all
else that a hop does.

Source: Maymounkov and Mazieres, "Kademlia" (2002), section 2.1.
"""

from __future__ import annotations

import hashlib
import random

__all__ = ["ID_BITS", "ID_BYTES", "as_int", "distance", "id_in_bucket", "key_of", "shared_bits"]

ID_BYTES = 32
ID_BITS = 8 * ID_BYTES


def as_int(node_id: bytes) -> int:
    """Return an id as a number; distances are XORs of these."""
    return int.from_bytes(node_id, "big")


def distance(one: bytes, other: bytes) -> int:
    """Return the XOR distance of two ids."""
    return as_int(one) ^ as_int(other)


def shared_bits(one: int, other: int) -> int:
    """Return how many leading bits two ids share: the index of the one's bucket at the other."""
    return ID_BITS - (one ^ other).bit_length()


def id_in_bucket(own: int, index: int, rng: random.Random) -> bytes:
    """Return a random id that shares exactly `index` leading bits with `own`; index 0..255."""
    low_bits = ID_BITS - index - 1
    low = rng.getrandbits(low_bits) if low_bits else 0
    high = (own >> low_bits) ^ 1
    return (high << low_bits | low).to_bytes(ID_BYTES, "big")


def key_of(kind: bytes, *parts: bytes) -> bytes:
    """Return the key under which something named by `parts` is stored; `kind` has <= 8 bytes."""
    hasher = hashlib.blake2s(person=kind)
    for part in parts:
        hasher.update(len(part).to_bytes(2, "big") + part)
    return hasher.digest()
