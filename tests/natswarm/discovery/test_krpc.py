from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.discovery.krpc import (
    Contact,
    Error,
    Query,
    Response,
    decode_contacts_untrusted,
    decode_krpc_untrusted,
    encode_contacts,
)
from natswarm.discovery.krpc_bencode import bdecode_untrusted, bencode
from natswarm.errors import DecodeError

VALUES = st.recursive(
    st.integers(-(2**63), 2**63) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
).filter(lambda value: depth(value) <= 8)


def depth(value) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 1


@given(VALUES)
def test_bencoding_has_one_form(value):
    assert bdecode_untrusted(bencode(value)) == value
    assert bencode(bdecode_untrusted(bencode(value))) == bencode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"i", b"ie", b"i-e", b"i-0e", b"i01e", b"i 1e", b"i1", b"i" + b"9" * 30 + b"e",
        b"1", b"2:a", b"-1:a", b"01:a", b"1:ab", b"99999999999:a", b"l", b"li1e", b"d", b"d1:ae",
        b"d1:ai1e", b"di1ei1ee", b"d1:bi1e1:ai1ee", b"d1:ai1e1:ai2ee", b"l" * 9 + b"e" * 9,
        b"l" * 100_000, b"e", b"x", "i\u0661e".encode(),
    ],
)  # fmt: skip
def test_what_is_not_bencoded(data):
    with pytest.raises(DecodeError):
        bdecode_untrusted(data)


def test_real_nodes_send_keys_in_any_order():
    assert bdecode_untrusted(b"d1:bi1e1:ai2ee", is_order_free=True) == {b"b": 1, b"a": 2}
    with pytest.raises(DecodeError):
        bdecode_untrusted(b"d1:bi1e1:bi2ee", is_order_free=True)


def test_the_examples_of_bep_5():
    ping = b"d1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t2:aa1:y1:qe"
    query = Query(b"aa", b"ping", {b"id": b"abcdefghij0123456789"})
    assert decode_krpc_untrusted(ping) == query
    assert query.encode() == ping
    answer = b"d1:rd2:id20:mnopqrstuvwxyz123456e1:t2:aa1:y1:re"
    assert decode_krpc_untrusted(answer) == Response(b"aa", {b"id": b"mnopqrstuvwxyz123456"})
    error = b"d1:eli201e23:A Generic Error Ocurrede1:t2:aa1:y1:ee"
    assert decode_krpc_untrusted(error) == Error(b"aa", 201, b"A Generic Error Ocurred")


def test_what_else_a_message_says():
    query = Query(b"aa", b"ping", {b"id": b"i" * 20}, is_read_only=True)
    assert decode_krpc_untrusted(query.encode()) == query
    for observed in (Endpoint("203.0.113.7", 4000), Endpoint("2001:db8::7", 4000)):
        response = Response(b"aa", {b"id": b"i" * 20}, observed)
        assert decode_krpc_untrusted(response.encode()) == response


@pytest.mark.parametrize("is_ipv6", [False, True])
def test_contacts(is_ipv6):
    ip, key = ("2001:db8::7", b"nodes6") if is_ipv6 else ("203.0.113.7", b"nodes")
    contacts = [Contact(bytes([number]) * 20, Endpoint(ip, 4000 + number)) for number in range(9)]
    fields = {key: encode_contacts(contacts)}
    assert decode_contacts_untrusted(fields, is_ipv6=is_ipv6) == contacts
    assert decode_contacts_untrusted(fields, is_ipv6=not is_ipv6) == []
    with pytest.raises(DecodeError):
        decode_contacts_untrusted({key: encode_contacts(contacts)[:-1]}, is_ipv6=is_ipv6)
    many = {key: encode_contacts(contacts) * 100}
    assert len(decode_contacts_untrusted(many, is_ipv6=is_ipv6)) == 64


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"d1:ad2:id" + tail))
def test_strangers_bytes_are_messages_or_decode_errors(data):
    with contextlib.suppress(DecodeError):
        decode_krpc_untrusted(data)


@given(st.dictionaries(st.sampled_from([b"t", b"y", b"q", b"a", b"r", b"e", b"ip", b"ro"]), VALUES))
def test_strange_dictionaries_are_messages_or_decode_errors(value):
    with contextlib.suppress(DecodeError):
        decode_krpc_untrusted(bencode(value))


def test_a_message_fits_a_datagram():
    with pytest.raises(DecodeError, match="at most 1500"):
        decode_krpc_untrusted(Query(b"aa", b"ping", {b"x": b"x" * 1500}).encode())
