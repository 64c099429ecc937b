"""Peers' peers: the words with which a common neighbour introduces two nodes.

    A                     N, connected to both                     B
    | -- Introduce(B) ----> |                                      |
    |                       | -- Rendezvous(attempt, A, seen A) -> |   B checks, starts its plan
    |                       | <------- RendezvousAccepted(B) ----- |
    | <- Introduced(B, ..) - |                                      |
    |  A starts its plan; both carry out complementary plans at once |

Records travel inside envelopes signed by the node they describe, so N can change nothing in them.
What N adds, and vouches for with its own connection to the peer, is the address it *sees* the peer
at: of all IPv4 addresses on the internet, probes go to that one alone. A peer that writes a
stranger's address into its record can therefore not aim us at the stranger. (Addresses of a home
reach nobody outside of ours; IPv6 candidates cost whoever owns them some 15 probes of 49 bytes.)
Starting skew is one way of N to A, well inside the window in which both sides probe.

Pure: message types, and the checks on them. Source: reference section 4.2; DCUtR for the shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from natswarm.address import AddressKind, Endpoint
from natswarm.errors import AddressError, DecodeError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.nat.profile import NatProfile, decode_profile_untrusted
from natswarm.wire import ATTEMPT_BYTES

__all__ = [
    "AskNeighbour",
    "Asked",
    "EchoTo",
    "FindPeers",
    "Introduce",
    "Introduced",
    "NodeRecord",
    "PeersFound",
    "Redeem",
    "Redeemed",
    "Rendezvous",
    "RendezvousAccepted",
    "ShareRecord",
    "complaint_about",
    "decode_attempt_untrusted",
    "decode_endpoint_untrusted",
    "decode_record_untrusted",
    "profile_as_seen",
    "record_as_seen",
]

RECORD_CONTEXT = b"record"
# A record is gossiped and kept; a profile is about 200 bytes, the rest is names of services.
RECORD_BYTES_MAX = 4096
NAME_CHARACTERS_MAX = 64
SERVICES_MAX = 16
SERVICE_CHARACTERS_MAX = 128
STRATEGIES_MAX = 16


class _RecordBody(Message, frozen=True, tag="NodeRecord", omit_defaults=True):
    """What is inside the envelope."""

    issued_at_s: float
    name: str
    profile: bytes
    alternate_endpoint: str | None
    services: tuple[str, ...]
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What a node says of itself.

    Attributes:
        peer_id: Who; signed it.
        issued_at_s: When, seconds since 1970 by its own clock; of two records the later one counts.
        name: What its user calls it, at most 64 characters; not unique, not to be trusted.
        profile: Its NAT, as it found out.
        alternate_endpoint: Where its second port is reachable, if it is: it can then help others
            to find out how their NATs filter.
        services: Names of what it serves, such as `llmload/stage/...`.
        order: In the answer to an introduction, of strategies with similar expected times those
            that it tries first, by what it has learned of the two networks; empty: the planner's.
    """

    peer_id: PeerId
    issued_at_s: float
    name: str
    profile: NatProfile
    alternate_endpoint: Endpoint | None = None
    services: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def seal(self, identity: Identity) -> bytes:
        """Return the signed form; `identity` is the one the record describes."""
        body = _RecordBody(
            issued_at_s=self.issued_at_s,
            name=self.name,
            profile=self.profile.encode(),
            alternate_endpoint=None
            if self.alternate_endpoint is None
            else str(self.alternate_endpoint),
            services=self.services,
            order=self.order,
        )
        return identity.seal(RECORD_CONTEXT, encode_message(body))


def decode_record_untrusted(data: bytes) -> NodeRecord:
    """Open and check a signed record.

    Raises:
        DecodeError: Damaged, forged, or over the bounds.
    """
    if len(data) > RECORD_BYTES_MAX:
        raise DecodeError(f"a record has at most {RECORD_BYTES_MAX} bytes, not {len(data)}")
    peer_id, payload = open_envelope_untrusted(RECORD_CONTEXT, data)
    body = decode_message_untrusted(payload, _RecordBody)
    if (complaint := complaint_about(body.name, body.services)) is not None:
        raise DecodeError(complaint)
    if not math.isfinite(body.issued_at_s):
        raise DecodeError("a record has a date")
    return NodeRecord(
        peer_id=peer_id,
        issued_at_s=body.issued_at_s,
        name=body.name,
        profile=decode_profile_untrusted(body.profile),
        alternate_endpoint=None
        if body.alternate_endpoint is None
        else decode_endpoint_untrusted(body.alternate_endpoint),
        services=body.services,
        order=body.order[:STRATEGIES_MAX],
    )


