"""Messages of the pipeline: pinned on the wire, strict about what comes in."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from llmload.config import GPT2Config
from llmload.swarm.protocol import (
    DescribeStage,
    Hop,
    Link,
    OpenSession,
    SessionFailed,
    SessionOpened,
    StageDescription,
    Step,
    Tokens,
    TokensOf,
    WireSampling,
    checksum,
    pack_token_ids,
    printable_reason,
    unpack_hidden_untrusted,
    unpack_token_ids_untrusted,
)
from natswarm import DecodeError, Message, MessageStream

CONFIG = GPT2Config(vocab_size=300, n_ctx=96, n_embd=8, n_layer=2, n_head=2)
MESSAGES = [
    OpenSession(
        session=b"s" * 16,
        model_hash="0" * 64,
        route=(Hop(b"p" * 32, 0, 1),),
        client=b"c" * 32,
        position_count=20,
        sampling=WireSampling(0.5, 40, 0.9, 2**64 - 1),
        budget_s=60.0,
    ),
    SessionOpened(),
    SessionFailed(Hop(b"p" * 32, 0, 1), "why"),
    Step(1, 5, 1, 1, "float32", 77, (0.25,), (b"r" * 32,)),
    TokensOf(b"s" * 16),
    Tokens(1, (42, 7), (0.25, 0.5), (b"r" * 32, b"s" * 32)),
    DescribeStage(),
    StageDescription(0, 5, 0.001, 0.0, 3, 1000, (Link(b"p" * 32, 0.05),)),
]


async def received(data: bytes, *types: type[Message]):
    """What a stream makes of bytes that a stranger has sent."""
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(data)
    await theirs.send_eof()
    return await MessageStream(ours).receive(*types)


async def sent(message: Message, payload: bytes = b"") -> bytes:
    ours, theirs = trio.testing.memory_stream_pair()
    await MessageStream(ours).send(message, payload)
    await ours.send_eof()
    return b"".join([chunk async for chunk in theirs])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
async def test_message_arrives_as_it_was_sent(message: Message):
    data = await sent(message, b"rows")
    assert await received(data, type(message)) == (message, b"rows")


async def test_step_and_token_are_pinned():
    step = await sent(Step(1, 5, 1, 1, "float32", 77, (0.25,)), b"\x01\x02")
    assert step.hex() == (
        "0000006600000002"
        "89a474797065a453746570a47374657001a8706f736974696f6e05a9726f775f636f756e7401"
        "aa647261775f636f756e7401a5636f646563a7666c6f61743332a8636865636b73756d4d"
        "a773746167655f7391cb3fd0000000000000a8726563656970747390"
        "0102"
    )
    token = await sent(Tokens(1, (42,), (), ()))
    assert token.hex() == (
        "0000003200000000"
        "85a474797065a6546f6b656e73a47374657001a9746f6b656e5f696473912a"
        "a773746167655f7390a8726563656970747390"
    )


@pytest.mark.parametrize(
    "message",
    [
        OpenSession(b"s" * 15, "0" * 64, (Hop(b"p" * 32, 0, 1),), b"c" * 32, 20, None, 60.0),
        Step(-1, 5, 1, 1, "float32", 0),
        Step(1, 2**40, 1, 1, "float32", 0),
        Step(1, 5, 0, 1, "float32", 0),
        Step(1, 5, 1, 1, "float64", 0),
        Step(1, 5, 1, 1, "float32", 0, (float("nan"),)),
        Step(1, 5, 1, 1, "float32", 0, (-1.0,)),
        Step(1, 5, 1, 1, "float32", 0, (0.0,) * 65),
        Tokens(1, (-1,), (), ()),
        Tokens(1, (2**31,), (), ()),
        Tokens(1, (1,) * 65, (), ()),
        Tokens(1, (1,), (), (b"short",)),
        Step(1, 5, 1, 65, "float32", 0),
        Step(1, 5, 1, 1, "float32", 2**32),
        SessionFailed(Hop(b"p" * 31, 0, 1), "why"),
        SessionFailed(Hop(b"p" * 32, 0, 1), "x" * 501),
        TokensOf(b""),
    ],
    ids=str,
)
async def test_message_out_of_bounds_is_a_decode_error(message: Message):
    data = await sent(message)
    with pytest.raises(DecodeError):
        await received(data, type(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
async def test_damaged_message_is_a_decode_error_or_another_message(message: Message):
    data = await sent(message, b"payload")
    for length in range(1, len(data)):
        with pytest.raises(DecodeError):
            await received(data[:length], type(message))
    for index in range(8, len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 0x55
        with contextlib.suppress(DecodeError):
            await received(bytes(damaged), type(message))


@given(st.lists(st.integers(0, 299), min_size=1, max_size=20))
def test_token_ids_arrive_as_they_were(ids: list[int]):
    payload = pack_token_ids(np.array(ids))
    step = Step(0, 0, len(ids), 1, "int32", checksum(payload))
    rows = unpack_token_ids_untrusted(step, payload, CONFIG)
    assert rows.dtype == np.int64
    assert rows.tolist() == [ids]


@given(
    st.binary(max_size=100),
    st.integers(1, 2**24),
    st.sampled_from(["int32", "float32", "float16", "int8"]),
)
def test_any_payload_is_rows_or_a_decode_error(payload: bytes, row_count: int, codec: str):
    step = Step(0, 0, row_count, 1, codec, checksum(payload))
    for unpack in (unpack_token_ids_untrusted, unpack_hidden_untrusted):
        try:
            rows = unpack(step, payload, CONFIG)
        except DecodeError:
            continue
        assert rows.shape[:2] == (1, row_count)


@given(st.binary(min_size=4, max_size=40), st.integers(0, 319))
def test_damage_is_found(payload: bytes, bit: int):
    payload = payload[: len(payload) // 4 * 4]
    step = Step(0, 0, len(payload) // 4, 1, "int32", checksum(payload))
    damaged = bytearray(payload)
    damaged[bit // 8 % len(payload)] ^= 1 << bit % 8
    with pytest.raises(DecodeError, match="checksum"):
        unpack_token_ids_untrusted(step, bytes(damaged), CONFIG)


def test_reason_of_a_stranger_can_not_paint_the_screen():
    assert printable_reason("a\x1b[31mb\nc\u202ed" + "x" * 600) == ("a [31mb c d" + "x" * 600)[:500]
