"""Who a node is: an Ed25519 key, and the PeerId, keys and certificate that follow from it.

A PeerId is the 32-byte Ed25519 public key itself (as in iroh), not a hash of it: whoever knows an
id can check signatures and derive a shared key without asking anybody. Public keys are as uniform
as hashes, so the same 32 bytes serve as the 256-bit id of the routing layer.

Source: RFC 8032 (Ed25519), RFC 7748 section 4.1 (the birational map between edwards25519 and
curve25519, so that one key signs and also agrees on MAC keys), RFC 7693 (BLAKE2).
Knows nothing of datagrams, peers' addresses or networks.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from natswarm.errors import DecodeError, IdentityError
from natswarm.secret_file import SecretFile

__all__ = ["Identity", "PeerId", "ProbeKeys", "open_envelope_untrusted"]

KEY_BYTES = 32
SIGNATURE_BYTES = 64

FILE = SecretFile(
    "natswarm-identity-1",
    "identity",
    IdentityError,
    "restore it from a copy, or move it away to start under a new identity",
)

# 2^255 - 19, the field of both curves (RFC 7748 section 4.1).
FIELD_PRIME = 2**255 - 19


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """The name of a node: its Ed25519 public key.

    Attributes:
        key: 32 bytes.
    """

    key: bytes

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a PeerId has {KEY_BYTES} bytes, not {len(self.key)}")

    def __str__(self) -> str:
        return base64.b32encode(self.key).decode().rstrip("=").lower()

    def __repr__(self) -> str:
        return f"PeerId({self.short})"

    @property
    def short(self) -> str:
        """The first 8 characters: enough to tell a handful of peers apart on a screen."""
        return str(self)[:8]

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Read the 52 characters that `str()` writes.

        Raises:
            IdentityError: Not a PeerId.
        """
        stripped = text.strip()
        try:
            key = base64.b32decode(stripped.upper() + "=" * (-len(stripped) % 8))
        except (binascii.Error, ValueError) as error:
            raise IdentityError(
                f"{text!r} is not a PeerId: 52 letters a-z and digits 2-7"
            ) from error
        if len(key) != KEY_BYTES or str(cls(key)) != stripped.lower():
            raise IdentityError(f"{text!r} is not a PeerId: 52 letters a-z and digits 2-7")
        return cls(key)

    @classmethod
    def decode_untrusted(cls, key: bytes) -> PeerId:
        """Take 32 bytes from a stranger; whether they own the key only a signature shows.

        Raises:
            DecodeError: Not 32 bytes.
        """
        if len(key) != KEY_BYTES:
            raise DecodeError(f"a PeerId has {KEY_BYTES} bytes, not {len(key)}")
        return cls(bytes(key))

    def verify_untrusted(self, signature: bytes, message: bytes) -> None:
        """Check that the owner of this id signed `message`.

        Raises:
            DecodeError: They did not.
        """
        try:
            _public_key(self.key).verify(signature, message)
        except (InvalidSignature, ValueError) as error:
            raise DecodeError(f"the signature is not that of {self.short}") from error


