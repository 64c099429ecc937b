"""Nodes among liars, floods, bad links and bad handlers: clear errors, counted drops, no hang."""

from __future__ import annotations

import logging
import random

import pytest
import trio

from natswarm import (
    ConfigurationError,
    ConnectFailed,
    Endpoint,
    PunctureEnded,
    PunctureFailed,
    RequestRefused,
    VirtualNetwork,
)
from natswarm.discovery.introduction import Introduced
from natswarm.message import Refusal
from natswarm.net import connector
from natswarm.net.message_stream import MessageStream
from natswarm.wire import EchoRequest, Hello

# Introducers that lie -----------------------------------------------------------------------------


def lies(swarm, victim: Endpoint):
    """What a lying introducer says; each a handler of `natswarm/introduce/1`."""

    async def wrong_record(stream, _peer):
        record = swarm.nodes["obs1"].sealed_record()
        await MessageStream(stream).send(Introduced(record, "198.51.100.9:9"))

    async def wrong_address(stream, _peer):
        record = swarm.nodes["b"].sealed_record()
        await MessageStream(stream).send(Introduced(record, str(victim)))

    async def no_address(stream, _peer):
        record = swarm.nodes["b"].sealed_record()
        await MessageStream(stream).send(Introduced(record, "not an address"))

    async def garbage(stream, _peer):
        await stream.send_all(random.Random(swarm.seed).randbytes(2000))

    async def refusal(stream, _peer):
        await MessageStream(stream).send(Refusal("no\x1b[31m" * 1000, "what\n" * 1000))

    async def stalls(_stream, _peer):
        await trio.sleep_forever()

    async def drops(_stream, _peer):
        return

    async def says_it_is_connecting(stream, _peer):
        await MessageStream(stream).send(Refusal("busy", "already-connecting"))

    return locals()


LIES = [
    "wrong_record",
    "wrong_address",
    "no_address",
    "garbage",
    "refusal",
    "stalls",
    "drops",
    "says_it_is_connecting",
]


@pytest.mark.parametrize("lie", LIES)
async def test_an_introducer_that_lies_costs_time_and_no_more(open_swarm, autojump_clock, lie):
    async with open_swarm(seed=LIES.index(lie)) as swarm:
        liar = await swarm.add("obs0")
        await swarm.add("obs1")
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "vodafone-nl")
        victim = Endpoint(swarm.internet.add_host("victim").ip, 4000)
        liar.serve("natswarm/introduce/1", lies(swarm, victim)[lie])
        # With an honest neighbour beside it, it does not keep us from the peer.
        with trio.fail_after(60):
            peer = await a.connect(b.peer_id)
        await swarm.check_talk("a", "b")
        await peer.aclose()
        await trio.sleep(1)
        # Alone it does, and we say why in words that are fit to print.
        await swarm.peer("a", "obs1").aclose()
        with trio.fail_after(120), pytest.raises(ConnectFailed) as caught:
            await a.connect(b.peer_id)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
        assert swarm.port_count("a") == 2


