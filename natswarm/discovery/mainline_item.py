"""Mutable items of BEP 44, and the meeting record of a peer inside one.

An item is at most 1,000 bencoded bytes that the owner of an Ed25519 key signs together with a
sequence number; nodes keep the one with the highest number under SHA-1(key, salt). A peer's item is
under the peer's own key: only the peer can write it, and whoever knows the PeerId finds it.

    salt    "nsw" 3 | BLAKE2s-128 of the swarm's key        one item for each swarm a peer is in
    value   version 1 | nonce 12 | sealed record | MAC 16   ChaCha20-Poly1305

The key of the value is derived from the swarm's key and the PeerId. Nodes that keep the item of an
open swarm can derive it, too, as can everybody who knows the PeerId; those of a private one cannot,
nor can they tell which swarm it is. Inside is a `NodeRecord`, signed once more.

Source: BEP 44. Knows neither nodes nor time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

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
    "meeting_salt",
    "open_meeting_untrusted",
    "seal_meeting",
]

VALUE_BYTES_MAX = 1000
SALT_BYTES_MAX = 64
SEQUENCE_MAX = 2**63 - 1

MEETING_VERSION = 1
NONCE_BYTES = 12


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


# The meeting record -------------------------------------------------------------------------------


def meeting_salt(swarm_key: bytes) -> bytes:
    """Return the salt of all meeting records of a swarm; it does not tell which swarm."""
    return b"nsw" + hashlib.blake2s(key=swarm_key, person=b"dhtsalt", digest_size=16).digest()


def seal_meeting(
    identity: Identity, swarm_key: bytes, sequence: int, sealed_record: bytes, nonce: bytes
) -> MutableItem:
    """Return the item with our record.

    Args:
        identity: Who we are.
        swarm_key: 32 bytes.
        sequence: Higher than ever before, such as the seconds since 1970.
        sealed_record: A signed `NodeRecord`.
        nonce: 12 random bytes.

    Raises:
        ConfigurationError: The record is too large.
    """
    salt = meeting_salt(swarm_key)
    sealed = _meeting_cipher(identity.peer_id, swarm_key).encrypt(nonce, sealed_record, salt)
    value = bytes([MEETING_VERSION]) + nonce + sealed
    return MutableItem.sign(identity, salt, sequence, value)


def open_meeting_untrusted(item: MutableItem, swarm_key: bytes) -> bytes:
    """Return the signed record in an item whose signature was checked.

    Raises:
        DecodeError: It is not a meeting record of this swarm.
    """
    value = bdecode_untrusted(item.value)
    if not isinstance(value, bytes) or value[:1] != bytes([MEETING_VERSION]):
        raise DecodeError("not a meeting record of a version that is known here")
    nonce, sealed = value[1 : 1 + NONCE_BYTES], value[1 + NONCE_BYTES :]
    try:
        return _meeting_cipher(item.owner, swarm_key).decrypt(nonce, sealed, item.salt)
    except (InvalidTag, ValueError) as error:
        raise DecodeError("a meeting record of another swarm, or a damaged one") from error


def _meeting_cipher(peer_id: PeerId, swarm_key: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(
        hashlib.blake2s(peer_id.key, key=swarm_key, person=b"dhtvalue").digest()
    )
