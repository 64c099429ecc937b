"""What we put into the mainline DHT: sealed, for those who can derive the key.

    version 1 | nonce 12 | sealed body | MAC 16        ChaCha20-Poly1305

Pure.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from natswarm.discovery.krpc_bencode import bdecode_untrusted
from natswarm.discovery.mainline_item import MutableItem
from natswarm.errors import DecodeError

__all__ = ["open_value_untrusted", "seal_value"]

VERSION = 1
NONCE_BYTES = 12
MAC_BYTES = 16


def seal_value(key: bytes, body: bytes, nonce: bytes) -> bytes:
    """Return the value of an item.

    Args:
        key: 32 bytes.
        body: What it says.
        nonce: 12 random bytes, never the same twice.
    """
    return bytes([VERSION]) + nonce + ChaCha20Poly1305(key).encrypt(nonce, body, None)


def open_value_untrusted(key: bytes, item: MutableItem) -> bytes:
    """Return what an item says; its signature was checked.

    Raises:
        DecodeError: It was sealed under another key, is damaged, or not sealed at all.
    """
    value = bdecode_untrusted(item.value)
    if not isinstance(value, bytes) or value[:1] != bytes([VERSION]):
        raise DecodeError("nothing of a version that is known here")
    if len(value) < 1 + NONCE_BYTES + MAC_BYTES:
        raise DecodeError("too short for anything sealed")
    nonce, sealed = value[1 : 1 + NONCE_BYTES], value[1 + NONCE_BYTES :]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, None)
    except InvalidTag as error:
        raise DecodeError("of another swarm, or damaged") from error
