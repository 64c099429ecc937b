"""Meeting records: for whom they can be read, what fits in, and what is refused."""

from __future__ import annotations

import pytest

from natswarm.address import Endpoint
from natswarm.discovery.introduction import NodeRecord
from natswarm.discovery.krpc_bencode import bencode
from natswarm.discovery.mainline_item import VALUE_BYTES_MAX, MutableItem
from natswarm.discovery.mainline_meeting import (
    INTRODUCERS_MAX,
    Meeting,
    meeting_place,
    open_meeting_untrusted,
    seal_meeting,
)
from natswarm.errors import ConfigurationError, DecodeError
from natswarm.identity import Identity
from natswarm.nat.profile import NatProfile
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

ME, EVE = Identity(b"m" * 32), Identity(b"e" * 32)
CLUB, OTHERS = SwarmKey(b"c" * 32), SwarmKey(b"o" * 32)
NONCE = b"n" * 12
RECORD = NodeRecord(ME.peer_id, 5.0, "my name", NatProfile(main_endpoint=Endpoint("1.2.3.4", 5)))
FRIENDS = tuple(
    (Identity(bytes([index]) * 32).peer_id, Endpoint("203.0.113.7", 40_000 + index))
    for index in range(1, 7)
)


def sealed(swarm=CLUB, record=RECORD, introducers=FRIENDS[:2], identity=ME):
    return seal_meeting(identity, swarm, 5, record.seal(identity), introducers, NONCE)


@pytest.mark.parametrize("swarm", [OPEN_SWARM, CLUB], ids=str)
def test_a_meeting_record_is_for_its_swarm(swarm):
    item = sealed(swarm)
    item.verify_untrusted()
    assert (item.owner, item.salt) == meeting_place(swarm, ME.peer_id)
    assert open_meeting_untrusted(item, swarm, ME.peer_id) == Meeting(RECORD, FRIENDS[:2])
    for secret in (b"my name", ME.peer_id.key, FRIENDS[0][0].key):
        assert secret not in item.value
    for other in {OPEN_SWARM, CLUB, OTHERS} - {swarm}:
        with pytest.raises(DecodeError, match="another swarm"):
            open_meeting_untrusted(item, other, ME.peer_id)
    with pytest.raises(DecodeError):
        open_meeting_untrusted(item, swarm, EVE.peer_id)


def test_where_it_is_kept_tells_neither_peer_nor_swarm():
    assert meeting_place(OPEN_SWARM, ME.peer_id) == (ME.peer_id, b"natswarm")
    places = [meeting_place(key, each.peer_id) for key in (CLUB, OTHERS) for each in (ME, EVE)]
    assert len({owner for owner, _ in places} | {ME.peer_id, EVE.peer_id}) == 6
    assert {salt for _, salt in places} == {b""}


def test_a_node_of_the_swarm_may_overwrite_it_and_not_speak_for_its_peer():
    forged = NodeRecord(EVE.peer_id, 9.0, "me, too", NatProfile())
    hidden = Identity(CLUB.derive(b"dhtkey", ME.peer_id.key))
    assert hidden.peer_id == meeting_place(CLUB, ME.peer_id)[0]
    body = sealed(record=RECORD)
    MutableItem.sign(hidden, b"", 6, body.value).verify_untrusted()
    item = seal_meeting(ME, CLUB, 6, forged.seal(EVE), (), NONCE)
    with pytest.raises(DecodeError, match="the record of"):
        open_meeting_untrusted(item, CLUB, ME.peer_id)


def test_as_many_introducers_as_have_room():
    found = open_meeting_untrusted(sealed(introducers=FRIENDS), CLUB, ME.peer_id)
    assert found.introducers == FRIENDS[:INTRODUCERS_MAX]
    long = NodeRecord(ME.peer_id, 5.0, "x", NatProfile(), services=("s" * 128,) * 5)
    item = sealed(record=long, introducers=FRIENDS)
    assert len(item.value) <= VALUE_BYTES_MAX
    assert 0 < len(open_meeting_untrusted(item, CLUB, ME.peer_id).introducers) < INTRODUCERS_MAX
    with pytest.raises(ConfigurationError, match="1000 bytes"):
        sealed(record=NodeRecord(ME.peer_id, 5.0, "x", NatProfile(), services=("s" * 128,) * 8))


@pytest.mark.parametrize("value", [5, b"", b"\x01", b"\x02" + bytes(60), b"\x01" + bytes(60)])
def test_garbage_is_refused(value):
    item = MutableItem(ME.peer_id, b"", 1, bencode(value), bytes(64))
    with pytest.raises(DecodeError):
        open_meeting_untrusted(item, CLUB, ME.peer_id)
