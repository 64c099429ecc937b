"""The meeting record of a peer in the mainline DHT: where it is, and who introduces to it.

A mutable item with the peer's own signed record, and with some of its neighbours that take
strangers: whoever looks for a peer behind a closed NAT dials one of those, and is introduced.

    sealed   [record, [[PeerId 32, endpoint], ...]]

Sealed (`sealed_value.py`) under a key derived from the swarm's and the PeerId. In the open swarm
the item stands under the PeerId itself, so that the peer alone can write it; whoever knows the
PeerId can read it, and so can the nodes that keep it. In a private swarm it stands under a key
derived from the swarm's and the PeerId, without a salt: for others an item like any, which names
neither peer nor swarm. Every node of the swarm can derive that key, and so overwrite the item; what
the record inside says, only its peer can have signed.

Pure. Source: BEP 44; that one key hides another, from the blinded keys of onion services.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from natswarm.address import Endpoint
from natswarm.discovery.introduction import (
    NodeRecord,
    decode_endpoint_untrusted,
    decode_record_untrusted,
)
from natswarm.discovery.krpc_bencode import bencode
from natswarm.discovery.mainline_item import VALUE_BYTES_MAX, MutableItem
from natswarm.discovery.sealed_value import open_value_untrusted, seal_value
from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.swarm_key import SwarmKey

__all__ = ["INTRODUCERS_MAX", "Meeting", "meeting_place", "open_meeting_untrusted", "seal_meeting"]

OPEN_SALT = b"natswarm"

# One that is still there is enough; of a usual record some four have room beside it.
INTRODUCERS_MAX = 4


class _Body(Message, frozen=True, array_like=True, tag=False):
    """What is sealed."""

    record: bytes
    introducers: tuple[tuple[bytes, str], ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """What it takes to meet a peer.

    Attributes:
        record: What it says of itself.
        introducers: Neighbours of it that take strangers, each with where.
    """

    record: NodeRecord
    introducers: tuple[tuple[PeerId, Endpoint], ...] = ()


def meeting_place(swarm: SwarmKey, peer_id: PeerId) -> tuple[PeerId, bytes]:
    """Return the key and the salt under which a peer's meeting record is kept."""
    if swarm.is_open:
        return peer_id, OPEN_SALT
    return _hidden_identity(swarm, peer_id).peer_id, b""


def seal_meeting(
    identity: Identity,
    swarm: SwarmKey,
    sequence: int,
    sealed_record: bytes,
    introducers: Sequence[tuple[PeerId, Endpoint]],
    nonce: bytes,
) -> MutableItem:
    """Return the item of our own meeting record, with as many introducers as have room.

    Args:
        identity: Who we are.
        swarm: Who may find us.
        sequence: Higher than ever before, such as the seconds since 1970.
        sealed_record: Our signed `NodeRecord`.
        introducers: Neighbours of ours that take strangers, each with where, the best first.
        nonce: 12 random bytes.

    Raises:
        ConfigurationError: The record alone is too large.
    """
    _, salt = meeting_place(swarm, identity.peer_id)
    signer = identity if swarm.is_open else _hidden_identity(swarm, identity.peer_id)
    named = [(peer_id.key, str(endpoint)) for peer_id, endpoint in introducers[:INTRODUCERS_MAX]]
    value = _value(identity, swarm, sealed_record, named, nonce)
    while named and len(bencode(value)) > VALUE_BYTES_MAX:
        named.pop()
        value = _value(identity, swarm, sealed_record, named, nonce)
    return MutableItem.sign(signer, salt, sequence, value)


def open_meeting_untrusted(item: MutableItem, swarm: SwarmKey, peer_id: PeerId) -> Meeting:
    """Return what is in the item of a peer; the item's signature was checked.

    Raises:
        DecodeError: It is not a meeting record of this peer and swarm.
    """
    opened = open_value_untrusted(_value_key(swarm, peer_id), item)
    body = decode_message_untrusted(opened, _Body)
    record = decode_record_untrusted(body.record)
    if record.peer_id != peer_id:
        raise DecodeError(f"the record of {record.peer_id.short}")
    introducers = tuple(
        (PeerId.decode_untrusted(key), decode_endpoint_untrusted(endpoint))
        for key, endpoint in body.introducers[:INTRODUCERS_MAX]
    )
    return Meeting(record, introducers)


def _value(
    identity: Identity,
    swarm: SwarmKey,
    sealed_record: bytes,
    introducers: Sequence[tuple[bytes, str]],
    nonce: bytes,
) -> bytes:
    body = encode_message(_Body(sealed_record, tuple(introducers)))
    return seal_value(_value_key(swarm, identity.peer_id), body, nonce)


def _value_key(swarm: SwarmKey, peer_id: PeerId) -> bytes:
    return swarm.derive(b"dhtvalue", peer_id.key)


def _hidden_identity(swarm: SwarmKey, peer_id: PeerId) -> Identity:
    return Identity(swarm.derive(b"dhtkey", peer_id.key))
