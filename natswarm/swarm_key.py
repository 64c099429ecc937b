"""The key of a swarm: who does not know it gets no answer, and sees nobody's name.

    SEALED      8 | version 1 | salt 12 | sealed datagram | MAC 16     instead of echoes and HELLOs
    PROBE       its MAC key is derived from the swarm's key, too
    QUIC        0xFF | salt 12 | sealed datagram | MAC 16              instead of long headers

Sealed with ChaCha20-Poly1305 under keys derived from the swarm's. So in a private swarm a datagram
of a stranger is never authentic, and its node as silent as a closed port. On the way nobody sees a
PeerId: echoes and HELLOs, which carry them, are sealed; so is QUIC's handshake, or else somebody on
the way could act a client of the server, which shows its certificate first. What has a short header
is under keys that came out of that handshake.

In the open swarm, whose key is known to everybody, nothing is sealed.

Source: the pre-shared keys of WireGuard for the idea. Knows no sockets and nothing of formats.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from natswarm.errors import ConfigurationError, DecodeError
from natswarm.secret_file import SECRET_BYTES, SecretFile

__all__ = ["OPEN_SWARM", "SwarmKey"]

SEALED = 8  # among the first bytes 4..15 of natswarm's datagrams, wire.py
VERSION = 1
CLEAR = 7  # a PROBE: it names nobody, and its MAC shows who knows the key
QUIC_SEALED = 0xFF
QUIC_LONG_HEADER = 0x80
SALT_BYTES = 12
MAC_BYTES = 16

FILE = SecretFile(
    "natswarm-swarm-1",
    "swarm key",
    ConfigurationError,
    "restore it from a copy, or take another folder and join the swarm again by an invite",
)


@dataclass(frozen=True)
class SwarmKey:
    """What the nodes of a swarm share.

    Attributes:
        secret: 32 bytes; zeros in the open swarm.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a swarm key has {SECRET_BYTES} bytes, not {len(self.secret)}")

    def __str__(self) -> str:
        return "the open swarm" if self.is_open else f"the private swarm {self.label}"

    @classmethod
    def generate(cls) -> SwarmKey:
        """Make the key of a new private swarm from the operating system's entropy."""
        return cls(os.urandom(SECRET_BYTES))

    @classmethod
    def load(cls, path: Path) -> SwarmKey | None:
        """Read a key; None: there is no such file.

        Raises:
            ConfigurationError: It is damaged, unreadable, or readable by other users.
        """
        secret = FILE.load(path)
        return None if secret is None else cls(secret)

    def store_new(self, path: Path) -> SwarmKey:
        """Store the key with mode 0600, unless there is one; return the one that is there now.

        Raises:
            ConfigurationError: It cannot be stored.
        """
        return SwarmKey(FILE.store_new(path, self.secret))

    @property
    def is_open(self) -> bool:
        """Whether it is that of the swarm that everybody is in who names no other."""
        return not any(self.secret)

    @cached_property
    def label(self) -> str:
        """8 characters by which people tell swarms apart; they give nothing of the key away."""
        return self.derive(b"label").hex()[:8]

    def derive(self, purpose: bytes, context: bytes = b"") -> bytes:
        """Return 32 bytes that only those who know the key can derive.

        Args:
            purpose: At most 8 bytes; those of different purposes are independent.
            context: Whatever else they are to depend on.
        """
        return hashlib.blake2s(context, key=self.secret, person=purpose).digest()

    # Datagrams of natswarm ------------------------------------------------------------------------

    def seal(self, datagram: bytes) -> bytes:
        """Return an echo or HELLO as it goes out: in a private swarm 30 bytes longer."""
        if self.is_open:
            return datagram
        return bytes((SEALED, VERSION)) + _encrypt(self._datagram_cipher, datagram)

    def open_untrusted(self, data: bytes) -> bytes:
        """Return a natswarm datagram that came in as it was before `seal`.

        Raises:
            DecodeError: It is of another swarm, or damaged.
        """
        if not data:
            raise DecodeError("an empty datagram")
        if self.is_open or data[0] == CLEAR:
            return data
        if data[0] != SEALED or data[1:2] != bytes((VERSION,)):
            raise DecodeError("a datagram of another swarm")
        opened = _decrypt_untrusted(self._datagram_cipher, data[2:])
        if not opened:
            raise DecodeError("nothing is sealed in there")
        return opened

    # Datagrams of QUIC ----------------------------------------------------------------------------

    def seal_quic(self, datagrams: Sequence[bytes]) -> Sequence[bytes]:
        """Return datagrams of QUIC as they go out: in a private swarm the handshake's sealed."""
        if self.is_open:
            return datagrams
        return [
            bytes((QUIC_SEALED,)) + _encrypt(self._quic_cipher, data)
            if data[0] & QUIC_LONG_HEADER
            else data
            for data in datagrams
        ]

    def open_quic_untrusted(self, datagrams: list[bytes]) -> list[bytes]:
        """Return those that are of this swarm, as they were before `seal_quic`."""
        if self.is_open or not any(data[0] & QUIC_LONG_HEADER for data in datagrams):
            return datagrams
        opened = []
        for data in datagrams:
            if data[0] & QUIC_LONG_HEADER:
                try:
                    data = _decrypt_untrusted(self._quic_cipher, data[1:])
                except DecodeError:
                    continue
            opened.append(data)
        return opened

    @cached_property
    def _datagram_cipher(self) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(self.derive(b"datagram"))

    @cached_property
    def _quic_cipher(self) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(self.derive(b"quic"))


def _encrypt(cipher: ChaCha20Poly1305, data: bytes) -> bytes:
    # 96 random bits: of 2^32 datagrams two share a salt once in 2^33 swarms.
    salt = os.urandom(SALT_BYTES)
    return salt + cipher.encrypt(salt, data, None)


def _decrypt_untrusted(cipher: ChaCha20Poly1305, sealed: bytes) -> bytes:
    if len(sealed) < SALT_BYTES + MAC_BYTES:
        raise DecodeError("too short for anything sealed")
    try:
        return cipher.decrypt(sealed[:SALT_BYTES], sealed[SALT_BYTES:], None)
    except InvalidTag as error:
        raise DecodeError("a datagram of another swarm, or a damaged one") from error


OPEN_SWARM = SwarmKey(bytes(SECRET_BYTES))
"""That which everybody is in who names no other."""
