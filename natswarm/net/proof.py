"""How a QUIC client proves, inside the encrypted connection, that it is the peer it claims to be.

A server shows a certificate. A client of qh3 can't: servers of qh3 do not ask for one. So its first
bytes on the QUIC stream are its key and a signature over a tag, the server's key and a secret that
both ends derive from the whole TLS transcript. Whoever sits in the middle has two transcripts.

    proof, client to server, 96 bytes:  key 32 | signature 64

Source: channel binding of RFC 9266 and RFC 8446 section 7.5 (exporter secret).
"""

from __future__ import annotations

from natswarm.errors import DecodeError
from natswarm.identity import SIGNATURE_BYTES, Identity, PeerId

__all__ = ["ACCEPTED", "PROOF_BYTES", "is_key_of", "make_proof", "proved_client_untrusted"]

PROOF_TAG = b"natswarm quic client\0"
PROOF_BYTES = 32 + SIGNATURE_BYTES
ACCEPTED = b"\x01"
"""What the server answers."""

# SubjectPublicKeyInfo of an Ed25519 key (RFC 8410): these 12 bytes, then the key.
ED25519_KEY_INFO = bytes.fromhex("302a300506032b6570032100")


def make_proof(client: Identity, server: PeerId, binding: bytes) -> bytes:
    """Return what proves to `server` that `client` is at the other end."""
    return client.peer_id.key + client.sign(PROOF_TAG + server.key + binding)


def proved_client_untrusted(proof: bytes, server: PeerId, binding: bytes) -> PeerId:
    """Return who proved to be at the other end.

    Raises:
        DecodeError: Nobody: it is not a proof, or one for another connection.
    """
    if len(proof) != PROOF_BYTES:
        raise DecodeError(f"a proof has {PROOF_BYTES} bytes, not {len(proof)}")
    client = PeerId.decode_untrusted(proof[:-SIGNATURE_BYTES])
    client.verify_untrusted(proof[-SIGNATURE_BYTES:], PROOF_TAG + server.key + binding)
    return client


def is_key_of(key_info: bytes | None, peer_id: PeerId) -> bool:
    """Return whether a certificate's SubjectPublicKeyInfo holds the key of `peer_id`."""
    return key_info == ED25519_KEY_INFO + peer_id.key
