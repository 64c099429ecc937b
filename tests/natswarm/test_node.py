"""Whole nodes on the virtual internet: they find out about their NATs, puncture, and talk."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import trio

from natswarm import (
    PRESETS,
    AllocationLaw,
    ConfigurationError,
    ConnectFailed,
    Invite,
    InviteError,
    PeerConnected,
    PeerLost,
    PeerNotFound,
    ProfileLearned,
    PunctureEnded,
    PunctureFailed,
    PunctureStarted,
)
from natswarm.net.dialler import LINGER_S
from natswarm.sim.ports import Blocks, Preserving, Sequential, Uniform

# One preset for each class that puncturing knows.
CLASSES = {
    "public": "public",
    "EIM/EIF": "lyca-nl",
    "EIM/ADF": "vodafone-nl",
    "EIM/APDF": "linux-home",
    "APDM block": "kpn-nl",
    "APDM uniform": "o2-uk-4g",
}
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(CLASSES, 2)
    if pair != ("APDM uniform", "APDM uniform")
]
LAWS = {Preserving: AllocationLaw.PRESERVING, Blocks: AllocationLaw.BLOCK}


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=map(" x ".join, PAIRS))
async def test_every_pair_of_classes_connects(open_swarm, autojump_clock, left, right):
    async with open_swarm(seed=PAIRS.index((left, right))) as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", CLASSES[left])
        b = await swarm.add_inspected("b", CLASSES[right])
        peer = await a.connect(b.peer_id)
        assert peer.peer_id == b.peer_id
        assert peer.puncture.is_ok
        assert peer.record.name == "b"
        await trio.sleep(2)
        await swarm.check_talk("a", "b")
        # Each start of a puncture has its end, and the rest of the story is told, too.
        kinds = [type(event) for event in swarm.events["a"]]
        assert kinds.count(PunctureStarted) == kinds.count(PunctureEnded) >= 3
        assert kinds.count(PeerConnected) == 3
        assert kinds.count(ProfileLearned) == 1
        assert PeerLost not in kinds


async def test_two_uniform_nats_are_refused_with_the_numbers(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "o2-uk-4g")
        b = await swarm.add_inspected("b", "tmobile-us")
        started_at = trio.current_time()
        for one, other in ((a, b), (b, a)):
            with pytest.raises(PunctureFailed, match=r"draw.* from [\d,]+ ports.*probes expected"):
                await one.connect(other.peer_id)
        assert trio.current_time() - started_at < 5


@pytest.mark.parametrize("age_s", [0, 15, 600])
async def test_counters_that_have_moved_on_since_the_last_look(open_swarm, autojump_clock, age_s):
    behaviour = replace(
        PRESETS["orange-bg"].behaviour, allocation=Sequential(cross_traffic_per_s=20.0)
    )
    async with open_swarm(seed=age_s) as swarm:
        await swarm.add_observers()
        b = await swarm.add_inspected("b", behaviour)
        a = await swarm.add_inspected("a", behaviour)
        await trio.sleep(age_s)
        peer = await a.connect(b.peer_id)
        assert peer.puncture.strategy == "sequential-prediction"
        assert peer.puncture.seconds < 5
        reports = [e.report for e in swarm.events["a"] if isinstance(e, PunctureEnded)]
        assert len(reports) == 3  # two observers and b, at the first try


@pytest.mark.parametrize("kind", PRESETS)
async def test_profile_is_what_is_emulated(open_swarm, autojump_clock, kind):
    async with open_swarm(seed=list(PRESETS).index(kind)) as swarm:
        await swarm.add_observers(3)
        node = await swarm.add_inspected("node", kind)
        profile, behaviour = node.profile, PRESETS[kind].behaviour
        if behaviour is None:
            assert profile.is_translated is False
            assert profile.accepts_strangers
            assert profile.main_endpoint.ip == swarm.hosts["node"].ip
            return
        assert profile.is_translated
        assert (profile.mapping, profile.filtering) == (behaviour.mapping, behaviour.filtering)
        assert profile.public_ips == (swarm.hosts["node"].nat.external_ip,)
        law = LAWS.get(type(behaviour.allocation))
        if getattr(behaviour.allocation, "is_sequential", False):
            law = AllocationLaw.SEQUENTIAL
        assert law in (None, profile.allocation.law)
        if isinstance(behaviour.allocation, Uniform):
            # 16 ports in a row may look like less than the whole range, but never small.
            assert profile.allocation.port_count > 8000


async def test_without_anybody_the_interfaces_tell(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        public = await swarm.add("public")
        hidden = await swarm.add("hidden", "kpn-nl")
        assert (await public.inspect()).accepts_strangers
        assert (await hidden.inspect()).is_translated is None
        # Once there is somebody to ask, a profile of nothing is not good enough.
        await hidden.connect(await public.invite())
        assert (await hidden.invite()).record.profile.is_translated


async def test_observers_word_for_their_address_is_not_enough(open_swarm, autojump_clock):
    """A record may name a third party's address; only where a neighbour sees the node counts."""
    async with open_swarm() as swarm:
        first, second = await swarm.add_observers()
        victim = swarm.internet.add_host("victim")
        received = []
        for port in (7000, 7001):
            victim.open_port(port).on_datagram = lambda *datagram: received.append(datagram)
        await second.inspect()
        lie = second.record()
        profile = lie.profile
        sealed = type(lie)(
            lie.peer_id,
            lie.issued_at_s + 1000,
            lie.name,
            type(profile)(
                is_translated=False,
                mapping=profile.mapping,
                public_ips=(victim.ip,),
                main_endpoint=type(profile.main_endpoint)(victim.ip, 7000),
                local_endpoints=(type(profile.main_endpoint)(victim.ip, 7001),),
            ),
            type(profile.main_endpoint)(victim.ip, 7001),
        ).seal(swarm.identity("obs1"))
        second.sealed_record = lambda: sealed
        await second.announce(["lie"])
        assert swarm.peer("obs0", "obs1").record.profile.main_endpoint.ip == victim.ip
        phone = await swarm.add("phone", "kpn-nl")
        await phone.connect(await first.invite())
        await phone.inspect()
        with pytest.raises(ConnectFailed):
            await phone.connect(second.peer_id)
        assert received == []