@lru_cache(maxsize=1024)
def _public_key(key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(key)


@dataclass(frozen=True, slots=True)
class ProbeKeys:
    """MAC keys between two peers, one a direction, so that a reflected probe is not ours.

    Attributes:
        send: 32 bytes, for what we send.
        receive: 32 bytes, for what the peer sends.
    """

    send: bytes
    receive: bytes


class Identity:
    """A private Ed25519 key and what follows from it."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise ValueError(f"a seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._seed = seed
        self._private_key = Ed25519PrivateKey.from_private_bytes(seed)
        self.peer_id = PeerId(self._private_key.public_key().public_bytes_raw())
        self._probe_keys: dict[tuple[PeerId, bytes], ProbeKeys] = {}

    def __repr__(self) -> str:
        return f"Identity({self.peer_id.short})"

    @classmethod
    def generate(cls) -> Identity:
        """Make a new identity from the operating system's entropy."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the identity stored at `path`, or make one and store it there with mode 0600.

        Raises:
            IdentityError: The file is damaged, unreadable, or readable by other users.
        """
        seed = FILE.load(path)
        return cls(FILE.store_new(path, os.urandom(KEY_BYTES)) if seed is None else seed)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of `message`."""
        return self._private_key.sign(message)

    def probe_keys(self, peer_id: PeerId, swarm_secret: bytes = b"") -> ProbeKeys:
        """Return the MAC keys that only we and `peer_id` can derive; cached.

        Args:
            peer_id: The other side.
            swarm_secret: What it takes to derive them besides, at most 32 bytes; empty: nothing.

        Raises:
            DecodeError: The id is not a usable public key.
        """
        if (keys := self._probe_keys.get((peer_id, swarm_secret))) is None:
            secret = self.shared_secret(peer_id, purpose=b"probe")
            if swarm_secret:
                secret = hashlib.blake2s(secret, key=swarm_secret).digest()
            keys = ProbeKeys(
                send=hashlib.blake2s(self.peer_id.key, key=secret).digest(),
                receive=hashlib.blake2s(peer_id.key, key=secret).digest(),
            )
            if len(self._probe_keys) >= 1024:  # strangers' HELLOs must not grow it for ever
                self._probe_keys.clear()
            self._probe_keys[peer_id, swarm_secret] = keys
        return keys

    def shared_secret(self, peer_id: PeerId, *, purpose: bytes) -> bytes:
        """Return 32 bytes that only we and `peer_id` can derive, equal on both sides.

        Args:
            peer_id: The other side.
            purpose: At most 8 bytes; secrets of different purposes are independent.

        Raises:
            DecodeError: The id is not a usable public key.
        """
        # Ed25519 signs with SHA-512(seed)[:32], clamped; X25519 clamps by itself.
        scalar = hashlib.sha512(self._seed).digest()[:32]
        try:
            shared = X25519PrivateKey.from_private_bytes(scalar).exchange(
                X25519PublicKey.from_public_bytes(_montgomery_u(peer_id.key))
            )
        except ValueError as error:  # a point of small order: nobody's honest key
            raise DecodeError(f"{peer_id.short} is not a usable public key") from error
        lower, higher = sorted((self.peer_id.key, peer_id.key))
        return hashlib.blake2s(lower + higher, key=shared, person=purpose).digest()

    def seal(self, context: bytes, payload: bytes) -> bytes:
        """Return a signed envelope: 32-byte key, 64-byte signature, payload.

        Args:
            context: What the envelope is for; a signature for one context is void in another.
            payload: Anything.
        """
        return self.peer_id.key + self.sign(_envelope_message(context, payload)) + payload

    @cached_property
    def certificate_pem(self) -> bytes:
        """A self-signed X.509 certificate of the identity, PEM.

        Peers check the key inside, never the dates or the name, so the dates are wide open: a phone
        with a wrong clock must still connect.
        """
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "natswarm")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._private_key.public_key())
            .serial_number(1)
            .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
            .not_valid_after(datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC))
            .sign(self._private_key, None)
        )
        return certificate.public_bytes(Encoding.PEM)

    @cached_property
    def private_key_pem(self) -> bytes:
        """The private key, PKCS #8 PEM, for the TLS engine."""
        return self._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def open_envelope_untrusted(context: bytes, data: bytes) -> tuple[PeerId, bytes]:
    """Return who signed an envelope made by `Identity.seal` and what is inside.

    Raises:
        DecodeError: Too short, or the signature does not fit signer, context and payload.
    """
    if len(data) < KEY_BYTES + SIGNATURE_BYTES:
        raise DecodeError(f"an envelope has at least 96 bytes, not {len(data)}")
    signer = PeerId.decode_untrusted(data[:KEY_BYTES])
    signature = data[KEY_BYTES : KEY_BYTES + SIGNATURE_BYTES]
    payload = data[KEY_BYTES + SIGNATURE_BYTES :]
    signer.verify_untrusted(signature, _envelope_message(context, payload))
    return signer, payload


def _envelope_message(context: bytes, payload: bytes) -> bytes:
    return b"natswarm envelope\0" + len(context).to_bytes(1, "big") + context + payload


def _montgomery_u(ed25519_key: bytes) -> bytes:
    """Map an Ed25519 public key to its X25519 form, u = (1 + y) / (1 - y) (RFC 7748, 4.1)."""
    y = int.from_bytes(ed25519_key, "little") & (2**255 - 1)
    return ((1 + y) * pow(1 - y, -1, FIELD_PRIME) % FIELD_PRIME).to_bytes(32, "little")
