"""Tokens: good for one asker at one address for ten minutes, and for nothing else."""

from __future__ import annotations

import pytest

from natswarm.identity import Identity
from natswarm.nat.address_token import AddressTokens
from natswarm.wire import ECHO_TOKEN_BYTES, NO_TOKEN

ALICE, BOB = (Identity(bytes([n] * 32)).peer_id for n in (1, 2))
TOKENS = AddressTokens(b"s" * 32)
TOKEN = TOKENS.issue(ALICE, "198.51.100.7", 1000.5)


def test_a_token_is_good_for_ten_minutes():
    assert len(TOKEN) == ECHO_TOKEN_BYTES
    assert TOKENS.is_valid(TOKEN, ALICE, "198.51.100.7", 1000.5)
    assert TOKENS.is_valid(TOKEN, ALICE, "198.51.100.7", 1600.0)
    assert not TOKENS.is_valid(TOKEN, ALICE, "198.51.100.7", 1602.0)


@pytest.mark.parametrize(
    ("asker", "ip"), [(BOB, "198.51.100.7"), (ALICE, "198.51.100.8"), (ALICE, "2001:db8::7")]
)
def test_a_token_is_good_for_nobody_and_nowhere_else(asker, ip):
    assert not TOKENS.is_valid(TOKEN, asker, ip, 1001.0)


@pytest.mark.parametrize("token", [NO_TOKEN, TOKEN[:-1] + b"\0", b"\xff" * 20, b""])
def test_a_forged_token_is_void(token: bytes):
    assert not TOKENS.is_valid(token, ALICE, "198.51.100.7", 1001.0)


def test_another_observers_token_is_void():
    assert not AddressTokens(b"t" * 32).is_valid(TOKEN, ALICE, "198.51.100.7", 1001.0)


def test_both_families():
    token = TOKENS.issue(ALICE, "2001:db8::7", 0.0)
    assert TOKENS.is_valid(token, ALICE, "2001:db8:0::7", 1.0)
