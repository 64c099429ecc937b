"""Records and what introducers add to them: every bound is checked, nothing else gets in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.discovery.introduction import (
    NodeRecord,
    decode_attempt_untrusted,
    decode_endpoint_untrusted,
    decode_record_untrusted,
    profile_as_seen,
    record_as_seen,
)
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.profile import NatProfile

ALICE = Identity(b"a" * 32)
PROFILE = NatProfile(
    mapping=Mapping.EIM,
    filtering=Filtering.ADF,
    public_ips=("203.0.113.5",),
    main_endpoint=Endpoint("203.0.113.5", 5000),
    local_endpoints=(Endpoint("192.168.1.2", 4000), Endpoint("203.0.113.5", 4000)),
    is_translated=True,
)
RECORD = NodeRecord(
    ALICE.peer_id, 1000.0, "Alice's phone", PROFILE, Endpoint("203.0.113.5", 5001), ("a/1", "b/2")
)
SEEN_AT = Endpoint("198.51.100.7", 6000)


def test_round_trip():
    assert decode_record_untrusted(RECORD.seal(ALICE)) == RECORD
    bare = replace(RECORD, alternate_endpoint=None, services=())
    assert decode_record_untrusted(bare.seal(ALICE)) == bare


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x" * 65},
        {"name": "escape \x1b[31m"},
        {"services": ("x",) * 17},
        {"services": ("x" * 129,)},
        {"services": ("line\nbreak",)},
        {"issued_at_s": math.nan},
        {"issued_at_s": math.inf},
        {"alternate_endpoint": Endpoint("0.0.0.0", 5001)},
        {"alternate_endpoint": Endpoint("224.0.0.1", 5001)},
        {"alternate_endpoint": Endpoint("203.0.113.5", 0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_over_the_bounds_is_refused(change):
    with pytest.raises(DecodeError):
        decode_record_untrusted(replace(RECORD, **change).seal(ALICE))


def test_a_record_that_is_too_large_is_refused_unread():
    with pytest.raises(DecodeError, match="at most 4096"):
        decode_record_untrusted(ALICE.seal(b"record", b"x" * 4096))


@given(st.data())
def test_damaged_records_are_decode_errors(data):
    sealed = bytearray(RECORD.seal(ALICE))
    match data.draw(st.sampled_from(["flip", "cut", "inside", "random"])):
        case "flip":
            sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del sealed[data.draw(st.integers(0, len(sealed) - 1)) :]
        case "inside":  # signed rightly, by a peer that writes nonsense
            payload = sealed[96:]
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
            sealed = bytearray(ALICE.seal(b"record", bytes(payload)))
        case "random":
            sealed = bytearray(data.draw(st.binary(max_size=300)))
    try:
        record = decode_record_untrusted(bytes(sealed))
    except DecodeError:
        return
    assert record.peer_id == ALICE.peer_id
    assert record.seal(ALICE)


@given(st.text())
def test_endpoints_are_literal_and_somebodys(text):
    with pytest.raises(DecodeError):
        decode_endpoint_untrusted(text + ":")
    for usable in ("192.0.2.1:4000", "[2001:db8::1]:4000"):
        assert str(decode_endpoint_untrusted(usable)) == usable


@pytest.mark.parametrize("size", [0, 7, 9])
def test_an_attempt_has_a_name_of_8_bytes(size):
    with pytest.raises(DecodeError):
        decode_attempt_untrusted(bytes(size))
    assert decode_attempt_untrusted(b"8 bytes.") == b"8 bytes."


def test_only_the_address_that_the_introducer_sees_is_believed():
    lie = replace(
        PROFILE,
        local_endpoints=(
            Endpoint("192.168.1.2", 4000),
            Endpoint("203.0.113.99", 53),  # a third party
            Endpoint("198.51.100.7", 4000),  # its own address
            Endpoint("2001:db8::5", 4000),
        ),
    )
    seen = profile_as_seen(lie, SEEN_AT)
    assert seen.public_ips == ("198.51.100.7",)
    assert seen.main_endpoint == Endpoint("198.51.100.7", 5000)
    assert [each.ip for each in seen.local_endpoints] == [
        "192.168.1.2",
        "198.51.100.7",
        "2001:db8::5",
    ]
    assert (seen.mapping, seen.filtering) == (lie.mapping, lie.filtering)
    record = record_as_seen(replace(RECORD, profile=lie), SEEN_AT)
    assert record.profile == seen
    assert record.alternate_endpoint == Endpoint("198.51.100.7", 5001)


def test_an_unknown_endpoint_stays_unknown():
    seen = profile_as_seen(replace(PROFILE, main_endpoint=None), SEEN_AT)
    assert seen.main_endpoint is None
