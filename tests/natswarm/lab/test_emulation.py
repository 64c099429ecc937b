"""The emulated part of a lab, without a lab: descriptors of any kind stand for TUN devices."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.lab.emulation import LabInternet, TunPort, add_host
from natswarm.lab.fragments import split_packet
from natswarm.lab.ipv4 import decode_packet_untrusted, encode_packet
from natswarm.lab.settings import LabPlan, LabSettings, make_plan
from natswarm.net.virtual import run_world
from natswarm.sim.host import Host
from natswarm.sim.packet import ICMP, TIME_EXCEEDED, Packet


def plan(*devices: str, **settings: Any) -> LabPlan:
    return make_plan(LabSettings(name="lab", devices=devices, nat="emulated", **settings))


def hosts(plan: LabPlan) -> tuple[LabInternet, list[Host]]:
    internet = LabInternet(plan)
    return internet, [add_host(internet, device)[0] for device in plan.devices]


class Device:
    """A namespace's side of a TUN device."""

    def __init__(self, host: Host) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self._theirs.setblocking(False)
        self._ours = ours
        self.host = host
        self.port = TunPort(ours.fileno(), host)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def send(self, datagram: bytes) -> None:
        self._theirs.send(datagram)

    async def receive(self) -> tuple[Packet, int]:
        await trio.lowlevel.wait_readable(self._theirs)
        return decode_packet_untrusted(self._theirs.recv(2000))

    async def receive_raw(self) -> bytes:
        await trio.lowlevel.wait_readable(self._theirs)
        return self._theirs.recv(2000)


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    _, made = hosts(plan("a=lyca-nl", "s=public", delay="1ms"))
    both = [Device(host) for host in made]
    yield both
    for device in both:
        device.close()


def datagram(source: Host, destination: Endpoint, data: bytes, ttl: int = 64) -> bytes:
    return encode_packet(Packet(Endpoint(source.ip, 4000), destination, data), ttl)


async def test_packets_pass_both_ways(devices: list[Device]):
    a, s = devices
    server = Endpoint(s.host.ip, 53)
    async with run_world(a.host.internet.world), trio.open_nursery() as nursery:
        for device in devices:
            nursery.start_soon(device.port.run)
        a.send(datagram(a.host, server, b"question"))
        packet, ttl = await s.receive()
        assert (packet.destination, packet.data) == (server, b"question")
        assert packet.source.ip == a.host.internet.nats["a/1"].external_ip
        assert ttl == 64 - 2 - 1 - 8
        s.send(encode_packet(Packet(server, packet.source, b"answer"), 64))
        packet, _ = await a.receive()
        assert packet == Packet(server, Endpoint(a.host.ip, 4000), b"answer")
        a.send(datagram(a.host, server, b"dies", 1))
        error, _ = await a.receive()
        assert (error.protocol, error.data[:2]) == (ICMP, TIME_EXCEEDED)
        nursery.cancel_scope.cancel()
    assert (a.port.counters.sent_count, a.port.counters.received_count) == (2, 2)


async def test_what_is_not_sound_is_counted_and_nothing_more(devices: list[Device]):
    a, s = devices
    server = Endpoint(s.host.ip, 53)
    sound = datagram(a.host, server, b"sound")
    async with run_world(a.host.internet.world), trio.open_nursery() as nursery:
        for device in devices:
            nursery.start_soon(device.port.run)
        a.send(b"\x60" + bytes(39))
        a.send(b"E")
        a.send(sound[:-1] + b"!")
        a.send(datagram(s.host, server, b"somebody else's address"))
        a.send(sound)
        packet, _ = await s.receive()
        assert packet.data == b"sound"
        nursery.cancel_scope.cancel()
    assert a.port.refused == {
        "not IPv4": 1,
        "too short for IPv4": 1,
        "wrong checksum of UDP": 1,
        "a source address that is not the device's": 1,
    }


async def test_long_datagrams_come_in_fragments(devices: list[Device]):
    a, s = devices
    data = bytes(range(256)) * 20
    whole = datagram(a.host, Endpoint(s.host.ip, 53), data)
    async with run_world(a.host.internet.world), trio.open_nursery() as nursery:
        for device in devices:
            nursery.start_soon(device.port.run)
        for piece in split_packet(whole, 1500, 7):
            a.send(piece)
        pieces = [await s.receive_raw() for _ in range(4)]
        assert b"".join(piece[20:] for piece in pieces)[8:] == data
        nursery.cancel_scope.cancel()


def arrivals(count: int, *, gap_s: float = 0.001, size: int = 100, **core: Any) -> list[float]:
    """Send datagrams from a public host to another; return when those that arrive do."""
    internet, (sender, receiver) = hosts(plan("a=public", "b=public", **core))
    port = receiver.open_port(53)
    world, times = internet.world, []
    port.on_datagram = lambda data, source: times.append(world.now)
    out = sender.open_port(4000)
    for index in range(count):
        world.at(index * gap_s, out.send, bytes(size), port.endpoint)
    world.run()
    assert internet.counters.delivered_count + internet.counters.lost_count == count
    return times


def test_the_core_delays():
    assert arrivals(1, delay="25ms") == [pytest.approx(0.002 + 0.025 + 0.002)]


def test_the_core_loses_a_share():
    # 3,000 of 10,000: five standard deviations are 229.
    assert 6771 < len(arrivals(10_000, loss="30%")) < 7229


def test_the_core_s_jitter_keeps_order():
    times = arrivals(500, delay="10ms", jitter="20ms")
    assert times == sorted(times)
    late = [time - 0.014 - index * 0.001 for index, time in enumerate(times)]
    # Whoever comes behind a late one is late, too, so few are early.
    assert 0 <= min(late) < 0.012
    assert 0.018 < max(late) <= 0.0201


def test_the_core_s_rate_spaces_and_its_queue_drops():
    # 128 bytes with headers take 1.024 ms at 1 Mbit/s; 20 fit into the queue, half of one to spare.
    times = arrivals(100, gap_s=0.0, delay="0", rate="1mbit", queue="2600b")
    assert len(times) == 20
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == pytest.approx([0.001024] * 19)


def test_a_rate_is_each_address_s_own():
    internet, (one, other, receiver) = hosts(
        plan("a=public", "b=public", "c=public", rate="1mbit", queue="2600b")
    )
    port, seen = receiver.open_port(53), []
    port.on_datagram = lambda data, source: seen.append(source.ip)
    for host in (one, other):
        out = host.open_port(4000)
        for _ in range(20):
            out.send(bytes(100), port.endpoint)
    internet.world.run()
    assert seen.count(one.ip) == seen.count(other.ip) == 20