async def test_find_peers_and_announce(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers(1)
        a = await swarm.add_inspected("a", "linux-home", services=("one",))
        b = await swarm.add_inspected("b", "lyca-nl")
        found = {record.name: record for record in await b.find_peers()}
        assert set(found) == {"obs0", "a"}
        assert found["a"].services == ("one",)
        await a.announce(["two", "three"])
        found = {record.name: record for record in await b.find_peers()}
        assert found["a"].services == ("two", "three")


async def test_a_neighbour_that_has_just_vanished_holds_up_nobody(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "lyca-nl")
        swarm.cut("obs0")  # both know a
        since = trio.current_time()
        found = {record.name for record in await b.find_peers()}
        assert (found, trio.current_time() - since < 4) == ({"obs0", "obs1", "a"}, True)


# Invites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds",
    [("linux-home", "vodafone-nl"), ("vodafone-nl", "kpn-nl"), ("kpn-nl", "kpn-nl")],
    ids=["EIM x EIM", "EIM x block", "block x block"],
)
async def test_invites_on_both_sides_need_no_introducer(open_swarm, autojump_clock, kinds):
    async with open_swarm(seed=3) as swarm:
        await swarm.add_observers()
        nodes = [await swarm.add_inspected(n, kind) for n, kind in zip("ab", kinds, strict=True)]
        invites = [await node.invite() for node in nodes]
        for name in ("obs0", "obs1"):
            await swarm.stop(name)
        await trio.sleep(1)
        assert nodes[0].peers() == nodes[1].peers() == []
        for _ in range(2):  # the second time at once after the first
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes[0].connect, Invite.parse(str(invites[1])))
                await trio.sleep(2)
                nursery.start_soon(nodes[1].connect, Invite.parse(str(invites[0])))
            await swarm.check_talk("a", "b")
            await swarm.peer("a", "b").aclose()
            await trio.sleep(0.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["public", "linux-home"])
