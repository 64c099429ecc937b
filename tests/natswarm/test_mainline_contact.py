"""Finding peers by the mainline DHT, on the virtual internet: nobody near knows them.

The DHT's nodes are in a private swarm of their own, so to all others they speak KRPC alone, as
BitTorrent's do.
"""

from __future__ import annotations

import pytest
import trio

from natswarm import ConnectFailed, Invite, PeerNotFound, PunctureFailed
from natswarm.net.mainline import MainlineConfig
from natswarm.swarm_key import OPEN_SWARM, SwarmKey

DHT_ONLY = SwarmKey(b"d" * 32)
CLUB = SwarmKey(b"c" * 32)


async def add_dht(swarm, count=8):
    """Start mainline nodes; return how others take part."""
    first = await swarm.add("dht0", swarm=DHT_ONLY, mainline=MainlineConfig((), answers=True))
    # The name that a NAT would not change: the node is public.
    start = first.record().profile.local_endpoints[0]
    for index in range(1, count):
        config = MainlineConfig((start,), answers=True)
        await swarm.add(f"dht{index}", swarm=DHT_ONLY, mainline=config)
    await trio.sleep(5)
    return MainlineConfig((start,), publishes=True)


@pytest.mark.parametrize("key", [OPEN_SWARM, CLUB], ids=str)
async def test_a_peer_behind_a_closed_nat_is_found_and_introduced(open_swarm, autojump_clock, key):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        for name in ("hub", "obs"):
            await swarm.add(name, swarm=key)
        await swarm.nodes["obs"].connect(await swarm.nodes["hub"].invite())
        phone = await swarm.add("phone", "kpn-nl", swarm=key, mainline=dht)
        for name in ("hub", "obs"):
            await phone.connect(await swarm.nodes[name].invite())
        await phone.inspect()
        await trio.sleep(70)
        # From here on: all that the seeker has is a PeerId and the address of a mainline node.
        seeker = await swarm.add("seeker", "linux-home", swarm=key, mainline=dht)
        begun = trio.current_time()
        peer = await seeker.connect(phone.peer_id)
        assert peer.record.name == "phone"
        assert trio.current_time() - begun < 15
        await swarm.check_talk("seeker", "phone")


async def test_a_peer_that_takes_strangers_is_dialled(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        hub = await swarm.add("hub", mainline=dht)
        await hub.inspect()
        await trio.sleep(70)
        seeker = await swarm.add("seeker", "kpn-nl", mainline=dht)
        assert (await seeker.connect(hub.peer_id)).record.name == "hub"


async def test_who_is_in_another_swarm_is_not_found(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        hub = await swarm.add("hub", swarm=CLUB, mainline=dht)
        await hub.inspect()
        await trio.sleep(70)
        seeker = await swarm.add("seeker", mainline=dht)
        with pytest.raises(PeerNotFound, match="the mainline DHT knows nothing of"):
            await seeker.connect(hub.peer_id)


async def test_two_that_have_nothing_but_the_dht_meet_by_the_clock(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        nodes = [await swarm.add(name, "linux-home", mainline=dht) for name in ("a", "b")]
        for node in nodes:
            await node.mainline.wait_bootstrapped()
            await node.inspect()
        await trio.sleep(70)
        with pytest.raises(ConnectFailed, match="--by-clock"):
            await nodes[0].connect(nodes[1].peer_id)
        async with trio.open_nursery() as nursery:
            for ours, theirs in ((0, 1), (1, 0)):
                nursery.start_soon(nodes[ours].meet_again, nodes[theirs].peer_id)
        await swarm.check_talk("a", "b")


@pytest.mark.parametrize(
    "kinds", [("linux-home", "kpn-nl"), ("vodafone-nl", "linux-home")], ids=str
)
@pytest.mark.parametrize("seed", [1, 2])
async def test_one_invite_is_enough_for_two_behind_closed_nats(
    open_swarm, autojump_clock, kinds, seed
):
    """The guest's own invite comes back by the DHT. Which PeerId is lower differs by the seed."""
    async with open_swarm(seed=seed) as swarm:
        dht = await add_dht(swarm)
        host, guest = [
            await swarm.add(name, kind, mainline=dht)
            for name, kind in zip(("host", "guest"), kinds, strict=True)
        ]
        for node in (host, guest):
            await node.mainline.wait_bootstrapped()
            await node.inspect()
        invite = Invite.parse(str(await host.invite()))
        assert invite.dialled_endpoints == ()
        await trio.sleep(30)
        begun = trio.current_time()
        assert (await guest.connect(invite)).record.name == "host"
        assert trio.current_time() - begun < 10
        await swarm.check_talk("guest", "host")


async def test_a_host_that_has_gone_ends_in_words(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        dht = await add_dht(swarm)
        host = await swarm.add("host", "linux-home", mainline=dht)
        guest = await swarm.add("guest", "linux-home", mainline=dht)
        await host.mainline.wait_bootstrapped()
        invite = await host.invite()
        assert invite.record.profile.is_translated
        await swarm.stop("host")
        with pytest.raises(PunctureFailed, match="nothing from the peer"):
            await guest.connect(invite)
