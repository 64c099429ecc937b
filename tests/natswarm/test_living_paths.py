"""Connections outlive their paths: NATs that end mappings, networks left, routers rebooted."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import replace

import pytest
import trio

from natswarm import PRESETS, PathChanged, PeerLost, ProfileLearned
from natswarm.cli.show import event_as_json, event_as_text
from natswarm.sim.ports import Sequential
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
        assert 1 <= len(outages) <= 3, "two deaths tell it; one more may come before they are known"
        late = [at for at in transfer.arrivals if at > transfer.arrivals[0] + 90]
        # A death is noticed after some 4 s; what a lost packet costs by chance is less.
        assert max(b - a for a, b in itertools.pairwise(late)) < 3.0


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
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 15
        for name in movers:
            assert swarm.nodes[name].profile.public_ips == (swarm.hosts[name].nat.external_ip,)
        await swarm.check_talk("a", "b")


@pytest.mark.parametrize("kind", ["linux-home", "vodafone-nl", "kpn-nl"])
async def test_a_transfer_outlives_a_reboot_of_the_router(open_swarm, autojump_clock, kind):
    async with open_swarm(seed=6) as swarm:
        await add_pair(swarm, kind, "lebara-nl")
        transfer = Transfer(swarm, seconds=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            swarm.hosts["a"].nat.reboot()
            nursery.cancel_scope.deadline = trio.current_time() + 60
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 10


def counter() -> Preset:
    """A carrier that counts; 35 others take a step each second."""
    preset = PRESETS["orange-bg"]
    allocation = Sequential(cross_traffic_per_s=35.0)
    return replace(preset, behaviour=replace(preset.behaviour, allocation=allocation))


async def test_a_transfer_outlives_roaming_between_counters(open_swarm, autojump_clock):
    """What is known of them ages in seconds, so both sides look right before the puncture."""
    async with open_swarm(seed=5) as swarm:
        await add_pair(swarm, counter(), counter())
        transfer = Transfer(swarm, seconds=30)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            swarm.hosts["a"].move(swarm.internet.add_nat("other", counter()))
            nursery.cancel_scope.deadline = trio.current_time() + 60
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 8


async def test_what_is_known_of_a_counter_is_new(open_swarm, autojump_clock):
    async with open_swarm(seed=5) as swarm:
        await swarm.add_observers()
        for name, kind, looks in (("a", counter(), 1), ("b", "kpn-nl", 0)):
            node = await swarm.add_inspected(name, kind)
            await trio.sleep(30)
            swarm.events[name].clear()
            for _ in range(2):
                await node.current_profile()
                learned = [e for e in swarm.events[name] if isinstance(e, ProfileLearned)]
                assert len(learned) == looks


async def test_a_reboot_in_the_middle_of_a_puncture_costs_seconds(open_swarm, autojump_clock):
    """Neither side knows that what it goes by is void; and the one moves on before it does."""
    async with open_swarm(seed=7) as swarm:
        await add_pair(swarm, "kpn-nl", "kpn-nl")
        transfer = Transfer(swarm, seconds=30)
        nats = [swarm.hosts["a"].nat, swarm.internet.add_nat("other", "kpn-nl")]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            swarm.hosts["a"].move(nats[1])
            await trio.sleep(2)
            swarm.hosts["b"].nat.reboot()
            await trio.sleep(2.5)
            swarm.hosts["a"].move(nats[0])
            nursery.cancel_scope.deadline = trio.current_time() + 60
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 12


async def test_roaming_without_neighbours_reaches_a_public_peer(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        public = await swarm.add("b")
        a = await swarm.add("a", "linux-home")
        await a.connect(await public.invite())
        transfer = Transfer(swarm, seconds=20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            move(swarm, "a", "o2-uk-4g")
            nursery.cancel_scope.deadline = trio.current_time() + 60
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        check_survived(swarm)
        assert transfer.longest_gap_s < 4  # 2 s until it is noticed, and QUIC's own time


async def test_two_roam_again_and_again(open_swarm, autojump_clock):
    async with open_swarm(seed=8) as swarm:
        await add_pair(swarm, "linux-home", "vodafone-nl")
        transfer = Transfer(swarm, seconds=90)
        kinds = ["kpn-nl", "linux-home", "lebara-nl"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            for index, name in enumerate("abaabb"):
                await trio.sleep(12)
                nat = swarm.internet.add_nat(f"{name}{index}", kinds[index % 3])
                swarm.hosts[name].move(nat)
            nursery.cancel_scope.deadline = trio.current_time() + 90
        transfer.check()
        check_survived(swarm)
        await swarm.check_talk("b", "a")


@pytest.mark.parametrize(
    ("carriers", "receiver"),
    [
        (("telia-no", "linux-home"), "linux-home"),
        (("kpn-nl", "vodafone-nl"), "linux-home"),
        (("orange-bg", "telia-no"), "lebara-nl"),
        (("linux-home", "lyca-bg"), "kpn-nl"),
    ],
)
async def test_whoever_moves_every_five_seconds_gets_something_through_each_time(
    open_swarm, autojump_clock, carriers, receiver
):
    """A phone between two networks; both carriers give it the same private addresses."""
    async with open_swarm(seed=14) as swarm:
        await add_pair(swarm, carriers[0], receiver)
        transfer = Transfer(swarm, seconds=40)
        nats = [swarm.hosts["a"].nat, swarm.internet.add_nat("other", carriers[1])]
        stays = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            for index in range(8):
                await trio.sleep(5)
                stays.append(transfer.received_bytes)
                swarm.hosts["a"].move(nats[(index + 1) % 2])
            nursery.cancel_scope.deadline = trio.current_time() + 30
        print(f"longest gap {transfer.longest_gap_s:.1f} s")
        transfer.check()
        await trio.sleep(1)  # the last bytes may come before the answer that proves their path
        check_survived(swarm)
        assert all(after > before for before, after in itertools.pairwise(stays)), stays


# Silence ------------------------------------------------------------------------------------------


async def test_idle_connections_stay_by_the_measured_lifetime(open_swarm, autojump_clock):
    """A NAT that forgets after 8 s, known to; half an hour of silence costs nothing but probes."""
    preset = PRESETS["kpn-nl"]
    behaviour = replace(preset.behaviour, unreplied_lifetime_s=8.0, replied_lifetime_s=8.0)
    async with open_swarm(seed=2) as swarm:
        await swarm.add_observers()
        for name in "ab":
            node = await swarm.add_inspected(name, replace(preset, behaviour=behaviour))
            node.adopt_profile(replace(node.profile, idle_lifetime_s=8.0))
        await swarm.nodes["a"].connect(swarm.nodes["b"].peer_id)
        await trio.sleep(30)
        before = swarm.internet.counters.sent_count
        await trio.sleep(1800)
        packets = swarm.internet.counters.sent_count - before
        print(f"{packets / 1800:.2f} packets/s for 6 connections")
        check_survived(swarm)
        assert switches(swarm, "a", "b") == switches(swarm, "b", "a") == []
        assert packets < 6 * 1800 / (0.7 * 8) * 4.5
        await swarm.check_talk("a", "b")


async def test_an_idle_lifetime_that_nobody_knew_of_is_learned(open_swarm, autojump_clock):
    preset = PRESETS["kpn-nl"]
    behaviour = replace(preset.behaviour, unreplied_lifetime_s=12.0, replied_lifetime_s=12.0)
    async with open_swarm(seed=2) as swarm:
        await add_pair(swarm, replace(preset, behaviour=behaviour), "kpn-nl")
        await trio.sleep(120)
        count = len(switches(swarm, "a", "b"))
        assert 1 <= count <= 4
        await trio.sleep(600)
        assert len(switches(swarm, "a", "b")) == count, "it is known by now"
        check_survived(swarm)
        await swarm.check_talk("a", "b")


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
async def test_a_dead_path_is_noticed(open_swarm, autojump_clock, busy):
    """Within 3 s while something is sent; at rest within the keepalive interval and 2 s."""
    async with open_swarm(seed=4) as swarm:
        await add_pair(swarm, "linux-home", "kpn-nl")
        await trio.sleep(30)
        async with trio.open_nursery() as nursery:
            if busy:
                nursery.start_soon(Transfer(swarm).run)
            await trio.sleep(5)
            swarm.cut("b")
            cut_at = trio.current_time()
            with trio.fail_after(3.2 if busy else 22.5):
                while swarm.peer("a", "b").is_reachable:  # noqa: ASYNC110 - looks as users do
                    await trio.sleep(0.05)
            print(f"noticed after {trio.current_time() - cut_at:.2f} s")
            nursery.cancel_scope.cancel()
        assert switches(swarm, "a", "b")[-1].new is None
        # The connection waits for a way back, and is given up after the outage that is allowed.
        lost = swarm.peer("a", "b")
        with trio.fail_after(61):
            await lost.wait_lost()
        assert trio.current_time() - cut_at >= 60


@pytest.mark.parametrize("minutes", [0.5, 8])
async def test_a_phone_sleeps_and_wakes(open_swarm, autojump_clock, minutes):
    """Radio off, mappings gone; the connection and its stream go on where they stopped."""
    async with open_swarm(seed=9) as swarm:
        await add_pair(swarm, "kpn-nl", "linux-home", outage_s=600.0)
        transfer = Transfer(swarm, seconds=20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer.run)
            await trio.sleep(10)
            wake = swarm.cut("a")
            await trio.sleep(60 * minutes)
            wake()
            woke_at = trio.current_time()
            nursery.cancel_scope.deadline = woke_at + 60
        transfer.check()
        check_survived(swarm)
        resumed_at = min(at for at in transfer.arrivals if at > woke_at)
        print(f"goes on {resumed_at - woke_at:.1f} s after waking")
        assert resumed_at - woke_at < 25


# Strangers and leftovers --------------------------------------------------------------------------


async def test_who_records_and_forges_moves_nobody(open_swarm, autojump_clock):
    async with open_swarm(seed=10) as swarm:
        recorded = []
        swarm.internet.world.trace = lambda _now, event, _where, packet: (
            recorded.append(packet) if event == "sent" and packet.data[:1] == b"\x07" else None
        )
        await add_pair(swarm, "linux-home", "lyca-nl")
        await trio.sleep(40)
        swarm.internet.world.trace = None
        attacker = swarm.internet.add_host("attacker").open_port(6000)
        answers = []
        attacker.on_datagram = lambda data, _: answers.append(data)
        rng = random.Random(swarm.seed)
        before = [swarm.peer("b", name).seen_at for name in ("a", "obs0", "obs1")]
        targets = {packet.destination for packet in recorded}
        for packet in recorded:
            broken = bytearray(packet.data)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            for target in targets:
                attacker.send(packet.data, target)
                attacker.send(bytes(broken), target)
            await trio.sleep(0.01)
        await trio.sleep(5)
        assert [swarm.peer("b", name).seen_at for name in ("a", "obs0", "obs1")] == before
        assert answers == []
        for name in ("a", "b", "obs0", "obs1"):
            assert not [e for e in swarm.events[name] if isinstance(e, PathChanged)]
        await swarm.check_talk("a", "b")


async def test_nothing_is_left_of_paths_that_ended(open_swarm, autojump_clock):
    async with open_swarm(seed=11) as swarm:
        await add_pair(swarm, ageing("linux-home"), ageing("kpn-nl"))
        await trio.sleep(200)
        tasks = {name: len(swarm.nodes[name]._nursery.child_tasks) for name in "ab"}
        await trio.sleep(200)
        for name in "ab":
            node = swarm.nodes[name]
            # Main and alternate port, and for each of three connections at most three paths and the
            # port of the next one.
            assert swarm.port_count(name) <= 2 + 3 * 4
            assert len(node._nursery.child_tasks) <= tasks[name] + 6
            assert len(node._dialler._dials) <= 3
            for peer in node.peers():
                await peer.aclose()
        await trio.sleep(10)
        for name in "ab":
            assert swarm.port_count(name) == 2
            assert swarm.nodes[name]._dialler._dials == {}
            assert swarm.nodes[name]._dialler._path_sets == {}


async def test_a_peer_that_has_forgotten_us_is_given_up(open_swarm, autojump_clock):
    """It was restarted and takes part in punctures, but has no end of our connection any more."""
    async with open_swarm(seed=12) as swarm:
        await add_pair(swarm, "linux-home", "vodafone-nl")
        ghost = swarm.peer("a", "b")
        await swarm.crash("b")
        await swarm.add_inspected("b")
        with trio.fail_after(90):
            await ghost.wait_lost()
        assert await swarm.nodes["a"].connect(swarm.identity("b").peer_id) is not ghost
        await swarm.check_talk("a", "b")


async def test_what_is_told_of_paths_can_be_shown(open_swarm, autojump_clock):
    async with open_swarm(seed=13) as swarm:
        await add_pair(swarm, "linux-home", "lyca-nl")
        mend = swarm.cut("b")
        await trio.sleep(30)
        mend()
        await trio.sleep(10)
        gone, back = switches(swarm, "a", "b")
        endpoint = str(swarm.peer("a", "b").seen_at)
        assert event_as_json(gone) == {
            "event": "path",
            "peer_id": str(swarm.identity("b").peer_id),
            "old": endpoint,
            "new": None,
            "reason": "it fell silent",
        }
        assert event_as_json(back)["new"] == endpoint
        assert "no path" in event_as_text(gone)
        assert endpoint in event_as_text(back)
