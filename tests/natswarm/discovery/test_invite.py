"""Invites survive copy and paste; whatever else is damaged or forged is an InviteError in words."""

from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.invite import Invite
from natswarm.errors import InviteError
from natswarm.identity import Identity
from natswarm.nat.profile import NatProfile

ALICE, MALLORY = Identity(b"a" * 32), Identity(b"m" * 32)
RECORD = NodeRecord(
    ALICE.peer_id,
    1000.0,
    "alice",
    NatProfile.unknown([Endpoint("192.168.1.2", 4000)]),
    services=("chat/1",),
)
TEXT = str(Invite.of(RECORD, ALICE))


def test_round_trip():
    invite = Invite.parse(TEXT)
    assert invite.record == RECORD
    assert str(invite) == TEXT
    assert len(TEXT) < 700  # it must fit into a QR code


@pytest.mark.parametrize(
    "spaced",
    [f"  {TEXT}\n", "\r\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)), f"{TEXT}\t"],
    ids=["around", "wrapped", "tab"],
)
def test_white_space_of_mails_and_terminals_is_ignored(spaced):
    assert Invite.parse(spaced).record == RECORD


@pytest.mark.parametrize("size", [*range(12), len(TEXT) // 2, len(TEXT) - 5, len(TEXT) - 1])
def test_cut_invites_are_refused(size):
    with pytest.raises(InviteError):
        Invite.parse(TEXT[:size])


@given(position=st.integers(0, len(TEXT) - 1), bit=st.integers(0, 6))
def test_any_damaged_character_is_noticed(position, bit):
    damaged = TEXT[:position] + chr(ord(TEXT[position]) ^ 1 << bit) + TEXT[position + 1 :]
    try:
        invite = Invite.parse(damaged)
    except InviteError:
        return
    # Bits of the last character that base64 does not use.
    assert invite.record == RECORD


@given(st.text())
@example("natswarm:")
@example("natswarm:é")
@example("natswarm:====")
@example("natswarm:" + "A" * 10_000)
def test_any_text_is_an_invite_error(text):
    for candidate in (text, "natswarm:" + text):
        with pytest.raises(InviteError) as caught:
            Invite.parse(candidate)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_forged_invite_is_refused():
    sealed = bytearray(RECORD.seal(MALLORY))
    sealed[:32] = ALICE.peer_id.key
    with pytest.raises(InviteError, match="signature"):
        Invite.parse("natswarm:" + base64.urlsafe_b64encode(sealed).decode())