async def test_invites_on_both_sides_where_one_takes_strangers(
    open_swarm, autojump_clock, seed, kind
):
    async with open_swarm(seed=seed) as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "lyca-nl")
        b = await swarm.add_inspected("b", kind)
        invites = await a.invite(), await b.invite()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, invites[1])
            nursery.start_soon(b.connect, invites[0])
        await trio.sleep(1)
        await swarm.check_talk("a", "b")


async def test_an_invite_that_nobody_else_dials_ends_in_words(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "linux-home")
        with pytest.raises(PunctureFailed, match="nothing from the peer"):
            await a.connect(await b.invite())
        assert swarm.port_count("a") == 2


async def test_the_second_try_is_gentle(open_swarm, autojump_clock):
    """The peer's cable is cut during the first try; the next one is for NATs that need care."""
    plans = []
    mend = None

    async with open_swarm() as swarm:
        await swarm.add_observers()
        await swarm.add_inspected("b", "linux-home")

        def watch(event) -> None:
            nonlocal mend
            if isinstance(event, PunctureStarted) and event.peer_id == b.peer_id:
                plans.append(event.plan)
                if len(plans) == 1:
                    mend = swarm.cut("b")
            elif isinstance(event, PunctureEnded) and mend is not None:
                mend()

        b = swarm.nodes["b"]
        a = await swarm.add_inspected("a", "linux-home", on_event=watch)
        assert await a.connect(b.peer_id)
    first, second = plans
    assert first.checks_ttl is None
    assert second.checks_ttl is not None


