"""Sightings: nobody is aimed at an address that only its owner, or a stranger to it, speaks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.routing.meeting import (
    SIGHTING_LIFETIME_S,
    SIGHTINGS_MAX,
    Sighting,
    decode_sighting_untrusted,
    seen_ip_untrusted,
)

ALICE, BOB, CAROL = (Identity(letter * 32) for letter in (b"a", b"b", b"c"))
NOW = 1_700_000_000.0
SIGHTING = Sighting(BOB.peer_id, ALICE.peer_id, "203.0.113.5", NOW)
GOOD = SIGHTING.seal(BOB)


def by(identity: Identity, **change) -> bytes:
    return replace(SIGHTING, observer=identity.peer_id, **change).seal(identity)


def test_those_that_agree_are_believed():
    assert decode_sighting_untrusted(GOOD) == SIGHTING
    assert seen_ip_untrusted((GOOD, by(CAROL)), ALICE.peer_id, NOW) == "203.0.113.5"


@pytest.mark.parametrize(
    ("sightings", "why"),
    [
        ((), "1 to 3 sightings are needed, not 0"),
        ((GOOD,) * (SIGHTINGS_MAX + 1), "not 4"),
        ((by(ALICE),), "by somebody else"),
        ((by(BOB, subject=CAROL.peer_id),), "not a sighting of"),
        ((GOOD, by(CAROL, ip="203.0.113.6")), "seen at 2 addresses at once"),
        ((by(BOB, seen_at_s=NOW - SIGHTING_LIFETIME_S - 1),), "older than"),
        ((by(BOB, seen_at_s=float("nan")),), "older than"),
        ((by(BOB, ip="0.0.0.0"),), "nobody's address"),
        ((by(BOB, ip="example.org"),), "example.org"),
        ((BOB.peer_id.key + GOOD[32:96] + by(CAROL)[96:][:-1] + b"\1",), "signature"),
    ],
)
def test_others_are_not(sightings, why):
    with pytest.raises(DecodeError, match=why):
        seen_ip_untrusted(sightings, ALICE.peer_id, NOW)


@given(st.binary(max_size=300))
def test_garbage_is_a_decode_error(data):
    with pytest.raises(DecodeError):
        decode_sighting_untrusted(data)
