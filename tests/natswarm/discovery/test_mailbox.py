"""Mailboxes: who can read them, and what is refused."""

from __future__ import annotations

import pytest

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.invite import Invite
from natswarm.discovery.krpc_bencode import bencode
from natswarm.discovery.mailbox import Mailbox
from natswarm.discovery.mainline_item import VALUE_BYTES_MAX, MutableItem
from natswarm.discovery.sealed_value import seal_value
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.nat.profile import NatProfile
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

HOST, GUEST = Identity(b"h" * 32), Identity(b"g" * 32)
CLUB = SwarmKey(b"c" * 32)
MEETING = b"meeting!"
PROFILE = NatProfile(main_endpoint=Endpoint("1.2.3.4", 5))
ANSWER = Invite.of(NodeRecord(GUEST.peer_id, 5.0, "my name", PROFILE), GUEST)
NONCE = b"n" * 12


@pytest.mark.parametrize("swarm", [OPEN_SWARM, CLUB], ids=str)
def test_an_answer_is_for_whoever_has_the_invite(swarm):
    box = Mailbox(swarm, HOST.peer_id, MEETING)
    item = box.seal(ANSWER, 7, NONCE)
    item.verify_untrusted()
    assert (item.owner, item.sequence) == (box.owner, 7)
    assert len(item.value) <= VALUE_BYTES_MAX
    assert Mailbox(swarm, HOST.peer_id, MEETING).open_untrusted(item) == ANSWER
    for secret in (b"my name", b"natswarm:", GUEST.peer_id.key, MEETING):
        assert secret not in item.value
    for other in (
        Mailbox(swarm, HOST.peer_id, b"another!"),
        Mailbox(swarm, GUEST.peer_id, MEETING),
        Mailbox(SwarmKey(b"o" * 32), HOST.peer_id, MEETING),
    ):
        assert other.owner != box.owner
        with pytest.raises(DecodeError):
            other.open_untrusted(item)


@pytest.mark.parametrize("body", [b"", b"\xff", b"natswarm:abc", b"hello"])
def test_what_is_no_invite_is_refused(body):
    box = Mailbox(OPEN_SWARM, HOST.peer_id, MEETING)
    key = OPEN_SWARM.derive(b"boxvalue", HOST.peer_id.key + MEETING)
    item = MutableItem(box.owner, b"", 1, bencode(seal_value(key, body, NONCE)), bytes(64))
    with pytest.raises(DecodeError, match="no invite"):
        box.open_untrusted(item)
