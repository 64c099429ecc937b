"""Messages on streams: bounds before memory, garbage and cuts are DecodeErrors."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError, RequestRefused
from natswarm.message import Message, Refusal, encode_message
from natswarm.net.message_stream import HEADER_BYTES_MAX, MessageStream


class Ping(Message, frozen=True):
    number: int
    text: str = ""


class Pong(Message, frozen=True):
    number: int


def framed(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(payload)) + header + payload


def memory_pair(**options: int) -> tuple[MessageStream, MessageStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return MessageStream(ours, **options), MessageStream(theirs, **options)


def receive_from(data: bytes, *, chunk_bytes: int = 10_000, **options: int) -> object:
    """Return what a MessageStream makes of a stream of these bytes and then the end."""

    async def main() -> object:
        ours, theirs = trio.testing.memory_stream_pair()
        for start in range(0, len(data), chunk_bytes):
            await ours.send_all(data[start : start + chunk_bytes])
        await ours.send_eof()
        return await MessageStream(theirs, **options).receive(Ping)

    return trio.run(main)


async def test_messages_come_as_they_were_sent():
    ours, theirs = memory_pair()
    payload = bytes(range(256)) * 100

    async def send() -> None:
        for number in range(3):
            await ours.send(Ping(number), memoryview(payload)[: number * 1000])
        await ours.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for number in range(3):
            assert await theirs.receive(Pong, Ping) == (Ping(number), payload[: number * 1000])
        with pytest.raises(trio.EndOfChannel):
            await theirs.receive(Ping)


async def test_call_answers_refusals_and_silence():
    ours, theirs = memory_pair()
    await theirs.send(Pong(1))
    await theirs.send(Refusal("no \x1b[31m" + "x" * 10_000, "busy"))
    await theirs.send(Ping(1))
    await theirs.send_eof()
    assert await ours.call(Ping(0), Pong) == Pong(1)
    with pytest.raises(RequestRefused, match=r"^no \[31mx+$") as caught:
        await ours.call(Ping(0), Pong)
    assert caught.value.code == "busy"
    assert len(str(caught.value)) <= 300
    with pytest.raises(DecodeError):
        await ours.call(Ping(0), Pong)
    with pytest.raises(trio.BrokenResourceError, match="unanswered"):
        await ours.call(Ping(0), Pong)


async def test_cancelling_receive_loses_nothing(autojump_clock):
    ours, theirs = trio.testing.memory_stream_pair()
    messages = MessageStream(theirs)
    data = framed(encode_message(Ping(7)), b"payload")
    for byte in data[:-1]:
        await ours.send_all(bytes([byte]))
        with trio.move_on_after(0.01):
            pytest.fail(f"got {await messages.receive(Ping)}")
    await ours.send_all(data[-1:])
    assert await messages.receive(Ping) == (Ping(7), b"payload")


async def test_too_large_to_send_sends_nothing():
    ours, theirs = memory_pair(payload_bytes_max=100)
    for header, payload in ((Ping(0), b"x" * 101), (Ping(0, "x" * HEADER_BYTES_MAX), b"")):
        with pytest.raises(ValueError, match="over the bounds"):
            await ours.send(header, payload)
    await ours.send(Ping(1), b"x" * 100)
    assert await theirs.receive(Ping) == (Ping(1), b"x" * 100)


@pytest.mark.parametrize(
    "sizes", [(HEADER_BYTES_MAX + 1, 0), (1, 101), (2**32 - 1, 2**32 - 1)], ids=str
)
def test_sizes_over_the_bounds_are_refused_before_a_byte_is_read(sizes):
    with pytest.raises(DecodeError, match="over the bounds"):
        receive_from(struct.pack(">II", *sizes), payload_bytes_max=100)


@given(cut=st.integers(1), chunk_bytes=st.integers(1, 50))
def test_a_cut_anywhere_is_a_decode_error(cut, chunk_bytes):
    data = framed(encode_message(Ping(5, "text")), b"payload" * 5)
    cut = cut % (len(data) - 1) + 1
    assert receive_from(data, chunk_bytes=chunk_bytes) == (Ping(5, "text"), b"payload" * 5)
    with pytest.raises(DecodeError, match="ended after"):
        receive_from(data[:cut], chunk_bytes=chunk_bytes)


@given(st.binary(max_size=60), st.booleans())
def test_garbage_is_a_decode_error(data, is_framed):
    try:
        header, _ = receive_from(framed(data) if is_framed else data)
    except (DecodeError, trio.EndOfChannel, RequestRefused):
        return
    assert isinstance(header, Ping)


def test_an_error_does_not_repeat_what_a_peer_wrote_at_length():
    header = encode_message(Pong(1)).replace(b"\xa4Pong", b"\xda\x40\x00" + b"\x1b" * 0x4000)
    with pytest.raises(DecodeError) as caught:
        receive_from(framed(header))
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
