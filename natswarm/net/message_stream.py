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

    async def send(self, header: Message, payload: bytes | memoryview = b"") -> None:
        """Send one message.

        After cancellation part of it may have left; the stream is then good for `aclose` alone.

        Raises:
            ValueError: The message is over the bounds; nothing was sent.
            trio.BrokenResourceError: The peer or the path is gone.
        """
        encoded = encode_message(header)
        payload_size = memoryview(payload).nbytes
        if len(encoded) > HEADER_BYTES_MAX or payload_size > self._payload_bytes_max:
            raise ValueError(f"message of {len(encoded)} + {payload_size} bytes is over the bounds")
        await self._stream.send_all(_SIZES.pack(len(encoded), payload_size) + encoded)
        if payload_size:
            await self._stream.send_all(payload)

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
        """Close the stream."""
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
