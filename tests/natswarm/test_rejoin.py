"""Coming back by the cache alone, on the virtual internet: nobody is named, nobody invites."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from natswarm.discovery.cache import CachedPeer
from natswarm.errors import ConfigurationError
from natswarm.identity import PeerId
from natswarm.net.rejoin import DIAL_TIMEOUT_S, WANTED_PEERS


class Memory:
    """A store without a disk; threads and a clock that jumps do not go together."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, CachedPeer] = {}
        self.is_broken = False

    async def load(self) -> list[CachedPeer]:
        await trio.lowlevel.checkpoint()
        if self.is_broken:
            raise ConfigurationError("the disk is gone")
        return list(self.peers.values())

    async def save(self, changed: Sequence[CachedPeer], forgotten: Sequence[PeerId]) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_broken:
            raise ConfigurationError("the disk is gone")
        for peer_id in forgotten:
            self.peers.pop(peer_id, None)
        self.peers |= {peer.peer_id: peer for peer in changed}


def silences(memory: Memory, swarm, names: Sequence[str]) -> float:
    found = [memory.peers[swarm.identity(name).peer_id] for name in names]
    return sum(each.silent_count for peer in found for each in peer.sightings)


@pytest.mark.parametrize("gone", [0.1, 0.5, 0.9])
async def test_rejoin_with_many_of_the_cached_peers_gone(open_swarm, autojump_clock, gone):
    memory = Memory()
    names = [f"obs{index}" for index in range(20)]
    async with open_swarm(seed=3) as swarm:
        for name in names:
            await swarm.add(name)
            await swarm.nodes[name].inspect()
        phone = await swarm.add("phone", "linux-home", cache=memory)
        for name in names:
            await phone.connect(await swarm.nodes[name].invite())
        await trio.sleep(6)
        await swarm.stop("phone")
        assert len(memory.peers) == 20
        assert all(peer.is_open for peer in memory.peers.values())
        lost = names[: int(gone * len(names))]
        for name in lost:
            await swarm.stop(name)
        await trio.sleep(300)

        phone = await swarm.add("phone", "linux-home", cache=memory)
        begun = trio.current_time()
        await phone.rejoin()
        assert phone.peers()
        # At worst all that are gone come first, four a second.
        assert trio.current_time() - begun < len(lost) / 4 + DIAL_TIMEOUT_S
        await trio.sleep(20)
        assert len(phone.peers()) >= min(len(names) - len(lost), WANTED_PEERS)
        # Somebody who is there introduces whom the cache did not reach.
        await swarm.stop("phone")
        if len(names) - len(lost) < WANTED_PEERS:
            assert silences(memory, swarm, lost) == pytest.approx(len(lost), abs=0.1)


async def test_a_crash_loses_at_most_a_few_seconds(open_swarm, autojump_clock):
    memory = Memory()
    async with open_swarm() as swarm:
        await swarm.add_observers(2)
        phone = await swarm.add("phone", cache=memory)
        await phone.connect(await swarm.nodes["obs0"].invite())
        await trio.sleep(6)
        assert set(memory.peers) == {swarm.identity("obs0").peer_id}
        await phone.connect(await swarm.nodes["obs1"].invite())
        await swarm.stop("phone")  # at once: a clean stop writes what the clock did not
        assert len(memory.peers) == 2


async def test_a_node_that_lost_everybody_comes_back_by_itself(open_swarm, autojump_clock):
    memory = Memory()
    async with open_swarm() as swarm:
        await swarm.add("obs0", port=4000)
        await swarm.nodes["obs0"].inspect()
        phone = await swarm.add("phone", "linux-home", cache=memory)
        await phone.connect(await swarm.nodes["obs0"].invite())
        await trio.sleep(10)
        await swarm.stop("obs0")
        await trio.sleep(300)
        assert phone.peers() == []
        await swarm.add("obs0", port=4000)
        await trio.sleep(1300)
        assert [peer.peer_id for peer in phone.peers()] == [swarm.identity("obs0").peer_id]


async def test_without_a_disk_a_node_lives_on(open_swarm, autojump_clock, caplog):
    memory = Memory()
    memory.is_broken = True
    async with open_swarm() as swarm:
        await swarm.add_observers(1)
        phone = await swarm.add("phone", cache=memory)
        await phone.rejoin()
        await phone.connect(await swarm.nodes["obs0"].invite())
        await trio.sleep(60)
        assert len(phone.peers()) == 1
    assert [each.getMessage() for each in caplog.records if each.name == "natswarm.cache"] == [
        "the disk is gone"
    ]
