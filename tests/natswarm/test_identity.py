from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.errors import DecodeError, IdentityError
from natswarm.identity import Identity, PeerId, open_envelope_untrusted

ALICE, BOB, EVE = (Identity(bytes([n]) * 32) for n in (1, 2, 3))


def test_stored_with_mode_0600_and_read_back(tmp_path: Path):
    path = tmp_path / "state" / "identity"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["identity"]


def test_a_file_others_can_read_is_refused_with_the_remedy(tmp_path: Path):
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load_or_create(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"natswarm-identity-1", b"natswarm-identity-1 zz", b"\xff\xfe", b"hello 00" * 9],
)
def test_a_damaged_file_is_never_overwritten(tmp_path: Path, content: bytes):
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match=r"cannot (store|read)"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_peer_id_text_comes_back():
    assert PeerId.parse(str(ALICE.peer_id)) == ALICE.peer_id
    assert len(str(ALICE.peer_id)) == 52
    assert str(ALICE.peer_id).startswith(ALICE.peer_id.short)


@given(st.text(max_size=60))
def test_other_text_is_no_peer_id(text: str):
    with pytest.raises(IdentityError):
        PeerId.parse(text)


def test_shared_keys_are_equal_secret_and_directional():
    ours, theirs = ALICE.probe_keys(BOB.peer_id), BOB.probe_keys(ALICE.peer_id)
    assert ours.send == theirs.receive
    assert ours.receive == theirs.send
    assert ours.send != ours.receive
    assert ALICE.probe_keys(EVE.peer_id) != ours
    assert EVE.probe_keys(BOB.peer_id) != ours
    assert ALICE.shared_secret(BOB.peer_id, purpose=b"a") != ALICE.shared_secret(
        BOB.peer_id, purpose=b"b"
    )


@pytest.mark.parametrize("y", [0, 1, 2**255 - 18])
def test_keys_of_small_order_are_refused(y: int):
    with pytest.raises(DecodeError, match="not a usable public key"):
        ALICE.probe_keys(PeerId(y.to_bytes(32, "little")))


def test_envelope():
    sealed = ALICE.seal(b"record", b"payload")
    assert open_envelope_untrusted(b"record", sealed) == (ALICE.peer_id, b"payload")
    with pytest.raises(DecodeError):
        open_envelope_untrusted(b"invite", sealed)
    with pytest.raises(DecodeError):
        open_envelope_untrusted(b"record", BOB.peer_id.key + sealed[32:])


@given(st.data())
def test_any_flipped_bit_breaks_an_envelope(data: st.DataObject):
    sealed = bytearray(ALICE.seal(b"record", b"payload"))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DecodeError):
        open_envelope_untrusted(b"record", bytes(sealed))


@given(st.binary(max_size=200))
def test_any_bytes_as_envelope(data: bytes):
    with pytest.raises(DecodeError):
        open_envelope_untrusted(b"record", data)


def test_probe_keys_of_many_strangers_stay_bounded():
    node = Identity(os.urandom(32))
    for n in range(1100):
        node.probe_keys(Identity(n.to_bytes(32, "big")).peer_id)
    assert len(node._probe_keys) <= 1024
