"""What nodes say to each other to route: seven words between neighbours, five questions end to end.

Between neighbours, on one stream of messages (`natswarm/route/1`), in both directions:

    Forward     carry this request towards its target        label, how, what, how far, how long
    Accepted    I am at it                                   label
    Answered    here is the answer                           label, signed answer
    Declined    not by me: try somebody else                 label, why
    Neighbours  these are near you; you may want to know them
    Replicate   keep these records: you are near their keys
    Goodbye     I have no room for this link; try these

A label is the sender's own number for one request to one neighbour, so nothing about the way back
stands in a request, and who made it is known only to whom it reaches. Requests and answers are
envelopes signed by who made them; an answer names the request by its digest.

Pure: types, bounds and their checks. Knows neither tables nor time.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import cast

from natswarm.errors import DecodeError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted
from natswarm.message import Message, decode_message_untrusted, encode_message
from natswarm.routing.distance import ID_BYTES
from natswarm.routing.kbucket import K

__all__ = [
    "BODY_BYTES_MAX",
    "DETOURS_MAX",
    "HOPS_MAX",
    "PATIENCE_MAX_S",
    "STRAY_STEPS_MAX",
    "Accepted",
    "Answer",
    "Answered",
    "Ask",
    "Closest",
    "Declined",
    "Fetch",
    "Fetched",
    "FindClosest",
    "Forward",
    "Goodbye",
    "LinkMessage",
    "Mode",
    "Neighbours",
    "Reason",
    "Replicate",
    "Request",
    "Sample",
    "Sampled",
    "Store",
    "Stored",
    "Told",
    "check_forward_untrusted",
    "check_ids_untrusted",
    "digest_of",
    "open_answer_untrusted",
    "open_request_untrusted",
    "seal_answer",
    "seal_request",
]

LOOKUP_BYTES = 16
DIGEST_BYTES = 16

# A signed request or answer: an introduction carries a node record of up to 4,096 bytes and who
# vouches for it; everything else is smaller. Usual ones have 200 to 900.
BODY_BYTES_MAX = 6 * 1024

# A million nodes take 20 hops if each mends one bit, and 8 in practice; the rest is for detours.
HOPS_MAX = 32
# Steps away from the target where nobody nearer is left.
DETOURS_MAX = 2
# Steps at random before a path heads for its target. With some 20 links each, three lead to any of
# thousands of nodes.
STRAY_STEPS_MAX = 3
# The longest anybody works on a request; an introduction may wait for a look at a NAT, 5 s.
PATIENCE_MAX_S = 15.0

RECORDS_PER_REPLICATE = 4

REQUEST_CONTEXT = b"route request"
ANSWER_CONTEXT = b"route answer"


class Mode(IntEnum):
    """How a request finds its way."""

    CLOSEST = 0  # to the node nearest to the target, each node on at most one path of a lookup
    EXACT = 1  # to the node whose id is the target, or not at all
    WALK = 2  # at random, each node equally likely in the end


class Reason(IntEnum):
    """Why a node does not carry a request."""

    NO_ROUTE = 0  # nobody left to try
    TAKEN = 1  # on another path of this lookup already, or on this: a loop
    BUSY = 2  # too many requests from the asking neighbour, or from all
    BOUNCED = 3  # a walk's coin said: stay where you are
    ABSENT = 4  # nobody nearer to the target, and it is not there


class Forward(Message, frozen=True):
    """Carry a request.

    Attributes:
        label: The sender's number for it, 0..2^63.
        mode: A `Mode`.
        lookup: Names the lookup, 16 bytes, the same on all its paths.
        target: An id or key.
        request: Signed, end to end.
        hops_left: Of a walk: the steps it still has to take.
        detours_left: Steps that may lead away from the target.
        patience_ms: An answer that comes later is of no use.
        degree: Of a walk: how many links the sender has.
        stray_steps: Steps to take at random before it heads for the target.
    """

    label: int
    mode: int
    lookup: bytes
    target: bytes
    request: bytes
    hops_left: int
    detours_left: int
    patience_ms: int
    degree: int = 0
    stray_steps: int = 0


class Accepted(Message, frozen=True):
    """I carry it, or am asking myself."""

    label: int


class Answered(Message, frozen=True):
    """Here is the answer, signed by who gave it."""

    label: int
    answer: bytes


class Declined(Message, frozen=True):
    """I don't, for a `Reason`."""

    label: int
    reason: int


class Neighbours(Message, frozen=True):
    """Ids of my links that are nearest to you."""

    ids: tuple[bytes, ...]


class Replicate(Message, frozen=True):
    """Signed records whose keys you are near to."""

    records: tuple[bytes, ...]


class Goodbye(Message, frozen=True):
    """This link has to go: I have too many. These share as many bits with you as I do."""

    ids: tuple[bytes, ...]


