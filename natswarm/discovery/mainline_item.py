"""Mutable items of BEP 44: what mainline nodes keep for the owner of a key.

An item is at most 1,000 bencoded bytes that the owner of an Ed25519 key signs together with a
sequence number; nodes keep the one with the highest number under SHA-1(key, salt).

Source: BEP 44. Knows neither nodes nor time, nor what is in an item.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from natswarm.discovery.krpc import Fields, bytes_in
from natswarm.discovery.krpc_bencode import Value, bdecode_untrusted, bencode
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId

__all__ = [
    "SEQUENCE_MAX",
    "VALUE_BYTES_MAX",
    "MutableItem",
    "item_fields",
    "item_in_untrusted",
    "item_target",
]

VALUE_BYTES_MAX = 1000
SALT_BYTES_MAX = 64
SEQUENCE_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class MutableItem:
    """A signed item.

    Attributes:
        owner: Whose key signed it.
        salt: At most 64 bytes; tells several items of one key apart.
        sequence: 0..2^63-1; the highest counts.
        value: Bencoded, at most 1,000 bytes.
        signature: Of the owner; whether it is one, `verify_untrusted` tells.
    """

    owner: PeerId
    salt: bytes
    sequence: int
    value: bytes
    signature: bytes

    @classmethod
    def sign(cls, identity: Identity, salt: bytes, sequence: int, value: Value) -> MutableItem:
        """Return our own item.

        Raises:
            ConfigurationError: The value is too large for mainline nodes.
        """
        encoded = bencode(value)
        if len(encoded) > VALUE_BYTES_MAX:
            raise ConfigurationError(
                f"mainline nodes keep {VALUE_BYTES_MAX} bytes, not {len(encoded)}: name fewer "
                "services, or a shorter name"
            )
        signature = identity.sign(_signed(salt, sequence, encoded))
        return cls(identity.peer_id, salt, sequence, encoded, signature)

    @property
    def target(self) -> bytes:
        """The 20 bytes under which nodes keep it."""
        return item_target(self.owner, self.salt)

    def verify_untrusted(self) -> None:
        """Check everything.

        Raises:
            DecodeError: A bound is broken, the value is not bencoded, or the signature is bad.
        """
        if len(self.value) > VALUE_BYTES_MAX or len(self.salt) > SALT_BYTES_MAX:
            raise DecodeError("an item is larger than items may be")
        if not 0 <= self.sequence <= SEQUENCE_MAX:
            raise DecodeError("a sequence number is out of range")
        self.owner.verify_untrusted(self.signature, _signed(self.salt, self.sequence, self.value))


def item_target(owner: PeerId, salt: bytes) -> bytes:
    """Return where the item of a key and a salt is kept."""
    return hashlib.sha1(owner.key + salt, usedforsecurity=False).digest()


def _signed(salt: bytes, sequence: int, value: bytes) -> bytes:
    """Return what BEP 44 signs: the pieces of the dictionary, without its `d` and `e`."""
    prefix = b"4:salt" + bencode(salt) if salt else b""
    return prefix + b"3:seq" + bencode(sequence) + b"1:v" + value


def item_in_untrusted(fields: Fields, salt: bytes) -> MutableItem:
    """Read an item from a message; its signature is not checked yet.

    Raises:
        DecodeError: A field is missing or of a wrong type or size.
    """
    sequence = fields.get(b"seq")
    if not isinstance(sequence, int) or b"v" not in fields:
        raise DecodeError("an item has a sequence number and a value")
    return MutableItem(
        PeerId(bytes_in(fields, b"k", at_least=KEY_BYTES, at_most=KEY_BYTES)),
        salt,
        sequence,
        bencode(fields[b"v"]),
        bytes_in(fields, b"sig", at_least=SIGNATURE_BYTES, at_most=SIGNATURE_BYTES),
    )


def item_fields(item: MutableItem) -> Fields:
    """Return an item as messages carry it, without its salt."""
    return {
        b"k": item.owner.key,
        b"seq": item.sequence,
        b"sig": item.signature,
        b"v": bdecode_untrusted(item.value),
    }
