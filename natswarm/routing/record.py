"""Records: what nodes publish under keys, signed, versioned and expiring.

    own record       key = hash of publisher and topic     one publisher: the latest version counts
    service record   key = hash of the service's name      everybody who serves it, one record each

A record is its own proof: whoever holds it can check publisher, key, version and date, so it does
not matter through whose hands it came. Dates are absolute, by the publisher's clock: a relative
lifetime would let whoever passes a record on start it anew for ever. A clock that is wrong by more
than `SKEW_S` keeps its node from publishing, and the refusal says so.

Source: BEP 44 for the shape and the bound (value of 1,000 bytes, a sequence number, a salt).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.routing.distance import key_of

__all__ = [
    "LIFETIME_MAX_S",
    "Record",
    "RecordKind",
    "decode_published_untrusted",
    "own_key",
    "service_key",
]

VALUE_BYTES_MAX = 1000
TOPIC_CHARACTERS_MAX = 128
SEALED_BYTES_MAX = 2048

# The longest a record may live without being published again, and how far clocks may differ.
LIFETIME_MAX_S = 2 * 3600.0
SKEW_S = 300.0

RECORD_CONTEXT = b"published record"


class RecordKind(IntEnum):
    """Whose key it is."""

    OWN = 0
    SERVICE = 1


def own_key(publisher: PeerId, topic: str) -> bytes:
    """Return the key of what a peer publishes under a topic."""
    return key_of(b"own", publisher.key, topic.encode())


def service_key(name: str) -> bytes:
    """Return the key under which everybody who serves something is found."""
    return key_of(b"service", name.encode())


@dataclass(frozen=True, slots=True)
class Record:
    """Something published.

    Attributes:
        publisher: Who; signed it.
        kind: Whether the key is the publisher's own or a service's.
        topic: What it is about, or the name of the service; at most 128 printable characters.
        version: Of two records of one publisher and key the higher one counts; 0..2^63.
        expires_at_s: Seconds since 1970.
        value: At most 1,000 bytes.
    """

    publisher: PeerId
    kind: RecordKind
    topic: str
    version: int
    expires_at_s: float
    value: bytes = b""

    @property
    def key(self) -> bytes:
        """Where it is stored."""
        if self.kind is RecordKind.SERVICE:
            return service_key(self.topic)
        return own_key(self.publisher, self.topic)

    def complaint(self) -> str | None:
        """Return why nobody would keep this record, or None."""
        if len(self.value) > VALUE_BYTES_MAX:
            return f"a record's value has at most {VALUE_BYTES_MAX} bytes, not {len(self.value)}"
        if len(self.topic) > TOPIC_CHARACTERS_MAX or not self.topic.isprintable():
            return f"a record's topic has at most {TOPIC_CHARACTERS_MAX} printable characters"
        if not 0 <= self.version < 1 << 63 or not 0 <= self.expires_at_s < 1 << 63:
            return "a record's version and date are between 0 and 2^63"
        return None

    def complaint_at(self, now: float) -> str | None:
        """Return why it must not be kept at a time, or None.

        Args:
            now: Seconds since 1970.
        """
        if self.expires_at_s <= now:
            age_s = now - self.expires_at_s
            return f"the record expired {age_s:.0f} s ago by my clock; is yours right?"
        if self.expires_at_s > now + LIFETIME_MAX_S + SKEW_S:
            return "the record lives too long by my clock; is yours right?"
        return None

    def seal(self, identity: Identity) -> bytes:
        """Return the signed form; `identity` is the publisher's."""
        body = _RecordBody(self.kind, self.topic, self.version, self.expires_at_s, self.value)
        return identity.seal(RECORD_CONTEXT, encode_message(body))


class _RecordBody(Message, frozen=True, tag="Record"):
    """What is inside the envelope."""

    kind: int
    topic: str
    version: int
    expires_at_s: float
    value: bytes


def decode_published_untrusted(sealed: bytes) -> Record:
    """Open and check a signed record; whether it has expired is the caller's question.

    Raises:
        DecodeError: Damaged, forged, or over the bounds.
    """
    if len(sealed) > SEALED_BYTES_MAX:
        raise DecodeError(f"a record has at most {SEALED_BYTES_MAX} bytes, not {len(sealed)}")
    publisher, payload = open_envelope_untrusted(RECORD_CONTEXT, sealed)
    body = decode_message_untrusted(payload, _RecordBody)
    if body.kind not in tuple(RecordKind):
        raise DecodeError(f"there is no kind {body.kind} of record")
    record = Record(
        publisher, RecordKind(body.kind), body.topic, body.version, body.expires_at_s, body.value
    )
    if (complaint := record.complaint()) is not None:
        raise DecodeError(complaint)
    return record
