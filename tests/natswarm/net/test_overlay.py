"""Real nodes route for each other: over QUIC, through emulated NATs, under virtual time."""

from __future__ import annotations

import pytest
import trio

from natswarm import (
    ConfigurationError,
    Identity,
    PeerNotFound,
    RequestRefused,
    own_key,
    service_key,
)
from natswarm.message import encode_message
from natswarm.net.overlay import ROUTE_PROTOCOL
from natswarm.routing.meeting import Meet, Sighted, Sighting
from natswarm.routing.protocol import Neighbours

# One for each kind of NAT that links can be made through; every sixth node takes strangers.
KINDS = ["public", "linux-home", "kpn-nl", "lyca-nl", "vodafone-nl", "sky-uk-dsl"]


async def join(swarm, count: int, *, settle_s: float = 30.0):
    """Start `count` nodes; each knows one living node that takes strangers, by its invite."""
    nodes = [await swarm.add("n0", "public", links_max=16)]
    for index in range(1, count):
        node = await swarm.add(f"n{index}", KINDS[index % len(KINDS)], links_max=16)
        contact = nodes[index // len(KINDS) * len(KINDS)] if index % len(KINDS) else nodes[0]
        await node.connect(await contact.invite())
        nodes.append(node)
        await trio.sleep(2)
    await trio.sleep(settle_s)
    return nodes


async def test_everybody_finds_everybody_after_the_first_contact_died(open_swarm, autojump_clock):
    async with open_swarm(seed=1) as swarm:
        nodes = await join(swarm, 20, settle_s=10)
        assert 10 < nodes[1].overlay.size_estimate() < 40
        await swarm.crash("n0")
        unknown = sum(
            not node.is_connected(other.peer_id) for node in nodes[1:] for other in nodes[1:]
        )
        assert unknown > 2 * 19, "those who are connected to all have nobody to find"
        for node in nodes[1:]:
            for other in nodes[1:]:
                if other is not node:
                    with trio.fail_after(60):
                        peer = await node.find(other.peer_id)
                    assert peer.peer_id == other.peer_id
        await swarm.check_talk("n1", "n5")


async def test_records_services_and_samples(open_swarm, autojump_clock):
    async with open_swarm(seed=2) as swarm:
        nodes = await join(swarm, 6)
        publisher, reader = nodes[2], nodes[5]
        key = own_key(publisher.peer_id, "profile")
        assert await reader.lookup(key) == []
        for value in (b"one", b"two"):
            assert await publisher.publish("profile", value) > 1
        (record,) = await reader.lookup(key)
        assert (record.publisher, record.value) == (publisher.peer_id, b"two")
        for server in nodes[:3]:
            await server.publish("llmload/stage/4-7", is_service=True)
        found = await reader.find_service("llmload/stage/4-7")
        assert set(found) == {server.peer_id for server in nodes[:3]}
        assert await reader.lookup(service_key("nobody serves this")) == []
        known = {node.peer_id for node in nodes}
        assert {await reader.sample_peer() for _ in range(10)} <= known
        with pytest.raises(ValueError, match="at most 1000 bytes"):
            await publisher.publish("profile", bytes(1001))
        publisher.withdraw("profile")


async def test_errors_say_what_to_do(open_swarm, autojump_clock):
    async with open_swarm(seed=3) as swarm:
        plain = await swarm.add("plain")
        for ask in (plain.find(plain.peer_id), plain.lookup(bytes(32)), plain.sample_peer()):
            with pytest.raises(ConfigurationError, match="open it with links_max"):
                await ask
        with pytest.raises(ConfigurationError, match="links_max is 0 or 16 to 128, not 3"):
            await swarm.add("few", links_max=3)
        first, second = await join(swarm, 2)
        with pytest.raises(PeerNotFound):
            await first.find(Identity(b"x" * 32).peer_id)
        alone = await swarm.add("alone", links_max=16)
        with pytest.raises(PeerNotFound, match="nobody is there to keep the record"):
            await alone.publish("profile")
        with pytest.raises(PeerNotFound, match="are there neighbours"):
            await alone.sample_peer()
        # Nodes without routing are peers like others, and no links.
        await second.connect(await plain.invite())
        await trio.sleep(30)
        assert len(second.peers()) == 2
        assert sum(map(len, second.overlay.neighbours_by_bucket().values())) == 1


async def test_a_link_that_ends_leaves_the_users_connection(open_swarm, autojump_clock):
    async with open_swarm(seed=4) as swarm:
        first, second = await join(swarm, 2)
        before = first.overlay._links[second.peer_id], swarm.peer("n0", "n1")
        before[0].queue.close()
        await trio.sleep(0.3)
        assert first.overlay.neighbours_by_bucket() == {}
        assert second.overlay.neighbours_by_bucket() == {}
        await swarm.check_talk("n0", "n1")
        await trio.sleep(60)  # and is used again, as there is nobody better
        assert first.overlay.neighbours_by_bucket() != {}
        after = first.overlay._links[second.peer_id], swarm.peer("n0", "n1")
        assert (after[0] is not before[0], after[1]) == (True, before[1])


@pytest.mark.parametrize("is_kept", [True, False])
async def test_a_connection_made_for_a_link_stays_if_the_user_of_either_side_wants_it(
    open_swarm, autojump_clock, is_kept
):
    async with open_swarm(seed=8) as swarm:
        _, *pair = await join(swarm, 3)
        (maker,) = (node for node in pair if node.overlay._made_for_link)
        other = pair[1 - pair.index(maker)]
        if is_kept:
            await other.connect(maker.peer_id)
        await trio.sleep(1)
        maker.overlay._links[other.peer_id].queue.close()
        await trio.sleep(0.3)
        assert other.peer_id not in maker.overlay._links
        assert other.is_connected(maker.peer_id) == maker.is_connected(other.peer_id) == is_kept


@pytest.mark.parametrize("lie", ["garbage", "somebody else's sighting", "an old word", "silence"])
async def test_a_neighbour_that_lies_ends_its_link_and_no_more(open_swarm, autojump_clock, lie):
    async with open_swarm(seed=5) as swarm:
        honest = (await join(swarm, 1))[0]
        liar = await swarm.add("liar", "lyca-nl")
        peer = await liar.connect(await honest.invite())
        messages = await peer.open_messages(ROUTE_PROTOCOL)
        if lie == "garbage":
            await messages._stream.send_all(b"\xff" * 100)
        elif lie == "somebody else's sighting":
            other = Identity(b"o" * 32)
            sighting = Sighting(other.peer_id, honest.peer_id, "203.0.113.99", 1e9)
            await messages.send(Sighted(sighting.seal(other)))
        elif lie == "an old word":
            await messages.send(Neighbours((bytes(31),)))
        await trio.sleep(30)
        assert len(honest.overlay._overlay.table) == (lie == "an old word")
        assert len(honest.peers()) == 1
        await swarm.check_talk("liar", "n0")


async def test_a_peer_that_takes_our_link_and_says_nothing_costs_the_link_alone(
    open_swarm, autojump_clock
):
    async with open_swarm(seed=7) as swarm:
        names = sorted(("n0", "mute"), key=lambda name: swarm.identity(name).peer_id)
        honest = await swarm.add(names[0], links_max=16)  # the lower PeerId opens the stream
        mute = await swarm.add(names[1])

        async def say_nothing(stream, peer):
            await trio.sleep_forever()

        mute.serve(ROUTE_PROTOCOL, say_nothing)
        routing = honest.overlay._overlay
        routing.table.add_candidate(mute.peer_id.key)
        await mute.connect(await honest.invite())
        await trio.sleep(30)
        assert not honest.overlay._links
        assert not routing.table.wanted(honest.overlay.now()), "it is not tried again at once"
        await swarm.check_talk(*names)


async def test_nobody_meets_at_an_address_without_a_witness(open_swarm, autojump_clock):
    async with open_swarm(seed=6) as swarm:
        nodes = await join(swarm, 4)
        a, b = nodes[1], nodes[3]
        own = Sighting(a.peer_id, a.peer_id, "203.0.113.99", 1e9).seal(swarm.identity("n1"))
        for sightings in ((), (own,)):
            a.overlay._own_sightings = lambda told=sightings: told
            with pytest.raises(RequestRefused, match="sighting"):
                await a.overlay.introduce(b.peer_id, b"attempt!")
        meet = encode_message(Meet(b"attempt!", a.sealed_record(), (own,), is_for_link=True))
        assert len(meet) < 1500
