"""Ids of mainline nodes: distance, and ids that are bound to an address.

Whoever could choose an id freely could sit next to any key and hide it. BEP 42 binds the first 21
bits of an id to the address by a CRC, with 8 ids an address at that precision; nodes prefer
neighbours whose ids fit. Addresses of a home or a laboratory are free.

Source: BEP 42, BEP 5. The CRC is CRC-32C (Castagnoli), which Python's libraries do not have.
"""

from __future__ import annotations

import ipaddress
from functools import cache

from natswarm.address import AddressKind, address_kind
from natswarm.discovery.krpc import ID_BYTES

__all__ = ["distance", "is_secure_id", "secure_id"]

POLYNOMIAL = 0x82F63B78
MASK_IPV4 = bytes.fromhex("030f3fff")
MASK_IPV6 = bytes.fromhex("0103070f1f3f7fff")
FREE_KINDS = (AddressKind.LOOPBACK, AddressKind.LINK_LOCAL, AddressKind.PRIVATE)


def distance(one: bytes, other: bytes) -> int:
    """Return the XOR distance of two ids."""
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")


def secure_id(ip: str, random_bytes: bytes) -> bytes:
    """Return an id that fits an address.

    Args:
        ip: Our address, as others see it.
        random_bytes: 20 of them; the last is the seed that BEP 42 calls `rand`.
    """
    crc = _crc_of(ip, random_bytes[-1])
    third = (crc >> 8 & 0xF8) | (random_bytes[2] & 0x07)
    return bytes([crc >> 24, crc >> 16 & 0xFF, third]) + random_bytes[3:ID_BYTES]


def is_secure_id(node_id: bytes, ip: str) -> bool:
    """Return whether an id fits the address of its node."""
    if address_kind(ip) in FREE_KINDS:
        return True
    crc = _crc_of(ip, node_id[-1])
    return int.from_bytes(node_id[:3], "big") >> 3 == crc >> 11


def _crc_of(ip: str, seed: int) -> int:
    packed = ipaddress.ip_address(ip.partition("%")[0]).packed
    mask = MASK_IPV4 if len(packed) == 4 else MASK_IPV6
    masked = bytearray(a & b for a, b in zip(packed, mask, strict=False))
    masked[0] |= (seed & 7) << 5
    crc = 0xFFFFFFFF
    for byte in masked:
        crc = _table()[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    def entry(index: int) -> int:
        for _ in range(8):
            index = index >> 1 ^ (POLYNOMIAL if index & 1 else 0)
        return index

    return tuple(entry(index) for index in range(256))
