"""Connections outlive their paths: NATs that end mappings, networks left, routers rebooted."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import replace

import pytest
import trio

from natswarm import PRESETS, PathChanged, PeerLost
from natswarm.sim.presets import Preset

TRANSFER_S = 60
CHUNK_BYTES = 2000
CHUNK_INTERVAL_S = 0.1


def ageing(kind: str, age_s: float = 20.0) -> Preset:
    """A preset whose NAT ends every mapping at this age, whatever its traffic."""
    preset = PRESETS[kind]
    behaviour = replace(preset.behaviour, absolute_lifetime_s=(age_s, age_s))
    return replace(preset, behaviour=behaviour)


async def add_pair(swarm, left, right, *, knows_lifetime=True, **config):
    """Start two observers and two nodes that know their NATs, and connect the two."""
    await swarm.add_observers()
    for name, kind in (("a", left), ("b", right)):
        node = await swarm.add_inspected(name, kind, **config)
        behaviour = kind.behaviour if isinstance(kind, Preset) else None
        if knows_lifetime and behaviour is not None and behaviour.absolute_lifetime_s:
            age_s = behaviour.absolute_lifetime_s[0]
            node.adopt_profile(replace(node.profile, absolute_lifetime_s=age_s))
    peer = await swarm.nodes["a"].connect(swarm.identity("b").peer_id)
    await peer.wait_introduced()
    return peer


class Transfer:
    """A paced transfer from one node to another, and what became of it."""

    def __init__(self, swarm, of="a", to="b", seconds=TRANSFER_S):
        self._swarm, self._of, self._to = swarm, of, to
        self._chunk_count = round(seconds / CHUNK_INTERVAL_S)
        self._rng = random.Random(swarm.seed)
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self.sent_bytes = self.received_bytes = 0
        self.arrivals = []

    async def run(self):
        done = trio.Event()

        async def receive(stream, _peer):
            async for data in stream:
                self._received.update(data)
                self.received_bytes += len(data)
                self.arrivals.append(trio.current_time())
            done.set()

        self._swarm.nodes[self._to].serve("test/transfer", receive)
        peer = self._swarm.peer(self._of, self._to)
        stream = await peer.open_stream("test/transfer")
        for _ in range(self._chunk_count):
            data = self._rng.randbytes(CHUNK_BYTES)
            self._sent.update(data)
            self.sent_bytes += len(data)
            await stream.send_all(data)
            await trio.sleep(CHUNK_INTERVAL_S)
        await stream.send_eof()
        await done.wait()
        await stream.aclose()

    def check(self):
        assert self.sent_bytes == self.received_bytes == self._chunk_count * CHUNK_BYTES
        assert self._sent.digest() == self._received.digest()

    @property
    def longest_gap_s(self):
        return max(after - before for before, after in itertools.pairwise(self.arrivals))


def switches(swarm, of, to):
    """What a node told of its paths to another."""
    peer_id = swarm.identity(to).peer_id
    return [
        event
        for event in swarm.events[of]
        if isinstance(event, PathChanged) and event.peer.peer_id == peer_id
    ]


def check_survived(swarm):
    for name, other in (("a", "b"), ("b", "a")):
        lost = [e for e in swarm.events[name] if isinstance(e, PeerLost)]
        assert not lost, f"{name} lost {lost}"
        assert swarm.peer(name, other).is_reachable


# Lifetimes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("linux-home", "linux-home"),
        ("linux-home", "kpn-nl"),
        ("vodafone-nl", "lebara-nl"),
        ("kpn-nl", "kpn-nl"),
        ("vodafone-nl", "public"),
    ],
)
async def test_a_transfer_outlives_the_mappings_of_both_sides(
    open_swarm, autojump_clock, left, right
):
    """A lifetime of 20 s on both sides: 60 s of a stream come over whole, and never stop."""
    async with open_swarm(seed=7) as swarm:
        right = right if right == "public" else ageing(right)
        await add_pair(swarm, ageing(left), right)
        transfer = Transfer(swarm)
        with trio.fail_after(TRANSFER_S + 10):
            await transfer.run()
        transfer.check()
        check_survived(swarm)
        told = switches(swarm, "a", "b")
        assert len(told) >= 3
        assert all(event.new is not None for event in told), "it was never without a path"
        assert transfer.longest_gap_s < 1.0


async def test_a_lifetime_that_nobody_knew_of_is_learned(open_swarm, autojump_clock):
    """Two paths die at the same age; the third is renewed in time."""
    async with open_swarm(seed=3) as swarm:
        await add_pair(swarm, ageing("linux-home"), ageing("kpn-nl"), knows_lifetime=False)
        transfer = Transfer(swarm, seconds=150)
        with trio.fail_after(170):
            await transfer.run()
        transfer.check()
        check_survived(swarm)
        outages = [event for event in switches(swarm, "b", "a") if event.new is None]
        assert 1 <= len(outages) <= 3
        late = [at for at in transfer.arrivals if at > transfer.arrivals[0] + 90]
        assert max(b - a for a, b in itertools.pairwise(late)) < 1.0


# Roaming ------------------------------------------------------------------------------------------


def move(swarm, name, kind):
    """Carry a host to a network of its own of another kind."""
    nat = swarm.internet.add_nat(f"{name}-{kind}", kind)
    swarm.hosts[name].move(nat)


@pytest.mark.parametrize("movers", ["a", "b", "ab"])
@pytest.mark.parametrize(
    ("before", "after"), [("linux-home", "kpn-nl"), ("kpn-nl", "linux-home")], ids=["out", "home"]
)
async def test_a_transfer_outlives_roaming(open_swarm, autojump_clock, movers, before, after):
    async with open_swarm(seed=5) as swarm:
        await add_pair(swarm, before, before)
        transfer = Transfer(swarm, seconds=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            for name in movers:
                move(swarm, name, after)
            moved_at = trio.current_time()
            nursery.cancel_scope.deadline = moved_at + 60
        print(movers, before, "gap", round(transfer.longest_gap_s, 2))
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 15
        for name in movers:
            assert swarm.nodes[name].profile.public_ips == (swarm.hosts[name].nat.external_ip,)
        await swarm.check_talk("a", "b")
