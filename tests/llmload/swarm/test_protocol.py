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
    Hop,
    OpenSession,
    SessionFailed,
    SessionOpened,
    Step,
    Token,
    TokensOf,
    WireSampling,
    pack_hidden,
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
    Step(1, 5, 1, "float32", (0.25,)),
    TokensOf(b"s" * 16),
    Token(1, 6, 42, (0.25, 0.5)),
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
    step = await sent(Step(1, 5, 1, "float32", (0.25,)), b"\x01\x02")
    assert step.hex() == (
        "0000004600000002"
        "86a474797065a453746570a47374657001a8706f736974696f6e05a9726f775f636f756e7401"
        "a5636f646563a7666c6f61743332a773746167655f7391cb3fd0000000000000"
        "0102"
    )
    token = await sent(Token(1, 6, 42, ()))
    assert token.hex() == (
        "0000002f00000000"
        "85a474797065a5546f6b656ea47374657001a8706f736974696f6e06a8746f6b656e5f69642a"
        "a773746167655f7390"
    )


@pytest.mark.parametrize(
    "message",
    [
        OpenSession(b"s" * 15, "0" * 64, (Hop(b"p" * 32, 0, 1),), b"c" * 32, 20, None, 60.0),
        Step(-1, 5, 1, "float32"),
        Step(1, 2**40, 1, "float32"),
        Step(1, 5, 0, "float32"),
        Step(1, 5, 1, "float64"),
        Step(1, 5, 1, "float32", (float("nan"),)),
        Step(1, 5, 1, "float32", (-1.0,)),
        Step(1, 5, 1, "float32", (0.0,) * 65),
        Token(1, 6, -1, ()),
        Token(1, 6, 2**31, ()),
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
    step = Step(0, 0, len(ids), "int32")
    rows = unpack_token_ids_untrusted(step, pack_token_ids(np.array(ids)), CONFIG)
    assert rows.dtype == np.int64
    assert rows.tolist() == [ids]


@given(st.binary(min_size=32, max_size=32 * 4))
def test_hidden_states_arrive_to_the_bit_or_are_refused(data: bytes):
    payload = data[: len(data) // 32 * 32]
    step = Step(0, 0, len(payload) // 32, "float32")
    sent_rows = np.frombuffer(payload, dtype="<f4").reshape(1, -1, 8)
    if np.isfinite(sent_rows).all():
        rows = unpack_hidden_untrusted(step, payload, CONFIG)
        assert rows.shape == (1, step.row_count, 8)
        assert rows.dtype == np.float32
        assert bytes(pack_hidden(rows)) == payload
    else:
        with pytest.raises(DecodeError, match="NaN"):
            unpack_hidden_untrusted(step, payload, CONFIG)


@given(st.binary(max_size=100), st.integers(1, 2**24), st.sampled_from(["int32", "float32"]))
def test_any_payload_is_rows_or_a_decode_error(payload: bytes, row_count: int, codec: str):
    step = Step(0, 0, row_count, codec)
    for unpack in (unpack_token_ids_untrusted, unpack_hidden_untrusted):
        try:
            rows = unpack(step, payload, CONFIG)
        except DecodeError:
            continue
        assert rows.shape[:2] == (1, row_count)


def test_reason_of_a_stranger_can_not_paint_the_screen():
    assert printable_reason("a\x1b[31mb\nc\u202ed" + "x" * 600) == ("a [31mb c d" + "x" * 600)[:500]
