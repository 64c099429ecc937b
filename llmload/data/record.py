"""Records: text, and marks on answers, that people give each other to learn from.

    sealed record   author's key 32 | Ed25519 signature 64 | msgpack of the record
    record id       SHA-256 of the key and the msgpack: the same for everybody who has the record

A record carries its licence, so whoever gets it knows what may be done with it; it says who signed
it, not who wrote it. What is longer than a record is cut into several at the ends of paragraphs.

This file does not know where records are kept, or who may have them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from natswarm import (
    DecodeError,
    Identity,
    Message,
    PeerId,
    decode_message_untrusted,
    encode_message,
    open_envelope_untrusted,
)

__all__ = [
    "RECORD_BYTES_MAX",
    "RECORD_ID_BYTES",
    "TEXT_BYTES_MAX",
    "FeedbackRecord",
    "Record",
    "SignedRecord",
    "TextRecord",
    "cut_text",
    "open_record_untrusted",
    "sign_record",
]

CONTEXT = b"llmload record/1"
RECORD_ID_BYTES = 32

# Some 3,000 tokens. The 150 bytes of key, signature and names are 2 % of it; and what is chosen,
# refused or lost is small.
TEXT_BYTES_MAX = 8 * 1024
# Text, and the other fields at their longest (300 characters of up to 4 bytes).
RECORD_BYTES_MAX = TEXT_BYTES_MAX + 2048

# An SPDX identifier such as CC-BY-4.0; a BCP 47 tag such as nl or pt-BR.
Licence: TypeAlias = Annotated[str, Meta(max_length=64)]
Language: TypeAlias = Annotated[str, Meta(max_length=36)]


class TextRecord(Message, frozen=True):
    """A piece of text.

    Attributes:
        text: At most `TEXT_BYTES_MAX` bytes as UTF-8.
        licence: What others may do with it; "" says nothing, and is never shared.
        language: Of the text, if known.
        title: Where it is from, for people.
    """

    text: Annotated[str, Meta(min_length=1)]
    licence: Licence = ""
    language: Language = ""
    title: Annotated[str, Meta(max_length=200)] = ""


class FeedbackRecord(Message, frozen=True):
    """What its author thinks of an answer of a model.

    Attributes:
        prompt: What the model was given; with the answer at most `TEXT_BYTES_MAX` bytes.
        answer: What it went on with.
        mark: 1 for a good one, -1 for a bad one.
        licence: As of a text.
    """

    prompt: str
    answer: Annotated[str, Meta(min_length=1)]
    mark: Literal[1, -1]
    licence: Licence = ""


Record: TypeAlias = TextRecord | FeedbackRecord


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """A record whose signature is right.

    Attributes:
        record_id: 32 bytes; see above.
        author: Who signed it.
        record: What it says.
        sealed: As it travels and is kept.
    """

    record_id: bytes
    author: PeerId
    record: Record
    sealed: bytes


def sign_record(identity: Identity, record: Record) -> SignedRecord:
    """Sign a record.

    Raises:
        ValueError: It is too long, or a field is.
    """
    sealed = identity.seal(CONTEXT, encode_message(record))
    try:
        return open_record_untrusted(sealed)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def open_record_untrusted(sealed: bytes) -> SignedRecord:
    """Check and read a record that somebody sent.

    Raises:
        DecodeError: It is too long, not signed by whom it names, or says something else.
    """
    if len(sealed) > RECORD_BYTES_MAX:
        raise DecodeError(f"a record has at most {RECORD_BYTES_MAX} bytes, not {len(sealed)}")
    author, payload = open_envelope_untrusted(CONTEXT, sealed)
    record = decode_message_untrusted(payload, TextRecord, FeedbackRecord)
    assert isinstance(record, TextRecord | FeedbackRecord), "nothing else is decoded"
    if isinstance(record, TextRecord):
        size = len(record.text.encode())
    else:
        size = len(record.prompt.encode()) + len(record.answer.encode())
    if size > TEXT_BYTES_MAX:
        raise DecodeError(f"the text of a record has at most {TEXT_BYTES_MAX} bytes, not {size}")
    record_id = hashlib.sha256(author.key + payload).digest()
    return SignedRecord(record_id, author, record, sealed)


def cut_text(text: str, bytes_max: int = TEXT_BYTES_MAX) -> Iterator[str]:
    """Yield pieces that are together the text, each as long as fits a record.

    A piece ends where a paragraph does if that makes it at least half as long as it may be; else at
    the end of a line, and else anywhere. Pieces of white space alone are left out.
    """
    data = text.encode()
    start = 0
    while start < len(data):
        piece = data[start : start + bytes_max]
        if start + bytes_max < len(data):
            for end in (b"\n\n", b"\n", b" "):
                if (found := piece.rfind(end)) >= bytes_max // 2:
                    piece = piece[: found + len(end)]
                    break
        # A character that the bound has cut in two goes with the next piece.
        whole = piece.decode(errors="ignore")
        start += len(whole.encode())
        if whole.strip():
            yield whole
