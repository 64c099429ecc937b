"""The pump sorts by first byte and source, keeps order, and no bytes can stop it."""

from __future__ import annotations

import random

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.net.port import Arrival, MergedArrival, PortStatistics
from natswarm.net.pump import PortPump
from natswarm.net.udp import UdpNetwork

HERE = Endpoint("192.0.2.1", 1)
PEER = Endpoint("192.0.2.2", 2)
OTHER = Endpoint("192.0.2.3", 3)


class ScriptedPort:
    """A port that receives the batches of a script and is closed then."""

    def __init__(self, batches):
        self._batches = list(batches)
        self.local_endpoint = HERE
        self.statistics = PortStatistics()

    async def receive_merged(self):
        await trio.lowlevel.checkpoint()
        if not self._batches:
            raise trio.ClosedResourceError
        return [MergedArrival(*(*arrival, 0)[:3]) for arrival in self._batches.pop(0)]

    def send(self, data, destination, *, ttl=None):
        raise AssertionError("a pump sends nothing")

    def send_run(self, datagrams, destination):
        raise AssertionError("a pump sends nothing")

    def close(self):
        pass


async def test_sorts_by_first_byte_and_source():
    batch = [
        Arrival(b"\x40one", PEER),
        Arrival(b"\x07probe", OTHER),
        Arrival(b"\xc0two", PEER),
        Arrival(b"\x40three", OTHER),
        Arrival(b"\x04echo", PEER),
        Arrival(b"", PEER),
        Arrival(b"\x00stun", PEER),
        Arrival(b"\x10", PEER),
        Arrival(b"\x80", PEER),
        Arrival(b"\xffthree", PEER),
    ]
    natswarm, from_peer = [], []
    pump = PortPump(
        ScriptedPort([batch, [Arrival(b"\x40four", PEER)]]), lambda *a: natswarm.append(a)
    )
    pump.attach(PEER, from_peer.append)
    await pump.run()
    assert natswarm == [(b"\x07probe", OTHER), (b"\x04echo", PEER)]
    assert from_peer == [[b"\x40one", b"\xc0two", b"\xffthree"], [b"\x40four"]]
    statistics = pump.statistics()
    assert statistics.quic_count == 4
    assert statistics.natswarm_count == 2
    assert statistics.stray_quic_count == 1
    assert statistics.unknown_count == 4


async def test_takes_apart_what_the_system_merged():
    """A probe may have the size of the last packet of a run, and be merged with it."""
    quic = [b"\x40one", b"\xc0two", b"\x40six", b"\x40t"]
    merged = b"".join([*quic[:2], b"\x07msg", *quic[2:]])
    batch = [MergedArrival(merged, PEER, 4), MergedArrival(b"".join(quic), PEER, 4)]
    natswarm, from_peer = [], []
    pump = PortPump(ScriptedPort([batch]), lambda *a: natswarm.append(a))
    pump.attach(PEER, from_peer.append)
    await pump.run()
    assert from_peer == [quic + quic]
    assert natswarm == [(b"\x07msg", PEER)]
    assert pump.statistics().quic_count == 8


async def test_receivers_come_and_go_while_it_runs():
    received = []

    def on_datagram(data, source):
        # A probe that makes the path, in the same batch as the peer's first QUIC datagram.
        pump.attach(source, receive)

    def receive(datagrams):
        received.append(datagrams)
        pump.detach(PEER)
        pump.detach(PEER)

    batches = [
        [Arrival(b"\x40early", PEER), Arrival(b"\x07", PEER)],
        [Arrival(b"\x40late", PEER)],
    ]
    pump = PortPump(ScriptedPort(batches), on_datagram)
    await pump.run()
    assert received == [[b"\x40early"]]
    assert pump.statistics().stray_quic_count == 1


async def test_one_endpoint_has_one_receiver():
    pump = PortPump(ScriptedPort([]), lambda *_: None)
    pump.attach(PEER, lambda _: None)
    with pytest.raises(ValueError, match="already"):
        pump.attach(PEER, lambda _: None)
    pump.detach(PEER)
    pump.attach(PEER, lambda _: None)


async def test_no_bytes_stop_it():
    rng = random.Random(1)
    batches = [
        [Arrival(rng.randbytes(rng.randrange(40)), rng.choice([PEER, OTHER])) for _ in range(50)]
        for _ in range(100)
    ]
    seen = []
    pump = PortPump(ScriptedPort(batches), lambda data, _: seen.append(data))
    pump.attach(PEER, seen.extend)
    await pump.run()
    statistics = pump.statistics()
    assert len(seen) == statistics.quic_count + statistics.natswarm_count
    assert len(seen) + statistics.stray_quic_count + statistics.unknown_count == 5000


async def test_on_a_real_port_it_ends_with_the_port():
    network = UdpNetwork()
    port, other = (network.bind(Endpoint("127.0.0.1", 0)) for _ in range(2))
    arrived = trio.Event()
    pump = PortPump(port, lambda data, source: arrived.set())
    assert pump.port is port
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.run)
        other.send(b"\x07", port.local_endpoint)
        await arrived.wait()
        port.close()
    other.close()
