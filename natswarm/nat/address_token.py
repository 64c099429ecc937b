"""Tokens that prove that an asker receives at an address, so that we may send there on its word.

Most measurements of a NAT need a datagram that comes in on a mapping which is not the one just used
to ask for it: does this mapping still live, does that port let strangers in? Whoever may name the
address to answer to could aim us at somebody else, so an echo reply carries a token, which the
asker shows with later requests: *this asker got a reply of mine at this address*. As in RFC 9000
section 8.1.4 we keep no state: a token is a time and a MAC over it.

It covers an address and not a port: a NAT's ports are what an inspection is about. One small answer
for each signed request is all it buys, at an address the asker shares.

Knows no clock and no datagram format.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from natswarm.identity import PeerId
from natswarm.wire import ECHO_TOKEN_BYTES

__all__ = ["AddressTokens"]

TIME_BYTES = 4
MAC_BYTES = ECHO_TOKEN_BYTES - TIME_BYTES

# Longer than the longest wait of a measurement: a lifetime of 300 s, asked for some time later.
LIFETIME_S = 600.0


class AddressTokens:
    """Makes and checks the tokens of one observer.

    Args:
        secret: 32 random bytes of this run; after a restart old tokens are void.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, asker: PeerId, ip: str, now: float) -> bytes:
        """Return the 20 bytes that let `asker` have answers sent to `ip` for ten minutes.

        Args:
            asker: Who signed the request.
            ip: Where the reply goes that carries the token.
            now: Seconds, 0..2^32; never goes back.
        """
        issued_at = int(now).to_bytes(TIME_BYTES, "big")
        return issued_at + self._mac(issued_at, asker, ip)

    def is_valid(self, token: bytes, asker: PeerId, ip: str, now: float) -> bool:
        """Return whether we issued `token` to `asker` for `ip`, at most ten minutes ago."""
        issued_at = token[:TIME_BYTES]
        age_s = now - int.from_bytes(issued_at, "big")
        return -1 <= age_s <= LIFETIME_S and hmac.compare_digest(
            token[TIME_BYTES:], self._mac(issued_at, asker, ip)
        )

    def _mac(self, issued_at: bytes, asker: PeerId, ip: str) -> bytes:
        body = issued_at + asker.key + ipaddress.ip_address(ip).packed
        return hashlib.blake2s(body, key=self._secret, digest_size=MAC_BYTES).digest()
