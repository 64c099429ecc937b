"""The key of a swarm: what it seals, and that nobody else opens it."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm import swarm_key as module
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.identity import Identity
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import Hello

OURS, THEIRS = SwarmKey(b"o" * 32), SwarmKey(b"t" * 32)
ME, KIM = Identity(b"m" * 32), Identity(b"k" * 32)
HELLO = Hello(b"attempt!", ME.peer_id, KIM.peer_id).encode(ME)
PROBE = b"\x07\x01" + bytes(47)
LONG, SHORT = b"\xc3" + bytes(1199), b"\x43" + bytes(50)


def test_the_format_is_pinned(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    assert OURS.seal(b"\x06\x01hello").hex() == (
        "0801000102030405060708090a0b22b2a677636dcd759363a9eda65280790a43566e0c3635"
    )  # fmt: skip
    assert OURS.seal_quic([b"\xc3long"])[0].hex() == (
        "ff000102030405060708090a0b2bb76432c693d013691426049e86e5d2d70d441e5d"
    )  # fmt: skip
    assert OURS.label == "6f3b0bb3"


def test_the_open_swarm_seals_nothing():
    assert OPEN_SWARM.seal(HELLO) == OPEN_SWARM.open_untrusted(HELLO) == HELLO
    assert OPEN_SWARM.seal_quic([LONG, SHORT]) == [LONG, SHORT]
    assert OPEN_SWARM.open_quic_untrusted([LONG, SHORT]) == [LONG, SHORT]
    assert str(OPEN_SWARM) == "the open swarm"


def test_what_is_sealed_shows_nothing_and_is_for_its_swarm():
    sealed = OURS.seal(HELLO)
    assert len(sealed) == len(HELLO) + 30
    assert OURS.open_untrusted(sealed) == HELLO
    assert sealed != OURS.seal(HELLO)
    for secret in (ME.peer_id.key, KIM.peer_id.key, b"attempt!", OURS.secret):
        assert secret not in sealed
    with pytest.raises(DecodeError):
        THEIRS.open_untrusted(sealed)
    with pytest.raises(DecodeError, match="another swarm"):
        OURS.open_untrusted(HELLO)  # of the open swarm
    assert OURS.open_untrusted(PROBE) == PROBE  # has a MAC of its own
    assert OURS.secret.hex() not in f"{OURS!r} {OURS}"


def test_of_quic_the_handshake_is_sealed():
    sealed = OURS.seal_quic([LONG, SHORT])
    assert sealed[1] == SHORT
    assert sealed[0][0] & 0x40, "or nobody would take it for QUIC"
    assert OURS.open_quic_untrusted(list(sealed)) == [LONG, SHORT]
    assert THEIRS.open_quic_untrusted(list(sealed)) == [SHORT]
    assert OURS.open_quic_untrusted([LONG, SHORT]) == [SHORT]
    assert OURS.open_quic_untrusted([b"\xff", SHORT]) == [SHORT]


@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    if data[:1] != b"\x07":
        with pytest.raises(DecodeError):
            OURS.open_untrusted(data)
    if data and data[0] & 0x80:
        assert OURS.open_quic_untrusted([data]) == []


@given(st.integers(min_value=1, max_value=len(HELLO) + 30), st.integers(0, 7))
def test_damage_is_noticed(position, bit):
    sealed = bytearray(OURS.seal(HELLO))
    with pytest.raises(DecodeError):
        OURS.open_untrusted(bytes(sealed[:-position]) or b"\x08")
    sealed[-position] ^= 1 << bit
    if sealed[0] != 7:
        with pytest.raises(DecodeError):
            OURS.open_untrusted(bytes(sealed))


def test_an_empty_datagram_inside_is_no_datagram():
    with pytest.raises(DecodeError, match="nothing"):
        OURS.open_untrusted(OURS.seal(b""))


def test_keys_of_purposes_and_swarms_differ():
    derived = [
        swarm.derive(purpose, context)
        for swarm in (OURS, THEIRS, OPEN_SWARM)
        for purpose in (b"a", b"b")
        for context in (b"", b"x")
    ]
    assert len(set(derived)) == len(derived)
    keys = {ME.probe_keys(KIM.peer_id, swarm.derive(b"probe")).send for swarm in (OURS, THEIRS)}
    assert len(keys | {ME.probe_keys(KIM.peer_id).send}) == 3
    assert (
        ME.probe_keys(KIM.peer_id, OURS.derive(b"probe")).send
        == KIM.probe_keys(ME.peer_id, OURS.derive(b"probe")).receive
    )


def test_a_key_is_kept_for_its_user_alone(tmp_path):
    path = tmp_path / "folder" / "swarm"
    assert SwarmKey.load(path) is None
    made = SwarmKey.generate()
    assert made.store_new(path) == SwarmKey.load(path) == made
    assert SwarmKey.generate().store_new(path) == made, "the first one stays"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        SwarmKey.load(path)
    path.chmod(0o600)
    path.write_text("natswarm-swarm-1 00")
    with pytest.raises(ConfigurationError, match="holds no swarm key"):
        SwarmKey.load(path)
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmKey(b"short")


def test_the_markers_are_those_of_the_wire():
    assert module.SEALED in range(4, 16)
    assert PROBE[0] == module.CLEAR