async def test_an_invite_without_a_profile_is_refused_in_words(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        a = await swarm.add("a", "kpn-nl")
        b = await swarm.add("b", "kpn-nl")
        with pytest.raises(PunctureFailed):
            await a.connect(await b.invite())


# Who is there -------------------------------------------------------------------------------------


async def test_a_one_time_invite_is_for_one_guest(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        host, first, second = [await swarm.add(name) for name in ("host", "first", "second")]
        invite = Invite.parse(str(await host.invite(is_one_time=True)))
        assert await first.connect(invite)
        with pytest.raises(InviteError, match="used up"):
            await second.connect(invite)
        assert second.peers() == []
        await trio.sleep(1)
        assert [peer.peer_id for peer in host.peers()] == [first.peer_id]
        # The guest may come again, and others by another invite.
        await swarm.peer("first", "host").aclose()
        assert await first.connect(invite)
        assert await second.connect(await host.invite())


async def test_an_expired_invite_is_refused_before_anything_is_sent(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        host = await swarm.add("host")
        late = await swarm.add("late", utc=lambda: time.time() + 8 * 86_400)
        with pytest.raises(InviteError, match="expired"):
            await late.connect(await host.invite())
        assert swarm.events["late"] == []
        with pytest.raises(InviteError, match="holds for a second"):
            await host.invite(lifetime_s=0)


async def test_the_invite_of_a_node_that_met_nobody_leads_to_its_own_addresses(
    open_swarm, autojump_clock
):
    async with open_swarm() as swarm:
        house = swarm.internet.add_nat("house", "linux-home")
        for name in ("a", "b", "c"):
            swarm.hosts[name] = swarm.internet.add_host(name, behind=house)
        a, b, c = [await swarm.add(name) for name in ("a", "b", "c")]
        invite = await a.invite()
        assert not invite.record.profile.accepts_strangers
        for node in (b, c):
            await node.connect(invite)
        # In one house nobody knows a public address, and nobody needs one.
        assert await b.connect(c.peer_id)


async def test_a_public_node_stays_open_to_strangers_when_nobody_could_test_it(
    open_swarm, autojump_clock
):
    async with open_swarm() as swarm:
        hub = await swarm.add("hub")
        first = await swarm.add("first")
        await hub.connect(await first.invite())
        profile = await hub.inspect()  # `first` has no other neighbour who could send a datagram
        assert profile.echo_count > 0
        assert profile.filtering is None
        assert profile.accepts_strangers
        newcomer = await swarm.add("newcomer", "kpn-nl")
        assert await newcomer.connect(await hub.invite())


async def test_a_node_does_not_connect_to_itself(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        node = await swarm.add("node")
        for target in (node.peer_id, await node.invite()):
            with pytest.raises(ConnectFailed, match="itself"):
                await node.connect(target)


async def test_the_wrong_peer_at_the_right_address_stays_silent(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        right = await swarm.add("right")
        other = await swarm.add("other", "linux-home")
        await right.inspect()
        forged = replace(right.record(), peer_id=swarm.identity("nobody").peer_id)
        with pytest.raises(PunctureFailed, match="nothing from the peer"):
            await other.connect(Invite.of(forged, swarm.identity("nobody")))
        assert right.peers() == []


async def test_an_unknown_peer_is_not_found(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        lonely = await swarm.add("lonely")
        node = await swarm.add_inspected("node", "kpn-nl")
        for each, count in ((lonely, 0), (node, 2)):
            with pytest.raises(PeerNotFound, match=f"none of our {count} neighbours"):
                await each.connect(swarm.identity("nobody").peer_id)


async def test_callers_at_once_get_one_peer(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "kpn-nl")
        peers = []

        async def connect() -> None:
            peers.append(await a.connect(b.peer_id))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(connect)
        assert len(set(peers)) == 1
        assert await a.connect(b.peer_id) is peers[0]


KINDS = ["public", "lyca-nl", "vodafone-nl", "linux-home", "kpn-nl"]


@pytest.mark.parametrize("seed", range(24))
async def test_both_sides_at_once_get_the_one_path(open_swarm, autojump_clock, seed):
    async with open_swarm(seed=seed) as swarm:
        observers = await swarm.add_observers()
        rng = swarm.internet.world.rng
        await swarm.add_inspected("a", rng.choice(KINDS))
        await swarm.add_inspected("b", rng.choice(KINDS))
        if seed % 3 == 0:  # the two sides are introduced by different neighbours
            for name, observer in zip("ab", observers, strict=True):
                await swarm.peer(name, f"obs{'ab'.index(name)}").aclose()
                await trio.sleep(1)
                await swarm.nodes[name].connect(observer.peer_id)
        returned = {}

        async def connect(of: str, to: str, delay_s: float) -> None:
            await trio.sleep(delay_s)
            returned[of] = await swarm.nodes[of].connect(swarm.nodes[to].peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, "a", "b", rng.choice([0, 0, rng.uniform(0, 1.5)]))
            nursery.start_soon(connect, "b", "a", rng.choice([0, 0, rng.uniform(0, 1.5)]))
        await trio.sleep(10)
        await swarm.check_talk("a", "b")
        assert returned["a"] is swarm.peer("a", "b")
        assert returned["b"] is swarm.peer("b", "a")
        connected = [e for e in swarm.events["a"] if isinstance(e, PeerConnected)]
        assert sum(e.peer.peer_id == swarm.nodes["b"].peer_id for e in connected) == 1


@pytest.mark.parametrize("seed", range(8))
async def test_two_public_nodes_dial_each_other_at_once(open_swarm, autojump_clock, seed):
    async with open_swarm(seed=seed) as swarm:
        a, b = await swarm.add("a"), await swarm.add("b")
        invites = await a.invite(), await b.invite()
        delay_s = swarm.internet.world.rng.choice([0, 0.005, 0.02, 0.05])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, invites[1])
            await trio.sleep(delay_s)
            nursery.start_soon(b.connect, invites[0])
        await trio.sleep(5)
        await swarm.check_talk("a", "b")


# Coming and going ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by_invite", [False, True], ids=["introduced", "invited"])
@pytest.mark.parametrize("kind", ["public", "lyca-nl", "kpn-nl"])
async def test_a_restarted_peer_takes_the_place_of_its_ghost(
    open_swarm, autojump_clock, kind, by_invite
):
    async with open_swarm(seed=len(kind)) as swarm:
        observer = (await swarm.add_observers())[0]  # two: a third peer shows who lets in all
        port = 5000 if kind == "public" else 0
        a = await swarm.add_inspected("a", "lyca-nl")
        b = await swarm.add_inspected("b", kind, port=port)
        await b.connect(await a.invite() if by_invite else a.peer_id)
        await trio.sleep(1)
        ghost = swarm.peer("a", "b")
        await swarm.crash("b")
        b = await swarm.add("b", port=port)  # the same identity, host and (if public) endpoint
        await b.connect(await observer.invite())
        await b.connect(await a.invite() if by_invite else a.peer_id)
        await trio.sleep(1)
        await swarm.check_talk("a", "b")
        assert ghost.is_lost
        await trio.sleep(60)  # whatever the ghost left behind does no harm later
        await swarm.check_talk("a", "b")
        lost = [e.peer for e in swarm.events["a"] if isinstance(e, PeerLost)]
        assert ghost in lost
        assert len(lost) == 1


async def test_connecting_again_right_after_closing(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        a, b = await swarm.add("a"), await swarm.add("b")
        for _ in range(3):
            peer = await a.connect(await b.invite())
            await swarm.check_talk("a", "b")
            await peer.aclose()
            assert a.peers() == []


async def test_leaving_closes_every_port_and_says_goodbye(open_swarm, autojump_clock):
    async with open_swarm(seed=6) as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "kpn-nl")
        b = await swarm.add_inspected("b", "linux-home")
        await a.connect(b.peer_id)
        assert swarm.port_count("a") == 3  # the path of a birthday puncture has its own
        await trio.sleep(1)
        peer = swarm.peer("b", "a")
        await swarm.stop("a")
        assert swarm.port_count("a") == 0
        with trio.fail_after(1):
            await peer.wait_lost()
        await trio.sleep(LINGER_S)
        assert [p.record.name for p in b.peers()] == ["obs0", "obs1"]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2, 0.4, 1.0])
async def test_a_node_that_closes_ends_connects_of_other_tasks(open_swarm, autojump_clock, after_s):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "o2-uk-4g")
        b = await swarm.add_inspected("b", "kpn-nl")

        async def connect() -> None:
            with pytest.raises(ConnectFailed):
                await a.connect(b.peer_id)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
                await trio.sleep(after_s)
                await swarm.stop("a")
                assert swarm.port_count("a") == 0
        with pytest.raises(ConnectFailed):
            await a.connect(swarm.identity("nobody").peer_id)
        assert swarm.port_count("a") == 0


@pytest.mark.parametrize("kind", ["kpn-nl", "public"])
async def test_cancelling_connect_anywhere_leaves_nothing(open_swarm, autojump_clock, kind):
    async with open_swarm(seed=4) as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", kind)
        tasks = set()
        for step in range(40):
            with trio.move_on_after(0.025 * step) as scope:
                await a.connect(b.peer_id)
            assert swarm.port_count("a") == 2 if scope.cancelled_caught else True
            await trio.sleep(30)
            assert all(peer.record for peer in a.peers()), "whoever stayed has shared its record"
            for peer in a.peers()[2:] + b.peers()[2:]:
                await peer.aclose()
            await trio.sleep(30)
            assert a._dialler._dials == b._dialler._dials == {}
            assert a._connector._wishes == b._connector._wishes == {}
            assert swarm.port_count("a") == swarm.port_count("b") == 2
            tasks.add(len(a._nursery.child_tasks))
        assert len(tasks) == 1
        assert await a.connect(b.peer_id)


# What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"bind_ip": "192.0.2.77"}, {"services": ("x" * 129,)}, {"services": ("x",) * 17}],
)
async def test_bad_configuration_is_said_at_once(open_swarm, autojump_clock, config):
    async with open_swarm() as swarm:
        with pytest.raises(ConfigurationError):
            await swarm.add("node", **config)
        assert swarm.port_count("node") == 0


async def test_announcing_too_much_is_refused_at_once(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        node = await swarm.add("node")
        with pytest.raises(ConfigurationError, match="services"):
            await node.announce(["bell\a"])
        assert node.record().services == ()
