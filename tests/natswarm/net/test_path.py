"""Tracing: on the virtual internet, and what a real system refuses."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio

from natswarm.address import Endpoint
from natswarm.errors import DecodeError
from natswarm.nat.behaviour import Filtering, Mapping
from natswarm.nat.path import PathReport
from natswarm.net.path import SystemPaths, _decode_error_untrusted, _load_scapy, trace_path
from natswarm.net.virtual import VirtualNetwork, run_world
from natswarm.sim.link import LinkConditions
from natswarm.sim.nat import NatBehaviour
from natswarm.sim.presets import PRESETS, Ipv6, Preset, Site, Transition
from natswarm.sim.topology import Host, Internet
from natswarm.sim.world import World

STRICT = NatBehaviour(mapping=Mapping.APDM, filtering=Filtering.APDF)
CARRIER = Preset(STRICT, Site.CARRIER, LinkConditions(delay_s=0.025), 2, "test")
SILENT = replace(CARRIER, answers_ttl=False)


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    internet = Internet(World(seed=1))
    async with run_world(internet.world):
        yield internet


def behind(internet: Internet, *kinds: NatBehaviour | Preset | str) -> Host:
    """A host behind NATs, the outermost first."""
    nat = None
    for kind in kinds:
        nat = internet.add_nat(f"nat{len(internet.nats)}", kind, behind=nat)
    return internet.add_host("us", behind=nat)


def peer(internet: Internet, *, answers: bool = False) -> Endpoint:
    port = internet.add_host("peer").open_port(4000)
    if answers:
        port.on_datagram = port.send
    return port.endpoint


def ips(report: PathReport) -> list[str | None]:
    return [hop.ip for hop in report.hops]


@pytest.mark.parametrize(
    ("kinds", "opener_ttl", "nat_count"),
    [
        ((), 1, 0),
        ((STRICT,), 2, 1),
        ((CARRIER,), 4, 1),
        ((CARRIER, STRICT), 5, 2),
        ((CARRIER, STRICT, STRICT), 6, 2),
        ((SILENT, STRICT), 5, 1),
    ],
    ids=["public", "home", "carrier", "double", "triple", "silent carrier"],
)
async def test_an_opener_with_the_limit_found_leaves_our_nats_and_goes_no_further(
    internet: Internet,
    autojump_clock,
    kinds: tuple[NatBehaviour | Preset, ...],
    opener_ttl: int,
    nat_count: int,
):
    us, destination = behind(internet, *kinds), peer(internet, answers=True)
    started = trio.current_time()
    report = await trace_path(VirtualNetwork(us), destination)
    assert trio.current_time() - started < 2
    assert report.reached
    assert report.local_ip == us.ip
    assert (report.opener_ttl, report.nat_count_at_least) == (opener_ttl, nat_count)
    if SILENT not in kinds:
        assert None not in ips(report)
        assert all(hop.rtt_s is not None for hop in report.hops)
    # And so it is: that limit makes a mapping in the outermost NAT, one less makes none.
    for ttl, passes in ((opener_ttl - 1, False), (opener_ttl, True)):
        port, outermost = us.open_port(), next(iter(internet.nats.values()), None)
        if outermost is None:
            break
        before = outermost.nat.counters.mapping_count
        port.send(b"opener", destination, ttl)
        await trio.sleep(1)
        assert (outermost.nat.counters.mapping_count > before) == passes


async def test_a_path_without_losses_is_traced_in_one_round_trip(
    internet: Internet, autojump_clock
):
    us, destination = behind(internet, CARRIER), peer(internet, answers=True)
    started = trio.current_time()
    report = await trace_path(VirtualNetwork(us), destination)
    assert trio.current_time() - started == pytest.approx(2 * (0.025 + 0.010 + 0.002))
    assert internet.counters.sent_count == 16 + 5  # and what the peer answered
    assert report.hops[-1].rtt_s == pytest.approx(2 * (0.025 + 0.010 + 0.002))


async def test_peers_drop_the_usual_probe_and_the_path_shows_all_the_same(
    internet: Internet, autojump_clock
):
    us, destination = behind(internet, STRICT), peer(internet)
    report = await trace_path(VirtualNetwork(us), destination)
    assert not report.reached
    assert len(report.hops) == 9
    assert report.opener_ttl == 2


async def test_a_closed_port_is_the_destination_too(internet: Internet, autojump_clock):
    us, server = behind(internet, STRICT), internet.add_host("server")
    report = await trace_path(VirtualNetwork(us), Endpoint(server.ip, 9))
    assert (report.reached, len(report.hops)) == (True, 10)


async def test_nobody_at_the_destination_ends_the_path_in_the_core(
    internet: Internet, autojump_clock
):
    us = behind(internet, STRICT)
    report = await trace_path(VirtualNetwork(us), Endpoint("203.0.113.99", 9))
    assert not report.reached
    assert len(report.hops) == 10
    assert report.hops[-1].ip == report.hops[-2].ip  # the last router, which knows no further
    assert report.opener_ttl == 2


@pytest.mark.parametrize("seed", range(5))
async def test_lost_answers_are_asked_for_again(autojump_clock, seed: int):
    print(f"seed {seed}")
    internet = Internet(World(seed))
    async with run_world(internet.world):
        us, destination = behind(internet, CARRIER, STRICT), peer(internet, answers=True)
        assert us.nat is not None
        us.nat.uplink.download.conditions = LinkConditions(delay_s=0.025, loss=0.3)
        report = await trace_path(VirtualNetwork(us), destination)
        lost_count = internet.counters.lost_count
    assert lost_count > 0
    answered = [ip for ip in ips(report) if ip is not None]
    assert len(answered) >= 10  # of 13; each is lost three times with probability 0.027
    assert report.nat_count_at_least == 2


@pytest.mark.parametrize(
    ("kinds", "core_answers", "reason"),
    [
        ((SILENT,), False, "no router on the way says"),
        ((SILENT, STRICT), False, "behind 192.168.1.1, hop 1, nobody answers"),
        ((CARRIER,), False, "behind 100.64.0.1, hop 3, nobody answers"),
    ],
)
async def test_silence_is_told_with_its_reason_in_less_than_two_seconds(
    autojump_clock, kinds: tuple[NatBehaviour | Preset, ...], core_answers: bool, reason: str
):
    internet = Internet(World(1), core_answers=core_answers)
    async with run_world(internet.world):
        us, destination = behind(internet, *kinds), peer(internet)
        started = trio.current_time()
        report = await trace_path(VirtualNetwork(us), destination)
        assert trio.current_time() - started == pytest.approx(3 * 0.55)
    assert report.opener_ttl is None
    assert reason in report.reason


async def test_without_a_peer_nobody_is_contacted(internet: Internet, autojump_clock):
    us = behind(internet, STRICT)
    report = await trace_path(VirtualNetwork(us), None)
    assert "no peer" in report.reason
    report = await trace_path(VirtualNetwork(us), Endpoint("3fff::1", 4000))
    assert "IPv6" in report.reason
    assert internet.counters.sent_count == 0


async def test_a_trace_leaves_nothing_behind(internet: Internet, autojump_clock):
    us, destination = behind(internet, SILENT), peer(internet)
    await trace_path(VirtualNetwork(us), destination)
    assert us.ports == {}
    with trio.move_on_after(0.1) as scope:
        await trace_path(VirtualNetwork(us), destination)
    assert scope.cancelled_caught
    assert us.ports == {}


async def test_a_host_without_ipv4_says_so(internet: Internet, autojump_clock):
    ipv6 = Ipv6(transition=Transition.NAT64)
    us = internet.add_host("us", replace(CARRIER, ipv6=ipv6))
    report = await trace_path(VirtualNetwork(us), peer(internet))
    assert "bind" in report.reason


@pytest.mark.parametrize("kind", [k for k, p in PRESETS.items() if p.behaviour is not None])
async def test_every_preset_has_one_nat(internet: Internet, autojump_clock, kind: str):
    us = internet.add_host("us", kind)
    report = await trace_path(VirtualNetwork(us), peer(internet))
    assert report.nat_count_at_least == 1
    assert report.opener_ttl == PRESETS[kind].access_hops + 2


@pytest.mark.skipif(sys.platform != "linux", reason="the error queue is Linux's")
async def test_the_error_queue_tells_of_a_closed_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        destination = Endpoint(*closed.getsockname())
    report = await trace_path(SystemPaths(ip="127.0.0.1"), destination)
    assert report.reached
    assert ips(report) == ["127.0.0.1"]
    assert report.local_ip == "127.0.0.1"
    assert report.opener_ttl is None


@pytest.mark.skipif(sys.platform != "linux", reason="the error queue is Linux's")
async def test_an_answer_by_udp_is_the_destinations():
    server = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await server.bind(("127.0.0.1", 0))

    async def echo() -> None:
        while True:
            data, source = await server.recvfrom(100)
            await server.sendto(data, source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        report = await trace_path(SystemPaths(), Endpoint(*server.getsockname()), payload=b"echo")
        nursery.cancel_scope.cancel()
    server.close()
    assert report.reached
    assert len(report.hops) == 1


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (SystemPaths(ip="203.0.113.77"), "cannot send to"),
        # Without root the reason is the raw socket, with it the address.
        (SystemPaths(ip="203.0.113.77", has_error_queue=False), "; "),
        (SystemPaths(interface="nosuch0"), "nosuch0"),
    ],
)
async def test_an_address_or_interface_that_is_not_there_is_told(paths: SystemPaths, reason: str):
    report = await trace_path(paths, Endpoint("127.0.0.1", 9))
    assert reason in report.reason
    assert report.hops == ()


def icmp_error(icmp_type: int = 11) -> bytes:
    """An ICMP error from 10.0.0.1 about a datagram from port 5000 to 203.0.113.9:4000."""

    def ip(source: str, destination: str, protocol: int) -> bytes:
        addresses = socket.inet_aton(source) + socket.inet_aton(destination)
        return bytes.fromhex("4500003800000000") + bytes([64, protocol, 0, 0]) + addresses

    about = ip("192.168.1.2", "203.0.113.9", 17) + (5000).to_bytes(2, "big") + b"\x0f\xa0\0\x08\0\0"
    return ip("10.0.0.1", "192.168.1.2", 1) + bytes([icmp_type]) + bytes(7) + about


def test_scapy_reads_what_a_datagram_of_ours_ran_into():
    _load_scapy()
    error = _decode_error_untrusted(icmp_error())
    assert error == ("10.0.0.1", 11, Endpoint("203.0.113.9", 4000), 5000)
    assert _decode_error_untrusted(icmp_error(3)).icmp_type == 3
    # macOS has the length of the payload alone there, in its own byte order.
    data = icmp_error()
    assert _decode_error_untrusted(data[:2] + b"\x24\0" + data[4:]) == error


def test_damaged_errors_raise_decode_error_only():
    _load_scapy()
    whole = icmp_error()
    for length in range(len(whole) - 8):
        with pytest.raises(DecodeError):
            _decode_error_untrusted(whole[:length])
    for index in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[index] ^= 1 << bit
            try:
                _decode_error_untrusted(bytes(damaged))
            except DecodeError:
                continue
