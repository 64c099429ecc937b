from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.wire import (
    EchoReply,
    EchoRequest,
    Hello,
    Probe,
    ProbeKind,
    decode_echo_reply_untrusted,
    decode_echo_request_untrusted,
    decode_hello_untrusted,
    decode_probe_untrusted,
    encode_probe,
    probe_attempt_untrusted,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "wire.json"
ALICE, BOB = Identity(bytes(range(32))), Identity(bytes(range(32, 64)))
KEY = ALICE.probe_keys(BOB.peer_id).send
SEEN_V4 = Endpoint("198.51.100.7", 40_000)
SEEN_V6 = Endpoint("2001:db8::7", 443)
TOKEN = bytes(range(100, 120))
NAME = b"\x01\x02\x03\x04\x05\x06\x07\x08"


def decode_probe(data: bytes) -> Probe:
    return decode_probe_untrusted(data, BOB.probe_keys(ALICE.peer_id).receive)


# name: (object, its bytes, the decoder)
CASES: dict[str, tuple[object, bytes, Callable[[bytes], object]]] = {
    "echo_request": (
        message := EchoRequest(NAME, ALICE.peer_id, from_alternate_port=True),
        message.encode(ALICE),
        decode_echo_request_untrusted,
    ),
    "echo_request_elsewhere": (
        message := EchoRequest(NAME, ALICE.peer_id, deliver_to=SEEN_V4, token=TOKEN),
        message.encode(ALICE),
        decode_echo_request_untrusted,
    ),
    "echo_reply_ipv4": (
        message := EchoReply(NAME, ALICE.peer_id, SEEN_V4, TOKEN),
        message.encode(ALICE),
        decode_echo_reply_untrusted,
    ),
    "echo_reply_ipv6": (
        message := EchoReply(NAME, ALICE.peer_id, SEEN_V6, is_unsolicited=True),
        message.encode(ALICE),
        decode_echo_reply_untrusted,
    ),
    "hello": (
        message := Hello(NAME, ALICE.peer_id, BOB.peer_id),
        message.encode(ALICE),
        decode_hello_untrusted,
    ),
    "probe": (probe := Probe(ProbeKind.PROBE, NAME, 7), encode_probe(probe, KEY), decode_probe),
    "ack": (
        probe := Probe(ProbeKind.ACK, NAME, 2**32 - 1, SEEN_V4),
        encode_probe(probe, KEY),
        decode_probe,
    ),
}
DECODERS = [
    decode_echo_request_untrusted,
    decode_echo_reply_untrusted,
    decode_hello_untrusted,
    decode_probe,
    probe_attempt_untrusted,
]


def test_every_format_has_a_vector():
    assert sorted(json.loads(VECTORS.read_text())) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(name: str):
    message, encoded, decode = CASES[name]
    golden = bytes.fromhex(json.loads(VECTORS.read_text())[name])
    assert encoded == golden
    assert decode(golden) == message
    assert decode(golden + b"trailing bytes of a later version") == message


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_every_flipped_bit_and_truncation_is_noticed(name: str, data: st.DataObject):
    _, encoded, decode = CASES[name]
    flipped = bytearray(encoded)
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DecodeError):
        decode(bytes(flipped))
    with pytest.raises(DecodeError):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(st.binary(max_size=300), st.sampled_from(DECODERS), st.sampled_from([b"", b"\4\1", b"\7\1"]))
def test_any_bytes_raise_only_decode_error(
    data: bytes, decode: Callable[[bytes], object], head: bytes
):
    with contextlib.suppress(DecodeError):
        assert decode is probe_attempt_untrusted, (decode(head + data), "was taken for authentic")
        decode(head + data)


def test_one_kind_is_not_taken_for_another():
    for _, encoded, right in CASES.values():
        for decode in DECODERS[:4]:
            if decode is not right:
                with pytest.raises(DecodeError):
                    decode(encoded)


def test_a_reflected_probe_is_not_ours():
    with pytest.raises(DecodeError, match="MAC"):
        decode_probe_untrusted(CASES["probe"][1], ALICE.probe_keys(BOB.peer_id).receive)


def test_no_answer_is_larger_than_its_question():
    sizes = {name: len(encoded) for name, (_, encoded, _) in CASES.items()}
    assert sizes["echo_reply_ipv6"] == sizes["echo_reply_ipv4"] <= sizes["echo_request"]
    assert sizes["ack"] == sizes["probe"] <= sizes["hello"]
