"""Messages between peers: msgpack with a schema, decoded strictly.

Datagrams have fixed layouts (`wire.py`); everything that travels on streams or inside signed
envelopes is a `Message`: an immutable Struct that carries its own name. Fields may be added at the
end with defaults; unknown fields are ignored, so versions can meet.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, TypeVar

import msgspec

from natswarm.errors import DecodeError

__all__ = [
    "Message",
    "Refusal",
    "decode_message_untrusted",
    "encode_message",
    "printable_untrusted",
]

# A sentence or two: what peers say goes to terminals and logs.
TEXT_CHARACTERS_MAX = 300


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every message."""


class Refusal(Message, frozen=True):
    """Any request may be answered with this: no, and why, in words for the user and a code."""

    reason: str
    code: str = ""


MessageT = TypeVar("MessageT", bound=Message)


def encode_message(message: Message) -> bytes:
    """Return the msgpack form."""
    return msgspec.msgpack.encode(message)


def decode_message_untrusted(data: bytes, *message_types: type[MessageT]) -> MessageT:
    """Read one message that must be one of `message_types`.

    Raises:
        DecodeError: It is damaged or another message.
    """
    expected: Any = reduce(or_, message_types)
    try:
        message: MessageT = msgspec.msgpack.decode(data, type=expected)
    # Text that is not UTF-8 and nesting that is too deep come as Python's own exceptions.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = printable_untrusted(str(error))  # it quotes what it did not expect
        raise DecodeError(f"a message is not what was expected: {reason}") from error
    return message


def printable_untrusted(text: str) -> str:
    """Return what a peer wrote as something to show: no control characters, no novels."""
    return "".join(c for c in text[:TEXT_CHARACTERS_MAX] if c.isprintable())