async def test_a_neighbour_is_asked_for_echoes_only_to_where_it_sees_us(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers(3)
        a = await swarm.add_inspected("a", "linux-home")
        victim = swarm.internet.add_host("victim").open_port(4000)
        received = []
        victim.on_datagram = lambda *datagram: received.append(datagram)
        with pytest.raises(RequestRefused, match="not at"):
            await a._introducer.ask_neighbour_to_echo(
                swarm.peer("a", "obs0"), b"8 bytes.", victim.endpoint
            )
        await trio.sleep(1)
        assert received == []


async def test_a_neighbour_cannot_make_us_flood_somebody(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        node = (await swarm.add_observers(1))[0]
        received = []
        victim = swarm.internet.add_host("victim").open_port(4000)
        victim.on_datagram = lambda *datagram: received.append(datagram)
        for _ in range(1000):
            node.send_unsolicited_echo(b"8 bytes.", victim.endpoint)
        await trio.sleep(1)
        assert len(received) <= 20


async def test_nobody_is_introduced_in_the_name_of_another(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers(1)
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "linux-home")
        a.sealed_record = b.sealed_record
        with pytest.raises(ConnectFailed, match="only itself"):
            await a.connect(b.peer_id)


async def test_introductions_without_end_are_bounded(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        target = await swarm.add_inspected("target", "linux-home")
        refusals = 0
        for index in range(connector.INTRODUCED_DIALS_MAX + 4):
            identity = swarm.identity(f"ghost{index}")
            record = type(target.record())(identity.peer_id, 0.0, "", target.record().profile)
            for _ in range(3):
                try:
                    await target.start_rendezvous(
                        record,
                        Endpoint("198.51.100.200", 5000),
                        random.Random(refusals + index).randbytes(8),
                        swarm.identity("obs0").peer_id,
                    )
                except ConnectFailed:
                    refusals += 1
        assert refusals >= 4
        assert len(target._dialler.under_way()) == connector.INTRODUCED_DIALS_MAX
        await trio.sleep(60)
        assert target._dialler._dials == {}


# Floods -------------------------------------------------------------------------------------------


async def test_floods_change_nothing_but_counters(open_swarm, autojump_clock):
    async with open_swarm(seed=11) as swarm:
        node = (await swarm.add_observers(1))[0]
        recorded = []
        host = swarm.hosts["obs0"]
        swarm.internet.world.trace = lambda _now, event, where, packet: (
            recorded.append((packet.data, packet.destination.port))
            if event == "received" and where == "obs0"
            else None
        )
        await swarm.add_inspected("a", "linux-home")
        swarm.internet.world.trace = None
        before = node.peers()
        rng = random.Random(11)
        attacker = swarm.internet.add_host("attacker")
        answered = []
        source = attacker.open_port(6000)
        source.on_datagram = lambda data, _: answered.append(len(data))
        sent_bytes = 0
        stranger = swarm.identity("stranger")
        for round_index in range(30):
            datagrams = [rng.randbytes(rng.randrange(1, 200)) for _ in range(30)]
            datagrams += [bytes([first]) + rng.randbytes(138) for first in range(16)]
            datagrams += [data for data, _ in rng.sample(recorded, 20)]
            datagrams += [
                Hello(rng.randbytes(8), stranger.peer_id, target).encode(stranger)
                for target in (node.peer_id, stranger.peer_id)
                for _ in range(10)
            ]
            broken = bytearray(EchoRequest(b"8 bytes.", stranger.peer_id).encode(stranger))
            broken[round_index] ^= 1
            datagrams.append(bytes(broken))
            for data in datagrams:
                sent_bytes += len(data)
                for port in list(host.ports):
                    source.send(data, Endpoint(host.ip, port))
            await trio.sleep(0.3)
            assert len(node._dialler._dials) <= connector.STRANGER_DIALS_MAX + 1
        assert node.peers() == before
        assert len(node._identity._probe_keys) <= 1024
        assert sum(answered) <= sent_bytes  # nobody is amplified at
        await swarm.check_talk("obs0", "a")
        # A newcomer gets through even now, and in the end nothing is left.
        await swarm.add("late", "vodafone-nl")
        await swarm.nodes["late"].connect(await node.invite())
        await trio.sleep(60)
        assert node._dialler._dials == {}
        assert set(host.ports) == {
            node.local_endpoint.port,
            node._alternate.port.local_endpoint.port,
        }


async def test_a_newcomer_gets_in_during_a_flood_of_knocks(open_swarm, autojump_clock):
    async with open_swarm(seed=12) as swarm:
        node = (await swarm.add_observers(1))[0]
        late = await swarm.add("late", "linux-home")
        invite = await node.invite()
        # One address would not get its knocks looked at.
        attackers = [swarm.internet.add_host(f"attacker{i}").open_port(6000) for i in range(4)]
        rng = random.Random(12)

        async def flood() -> None:
            for index in range(400):
                stranger = swarm.identity(str(index))
                hello = Hello(rng.randbytes(8), stranger.peer_id, node.peer_id)
                attackers[index % 4].send(
                    hello.encode(stranger), invite.record.profile.main_endpoint
                )
                await trio.sleep(1 / 40)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await trio.sleep(3)
            assert len(node._dialler._dials) == connector.STRANGER_DIALS_MAX
            await late.connect(invite)
            nursery.cancel_scope.cancel()


async def test_peers_are_bounded(open_swarm, autojump_clock, monkeypatch):
    monkeypatch.setattr("natswarm.node.node.PEERS_MAX", 2)
    async with open_swarm() as swarm:
        full = (await swarm.add_observers(1))[0]
        invite = await full.invite()
        for name in "ab":
            await (await swarm.add(name)).connect(invite)
        late = await swarm.add("late")
        with pytest.raises(PunctureFailed):
            await late.connect(invite)
        with pytest.raises(ConnectFailed, match="at most 2 peers"):
            await full.connect(await late.invite())
        await trio.sleep(30)
        assert late.peers() == []
        await swarm.peer("a", "obs0").aclose()
        await trio.sleep(1)
        await late.connect(invite)


# Bad links and peers that die ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_ten_percent_loss(open_swarm, autojump_clock, seed):
    kinds = ["linux-home", "vodafone-nl", "kpn-nl", "lyca-nl"]
    async with open_swarm(seed=seed) as swarm:
        await swarm.add_observers()
        for name in "ab":
            swarm.hosts[name] = swarm.internet.add_host(name, random.Random(seed).choice(kinds))
        swarm.worsen(0.1)
        a = await swarm.add_inspected("a")
        b = await swarm.add_inspected("b")
        with trio.fail_after(60):
            await a.connect(b.peer_id)
        await trio.sleep(5)
        await swarm.check_talk("a", "b")


@pytest.mark.parametrize("after_s", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["linux-home", "kpn-nl"])
async def test_a_peer_that_dies_while_we_connect(open_swarm, autojump_clock, kind, after_s):
    async with open_swarm(seed=5) as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", kind)

        async def die() -> None:
            await trio.sleep(after_s)
            swarm.cut("b")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            with trio.fail_after(150):
                try:
                    peer = await a.connect(b.peer_id)
                except ConnectFailed:
                    assert swarm.port_count("a") == 2
                    return
        with trio.fail_after(75):  # it got through; then the loss is noticed, and outwaited
            await peer.wait_lost()
        assert a.peers()[2:] == []


async def test_a_peer_that_dies_mid_stream(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        a = await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b", "kpn-nl")
        peer = await a.connect(b.peer_id)

        async def stall(stream, _peer):
            await stream.send_all(b"half a mess")
            await trio.sleep_forever()

        b.serve("stall", stall)
        messages = await peer.open_messages("stall")
        swarm.cut("b")
        with trio.fail_after(75), pytest.raises(trio.BrokenResourceError):
            await messages.receive(Refusal)
        with pytest.raises(trio.BrokenResourceError):
            await peer.open_stream("stall")
        with trio.fail_after(60), pytest.raises(ConnectFailed):
            await a.connect(b.peer_id)


# Bad handlers -------------------------------------------------------------------------------------


class Bug(Exception):
    """A mistake in a user's code."""


@pytest.mark.parametrize(
    ("error", "is_bug"),
    [
        (Bug("boom"), True),
        (ExceptionGroup("several", [Bug("boom"), ConnectFailed("no")]), True),
        (ConnectFailed("no"), False),
        (trio.BrokenResourceError("gone"), False),
        (trio.ClosedResourceError("closed"), False),
        (ExceptionGroup("several", [trio.BrokenResourceError()]), False),
    ],
    ids=["bug", "group", "natswarm", "broken", "closed", "expected-group"],
)
async def test_what_a_handler_raises_stays_with_its_stream(
    open_swarm, autojump_clock, caplog, error, is_bug
):
    caplog.set_level(logging.WARNING, "natswarm")
    async with open_swarm() as swarm:
        await swarm.add_observers(2)

        async def fail(stream, _peer):
            await stream.send_all(b"part of it")
            raise error

        swarm.nodes["obs0"].serve("fail", fail)
        stream = await swarm.peer("obs1", "obs0").open_stream("fail")
        with pytest.raises(trio.BrokenResourceError):  # not a clean end: it was cut off
            [chunk async for chunk in stream]
        await stream.aclose()
        await swarm.check_talk("obs1", "obs0")
    assert [record.exc_info is not None for record in caplog.records] == [True] * is_bug
    assert ("boom" in caplog.text) is is_bug


async def test_an_unknown_protocol_is_refused(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers(2)
        stream = await swarm.peer("obs1", "obs0").open_stream("unheard/of")
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()


async def test_an_observer_of_events_that_fails_is_logged(open_swarm, autojump_clock, caplog):
    def on_event(_event):
        raise Bug("in on_event")

    async with open_swarm() as swarm:
        await swarm.add_observers(1)
        await swarm.add_inspected("a", "linux-home", on_event=on_event)
        await swarm.check_talk("a", "obs0")
    assert "in on_event" in caplog.text
    caplog.clear()


class StingyNetwork(VirtualNetwork):
    """A system that gives no groups of ports."""

    def bind_group(self, ip, count):
        raise ConfigurationError(f"{count} ports asked for, 0 were free")


async def test_a_system_without_ports_is_a_plain_error(open_swarm, autojump_clock):
    async with open_swarm() as swarm:
        await swarm.add_observers()
        host = swarm.hosts["b"] = swarm.internet.add_host("b", "kpn-nl")
        await swarm.add_inspected("a", "linux-home")
        b = await swarm.add_inspected("b")
        b._dialler._network = StingyNetwork(host)
        with pytest.raises(ConfigurationError, match="0 were free"):
            await b.connect(swarm.nodes["a"].peer_id)
        ended = [e.report for e in swarm.events["b"] if isinstance(e, PunctureEnded)]
        assert not ended[-1].is_ok
        assert "0 were free" in ended[-1].reason
        b._echo._network = StingyNetwork(host)
        # An inspection ends with what it has.
        await b.inspect()
        assert b.inspection is not None
        assert "0 were free" in b.inspection.unknown["mapping"]