LinkMessage = Forward | Accepted | Answered | Declined | Neighbours | Replicate | Goodbye


class FindClosest(Message, frozen=True):
    """Who is nearest to the target?"""

    lookup: bytes
    target: bytes


class Store(Message, frozen=True):
    """Keep a record, and see that its other replicas do."""

    lookup: bytes
    target: bytes
    record: bytes


class Fetch(Message, frozen=True):
    """Which records have this key?"""

    lookup: bytes
    target: bytes


class Ask(Message, frozen=True):
    """For the node `target` itself; what it is about is between the two ends."""

    lookup: bytes
    target: bytes
    body: bytes


class Sample(Message, frozen=True):
    """Whoever you are: say so."""

    lookup: bytes
    target: bytes


class Closest(Message, frozen=True):
    """To FindClosest: those of my links that are nearest to the target."""

    request: bytes
    ids: tuple[bytes, ...]


class Stored(Message, frozen=True):
    """To Store: kept by me, and handed to `replica_count` others; or why not."""

    request: bytes
    replica_count: int
    complaint: str = ""


class Fetched(Message, frozen=True):
    """To Fetch: signed records; and who else is near the key."""

    request: bytes
    records: tuple[bytes, ...]
    ids: tuple[bytes, ...] = ()


class Told(Message, frozen=True):
    """To Ask."""

    request: bytes
    body: bytes


class Sampled(Message, frozen=True):
    """To Sample: it was me."""

    request: bytes


Request = FindClosest | Store | Fetch | Ask | Sample
Answer = Closest | Stored | Fetched | Told | Sampled
_REQUESTS: tuple[type[Message], ...] = (FindClosest, Store, Fetch, Ask, Sample)
_ANSWERS: tuple[type[Message], ...] = (Closest, Stored, Fetched, Told, Sampled)


def seal_request(identity: Identity, request: Request) -> bytes:
    """Return the signed form of a request."""
    return identity.seal(REQUEST_CONTEXT, encode_message(request))


def seal_answer(identity: Identity, answer: Answer) -> bytes:
    """Return the signed form of an answer."""
    return identity.seal(ANSWER_CONTEXT, encode_message(answer))


def open_request_untrusted(forward: Forward) -> tuple[PeerId, Request]:
    """Return who asks and what.

    Raises:
        DecodeError: Damaged or forged, or what is inside is not what it is labelled as.
    """
    origin, payload = open_envelope_untrusted(REQUEST_CONTEXT, forward.request)
    request = cast("Request", decode_message_untrusted(payload, *_REQUESTS))
    is_elsewhere = request.target != forward.target and isinstance(request, (FindClosest, Ask))
    if request.lookup != forward.lookup or is_elsewhere:
        raise DecodeError("a request was put under another's name or target")
    return origin, request


def open_answer_untrusted(answer: bytes, request_digest: bytes) -> tuple[PeerId, Answer]:
    """Return who answers and what.

    Raises:
        DecodeError: Damaged, forged, over the bounds, or the answer to another request.
    """
    signer, payload = open_envelope_untrusted(ANSWER_CONTEXT, answer)
    opened = cast("Answer", decode_message_untrusted(payload, *_ANSWERS))
    if opened.request != request_digest:
        raise DecodeError("that answers another request")
    if isinstance(opened, (Closest, Fetched)):
        check_ids_untrusted(opened.ids)
    return signer, opened


def digest_of(request: bytes) -> bytes:
    """Return the name of a signed request in its answers."""
    return hashlib.blake2s(request, digest_size=DIGEST_BYTES).digest()


def check_forward_untrusted(forward: Forward) -> None:
    """Check what a neighbour wants carried.

    Raises:
        DecodeError: A field is over its bounds.
    """
    if (
        len(forward.lookup) != LOOKUP_BYTES
        or len(forward.target) != ID_BYTES
        or len(forward.request) > BODY_BYTES_MAX
        or forward.mode not in tuple(Mode)
        or not 0 <= forward.label < 1 << 63
        or not 0 <= forward.hops_left <= HOPS_MAX
        or not 0 <= forward.detours_left <= DETOURS_MAX
        or not 0 <= forward.patience_ms <= PATIENCE_MAX_S * 1000
        or not 0 <= forward.degree < 1 << 16
        or not 0 <= forward.stray_steps <= STRAY_STEPS_MAX
    ):
        raise DecodeError("a request to carry is over the bounds")


def check_ids_untrusted(ids: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Check a list of ids, which has at most K.

    Raises:
        DecodeError: Too many, or not ids.
    """
    if len(ids) > K or any(len(each) != ID_BYTES for each in ids):
        raise DecodeError(f"a list of neighbours has at most {K} ids of {ID_BYTES} bytes")
    return ids
