"""The datagram with which a node says on its LAN: I am here, at the address this comes from.

    magic "nsw" 3 | version 1 | salt 12 | sealed 114 | MAC 16                       146 bytes
    sealed:  sender 32 | endpoint 18 | signature 64

Sealed with ChaCha20-Poly1305 under a key derived from the swarm's key. In the open swarm that key
is known to everybody; in a private one nobody else sees who is there, nor that two beacons are of
one node, only that some natswarm is. Beacons of another swarm fail the MAC: two swarms on one LAN
stay apart, at the price of one MAC a beacon.

The signature covers the endpoint, and whoever receives a beacon takes it only from that very
address: a beacon that somebody repeats from elsewhere, or with a stranger's address inside, aims
nobody at anything. It has no date, since phones have wrong clocks; an old beacon sent again from
its own address tells where the node once was, which costs a knock.

Source: BEP 14 for the manners (`beacon_schedule.py`); format and key are our own. Knows no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from natswarm.address import ENDPOINT_BYTES, Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

__all__ = ["BEACON_BYTES", "SALT_BYTES", "Beacon", "BeaconCipher"]

HEAD = b"nsw\x01"  # the last byte is the version
SALT_BYTES = 12
MAC_BYTES = 16
SEALED_BYTES = KEY_BYTES + ENDPOINT_BYTES + SIGNATURE_BYTES
BEACON_BYTES = len(HEAD) + SALT_BYTES + SEALED_BYTES + MAC_BYTES

SIGNED_CONTEXT = b"natswarm beacon\0"


@dataclass(frozen=True, slots=True)
class Beacon:
    """What a beacon says.

    Attributes:
        sender: Who says it.
        endpoint: Where it takes strangers, by its own word; without scope.
        salt: 12 bytes, new for every beacon.
        signature: Of the sender, over all of this; whether it is one `verify_untrusted` tells.
    """

    sender: PeerId
    endpoint: Endpoint
    salt: bytes
    signature: bytes

    def verify_untrusted(self) -> None:
        """Check the signature; costs 0.1 ms, so look first whether the beacon matters.

        Raises:
            DecodeError: It is not the sender's.
        """
        self.sender.verify_untrusted(self.signature, _signed(self.salt, self.endpoint))


class BeaconCipher:
    """Seals and opens the beacons of one swarm.

    Args:
        swarm: Which one.
    """

    def __init__(self, swarm: SwarmKey = OPEN_SWARM) -> None:
        self._cipher = ChaCha20Poly1305(swarm.derive(b"beacon"))

    def encode(self, identity: Identity, endpoint: Endpoint, salt: bytes) -> bytes:
        """Return the 146 bytes of a beacon.

        Args:
            identity: Who we are.
            endpoint: Where we take strangers: its address is the one the beacon is sent from.
            salt: 12 random bytes.
        """
        endpoint = Endpoint(endpoint.ip.partition("%")[0], endpoint.port)
        body = identity.peer_id.key + endpoint.to_bytes() + identity.sign(_signed(salt, endpoint))
        return HEAD + salt + self._cipher.encrypt(salt, body, HEAD)

    def decode_untrusted(self, data: bytes) -> Beacon:
        """Open a beacon of this swarm; its signature is not checked yet.

        Raises:
            DecodeError: Not a beacon, or not of this swarm.
        """
        if len(data) < BEACON_BYTES or not data.startswith(HEAD):
            raise DecodeError("not a beacon of a version that is known here")
        salt = data[len(HEAD) : len(HEAD) + SALT_BYTES]
        try:
            body = self._cipher.decrypt(salt, data[len(HEAD) + SALT_BYTES : BEACON_BYTES], HEAD)
        except InvalidTag as error:
            raise DecodeError("a beacon of another swarm, or a damaged one") from error
        return Beacon(
            sender=PeerId(body[:KEY_BYTES]),
            endpoint=Endpoint.decode_untrusted(body[KEY_BYTES : KEY_BYTES + ENDPOINT_BYTES]),
            salt=salt,
            signature=body[KEY_BYTES + ENDPOINT_BYTES :],
        )


def _signed(salt: bytes, endpoint: Endpoint) -> bytes:
    return SIGNED_CONTEXT + salt + endpoint.to_bytes()
