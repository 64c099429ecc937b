"""Private swarms on the virtual internet: nodes work as ever, nobody else learns who they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from natswarm import ConnectFailed, Identity, Invite, InviteError
from natswarm.address import Endpoint
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import EchoRequest, Hello

CLUB, OTHERS = SwarmKey(b"c" * 32), SwarmKey(b"o" * 32)
EVE = Identity(b"eve".ljust(32, b"."))


class Wire:
    """Every datagram that any host sends."""

    def __init__(self, swarm) -> None:
        self.packets = []
        swarm.internet.world.trace = self

    def __call__(self, _time, event, _where, about) -> None:
        if event == "sent":
            self.packets.append(about)

    def seen(self, *secrets: bytes) -> list[bytes]:
        return [secret for secret in secrets if any(secret in each.data for each in self.packets)]

    def sent_to(self, ip: str) -> int:
        return sum(each.destination.ip == ip for each in self.packets)


async def add_club(swarm, *, key=CLUB):
    """Two public nodes, and two behind NATs that know their NATs."""
    for name in ("obs0", "obs1"):
        await swarm.add(name, swarm=key)
    await swarm.nodes["obs1"].connect(await swarm.nodes["obs0"].invite())
    for name, kind in (("phone", "kpn-nl"), ("home", "linux-home")):
        node = await swarm.add(name, kind, swarm=key)
        for observer in ("obs0", "obs1"):
            await node.connect(await swarm.nodes[observer].invite())
        await node.inspect()


async def test_nodes_of_a_private_swarm_meet_and_nobody_on_the_way_sees_who_they_are(
    open_swarm, autojump_clock
):
    async with open_swarm() as swarm:
        wire = Wire(swarm)
        await add_club(swarm)
        home, phone = swarm.nodes["home"], swarm.nodes["phone"]
        assert home.profile.mapping is not None
        assert phone.profile.filtering is not None
        peer = await home.connect(phone.peer_id)  # introduced, and punctured
        assert peer.record.name == "phone"
        identities = [swarm.identity(name) for name in swarm.nodes]
        assert len(wire.packets) > 100
        names = [each.encode() for each in swarm.nodes]
        assert wire.seen(*(each.peer_id.key for each in identities), *names, CLUB.secret) == []


async def test_in_the_open_swarm_they_do_see(open_swarm, autojump_clock):
    """Or else the test above would see nothing, whatever happens."""
    async with open_swarm() as swarm:
        wire = Wire(swarm)
        await add_club(swarm, key=OPEN_SWARM)
        key = swarm.identity("phone").peer_id.key
        assert wire.seen(key) == [key]


@pytest.mark.parametrize("key", [OPEN_SWARM, OTHERS], ids=str)
async def test_a_stranger_gets_no_answer(open_swarm, autojump_clock, key):
    """Not even one who knows who is there, and where."""
    async with open_swarm() as swarm:
        hub = await swarm.add("hub", swarm=CLUB)
        eve = await swarm.add("eve", swarm=key)
        invite = replace(await hub.invite(), swarm_key=b"" if key.is_open else key.secret)
        wire = Wire(swarm)
        with pytest.raises(ConnectFailed):
            await eve.connect(invite)
        assert len(wire.packets) > 5
        assert wire.sent_to(eve.local_addresses()[0]) == 0
        assert hub.rejected_count > 0
        hello = Hello(b"attempt!", EVE.peer_id, hub.peer_id).encode(EVE)
        echo = EchoRequest(b"12345678", EVE.peer_id).encode(EVE)
        for datagram in (hello, echo, key.seal(hello), key.seal(echo)):
            before = hub.rejected_count
            hub._on_main_datagram(datagram, Endpoint("198.51.100.9", 9))
            hub._on_alternate_datagram(datagram, Endpoint("198.51.100.9", 9))
            assert hub.rejected_count == before + 2
        await trio.sleep(5)
        assert wire.sent_to("198.51.100.9") == 0


async def test_an_invite_of_another_swarm_is_said_to_be_one(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        hub = await swarm.add("hub", swarm=CLUB)
        alice = await swarm.add("alice")
        bob = await swarm.add("bob", swarm=OTHERS)
        private, opened = await hub.invite(), await alice.invite()
        assert Invite.parse(str(private)).swarm == CLUB
        assert Invite.parse(str(opened)).swarm == OPEN_SWARM
        for node, invite, words in (
            (alice, private, f"to the private swarm {CLUB.label}, and this node is in the open"),
            (bob, private, f"to the private swarm {CLUB.label}, .* swarm {OTHERS.label}"),
            (hub, opened, "to the open swarm, and this node is in the private"),
        ):
            with pytest.raises(InviteError, match=words):
                await node.connect(invite)
