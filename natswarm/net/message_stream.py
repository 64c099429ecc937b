"""Messages on streams: a header with a schema, then raw bytes.

    header size 4 | payload size 4 | header (msgpack) | payload          sizes big-endian

The header is a `Message`; the payload is what should not be packed again (tensors, records). Both
are bounded before a byte of them is read, so a peer cannot make us reserve memory.
"""

from __future__ import annotations

import struct
from typing import TypeVar, cast

import trio

from natswarm.errors import DecodeError, RequestRefused
from natswarm.message import (
    Message,
    Refusal,
    decode_message_untrusted,
    encode_message,
    printable_untrusted,
)

__all__ = ["MessageStream"]

HEADER_BYTES_MAX = 64 * 1024
# The largest payload anything sends today is a shard of gradients or a prefill's activations.
PAYLOAD_BYTES_MAX = 16 * 1024 * 1024
# Copying a small payload costs less than a datagram of its own.
JOINED_BYTES_MAX = 16 * 1024

_SIZES = struct.Struct(">II")

MessageT = TypeVar("MessageT", bound=Message)


class MessageStream:
    """Messages over one stream of bytes; owns the stream.

    Args:
        stream: Any two-way Trio stream.
        payload_bytes_max: Larger payloads, in either direction, are an error.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        *,
        payload_bytes_max: int = PAYLOAD_BYTES_MAX,
    ) -> None:
        self._stream = stream
        self._payload_bytes_max = payload_bytes_max
        self._received = bytearray()
        self._is_send_cut = False

    async def send(
        self,
        header: Message,
        payload: bytes | memoryview = b"",
        *,
        preceded_by: Message | None = None,
    ) -> None:
        """Send one message, or two in one go, of which the first has no payload.

        After cancellation part of it may have left; the stream is then good for `aclose` alone.

        Raises:
            ValueError: The message is over the bounds; nothing was sent.
            trio.BrokenResourceError: The peer or the path is gone.
        """
        view = memoryview(payload).cast("B")
        framed = self._framed(header, len(view))
        if preceded_by is not None:
            framed = self._framed(preceded_by, 0) + framed
        if self._is_send_cut:
            raise trio.BrokenResourceError("an earlier message was not sent to its end")
        self._is_send_cut = True
        if len(view) <= JOINED_BYTES_MAX:
            await self._stream.send_all(framed + view)
        else:
            await self._stream.send_all(framed)
            await self._stream.send_all(view)
        self._is_send_cut = False

    def _framed(self, header: Message, payload_size: int) -> bytes:
        encoded = encode_message(header)
        if len(encoded) > HEADER_BYTES_MAX or payload_size > self._payload_bytes_max:
            raise ValueError(f"message of {len(encoded)} + {payload_size} bytes is over the bounds")
        return _SIZES.pack(len(encoded), payload_size) + encoded

    async def receive(self, *header_types: type[MessageT]) -> tuple[MessageT, bytes]:
        """Wait for one message whose header is one of `header_types`.

        Cancelled, nothing is lost: what came in of the message waits for the next call.

        Raises:
            RequestRefused: The peer answered with a `Refusal`.
            DecodeError: The message is over the bounds, damaged, of another type, or cut off.
            trio.EndOfChannel: The peer ended the stream between two messages.
            trio.BrokenResourceError: The peer or the path is gone.
        """
        await self._wait_received(_SIZES.size, may_end=True)
        header_size, payload_size = _SIZES.unpack_from(self._received)
        if header_size > HEADER_BYTES_MAX or payload_size > self._payload_bytes_max:
            raise DecodeError(
                f"a message of {header_size} + {payload_size} bytes is over the bounds"
            )
        header_end = _SIZES.size + header_size
        end = header_end + payload_size
        await self._wait_received(end)
        with memoryview(self._received) as view:
            encoded, payload = bytes(view[_SIZES.size : header_end]), bytes(view[header_end:end])
        del self._received[:end]
        header: Message = decode_message_untrusted(encoded, *header_types, Refusal)
        if isinstance(header, Refusal):
            raise RequestRefused(
                printable_untrusted(header.reason), printable_untrusted(header.code)
            )
        return cast("MessageT", header), payload

    async def call(self, request: Message, reply_type: type[MessageT]) -> MessageT:
        """Send a request without payload and return the header of its reply.

        Raises:
            RequestRefused: The peer said no.
            DecodeError: The reply is not a `reply_type`.
            trio.BrokenResourceError: The peer or the path is gone, or it answered nothing.
        """
        await self.send(request)
        try:
            reply, _ = await self.receive(reply_type)
        except trio.EndOfChannel as error:
            raise trio.BrokenResourceError("the peer closed the stream unanswered") from error
        return reply

    async def send_eof(self) -> None:
        """Say that no further message comes."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the stream; give it up where a message was not sent to its end."""
        if self._is_send_cut:
            await trio.aclose_forcefully(self._stream)
        else:
            await self._stream.aclose()

    async def __aenter__(self) -> MessageStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _wait_received(self, size: int, *, may_end: bool = False) -> None:
        """Wait until `size` bytes have come in that no message has used."""
        while len(self._received) < size:
            chunk = await self._stream.receive_some()
            if not chunk:
                if may_end and not self._received:
                    raise trio.EndOfChannel
                raise DecodeError(f"the stream ended after {len(self._received)} of {size} bytes")
            self._received += chunk
