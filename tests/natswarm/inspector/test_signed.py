"""A profile to hand over: back as it was, a few hundred characters, and nothing else gets in."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm import Identity, NatProfile, SignedProfile, open_signed_profile_untrusted
from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.inspector.signed import CONTEXT, SCHEME
from natswarm.message import encode_message
from natswarm.nat.allocation import PortAllocation
from natswarm.nat.behaviour import AllocationLaw, Filtering, Mapping

IDENTITY = Identity(b"s" * 32)
PROFILE = NatProfile(
    mapping=Mapping.APDM,
    filtering=Filtering.APDF,
    allocation=PortAllocation(AllocationLaw.BLOCK, block_size=256, blocks=(40_960,)),
    public_ips=("203.0.113.9",),
    local_endpoints=(Endpoint("192.168.1.7", 4000),),
    is_translated=True,
    nat_count=2,
    opener_ttl=5,
    inferred=("nat_count",),
)
SIGNED = SignedProfile(IDENTITY.peer_id, 1_700_000_000.0, PROFILE)


def test_comes_back():
    text = SIGNED.seal(IDENTITY)
    assert open_signed_profile_untrusted(text) == SIGNED
    assert len(text) < 800
    # As mails and terminals break it.
    lines = "\n".join(text[start : start + 60] for start in range(0, 800, 60))
    assert open_signed_profile_untrusted(lines) == SIGNED


def test_nobody_signs_for_another():
    forged = SignedProfile(Identity(b"x" * 32).peer_id, 0.0, PROFILE)
    with pytest.raises(ValueError, match="cannot sign"):
        forged.seal(IDENTITY)


@given(st.data())
def test_one_changed_character_is_noticed(data):
    text = SIGNED.seal(IDENTITY)
    index = data.draw(st.integers(0, len(text) - 2))  # the last one has unused bits
    other = data.draw(st.sampled_from("ABCxyz019-_=é \0").filter(lambda each: each != text[index]))
    changed = text[:index] + other + text[index + 1 :]
    with pytest.raises(DecodeError):
        open_signed_profile_untrusted(changed)


@given(st.text())
def test_anything_else_is_refused(text):
    for each in (text, SCHEME + text):
        with pytest.raises(DecodeError):
            open_signed_profile_untrusted(each)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not what was expected"),
        (encode_message(None), "not what was expected"),
    ],
)
def test_what_is_signed_must_be_a_profile(payload, reason):
    sealed = IDENTITY.seal(CONTEXT, payload)
    with pytest.raises(DecodeError, match=reason):
        open_signed_profile_untrusted(SCHEME + base64.urlsafe_b64encode(sealed).decode())


def test_a_signature_for_something_else_is_void():
    sealed = IDENTITY.seal(b"record", b"")
    with pytest.raises(DecodeError, match="signature"):
        open_signed_profile_untrusted(SCHEME + base64.urlsafe_b64encode(sealed).decode())


def test_length_is_bounded():
    with pytest.raises(DecodeError, match="at most 2048 characters"):
        open_signed_profile_untrusted(SCHEME + "A" * 1_000_000)
