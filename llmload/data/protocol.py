"""How peers ask each other for records: one call.

    texts/1   Sketch and its bits   ->  Offers
              WantTexts             ->  GivenText and the record, for each that is given

This file does not know who asks, or what is given to whom.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from llmload.data.record import (
    RECORD_BYTES_MAX,
    RECORD_ID_BYTES,
    SignedRecord,
    TextRecord,
    open_record_untrusted,
)
from llmload.data.sketch import SKETCH_BYTES_MAX, Sketch
from natswarm import DecodeError, Message, Method

__all__ = [
    "OFFERS_MAX",
    "TEXTS",
    "GivenText",
    "Offer",
    "Offers",
    "WantTexts",
    "offer_of",
    "open_given_untrusted",
    "pack",
]

OFFERS_MAX = 32
# Some thirty tokens: enough to see whether a text is new to a model.
SAMPLE_CHARACTERS = 96
# As packed; what does not get smaller gets a little longer.
PACKED_BYTES_MAX = RECORD_BYTES_MAX + 64

RecordId: TypeAlias = Annotated[bytes, Meta(min_length=RECORD_ID_BYTES, max_length=RECORD_ID_BYTES)]


Kind: TypeAlias = Literal["text", "feedback"]


class Offer(msgspec.Struct, frozen=True):
    """A record that a peer would give.

    Attributes:
        record_id: Of the record.
        kind: What it is.
        byte_count: Of the record as it travels.
        sample: The beginning of its text, or of the answer that feedback is on.
    """

    record_id: RecordId
    kind: Kind
    byte_count: Annotated[int, Meta(ge=1, le=PACKED_BYTES_MAX)]
    sample: Annotated[str, Meta(max_length=SAMPLE_CHARACTERS)]


class Offers(Message, frozen=True):
    """What the asker may choose from.

    Attributes:
        offers: No record twice.
        allowance_bytes: How much of it all will be given.
    """

    offers: Annotated[tuple[Offer, ...], Meta(max_length=OFFERS_MAX)]
    allowance_bytes: Annotated[int, Meta(ge=0, lt=2**62)]


class WantTexts(Message, frozen=True):
    """What was chosen, the dearest wish first."""

    record_ids: Annotated[tuple[RecordId, ...], Meta(max_length=OFFERS_MAX)]


class GivenText(Message, frozen=True):
    """A record follows, packed."""

    record_id: RecordId


TEXTS: Method[Sketch | WantTexts, Offers | GivenText] = Method(
    "llmload/texts/1",
    (Sketch, WantTexts),
    (Offers, GivenText),
    payload_bytes_max=max(PACKED_BYTES_MAX, SKETCH_BYTES_MAX),
)


def pack(signed: SignedRecord) -> bytes:
    """Return a record as it travels: zlib makes half of most texts."""
    return zlib.compress(signed.sealed, 9)


def offer_of(signed: SignedRecord) -> Offer:
    """Return what is told of a record before it is given."""
    sample = _said(signed)[:SAMPLE_CHARACTERS]
    return Offer(signed.record_id, _kind(signed), len(pack(signed)), sample)


def open_given_untrusted(offer: Offer, packed: bytes) -> SignedRecord:
    """Check that what a peer sent is what it had offered.

    Raises:
        DecodeError: It is not, or no record at all.
    """
    unpacker = zlib.decompressobj()
    try:
        sealed = unpacker.decompress(packed, RECORD_BYTES_MAX + 1)
    except zlib.error as error:
        raise DecodeError(f"a record can't be unpacked: {error}") from error
    signed = open_record_untrusted(sealed)
    if not signed.record.licence:
        raise DecodeError("a record without a licence is not to be had")
    if signed.record_id != offer.record_id:
        raise DecodeError("the record is not the one that was offered")
    if (
        len(packed) > offer.byte_count
        or _kind(signed) != offer.kind
        or not _said(signed).startswith(offer.sample)
    ):
        raise DecodeError("the record is not as it was offered")
    return signed


def _kind(signed: SignedRecord) -> Kind:
    return "text" if isinstance(signed.record, TextRecord) else "feedback"


def _said(signed: SignedRecord) -> str:
    record = signed.record
    return record.text if isinstance(record, TextRecord) else record.answer