def complaint_about(name: str, services: Sequence[str]) -> str | None:
    """Return why these can't be in a record, or None: peers would refuse the whole record."""
    if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        return f"a node's name has at most {NAME_CHARACTERS_MAX} printable characters"
    if len(services) > SERVICES_MAX or any(
        len(service) > SERVICE_CHARACTERS_MAX or not service.isprintable() for service in services
    ):
        return (
            f"a node names at most {SERVICES_MAX} services of at most {SERVICE_CHARACTERS_MAX} "
            "printable characters"
        )
    return None


class ShareRecord(Message, frozen=True):
    """Here is my record; give me yours. The answer is a ShareRecord, too."""

    record: bytes


class FindPeers(Message, frozen=True):
    """Whom are you connected to?"""


class PeersFound(Message, frozen=True):
    """These: signed records, and for each where I see the peer, on a living connection."""

    records: tuple[bytes, ...]
    seen_at: tuple[str, ...] = ()


class Introduce(Message, frozen=True):
    """A to N: introduce me to `target`; of several addresses that you see me at, as `at`."""

    target: bytes
    attempt: bytes
    record: bytes
    at: str = ""


class Rendezvous(Message, frozen=True):
    """N to B: the peer of `record`, which I see at `seen_at`, wants to meet you now."""

    attempt: bytes
    record: bytes
    seen_at: str


class RendezvousAccepted(Message, frozen=True):
    """B to N: I have started my side."""

    record: bytes


class Introduced(Message, frozen=True):
    """N to A: the peer of `record`, which I see at `seen_at`, has started."""

    record: bytes
    seen_at: str


class AskNeighbour(Message, frozen=True):
    """A to N: let a neighbour of yours that I never met send an echo reply to `observed`."""

    transaction: bytes
    observed: str


class EchoTo(Message, frozen=True):
    """N to its neighbour: send one echo reply there; I see the asker at that very address."""

    transaction: bytes
    observed: str


class Asked(Message, frozen=True):
    """The answer to both: it was sent."""


class Redeem(Message, frozen=True):
    """Guest to host: I came by your one-time invite with this ticket."""

    ticket: bytes


class Redeemed(Message, frozen=True):
    """The answer: it is yours."""


def decode_endpoint_untrusted(text: str) -> Endpoint:
    """Read an endpoint that a peer wrote.

    Raises:
        DecodeError: Not one, or one that can be nobody's.
    """
    try:
        endpoint = Endpoint.parse(text)
    except AddressError as error:
        raise DecodeError(str(error)) from error
    if endpoint.kind is AddressKind.UNUSABLE:
        raise DecodeError(f"{endpoint} can be nobody's endpoint")
    return endpoint


def decode_attempt_untrusted(attempt: bytes) -> bytes:
    """Check the name of an attempt.

    Raises:
        DecodeError: Not 8 bytes.
    """
    if len(attempt) != ATTEMPT_BYTES:
        raise DecodeError(f"an attempt is named by {ATTEMPT_BYTES} bytes, not {len(attempt)}")
    return attempt


def profile_as_seen(profile: NatProfile, seen_at: Endpoint) -> NatProfile:
    """Return a peer's profile with every global address replaced by the one the introducer sees.

    Ports stay as the peer says: they are within its own address, so they harm nobody else. Host
    candidates stay where they can't be a third party's IPv4 address on the internet.
    """
    main = profile.main_endpoint
    return replace(
        profile,
        public_ips=(seen_at.ip,),
        main_endpoint=None if main is None else Endpoint(seen_at.ip, main.port),
        local_endpoints=tuple(
            each
            for each in profile.local_endpoints
            if ":" in each.ip or each.kind is not AddressKind.GLOBAL or each.ip == seen_at.ip
        ),
    )


def record_as_seen(record: NodeRecord, seen_at: Endpoint) -> NodeRecord:
    """Return a record with every global address replaced by the one the introducer sees."""
    alternate = record.alternate_endpoint
    return replace(
        record,
        profile=profile_as_seen(record.profile, seen_at),
        alternate_endpoint=None if alternate is None else Endpoint(seen_at.ip, alternate.port),
    )
