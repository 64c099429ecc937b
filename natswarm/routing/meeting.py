"""Introductions over several hops: what two strangers tell each other before they puncture.

A common neighbour vouches for where it sees a peer, with its own connection to it
(`discovery/introduction.py`). Over several hops there is no common neighbour. But everybody has
neighbours of its own, and each of these gives it a *sighting*: "I see this peer at this address",
signed. A node that wants to meet, or agrees to, sends some along:

    A ── Meet(attempt, record, sightings) ── hop by hop ──▶ B       B starts its plan
    A ◀─ Met(record, sightings) ───────── the way back ──── B       A starts its plan

Nobody on the way can change any of it, since requests and answers are signed end to end. Probes go
only to an address that all sightings name, and which somebody other than its owner vouches for; as
with a common neighbour, aiming them at a third party takes two that conspire.

Pure: messages and checks. `now` is seconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass

from natswarm.address import AddressKind, address_kind
from natswarm.errors import AddressError, DecodeError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.message import Message, decode_message_untrusted, encode_message

__all__ = [
    "SIGHTINGS_MAX",
    "SIGHTING_LIFETIME_S",
    "Kept",
    "Meet",
    "Met",
    "NotMet",
    "Sighted",
    "Sighting",
    "decode_sighting_untrusted",
    "seen_ip_untrusted",
]

# Sent along with a meeting: each is 150 bytes and a signature to check.
SIGHTINGS_MAX = 3
# As long as an address may well be somebody's; clocks may be wrong by as much.
SIGHTING_LIFETIME_S = 2 * 3600.0

SIGHTING_CONTEXT = b"sighting"


class Sighted(Message, frozen=True):
    """Between neighbours: my signed sighting of you."""

    sighting: bytes


class Kept(Message, frozen=True):
    """Between neighbours: my user wants this connection, too; leave it when the link goes."""


class Meet(Message, frozen=True):
    """Let us puncture, in this attempt.

    Attributes:
        attempt: Its name, 8 bytes.
        record: Our signed node record.
        sightings: Where our neighbours see us.
        is_for_link: Only to route for each other; who has enough links may decline.
    """

    attempt: bytes
    record: bytes
    sightings: tuple[bytes, ...]
    is_for_link: bool


class Met(Message, frozen=True):
    """I have started my side."""

    record: bytes
    sightings: tuple[bytes, ...]


class NotMet(Message, frozen=True):
    """No; why, in words and a code, see `Refusal`."""

    reason: str
    code: str


class _SightingBody(Message, frozen=True, tag="Sighting"):
    subject: bytes
    ip: str
    seen_at_s: float


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody sees a peer at an address, on a living connection.

    Attributes:
        observer: Who says so.
        subject: Whom it sees.
        ip: Where.
        seen_at_s: When, seconds since 1970.
    """

    observer: PeerId
    subject: PeerId
    ip: str
    seen_at_s: float

    def seal(self, identity: Identity) -> bytes:
        """Return the signed form; `identity` is the observer's."""
        body = _SightingBody(self.subject.key, self.ip, self.seen_at_s)
        return identity.seal(SIGHTING_CONTEXT, encode_message(body))


def decode_sighting_untrusted(sealed: bytes) -> Sighting:
    """Open and check a signed sighting.

    Raises:
        DecodeError: Damaged, forged, or of an address that can be nobody's.
    """
    observer, payload = open_envelope_untrusted(SIGHTING_CONTEXT, sealed)
    body = decode_message_untrusted(payload, _SightingBody)
    try:
        kind = address_kind(body.ip)
    except AddressError as error:
        raise DecodeError(str(error)) from error
    if kind is AddressKind.UNUSABLE:
        raise DecodeError(f"{body.ip} can be nobody's address")
    return Sighting(observer, PeerId.decode_untrusted(body.subject), body.ip, body.seen_at_s)


def seen_ip_untrusted(sightings: tuple[bytes, ...], subject: PeerId, now: float) -> str:
    """Return the address at which others see a peer.

    Raises:
        DecodeError: No sighting, or one that is forged, old, of somebody else, by the peer
            itself, or that names another address than the rest.
    """
    if not 1 <= len(sightings) <= SIGHTINGS_MAX:
        raise DecodeError(f"1 to {SIGHTINGS_MAX} sightings are needed, not {len(sightings)}")
    ips = set()
    for sealed in sightings:
        sighting = decode_sighting_untrusted(sealed)
        if sighting.subject != subject or sighting.observer == subject:
            raise DecodeError(f"not a sighting of {subject.short} by somebody else")
        if not abs(now - sighting.seen_at_s) <= SIGHTING_LIFETIME_S:
            raise DecodeError(
                f"a sighting of {subject.short} is older than {SIGHTING_LIFETIME_S:.0f} s "
                "by my clock; is yours right?"
            )
        ips.add(sighting.ip)
    if len(ips) > 1:
        raise DecodeError(f"{subject.short} is seen at {len(ips)} addresses at once")
    return ips.pop()
